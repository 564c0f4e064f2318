"""Build ggml's CUDA backend as a module that the CPU wheel of native/ loads.

    python .github/cuda_module.py 86 --out dist   # for compute capability 8.6

Needs the CUDA toolkit, cmake, ninja and patch-ng. Writes libggml-cuda.so and a README.txt that states the llama.cpp
commit, the GPU generation and the driver that the module needs. The module works only with a wheel of the same commit.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NATIVE = Path(__file__).resolve().parent.parent / "native"
sys.path.insert(0, str(NATIVE))

from _build import source  # noqa: E402
from _build.patches import apply_patches  # noqa: E402
from _build.upstream import Upstream  # noqa: E402

# CUDA 12 runs on the first driver of its major version, but GPUs that are newer than that driver need their own.
CUDA_12, BLACKWELL = "525.60.13", "570.26"
GPUS = {
    "75": ("Turing (GeForce RTX 20, T4)", CUDA_12),
    "80": ("Ampere (A100)", CUDA_12),
    "86": ("Ampere (GeForce RTX 30, A10)", CUDA_12),
    "89": ("Ada Lovelace (GeForce RTX 40, L4, L40)", CUDA_12),
    "90": ("Hopper (H100, H200)", CUDA_12),
    "100": ("Blackwell (B200)", BLACKWELL),
    "120": ("Blackwell (GeForce RTX 50)", BLACKWELL),
}
README = """\
ggml's CUDA backend for edge_speq, compute capability {capability}
GPUs:      {gpus}
llama.cpp: {commit}
Driver:    NVIDIA {driver} or newer (Linux)
Libraries: CUDA 12 runtime and cuBLAS: pip install nvidia-cuda-runtime-cu12 nvidia-cublas-cu12

Put libggml-cuda.so into the folder llama_cpp/lib of the installed wheel, or set EDGE_SPEQ_BACKENDS to its path.
`edge-speq doctor` then lists the GPU.
"""


def options(capability: str) -> list[str]:
    """Return the CMake options. No PTX (-real): an older driver could not compile it."""
    pip_libraries = "$ORIGIN;$ORIGIN/../../nvidia/cublas/lib;$ORIGIN/../../nvidia/cuda_runtime/lib"
    return [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        "-DGGML_BACKEND_DL=ON",
        "-DGGML_NATIVE=OFF",
        "-DGGML_CUDA=ON",
        "-DGGML_CUDA_GRAPHS=ON",
        "-DGGML_CUDA_NCCL=OFF",
        "-DLLAMA_CURL=OFF",
        *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP", "MTMD")),
        f"-DCMAKE_CUDA_ARCHITECTURES={capability}-real",
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
        f"-DCMAKE_INSTALL_RPATH={pip_libraries}",
    ]


def build(capability: str, out: Path, upstream: Upstream) -> None:
    with tempfile.TemporaryDirectory(prefix="edge-speq-cuda-") as work:
        tree = source.unpack(source.identify(upstream).path or source.fetch(upstream), Path(work))
        apply_patches([NATIVE / "patches" / name for name in upstream.patches], tree)
        # Not its ggml folder alone: the sdist lacks ggml.pc.in, which only a build of ggml itself reads.
        llama_cpp, folder = tree / "vendor" / "llama.cpp", Path(work) / "build"
        subprocess.run(["cmake", "-G", "Ninja", "-S", llama_cpp, "-B", folder, *options(capability)], check=True)
        subprocess.run(["cmake", "--build", folder, "--target", "ggml-cuda"], check=True)
        (module,) = folder.rglob("libggml-cuda.so")
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, out)
    gpus, driver = GPUS[capability]
    text = README.format(capability=capability, gpus=gpus, commit=upstream.llama_cpp_commit, driver=driver)
    (out / "README.txt").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", choices=GPUS, help="compute capability of the GPU, without the dot")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("dist"))
    arguments = parser.parse_args()
    build(arguments.capability, arguments.out, Upstream.load(NATIVE / "upstream.toml"))


if __name__ == "__main__":
    main()
