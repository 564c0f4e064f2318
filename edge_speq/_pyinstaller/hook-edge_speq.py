"""The JSON schemas and the bundled models lie beside the modules; the engine's process is named by no import."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("edge_speq", includes=["models/*.gguf", "schema/*.json", "data/*"])
hiddenimports = [
    "edge_speq.session.subprocess.child",
    "edge_speq.session.subprocess.remote",
    "edge_speq.engine.llama",
    "edge_speq.session.in_process",
    "edge_speq.session.session",
]
