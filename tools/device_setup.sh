# Sourced with $carry set: unpacks what a GPU machine without a compiler or a network needs, once, and points Python at it.
#
# $carry holds site.tar.xz (site/ with the unpacked native wheel, built with GGML_NATIVE=OFF), wheels/ (cffi, pycparser, diskcache,
# gguf for the Python there) and the backend module, libggml-cuda.so or its libggml-cuda.so.xz.* parts; without one it is a CPU run.
# With libggml-cuda-graphs.so (cuda_graphs.sh) the module's kernels are launched as CUDA graphs, as llama.cpp's own builds do.
# Sets $here (the repository), $work, PYTHONPATH, EDGE_SPEQ_BACKENDS and LD_LIBRARY_PATH.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${EDGE_SPEQ_WORK:-/tmp/edge_speq_device}
mkdir -p "$work/backends"
if [ ! -e "$work/ready" ]; then
    tar -C "$work" -xJf "$carry/site.tar.xz"
    if [ -e "$carry/libggml-cuda.so" ]; then
        cp "$carry/libggml-cuda.so" "$work/backends/"
    elif compgen -G "$carry/libggml-cuda.so.xz.*" >/dev/null; then
        cat "$carry"/libggml-cuda.so.xz.* | xz -d >"$work/backends/libggml-cuda.so"
    fi
    if [ -e "$carry/libggml-cuda-graphs.so" ]; then
        mkdir -p "$work/backends/kernels"
        mv "$work/backends/libggml-cuda.so" "$work/backends/kernels/libggml-cuda-kernels.so"
        cp "$carry/libggml-cuda-graphs.so" "$work/backends/libggml-cuda.so"
    fi
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$work/wheels" "$carry"/wheels/*.whl
    touch "$work/ready"
fi
export PYTHONPATH="$here:$work/site:$work/wheels" PYTHONUNBUFFERED=1
if [ -e "$work/backends/libggml-cuda.so" ]; then
    export EDGE_SPEQ_BACKENDS="$work/backends"
fi
cuda=$(
    python3 - <<'PY'
import glob, sysconfig
roots = [sysconfig.get_paths()["purelib"] + "/nvidia/*/lib", "/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib"]
print(":".join(path for root in roots for path in sorted(glob.glob(root))))
PY
)
export LD_LIBRARY_PATH="$work/site/llama_cpp/lib:$cuda:${LD_LIBRARY_PATH:-}"
