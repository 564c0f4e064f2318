"""The JSON schemas and the bundled models lie beside the modules; the engine's process is named by no import."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("edge_speq", includes=["models/*.gguf", "schema/*.json", "bench/data/*"])
hiddenimports = [
    "edge_speq.isolation.child",
    "edge_speq.isolation.remote",
    "edge_speq.llama",
    "edge_speq.local",
    "edge_speq.session",
]
