"""What the tensors of a GGUF file mean, checked against its hyper-parameters before llama.cpp sees the file.

Refused is what would abort or crash llama.cpp, whose own checks of hyper-parameters are assertions, and experts that
could not be moved one by one. What llama.cpp refuses with a message of its own (missing tensors, say) is left to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from edge_speq.gguf_file import GGUFFile, Tensor, read

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_HEADS = 1 << 16  # products of heads and their width are 32 bits in llama.cpp
MAX_WIDTH = 1 << 15
MAX_CONTEXT = 1 << 30
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")  # LLAMA_ROPE_SCALING_TYPES
ROUTER_TYPES = ("F32", "F16", "BF16")
NOT_WEIGHTS = ("F64", "I8", "I16", "I32", "I64")
TABLES = re.compile(r"d2t|t2d|tid2eid")  # integers by design: token maps of drafts, expert ids by token
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(up|gate|down|gate_up)_exps\.weight")
ROUTER = re.compile(r"blk\.\d+\.ffn_gate_inp\.weight")
QUERY = re.compile(r"blk\.\d+\.attn_q\.weight")
NORM_OR_BIAS = re.compile(r"norm\.weight$|\.bias$")

# architectures of the pinned src/models whose experts are [width, n_ff, n_expert]; others get container checks only
_MOE = """
    afmoe arctic bailingmoe bailingmoe2 bailingmoe3 cohere2moe dbrx deepseek deepseek2 deepseek2-ocr deepseek32
    deepseek4 dflash dots1 dots3note ernie4_5-moe exaone-moe gemma4 glm-dsa glm4moe glm5-next gpt-oss granite
    granitehybrid granitemoe graniteswitch grok grovemoe hunyuan-moe hy_v3 hy_v4 jamba kimi-k3 kimi-linear laguna
    lfm2moe llada-moe llama llama4 maple mellum mimo2 minicpm minimax-01 minimax-m2 minimax-m3 mistral3 mistral4
    nemotron_h_moe nomic-bert-moe olmoe phimoe qwen2moe qwen35moe qwen3moe qwen3next qwen3vlmoe qwen4exp rnd1
    smallthinker step35
"""
MOE_ARCHITECTURES = frozenset(_MOE.split())

# architectures whose graph asserts that the whole head is rotated, and takes a query of all heads and nothing more
_FULL_ROTATION = """
    arctic cohere2moe dbrx deepseek dots1 ernie4_5-moe exaone-moe granite granitemoe grok grovemoe hunyuan-moe hy_v3
    llada-moe llama llama4 mistral3 olmoe qwen2 qwen2moe qwen3 qwen3moe qwen3vlmoe rnd1 smallthinker
"""
FULL_ROTATION = frozenset(_FULL_ROTATION.split())


def check_model(path: str | Path, role: str = "model") -> GGUFFile:
    """A model's file or files. Raises GGUFError when they must not be loaded, EdgeError when they are not there."""
    file = read(path, role)
    _check_types(file)
    _check_hyperparameters(file)
    _check_attention(file)
    if architecture(file) in MOE_ARCHITECTURES and hyperparameter(file, "expert_count"):
        _check_experts(file)
    return file


def architecture(file: GGUFFile) -> str:
    found = file.fields.get("general.architecture")
    return found.value if found is not None and isinstance(found.value, str) else ""


def hyperparameter(file: GGUFFile, name: str) -> int:
    """A whole number from 0 on, the largest where each layer has its own; 0 where the file has none."""
    key = f"{architecture(file)}.{name}"
    found = file.fields.get(key)
    if found is None:
        return 0
    values = found.values if found.count is not None else (found.value,)
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) != len(values) or not numbers or min(numbers) < 0:
        file.fail(key, "it must be a whole number from 0 on")
    return max(numbers)


def _check_types(file: GGUFFile) -> None:
    for tensor in file.tensors.values():
        if ROUTER.fullmatch(tensor.name) and tensor.type not in ROUTER_TYPES:
            problem = f"a router of type {tensor.type} crashes llama.cpp, it must be one of {', '.join(ROUTER_TYPES)}"
            file.fail(tensor.name, problem, tensor)
        if tensor.type in NOT_WEIGHTS and not TABLES.search(tensor.name):
            file.fail(tensor.name, f"weights of type {tensor.type} crash llama.cpp", tensor)
        if len(tensor.ne) == 1 and tensor.type != "F32" and NORM_OR_BIAS.search(tensor.name):
            file.fail(tensor.name, f"a norm or bias of type {tensor.type} crashes llama.cpp, it must be F32", tensor)


