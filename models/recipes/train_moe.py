"""Train a second small MoE whose routing differs from the bundled model's: Mixtral's graph, with torch alone.

    python models/recipes/train_moe.py prepare corpus/*.txt --tokenizer CHECKPOINT/tokenizer.json -o corpus.npy.xz
    python models/recipes/train_moe.py train corpus.npy.xz -o moe2 --seconds 75      # on a GPU; needs torch and numpy
    cp CHECKPOINT/{tokenizer,tokenizer_config,special_tokens_map,generation_config}.json moe2/
    edge-speq convert hf moe2 -o moe2-f16.gguf --outtype f16
    python models/recipes/train_moe.py check moe2 moe2-f16.gguf
    edge-speq convert quantize moe2-f16.gguf moe2.gguf --type q5_k_m

Text files hold documents separated by <|endoftext|>; moe_corpus.py makes some. The bundled model chooses 4 of 32
experts, this one 2 of 20. Training ends after a given time, so the learning rate follows the clock. Weights are written
as F16 in small files.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from moe_model import END, Shape, forward, initial, load, save

END_TEXT = "<|endoftext|>"
BALANCED = 0.25  # of the time, with more than the final weight of the balancing loss
HELD_OUT = 0.01  # of the tokens, the last ones: documents of all classes, never trained on
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
Ids = npt.NDArray[np.uint16]


def prepare(files: list[Path], tokenizer: Path, out: Path, n_tokens: int, seed: int) -> None:
    """Take the same number of tokens from every file, or all that it has, with documents shuffled."""
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    random, left = np.random.default_rng(seed), n_tokens
    documents: list[Ids] = []
    # the smallest first: what it lacks, the larger ones give
    for place, path in enumerate(sorted(files, key=lambda path: path.stat().st_size)):
        quota = left // (len(files) - place)
        texts = [text for text in path.read_text(encoding="utf-8").split(END_TEXT) if text.strip()]
        random.shuffle(texts)
        had = len(documents)
        taken = 0
        for ids in _encode(encoder, texts):
            if taken >= quota:
                break
            documents.append(ids)
            taken += len(ids)
        left -= taken
        print(f"{path.name}: {taken:,} tokens of {len(documents) - had} documents", flush=True)
    order = random.permutation(len(documents))
    write_ids(np.concatenate([documents[i] for i in order]), out)


def _encode(encoder: Any, texts: list[str]) -> Iterator[Ids]:
    for start in range(0, len(texts), 256):
        for found in encoder.encode_batch(texts[start : start + 256], add_special_tokens=False):
            yield np.array([*found.ids, END], dtype=np.uint16)


def write_ids(ids: Ids, out: Path) -> None:
    if out.suffix != ".xz":
        np.save(out, ids)
    else:
        filters = [
            {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 1, "pb": 1}
        ]  # 16-bit units
        with lzma.open(out, "wb", filters=filters) as file:
            np.save(file, ids)
    print(f"{out}: {len(ids):,} tokens, {out.stat().st_size:,} bytes", flush=True)


def read_ids(path: Path) -> Ids:
    if path.suffix != ".xz":
        found: Ids = np.load(path)
        return found
    with lzma.open(path, "rb") as file:
        found = np.load(file)
    return found


class Trainer:
    """Train until the time or the steps are over."""

    def __init__(self, shape: Shape, ids: Ids, options: argparse.Namespace) -> None:
        import torch

        self.shape, self.options = shape, options
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cpu" and options.threads:
            torch.set_num_threads(options.threads)
        window = options.length + 1
        cut = min(int(len(ids) * (1 - HELD_OUT)), len(ids) - 4 * window)
        if cut < window or int(ids.max()) >= shape.vocab:
            raise SystemExit("error: too few tokens for these windows, or ids beyond --vocab: prepare other text")
        whole = torch.from_numpy(ids.astype(np.int32)).to(self.device)
        self.ids, last = whole[:cut], whole[cut:]
        n = min(len(last) // window, 64)
        self.held_out = last[: n * window].view(n, window).long()
        self.random = torch.Generator(self.device).manual_seed(options.seed)
        self.weights = initial(shape, self.device, options.seed)
        for weight in self.weights.values():
            weight.requires_grad_()
        decayed = [w for w in self.weights.values() if w.dim() > 1]
        groups = [
            {"params": decayed, "weight_decay": options.decay},
            {"params": [w for w in self.weights.values() if w.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=self.device == "cuda")

    def batch(self) -> Any:
        import torch

        starts = (len(self.ids) - self.options.length, (self.options.batch, 1))
        at = torch.randint(*starts, generator=self.random, device=self.device)
        return self.ids[at + torch.arange(self.options.length + 1, device=self.device)].long()

    def losses(self, windows: Any) -> tuple[Any, Any, Any]:
        import torch
        import torch.nn.functional as f

        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits, balance, counts = forward(self.weights, self.shape, windows[:, :-1])
        return f.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten()), balance, counts

    def step(self, progress: float) -> float:
        """`progress`, 0 to 1, decides the learning rate (3 % of warm-up, then a cosine) and the balancing weight, which
        falls from `first_balance` over a quarter of the time: a router that is left alone from the start soon sends
        all tokens to the same experts. Returns the loss, nats a token.
        """
        import torch

        o = self.options
        lr = o.lr * min(progress / 0.03, 0.5 + 0.5 * math.cos(math.pi * progress)) if progress < 1 else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, balance, _ = self.losses(self.batch())
        weight = o.balance + (o.first_balance - o.balance) * max(0.0, 1 - progress / BALANCED)
        (loss + weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def measure(self) -> dict[str, Any]:
        """On held-out windows: loss; a layer: the share of the busiest expert, and how many were never chosen."""
        import torch

        total, counts = 0.0, torch.zeros(self.shape.layers, self.shape.experts, device=self.device)
        with torch.no_grad():
            for part in self.held_out.split(self.options.batch):
                loss, _, count = self.losses(part)
                total += float(loss) * len(part)
                counts += count
        shares = counts / counts.sum(1, keepdim=True)
        return {
            "held_out_loss": round(total / len(self.held_out), 4),
            "busiest": [round(float(share), 3) for share in shares.amax(1)],
            "never_chosen": [int(n) for n in (counts == 0).sum(1)],
        }

    def run(self) -> dict[str, Any]:
        o, steps, told, loss = self.options, 0, 0.0, math.nan
        self.losses(self.batch())  # kernels are loaded before the clock runs
        begin = time.monotonic()
        while (elapsed := time.monotonic() - begin) < o.seconds and steps < o.steps:
            loss = self.step(max(elapsed / o.seconds, (steps + 1) / (o.steps + 1)))
            steps += 1
            if elapsed >= told:
                seen = steps * o.batch * o.length
                print(f"{elapsed:6.1f} s, step {steps}, {seen / 1e6:.2f} M tokens, loss {loss:.3f}", end="", flush=True)
                told = elapsed + o.every
                print(f", {json.dumps(self.measure())}", flush=True)
        seen, seconds = steps * o.batch * o.length, round(time.monotonic() - begin, 1)
        return {"steps": steps, "tokens": seen, "seconds": seconds, "loss": round(loss, 4), **self.measure()}


def train(options: argparse.Namespace) -> None:
    import torch

    shape = Shape(
        *(
            getattr(options, name)
            for name in ("d_model", "layers", "experts", "top", "ff", "heads", "kv_heads", "vocab")
        )
    )
    ids = read_ids(options.ids)
    trainer = Trainer(shape, ids, options)
    n = sum(weight.numel() for weight in trainer.weights.values())
    print(
        f"{n / 1e6:.1f} M parameters, {len(ids) / 1e6:.2f} M tokens, torch {torch.__version__} on {trainer.device}",
        flush=True,
    )
    done = trainer.run()
    save(trainer.weights, shape, options.out, int(options.shard_mb * 1e6))
    kept = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    name = torch.cuda.get_device_name() if trainer.device == "cuda" else "cpu"
    done |= {"parameters": n, "corpus_tokens": len(ids), "device": name, "torch": torch.__version__, "options": kept}
    (options.out / "train.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    if options.tokenizer:
        for one in TOKENIZER:
            shutil.copy(options.tokenizer / one, options.out / one)
    print(json.dumps(done), flush=True)


def check(folder: Path, files: list[str], text: str | None, n_tokens: int) -> list[dict[str, Any]]:
    """Compare F32 logits of the model here with llama.cpp's, as checkpoint_check.py does with transformers."""
    import tokenizers
    from checkpoint_check import compare

    from edge_speq.convert.evaluation import reader

    weights, shape = load(folder)
    encoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        found: list[int] = encoder.encode(text, add_special_tokens=add_special_tokens).ids
        return found

    tokenizer = SimpleNamespace(encode=encode)
    read = reader.read_text(text)
    return [
        compare(lambda ids: SimpleNamespace(logits=forward(weights, shape, ids)[0]), tokenizer, file, read, n_tokens)
        for file in files
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("prepare", help="text files to token ids, .npy or .npy.xz")
    one.add_argument("files", type=Path, nargs="+")
    one.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    one.add_argument("--tokens", type=int, default=10_000_000, help="in all (%(default)s)")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("-o", "--out", type=Path, required=True)
    two = verbs.add_parser("train", help="token ids to a Hugging Face checkpoint")
    two.add_argument("ids", type=Path)
    two.add_argument("-o", "--out", type=Path, required=True, help="folder of the checkpoint")
    two.add_argument("--seconds", type=float, default=75.0, help="of training (%(default)s)")
    two.add_argument("--step-log", type=int, default=10**9, help="most steps")
    shape = Shape()
    for name in ("d_model", "layers", "experts", "top", "ff", "heads", "kv_heads", "vocab"):
        two.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(shape, name), help="%(default)s")
    two.add_argument("--batch", type=int, default=32, help="sequences a step (%(default)s)")
    two.add_argument("--length", type=int, default=512, help="tokens of a sequence (%(default)s)")
    two.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (%(default)s)")
    two.add_argument("--decay", type=float, default=0.1, help="weight decay (%(default)s)")
    two.add_argument("--balance", type=float, default=2e-3, help="weight of the balancing loss (%(default)s)")
    two.add_argument("--first-balance", type=float, default=5e-2, help="its weight at the start (%(default)s)")
    two.add_argument("--every", type=float, default=5.0, help="seconds between two lines (%(default)s)")
    two.add_argument("--device", help="cuda or cpu (default: cuda if there is a GPU)")
    two.add_argument("--threads", type=int, default=0, help="on the CPU (torch's own number)")
    two.add_argument("--seed", type=int, default=1)
    two.add_argument("--shard-mb", type=float, default=15.0, help="most megabytes of a file (%(default)s)")
    two.add_argument("--tokenizer", type=Path, help="a checkpoint whose tokenizer files are copied")
    three = verbs.add_parser("check", help="logits of a converted GGUF against the checkpoint's")
    three.add_argument("checkpoint", type=Path)
    three.add_argument("gguf", nargs="+")
    three.add_argument("--text", help="a text file (the prompts that come with edge_speq)")
    three.add_argument("--tokens", type=int, default=2048, help="most tokens to compare (%(default)s)")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.verb == "prepare":
        prepare(given.files, given.tokenizer, given.out, given.tokens, given.seed)
    elif given.verb == "train":
        train(given)
    else:
        for row in check(given.checkpoint, given.gguf, given.text, given.tokens):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
