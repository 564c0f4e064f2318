"""Regenerate models/tales-moe.gguf and models/tales-draft.gguf from their Hugging Face checkpoints.

    pip install ./native '.[convert]'
    python models/recipes/make_models.py --target HF_DIR --draft HF_DIR --calibration TEXT [TEXT ...] \
        [--measure TEXT ...] --out models

Convert to F16 with llama.cpp's own converter, collect an importance matrix on the second half of the calibration texts,
quantize by TARGET and DRAFT below. --measure prints the loss on the first half of each text, unseen by calibration.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import llama_cpp as lib
import numpy as np

from edge_speq.convert.evaluation import graph
from edge_speq.convert.huggingface import hf

CONTEXT = 512  # tokens of one calibration or measuring window
IM_END = 2  # the token that ends a chat turn; <|endoftext|> is 0
AUTHOR = "the edge_speq project"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is quantized: a default file type, then (tensor name pattern, ggml type), the first match wins."""

    name: str
    description: str  # 127 bytes at most: a llama.cpp key override holds no more
    ftype: int
    overrides: tuple[tuple[str, int], ...]


Q5_0, Q5_1, Q5_K, Q6_K, IQ3_S, IQ4_XS = 6, 7, 13, 14, 21, 23  # enum ggml_type
# Together under 24 MB. At 3 bits the gate and up experts of the first layers lose least, down experts and attention
# most: models/README.md has the measurements. Layers of two kinds also make two slot groups, as Q4_K_M files do.
TARGET = Recipe(
    "tales-moe",
    "Mixture of 32 experts, 4 active; trained from scratch on books, code and dialogues.",
    lib.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    (("token_embd", Q5_K), ("attn_", Q6_K), (r"blk\.[0-3]\.ffn_(gate|up)_exps", IQ3_S), ("_exps", IQ4_XS)),
)
DRAFT = Recipe(
    "tales-draft",
    "Dense draft of tales-moe with the same tokenizer, trained from scratch on the same text.",
    lib.LLAMA_FTYPE_MOSTLY_Q5_1,
    (("token_embd", Q5_0), ("weight", Q5_1)),  # rows of 192: no K-quants, which hold 256 columns a block
)


def convert(checkpoint: Path, out: Path, name: str) -> Path:
    """Write `checkpoint` as an F16 GGUF with llama.cpp's converter."""
    hf.convert(checkpoint, out, None, "f16", name=name)
    return out


class Importance:
    """Mean squared activation per input column of every weight and expert, as llama.cpp's tools/imatrix has it."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}  # name -> [n_expert or 1, ne0]
        self.counts: dict[str, np.ndarray] = {}  # name -> [n_expert or 1]
        self.callback = lib.ggml_backend_sched_eval_callback(self._observe)

    def _observe(self, address: int, ask: bool, _user: int | None) -> bool:
        node = graph.GraphTensor.from_address(address)
        if not node.src[0] or not node.src[1]:
            return not ask
        weight, x = graph.GraphTensor.from_address(node.src[0]), graph.GraphTensor.from_address(node.src[1])
        name = weight.name.decode()
        if not name.endswith(".weight") or x.type != 0 or weight.ne[0] != x.ne[0]:  # F32 activations into a weight
            return not ask
        if ask:
            return True
        rows = x.array(np.float32)
        n = weight.ne[2]
        sums = self.sums.setdefault(name, np.zeros((n, weight.ne[0])))
        counts = self.counts.setdefault(name, np.zeros(n))
        if node.src[2]:  # MUL_MAT_ID: ids [token, k], rows [token, 1 or k, ne0]
            ids = graph.GraphTensor.from_address(node.src[2]).array(np.int32)[0]
            squares = np.broadcast_to(np.square(rows), (*ids.shape, weight.ne[0])).reshape(ids.size, -1)
            chosen = np.eye(n, dtype=np.float32)[ids.ravel()]
            sums += chosen.T @ squares
            counts += chosen.sum(0)
        else:
            sums[0] += np.square(rows).sum(axis=(0, 1))
            counts[0] += rows.shape[0] * rows.shape[1]
        return True

    def matrix(self) -> dict[str, np.ndarray]:
        """Means, drawn towards the tensor's own mean so that an expert seen rarely still gets sane weights."""
        prior = 32
        means = {}
        for name, sums in self.sums.items():
            counts = self.counts[name]
            smooth = (sums + prior * sums.sum(0) / counts.sum()) / (counts[:, None] + prior)
            means[name] = smooth.astype(np.float32)
        return means