def _check_hyperparameters(file: GGUFFile) -> None:
    """The assertions of llama_model_base::load_hparams: each would end the process."""
    arch = architecture(file)
    n_layer, n_nextn = hyperparameter(file, "block_count"), hyperparameter(file, "nextn_predict_layers")
    n_expert, n_used = hyperparameter(file, "expert_count"), hyperparameter(file, "expert_used_count")
    n_groups = hyperparameter(file, "expert_group_count")
    n_groups_used = hyperparameter(file, "expert_group_used_count")
    if not arch.isprintable():
        file.fail("general.architecture", "a name must be printable text")
    if arch in ("hunyuan_vl", "hunyuan-dense") and n_expert <= 1:
        n_expert = n_used = 0
    if f"{arch}.block_count" in file.fields and not 1 <= n_layer <= MAX_LAYERS:
        file.fail(f"{arch}.block_count", f"{n_layer} layers, llama.cpp takes 1 to {MAX_LAYERS}")
    if n_nextn > n_layer:
        file.fail(f"{arch}.nextn_predict_layers", f"{n_nextn} of {n_layer} layers")
    if n_expert > MAX_EXPERTS:
        file.fail(f"{arch}.expert_count", f"{n_expert} experts, llama.cpp takes {MAX_EXPERTS}")
    if not min(1, n_expert) <= n_used <= n_expert:
        file.fail(f"{arch}.expert_used_count", f"{n_used} of {n_expert} experts")
    if n_groups and (n_groups >= n_expert or (n_groups > 1 and n_expert % n_groups)):
        file.fail(f"{arch}.expert_group_count", f"{n_expert} experts cannot be in {n_groups} groups")
    if n_groups > 1 and not 0 < n_groups_used < n_groups:
        file.fail(f"{arch}.expert_group_used_count", f"{n_groups_used} of {n_groups} groups")
    scaling = file.fields.get(f"{arch}.rope.scaling.type")
    if scaling is not None and scaling.value not in ROPE_SCALINGS:
        file.fail(f"{arch}.rope.scaling.type", f"not one of {', '.join(ROPE_SCALINGS)}")


def _check_attention(file: GGUFFile) -> None:
    """Sizes that would wrap around in llama.cpp, and its graphs' assertions about the rotated part of a head."""
    arch = architecture(file)
    limits = {"attention.head_count": MAX_HEADS, "attention.head_count_kv": MAX_HEADS, "context_length": MAX_CONTEXT}
    limits |= {f"attention.{which}_length{swa}": MAX_WIDTH for which in ("key", "value") for swa in ("", "_swa")}
    for name, most in limits.items():
        if hyperparameter(file, name) > most:
            file.fail(f"{arch}.{name}", f"more than {most}")
    n_head, n_rot = hyperparameter(file, "attention.head_count"), hyperparameter(file, "rope.dimension_count")
    width = hyperparameter(file, "attention.key_length")
    if not width and n_head:
        width = hyperparameter(file, "embedding_length") // n_head
    if arch not in FULL_ROTATION:
        return
    if f"{arch}.rope.dimension_count" in file.fields and n_rot != width:
        file.fail(f"{arch}.rope.dimension_count", f"{n_rot}, but heads are {width} wide")
    heads = file.fields.get(f"{arch}.attention.head_count")
    if heads is None or heads.count is not None:
        return
    for tensor in file.tensors.values():
        if QUERY.fullmatch(tensor.name) and tensor.ne[1:] != (n_head * width,):
            file.fail(tensor.name, f"shape {list(tensor.ne)} does not hold {n_head} heads of {width}", tensor)


def _check_experts(file: GGUFFile) -> None:
    """Routers are [n_embd, n_expert], up and gate [width, n_ff, n_expert], down [n_ff, width, n_expert], gate_up as
    up with twice the n_ff; the width is n_embd or, in some families, a latent one."""
    n_expert, n_embd = hyperparameter(file, "expert_count"), hyperparameter(file, "embedding_length")
    latent = (hyperparameter(file, "moe_latent_size"), hyperparameter(file, "expert_latent_length"))
    blocks: dict[str, dict[str, Tensor]] = {}
    for tensor in file.tensors.values():
        if ROUTER.fullmatch(tensor.name) and tensor.ne != (n_embd, n_expert):
            problem = f"router of shape {list(tensor.ne)}, the model needs {[n_embd, n_expert]}"
            file.fail(tensor.name, problem, tensor)
        match = EXPERTS.fullmatch(tensor.name)
        if match:
            blocks.setdefault(match[1], {})[match[2]] = tensor
    for block in blocks.values():
        sizes: set[tuple[int, int]] = set()
        for part, tensor in block.items():
            if len(tensor.ne) != 3 or tensor.ne[2] != n_expert:
                problem = f"shape {list(tensor.ne)} does not hold {n_expert} experts"
                file.fail(tensor.name, problem, tensor)
            columns, rows, _ = tensor.ne
            width, n_ff = (rows, columns) if part == "down" else (columns, rows)
            sizes.add((width, n_ff // 2 if part == "gate_up" and n_ff % 2 == 0 else n_ff))
            if len(sizes) > 1 or width not in (n_embd, *filter(None, latent)):
                problem = f"shape {list(tensor.ne)} does not go with n_embd {n_embd} or the block's other experts"
                file.fail(tensor.name, problem, tensor)
