"""A tiny Hugging Face checkpoint made on the spot: Qwen3-MoE with random weights and a byte-level BPE tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HIDDEN = EXPERT = 256  # K-quants hold 256 columns a block
LAYERS, EXPERTS, USED, HEADS, KV_HEADS, HEAD = 2, 4, 2, 4, 2, 64
VOCAB = 400
TEXT = Path(__file__).parents[1] / "data" / "prompts" / "prose.jsonl"


def write_checkpoint(folder: Path, pre_tokenizer: Any = None) -> Path:
    """Skips the test where what makes or converts a checkpoint is not installed."""
    for package in ("torch", "transformers", "sentencepiece"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra edge-speq[convert]")
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors, of the extra edge-speq[convert]")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config()), encoding="utf-8")
    safetensors.save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, pre_tokenizer)
    return folder


def config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "moe_intermediate_size": EXPERT,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_experts": EXPERTS,
        "num_experts_per_tok": USED,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def weights() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    random = np.random.default_rng(5)

    def matrix(rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    found = {
        "model.embed_tokens.weight": random.standard_normal((VOCAB, HIDDEN)).astype(np.float32),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": matrix(VOCAB, HIDDEN) * 4,
    }
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        found |= {p + f"{name}_layernorm.weight": np.ones(HIDDEN, np.float32) for name in ("input", "post_attention")}
        found |= {p + f"self_attn.{name}_norm.weight": np.ones(HEAD, np.float32) for name in "qk"}
        shapes = {"q": (HEADS * HEAD, HIDDEN), "k": (KV_HEADS * HEAD, HIDDEN), "v": (KV_HEADS * HEAD, HIDDEN)}
        shapes["o"] = (HIDDEN, HEADS * HEAD)
        found |= {p + f"self_attn.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
        found[p + "mlp.gate.weight"] = matrix(EXPERTS, HIDDEN) * 2
        for e in range(EXPERTS):
            found |= {
                p + f"mlp.experts.{e}.{name}_proj.weight": matrix(EXPERT, HIDDEN) for name in ("gate", "up", "down")
            }
    return found


def write_tokenizer(folder: Path, pre_tokenizer: Any = None) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers, of the extra edge-speq[convert]")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator([json.loads(line)["prompt"] for line in lines], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
