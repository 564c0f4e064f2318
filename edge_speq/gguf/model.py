"""Checks of a GGUF model's tensors and hyper-parameters before llama.cpp opens the file.

llama.cpp checks hyper-parameters with assertions that end the process. This module refuses such files with an error,
and experts that cannot be moved one by one. Errors that llama.cpp reports itself (missing tensors) are left to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from edge_speq.gguf.container import TOKEN_TYPES, TOKENS, GGUFFile, Tensor, read

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_HEADS = 1 << 16  # products of heads and their width are 32 bits in llama.cpp
MAX_WIDTH = 1 << 15
MAX_CONTEXT = 1 << 26  # llama_cpp.Llama.tokenize allocates four bytes for each
MAX_WINDOW = 1 << 26  # set_input_kq_mask reserves that many indices
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")  # LLAMA_ROPE_SCALING_TYPES
GATING_FUNCTIONS = range(1, 5)  # llama_expert_gating_func_type; a file without the key gets its architecture's
ROUTER_TYPES = ("F32", "F16", "BF16")
NOT_WEIGHTS = ("F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K")  # the last two hold activations only
TABLES = re.compile(r"d2t|t2d|tid2eid")  # integers by design: token maps of drafts, expert ids by token
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(up|gate|down|gate_up)_exps\.weight")
ROUTER = re.compile(r"blk\.\d+\.ffn_gate_inp\.weight")
HEADS = re.compile(r"blk\.(\d+)\.attn_([qkv])\.weight")
_KV = ("key", "value")
SHARED_GATE = re.compile(r"blk\.\d+\.ffn_gate_inp_shexp\.weight")
# ggml supports only F32 for tensors that are not operands of a matrix product. With F16 or BF16 the CPU backend aborts
# (binary-ops.cpp; add_id and rope assert), and so does CUDA (binbcast.cu). llama.cpp's loader does not notice: the CPU
# backend claims to support these operators. convert_hf_to_gguf.py and llama-quantize always write F32.
F32_ONLY = re.compile(r"norm\.weight$|\.bias$|\.scale$|rope_(freqs|factors_long|factors_short)\.weight$|attn_sinks")

# architectures of the pinned src/models whose experts are [width, n_ff, n_expert]; experts of others are not checked
_MOE = """
    afmoe arctic bailingmoe bailingmoe2 bailingmoe3 cohere2moe dbrx deepseek deepseek2 deepseek2-ocr deepseek32
    deepseek4 dflash dots1 dots3note ernie4_5-moe exaone-moe gemma4 glm-dsa glm4moe glm5-next gpt-oss granite
    granitehybrid granitemoe graniteswitch grok grovemoe hunyuan-moe hy_v3 hy_v4 jamba kimi-k3 kimi-linear laguna
    lfm2moe llada-moe llama llama4 maple mellum mimo2 minicpm minimax-01 minimax-m2 minimax-m3 mistral3 mistral4
    nemotron_h_moe nomic-bert-moe olmoe phimoe qwen2moe qwen35moe qwen3moe qwen3next qwen3vlmoe qwen4exp rnd1
    smallthinker step35
"""
MOE_ARCHITECTURES = frozenset(_MOE.split())

# architectures whose graph requires that RoPE rotates the whole head and that values are as wide as keys
_FULL_ROTATION = """
    apertus arcee arctic baichuan chameleon codeshell cogvlm cohere2moe dbrx deci deepseek dots1 dream ernie4_5
    ernie4_5-moe exaone exaone-moe exaone4 falcon gpt-oss granite granite_swa granitemoe graniteswitch grok grovemoe
    hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 llada llada-moe llama llama-embed llama4 maincoder
    mellum minicpm mistral3 olmo olmo2 olmoe orion paddleocr pangu-embedded plamo pockettts qwen2 qwen2moe qwen2vl
    qwen3 qwen3moe qwen3tts qwen3vl qwen3vlmoe rnd1 seed_oss smallthinker smollm3 starcoder2 talkie xverse
