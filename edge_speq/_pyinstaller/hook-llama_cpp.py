"""Libraries are loaded by path from llama_cpp/lib, and the header of the C ABI is parsed at run time. Backend modules
that lie there (libggml-cuda.so, ...) come along; what they need of a driver must be on the user's machine."""

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs

binaries = collect_dynamic_libs("llama_cpp", search_patterns=["*.so", "*.so.*", "*.dylib", "*.dll"])
datas = collect_data_files("llama_cpp", includes=["include/*.h"])
# an application that uses LlamaHFTokenizer imports transformers itself; for all others torch would come along
excludedimports = ["llama_cpp.server", "transformers"]
