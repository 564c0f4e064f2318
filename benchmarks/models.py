"""Models that measurements need and that are not in the repository: the commands that make them."""

from __future__ import annotations

INFLATE = "python models/recipes/inflate.py models/tales-moe.gguf"
SHAPE = "python models/recipes/inflate_model.py"
TWIN = "edge-speq convert draft"
TO_TYPE = "edge-speq convert quantize models/tales-moe.gguf"

MODELS: dict[str, str] = {
    "tales-big.gguf": f"{INFLATE} tales-big.gguf --width-times 8 --ff-times 8 --layers-times 8",  # 9.5 GB
    "tales24.gguf": f"{INFLATE} tales24.gguf --width-times 8 --ff-times 8 --layers-times 4",  # 4.7 GB
    "tales24-narrow.gguf": f"{INFLATE} tales24-narrow.gguf --layers-times 4",
    "tales48-narrow.gguf": f"{INFLATE} tales48-narrow.gguf --layers-times 8",
    "twin24.gguf": f"{TWIN} tales24-narrow.gguf -o twin24.gguf --type q4_k --no-measure",
    "twin-q4k.gguf": f"{TWIN} models/tales-moe.gguf -o twin-q4k.gguf --type q4_k --no-measure",
    "qwen3.gguf": f"{SHAPE} qwen3.gguf --shape qwen3 --layers 12 --prompts qwen3.jsonl",
    "mixtral.gguf": f"{SHAPE} mixtral.gguf --shape mixtral --layers 4 --prompts mixtral.jsonl",
    "mixtral-cut.gguf": "edge-speq convert split mixtral.gguf -o mixtral-cut.gguf --sub-experts 4 --no-profile",
    "tales-f16.gguf": f"{TO_TYPE} tales-f16.gguf --type f16",
    "tales-q8_0.gguf": f"{TO_TYPE} tales-q8_0.gguf --type q8_0",
    "tales-q4_k_m.gguf": f"{TO_TYPE} tales-q4_k_m.gguf --type q4_k_m",
    "tales-q4_0.gguf": f"{TO_TYPE} tales-q4_0.gguf --type q4_0",
}
BESIDE = {"qwen3.jsonl": "qwen3.gguf", "mixtral.jsonl": "mixtral.gguf"}  # files that another one's command writes
BY_HAND = {"moe2.gguf": "train it on a GPU: models/recipes/train_moe.py --help"}