"""
FULL_ROTATION = frozenset(_FULL_ROTATION.split())

# architectures whose graph requires only that values are as wide as keys
_EQUAL_WIDTHS = """
    afmoe bailingmoe2 bitnet bloom chatglm cohere2 command-r deepseek4 glm4 glm4moe gpt2 gptneox granitehybrid jais
    laguna maple minimax-01 minimax-m2 minimax-m3 modern-bert mpt muse-glimmer nanbeige nemotron nemotron_h
    nemotron_h_moe openelm phi2 phi3 phimoe qwen qwen35 qwen35moe qwen3next qwen4exp refact spark2_5 stablelm
    starcoder
"""
EQUAL_WIDTHS = FULL_ROTATION | frozenset(_EQUAL_WIDTHS.split())

# architectures whose query, key and value tensors hold all heads, of one width in all layers, and nothing else
_PLAIN_HEADS = """
    arctic cohere2moe dbrx deepseek dots1 ernie4_5-moe exaone-moe gpt-oss granite granitemoe grok grovemoe hunyuan-moe
    hy_v3 llada-moe llama llama4 mistral3 olmoe phimoe qwen2 qwen2moe qwen3 qwen3moe qwen3vlmoe rnd1 smallthinker
"""
PLAIN_HEADS = frozenset(_PLAIN_HEADS.split())
LATENT_HEADS = frozenset(("deepseek2", "mistral4"))  # deepseek2.cpp's graph
NO_HEADS = frozenset(("arwkv7", "clip", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "wavtokenizer-dec"))


def check_model(path: str | Path, role: str = "model") -> GGUFFile:
    """Read and check a model's file or parts. Raises GGUFError if llama.cpp must not load it, EdgeError if missing."""
    return check(read(path, role))


def check(file: GGUFFile) -> GGUFFile:
    """Return the file unchanged. Raises GGUFError if llama.cpp must not load it."""
    _check_types(file)
    _check_numbers(file)
    _check_hyperparameters(file)
    _check_heads(file)
    _check_vocabulary(file)
    if architecture(file) in MOE_ARCHITECTURES and hyperparameter(file, "expert_count"):
        _check_experts(file)
    return file


def architecture(file: GGUFFile) -> str:
    found = file.fields.get("general.architecture")
    return found.value if found is not None and isinstance(found.value, str) else ""


def hyperparameter(file: GGUFFile, name: str) -> int:
    """Return a hyper-parameter, its maximum if it is given per layer, or 0 if the file lacks it.

    Raises GGUFError if it is not a whole number of at least 0.
    """
    key = f"{architecture(file)}.{name}"
    found = file.fields.get(key)
    if found is None:
        return 0
    values = found.values if found.count is not None else (found.value,)
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) != len(values) or not numbers or min(numbers) < 0:
        file.fail(key, "it must be a whole number from 0 on")
    return max(numbers)


def per_layer(file: GGUFFile, name: str) -> list[int]:
    """Return a hyper-parameter for each layer; [] if the file lacks it."""
    found = file.fields.get(f"{architecture(file)}.{name}")
    if found is None:
        return []
    most = hyperparameter(file, name)
    return [int(value) for value in found.values] if found.count is not None else [most] * MAX_LAYERS


def _check_types(file: GGUFFile) -> None:
    for tensor in file.tensors.values():
        if ROUTER.fullmatch(tensor.name) and tensor.type not in ROUTER_TYPES:
            problem = f"a router of type {tensor.type} crashes llama.cpp, it must be one of {', '.join(ROUTER_TYPES)}"
            file.fail(tensor.name, problem, tensor)
        if TABLES.search(tensor.name):
            continue
        if tensor.type in NOT_WEIGHTS:
            file.fail(tensor.name, f"weights of type {tensor.type} crash llama.cpp", tensor)
        vector = len(tensor.ne) == 1 and not SHARED_GATE.fullmatch(tensor.name)
        if tensor.type != "F32" and (F32_ONLY.search(tensor.name) or vector):
            file.fail(tensor.name, f"a norm or bias of type {tensor.type} crashes llama.cpp, it must be F32", tensor)


