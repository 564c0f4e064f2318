#!/usr/bin/env bash
# CUDA graphs for a CUDA backend module that was built without them, as ggml alone is by default and llama.cpp is not.
#
#     tools/cuda_graphs.sh LLAMA_CPP MODULE.so OUT.so
#
# LLAMA_CPP: the source tree that MODULE.so was built of. OUT.so holds the one file of ggml-cuda that launches kernels, compiled with
# GGML_CUDA_USE_GRAPHS, and takes the kernels from MODULE.so, which has to lie beside it as kernels/libggml-cuda-kernels.so
# (device_setup.sh puts it there). The graphs' members of ggml_backend_cuda_context go to its end, so that the offsets that MODULE.so
# knows stay. Needs nvcc and the headers of cuBLAS (CUBLAS_INCLUDE, the include folder of the nvidia-cublas wheel, or a whole toolkit).
set -euo pipefail
llama=$(realpath "$1") module=$(realpath "$2") out=$(realpath -m "$3")
arch=${CUDA_ARCH:-sm_90}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/include"
cp -r "$llama/ggml/src/ggml-cuda" "$work/include/ggml-cuda" # under the name by which its own files include it
python3 - "$work/include/ggml-cuda/common.cuh" <<'PY'
import sys
from pathlib import Path

path = Path(sys.argv[1])
text = path.read_text()
end = "#endif // USE_CUDA_GRAPH\n"
first = text.index("#ifdef USE_CUDA_GRAPH\n    // Map from first_node_ptr")
last = text.index(end, first) + len(end)
members, text = text[first:last], text[:first] + text[last:]
struct_end = "    ggml_cuda_pool & pool() {\n        return pool(device);\n    }\n"
assert text.count(struct_end) == 1, "another version of ggml-cuda: look where its context ends"
path.write_text(text.replace(struct_end, struct_end + "\n" + members))
PY
cp "$module" "$work/libggml-cuda-kernels.so"
nvcc -O3 -DNDEBUG -std=c++17 "-arch=$arch" -use_fast_math -extended-lambda -compress-mode=size -Xcompiler "-fPIC -Wno-pedantic" \
    -DGGML_BACKEND_BUILD -DGGML_BACKEND_DL -DGGML_BACKEND_SHARED -DGGML_SHARED -DGGML_SCHED_MAX_COPIES=4 -D_GNU_SOURCE \
    -DGGML_CUDA_PEER_MAX_BATCH_SIZE=128 -DGGML_CUDA_USE_GRAPHS -I "$work/include" -I "$llama/ggml/include" -I "$llama/ggml/src" \
    ${CUBLAS_INCLUDE:+-I "$CUBLAS_INCLUDE"} -c "$work/include/ggml-cuda/ggml-cuda.cu" -o "$work/ggml-cuda.o"
# what the driver, cuBLAS and ggml-base define comes with the kernels' own dependencies
cudart=$(dirname "$(find -L "$(dirname "$(readlink -f "$(command -v nvcc)")")/.." /usr/local/cuda*/ -name 'libcudart.so' 2>/dev/null | head -1)")
g++ -shared -o "$out" "$work/ggml-cuda.o" -L "$work" -l:libggml-cuda-kernels.so -L "$cudart" -lcudart \
    -Wl,-rpath,'$ORIGIN/kernels' -Wl,--allow-shlib-undefined
strip "$out"
echo "$out: $(stat -c %s "$out") bytes"
