"""Collect the native libraries in llama_cpp/lib, which are loaded by path, and the C header parsed at run time.

Backend libraries in that folder (libggml-cuda.so, ...) are included; their drivers must be on the user's machine.
"""

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs

binaries = collect_dynamic_libs("llama_cpp", search_patterns=["*.so", "*.so.*", "*.dylib", "*.dll"])
datas = collect_data_files("llama_cpp", includes=["include/*.h"])
# applications with LlamaHFTokenizer import transformers themselves; in all others it would only add torch
excludedimports = ["llama_cpp.server", "transformers"]
