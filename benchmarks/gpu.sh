#!/usr/bin/env bash
# On a GPU machine without a compiler or a network: GPU tests and entries, within a time limit.
#
#     benchmarks/gpu.sh CARRY OUT MINUTES [tests] [demo] [memcheck] [ENTRY...]
#
# CARRY holds site.tar.xz (site/ with the unpacked native wheel, built with GGML_NATIVE=OFF), wheels/ (what pip needs for the Python
# there) and the backend module: libggml-cuda.so, or its parts libggml-cuda.so.xz.*. Without a module it is a CPU run.
# OUT gets the JSON of entries (each share or cell as soon as it is measured; the same command goes on from there) and run.log.
# EDGE_SPEQ_WORK: a folder for what is unpacked and for models.
set -euo pipefail
deadline=$(($(date +%s) + $3 * 60))
carry=$(realpath "$1") out=$(realpath "$2")
shift 3
work=${EDGE_SPEQ_WORK:-/tmp/edge_speq_gpu}
cd "$(dirname "$0")/.."
mkdir -p "$work/backends"
if [ ! -e "$work/ready" ]; then
    tar -C "$work" -xJf "$carry/site.tar.xz"
    if [ -e "$carry/libggml-cuda.so" ]; then
        cp "$carry/libggml-cuda.so" "$work/backends/"
    elif compgen -G "$carry/libggml-cuda.so.xz.*" >/dev/null; then
        cat "$carry"/libggml-cuda.so.xz.* | xz -d >"$work/backends/libggml-cuda.so"
    fi
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$work/wheels" "$carry"/wheels/*.whl
    touch "$work/ready"
fi
export PYTHONPATH="$PWD:$work/site:$work/wheels" PYTHONUNBUFFERED=1
[ ! -e "$work/backends/libggml-cuda.so" ] || export EDGE_SPEQ_BACKENDS="$work/backends"
cuda=$(python3 -c '
import glob, sysconfig
roots = [sysconfig.get_paths()["purelib"] + "/nvidia/*/lib", "/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib"]
print(":".join(path for root in roots for path in sorted(glob.glob(root))))
')
export LD_LIBRARY_PATH="$work/site/llama_cpp/lib:$cuda:${LD_LIBRARY_PATH:-}"

say() { echo "[$((deadline - $(date +%s))) s left] $*" | tee -a "$out/run.log"; }
tests() {
    python3 -m pytest -o addopts=--import-mode=importlib $(python3 -c '
from pathlib import Path
print(*sorted(map(str, Path("tests").rglob("test_gpu*.py"))))
') -rA -p no:cacheprovider 2>&1 | tee "$out/gpu_tests.log" | grep -E "NMSE|texts part|passed|failed|Error"
}
demo() {
    python3 -m edge_speq run -n 96 --json >"$out/demo.json"
    python3 -m edge_speq run -n 96 --policy all
}
memcheck() { # API errors are left out: ggml answers cudaGraphExecUpdate's by making the graph anew
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer | head -1)
    "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 9 python3 -m edge_speq run -n 12 --resident 1/4 \
        --draft-tokens 2 --json 2>&1 | tee "$out/memcheck.log" | tail -3
}

python3 -m edge_speq --version
for part in "$@"; do
    left=$((deadline - $(date +%s)))
    [ "$left" -gt 60 ] || { say "skipped $part" && continue; }
    say "== $part"
    case $part in
        tests | demo | memcheck) "$part" || say "$part failed" ;;
        *)
            python3 -m benchmarks run "$part" --out "$out" --work "$work" --minutes "$(((left - 30) / 60)).$(((left - 30) % 60 * 100 / 60))" \
                2> >(tee -a "$out/run.log" >&2) || say "$part is not finished"
            ;;
    esac
done