def _check_numbers(file: GGUFFile) -> None:
    """Check single numbers that ggml operators and graphs assert."""
    arch = architecture(file)
    for key, found in file.fields.items():
        if key.endswith("_epsilon") and not (isinstance(found.value, float) and 0 <= found.value < 1):
            file.fail(key, "it must be a number from 0 to 1")
    gating = f"{arch}.expert_gating_func"
    if gating in file.fields and file.fields[gating].value not in GATING_FUNCTIONS:
        file.fail(gating, "an unknown function")
    scale, length = f"{arch}.attention.temperature_scale", "attention.temperature_length"
    scaled = scale in file.fields and file.fields[scale].value != 0
    if arch in LATENT_HEADS and scaled and not hyperparameter(file, length):
        file.fail(scale, f"it needs {length}")


def _check_hyperparameters(file: GGUFFile) -> None:
    """Check the assertions of llama_model_base::load_hparams, each of which would end the process."""
    arch = architecture(file)
    n_layer, n_nextn = hyperparameter(file, "block_count"), hyperparameter(file, "nextn_predict_layers")
    n_expert, n_used = hyperparameter(file, "expert_count"), hyperparameter(file, "expert_used_count")
    n_groups, n_per_group = hyperparameter(file, "expert_group_count"), hyperparameter(file, "experts_per_group")
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
    if arch == "grovemoe" and (n_per_group == 0 or n_used * n_per_group > n_expert):
        file.fail(f"{arch}.experts_per_group", f"{n_expert} experts in groups of {n_per_group}, {n_used} groups used")
    scaling = file.fields.get(f"{arch}.rope.scaling.type")
    if scaling is not None and scaling.value not in ROPE_SCALINGS:
        file.fail(f"{arch}.rope.scaling.type", f"not one of {', '.join(ROPE_SCALINGS)}")


def _check_heads(file: GGUFFile) -> None:
    """Check sizes that would overflow in llama.cpp, and its assertions about heads and their rotated part."""
    arch = architecture(file)
    limits = {"attention.head_count": MAX_HEADS, "attention.head_count_kv": MAX_HEADS, "context_length": MAX_CONTEXT}
    limits["attention.sliding_window"] = MAX_WINDOW
    limits |= {f"attention.{which}_length{swa}": MAX_WIDTH for which in _KV for swa in ("", "_swa")}
    for name, most in limits.items():
        if hyperparameter(file, name) > most:
            file.fail(f"{arch}.{name}", f"more than {most}")
    heads, heads_kv = per_layer(file, "attention.head_count"), per_layer(file, "attention.head_count_kv")
    if f"{arch}.block_count" in file.fields and arch not in NO_HEADS and not any(heads):
        file.fail(f"{arch}.attention.head_count", "no attention heads")
    for n, n_kv in zip(heads, heads_kv, strict=False):
        if (arch in PLAIN_HEADS and n * n_kv == 0) or (n_kv and n % n_kv):
            file.fail(f"{arch}.attention.head_count_kv", f"{n} heads cannot share {n_kv} keys")
    if heads and heads[0]:
        _check_widths(file, heads, heads_kv or heads)


