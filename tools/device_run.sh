#!/usr/bin/env bash
# On a GPU machine without a compiler or a network: the GPU tests, the demo and the step times.
#
#     tools/device_run.sh CARRY OUT [tests] [beside] [demo] [steps] [transfer] [soak] [memcheck]
#
# CARRY holds site.tar.xz (site/ with the unpacked native wheel, built with GGML_NATIVE=OFF), wheels/ (cffi, pycparser, diskcache,
# gguf for the Python there) and the backend module, libggml-cuda.so or its libggml-cuda.so.xz.* parts.
set -euo pipefail
carry=$(realpath "$1") out=$(realpath "$2")
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
work=/tmp/edge_speq_device
mkdir -p "$work/backends"
if [ ! -e "$work/ready" ]; then
    tar -C "$work" -xJf "$carry/site.tar.xz"
    if [ -e "$carry/libggml-cuda.so" ]; then
        cp "$carry/libggml-cuda.so" "$work/backends/"
    else
        cat "$carry"/libggml-cuda.so.xz.* | xz -d >"$work/backends/libggml-cuda.so"
    fi
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$work/wheels" "$carry"/wheels/*.whl
    touch "$work/ready"
fi
export PYTHONPATH="$here:$work/site:$work/wheels" PYTHONUNBUFFERED=1
export EDGE_SPEQ_BACKENDS="$work/backends"
cuda=$(python3 - <<'PY'
import glob, sysconfig
roots = [sysconfig.get_paths()["purelib"] + "/nvidia/*/lib", "/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib"]
print(":".join(path for root in roots for path in sorted(glob.glob(root))))
PY
)
export LD_LIBRARY_PATH="$work/site/llama_cpp/lib:$cuda:${LD_LIBRARY_PATH:-}"
inflated() { # Qwen3-30B-A3B's shape, once
    [ -e "$work/inflated.gguf" ] || python3 tools/inflate_model.py "$work/inflated.gguf" --layers 12
}
cd "$here"
python3 -m edge_speq --version
for what in "$@"; do
    echo "== $what"
    case $what in
        tests) python3 -m pytest -o addopts=--import-mode=importlib tests/test_gpu.py -rA -p no:cacheprovider 2>&1 | tee "$out/gpu_tests.log" | grep -E "NMSE|texts part|passed|failed|Error" ;;
        beside) # the module beside the libraries rather than named
            cp "$work/backends/libggml-cuda.so" "$work/site/llama_cpp/lib/"
            EDGE_SPEQ_BACKENDS="" python3 -m edge_speq --version
            rm "$work/site/llama_cpp/lib/libggml-cuda.so"
            ;;
        demo)
            python3 -m edge_speq run -n 96 | tee "$out/demo.txt"
            python3 -m edge_speq run -n 96 --json >"$out/demo.json"
            python3 -m edge_speq run -n 96 --policy all
            ;;
        steps)
            python3 tools/step_times.py models/tales-moe.gguf --threads 2,8,16 -o "$out/steps_tales.json"
            inflated
            python3 tools/step_times.py "$work/inflated.gguf" --threads 8,16 -o "$out/steps_inflated.json"
            ;;
        transfer)
            inflated
            python3 tools/transfer_speed.py "$work/inflated.gguf" -o "$out/transfer_inflated.json"
            python3 tools/transfer_speed.py models/tales-moe.gguf -o "$out/transfer_tales.json"
            ;;
        soak) python3 tools/soak.py --generations 1200 --every 100 --json "$out/soak.json" | tail -12 ;;
        memcheck)
            sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer | head -1)
            "$sanitizer" --tool memcheck --error-exitcode 9 python3 -m edge_speq run -n 12 --resident 1/4 --speculation 2 \
                --json 2>&1 | tee "$out/memcheck.log" | tail -3
            ;;
    esac
done
