#!/usr/bin/env bash
# On a GPU machine without a compiler or a network: the GPU tests, the demo and the step times.
#
#     tools/device_run.sh CARRY OUT [tests] [beside] [demo] [steps] [transfer] [soak] [memcheck]
#
# CARRY: see device_setup.sh.
set -euo pipefail
carry=$(realpath "$1") out=$(realpath "$2")
shift 2
. "$(dirname "$0")/device_setup.sh"
inflated() { # Qwen3-30B-A3B's shape, once
    [ -e "$work/inflated.gguf" ] || python3 tools/inflate_model.py "$work/inflated.gguf" --layers 12
}
cd "$here"
python3 -m edge_speq --version
for what in "$@"; do
    echo "== $what"
    case $what in
        tests) python3 -m pytest -o addopts=--import-mode=importlib tests/test_gpu.py tests/test_gpu_own_draft.py -rA -p no:cacheprovider 2>&1 | tee "$out/gpu_tests.log" | grep -E "NMSE|texts part|passed|failed|Error" ;;
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
            "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 9 python3 -m edge_speq run -n 12 --resident 1/4 --draft-tokens 2 \
                --json 2>&1 | tee "$out/memcheck.log" | tail -3
            ;;
    esac
done