def _check_widths(file: GGUFFile, heads: list[int], heads_kv: list[int]) -> None:
    """Check the widths of keys, values and the rotated part of a head; the default width is n_embd / n_head."""
    arch = architecture(file)

    def width(name: str, otherwise: int) -> int:
        return hyperparameter(file, name) if f"{arch}.{name}" in file.fields else otherwise

    key, value = (width(f"attention.{which}_length", width("embedding_length", 0) // heads[0]) for which in _KV)
    n_rot = width("rope.dimension_count", key)
    if arch in EQUAL_WIDTHS and key != value:
        file.fail(f"{arch}.attention.value_length", f"{value}, but keys are {key} wide")
    if n_rot != key and (arch in FULL_ROTATION or n_rot > key or n_rot % 2):
        file.fail(f"{arch}.rope.dimension_count", f"{n_rot}, but heads are {key} wide")
    if not n_rot and arch in EQUAL_WIDTHS | LATENT_HEADS:  # rope would not terminate
        file.fail(f"{arch}.rope.dimension_count", "heads must be rotated")
    if arch in PLAIN_HEADS:
        sliding = {"attention.key_length_swa": key, "attention.value_length_swa": value}
        for name, other in (sliding | {"rope.dimension_count_swa": n_rot}).items():
            if width(name, other) != other:
                file.fail(f"{arch}.{name}", f"it must be {other}, as in the other layers")
        _check_plain_heads(file, key, heads, heads_kv)
    if arch in LATENT_HEADS:
        _check_latent_heads(file, key, value, n_rot, heads_kv[0] == heads[0])


def _check_plain_heads(file: GGUFFile, width: int, heads: list[int], heads_kv: list[int]) -> None:
    for tensor in file.tensors.values():
        match = HEADS.fullmatch(tensor.name)
        counts = heads if match and match[2] == "q" else heads_kv
        if match and int(match[1]) < len(counts) and tensor.ne[1:] != (counts[int(match[1])] * width,):
            n = counts[int(match[1])]
            file.fail(tensor.name, f"shape {list(tensor.ne)} does not hold {n} heads of {width}", tensor)


def _check_latent_heads(file: GGUFFile, key: int, value: int, n_rot: int, equal: bool) -> None:
    """Check multi-head latent attention: one key (latent vector and rotated part) and one value (latent vector).

    Files of older converters have a key for each head instead.
    """
    arch = architecture(file)
    latent = hyperparameter(file, "attention.kv_lora_rank")
    wide, value_wide = (hyperparameter(file, f"attention.{which}_length_mla") for which in _KV)
    if (wide == 0) != (value_wide == 0):
        file.fail(f"{arch}.attention.key_length_mla", "the widths of keys and of values go together")
    if not n_rot < (wide or key):
        file.fail(f"{arch}.rope.dimension_count", f"{n_rot}, but heads are {wide or key} wide")
    if wide and (hyperparameter(file, "attention.head_count_kv") != 1 or (key, value) != (latent + n_rot, latent)):
        problem = (
            f"latent attention needs 1 key of {latent} + {n_rot} and 1 value of {latent}, not of {key} and {value}"
        )
        file.fail(f"{arch}.attention.head_count_kv", problem)
    if not wide and not equal:
        file.fail(f"{arch}.attention.head_count_kv", "it must be the number of heads")


def _check_vocabulary(file: GGUFFile) -> None:
    """Refuse vocabularies that let llama.cpp load the model but abort on the first text."""
    key = "tokenizer.ggml.model"
    model = file.fields[key].value if key in file.fields else None
    if model in ("no_vocab", "none") or (TOKENS in file.fields and not file.fields[TOKENS].count):
        file.fail(key, "the model has no vocabulary: text cannot be tokenized")
    if model == "llama" and file.missing_bytes:
        byte = file.missing_bytes[0]
        file.fail(TOKENS, f"a SentencePiece vocabulary must have a token for each byte, <0x{byte:02X}> is missing")
    if model == "bert" and file.has_byte_tokens:
        file.fail(TOKEN_TYPES, "a WordPiece vocabulary has no tokens for bytes")
    if model == "rwkv" and architecture(file) not in NO_HEADS:  # its vocabulary must have a token for each byte
        file.fail(key, "this tokenizer is only known with RWKV models")


def _check_experts(file: GGUFFile) -> None:
    """Check the shapes of routers and experts.

    Router: [n_embd, n_expert]. up and gate: [width, n_ff, n_expert]; gate_up: [width, 2 n_ff, n_expert]; down:
    [n_ff, width, n_expert]. The width is n_embd, or a latent width in some architectures.
    """
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