class Runner:
    """A model and a context that return the logits of every position of one window."""

    def __init__(self, path: Path, importance: Importance | None = None) -> None:
        model_params = lib.llama_model_default_params()
        model_params.use_extra_bufts = False
        self.model = lib.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise SystemExit(f"error: llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_threads = params.n_threads_batch = 2
        if importance is not None:
            params.cb_eval = importance.callback
        self.context = lib.llama_init_from_model(self.model, params)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)

    def tokens(self, text: str) -> np.ndarray:
        raw = text.encode()
        buffer = (lib.llama_token * len(raw))()
        special = True  # the texts part their documents with a literal <|endoftext|>
        n = lib.llama_tokenize(self.vocab, raw, len(raw), buffer, len(raw), False, special)
        return np.array(buffer[:n], np.int32)

    def logits(self, window: np.ndarray) -> np.ndarray:
        """Logits [n, n_vocab] of a window of at most CONTEXT tokens, from an empty cache."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = lib.llama_decode(self.context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise SystemExit(f"error: llama_decode returned {status}")
        out: np.ndarray = np.ctypeslib.as_array(lib.llama_get_logits(self.context), (len(window), self.n_vocab))
        return out

    def close(self) -> None:
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)


def windows(tokens: np.ndarray, count: int) -> Iterable[np.ndarray]:
    """`count` windows of CONTEXT tokens, evenly spaced."""
    starts = np.linspace(0, len(tokens) - CONTEXT, count).astype(int)
    return (tokens[s : s + CONTEXT] for s in starts)


def calibrate(model: Path, texts: list[Path], count: int = 60) -> dict[str, np.ndarray]:
    importance = Importance()
    runner = Runner(model, importance)
    for text in texts:
        tokens = runner.tokens(text.read_text())
        for window in windows(tokens[len(tokens) // 2 :], count):
            runner.logits(window)
    runner.close()
    return importance.matrix()


def loss(model: Path, text: Path, count: int = 40) -> float:
    """Mean negative log likelihood (nats per token) over `count` windows of the first half of `text`."""
    runner = Runner(model)
    tokens = runner.tokens(text.read_text())
    total = 0.0
    for window in windows(tokens[: len(tokens) // 2], count):
        logits = runner.logits(window)[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        total += float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(CONTEXT - 1), window[1:]]))
    runner.close()
    return total / count


def quantize(source: Path, out: Path, recipe: Recipe, importance: dict[str, np.ndarray]) -> Path:
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype = 2, recipe.ftype
    types = (lib.llama_model_tensor_override * (len(recipe.overrides) + 1))()
    for slot, (pattern, kind) in zip(types, recipe.overrides, strict=False):
        slot.pattern, slot.type = pattern.encode(), kind
    params.tt_overrides = types
    matrix = (lib.llama_model_imatrix_data * (len(importance) + 1))()
    for slot, (name, values) in zip(matrix, importance.items(), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        params.imatrix = matrix
    texts = {
        "general.name": recipe.name,
        "general.description": recipe.description,
        "general.author": AUTHOR,
        "general.license": "apache-2.0",
    }
    keys = (lib.llama_model_kv_override * (len(texts) + 2))()  # an empty key ends the list
    for slot, (key, text) in zip(keys, texts.items(), strict=False):
        slot.tag, slot.key, slot.value.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, key.encode(), text.encode()
    keys[len(texts)].tag, keys[len(texts)].key = lib.LLAMA_KV_OVERRIDE_TYPE_INT, b"tokenizer.ggml.eot_token_id"
    keys[len(texts)].value.val_i64 = IM_END
    params.kv_overrides = keys
    if lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise SystemExit(f"error: llama.cpp cannot quantize {source}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="Hugging Face folder of tales-moe")
    parser.add_argument("--draft", type=Path, required=True, help="Hugging Face folder of tales-draft")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, help="texts (second halves)")
    parser.add_argument("--measure", type=Path, nargs="*", default=[], help="texts (first halves)")
    parser.add_argument("--out", type=Path, default=Path("models"))
    parser.add_argument("--work", type=Path, help="keep the F16 files here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        for recipe, checkpoint in ((TARGET, args.target), (DRAFT, args.draft)):
            f16 = convert(checkpoint, work / f"{recipe.name}.f16.gguf", recipe.name)
            out = quantize(f16, args.out / f"{recipe.name}.gguf", recipe, calibrate(f16, args.calibration))
            print(out, out.stat().st_size, hashlib.sha256(out.read_bytes()).hexdigest())
            for text in args.measure:
                print(f"  {text.stem}: F16 {loss(f16, text):.4f}, quantized {loss(out, text):.4f} nats/token")


if __name__ == "__main__":
    main()
