"""Collect the data files of edge_speq, and the modules of the engine subprocess, which no import statement names."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("edge_speq", includes=["models/*.gguf", "schema/*.json", "data/*"])
hiddenimports = [
    "edge_speq.session.subprocess.child",
    "edge_speq.session.subprocess.remote",
    "edge_speq.engine.llama",
    "edge_speq.session.in_process",
    "edge_speq.session.session",
]
