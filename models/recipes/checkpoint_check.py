"""Compare GGUF files with the Hugging Face checkpoint they were made of, read by transformers in F32 on the CPU.

    pip install '.[convert]'
    python models/recipes/checkpoint_check.py CHECKPOINT model-f16.gguf model-q8_0.gguf

Tokens of a text must be equal. Logits are compared by NMSE and by the share of positions with the same top token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

import numpy as np

from edge_speq.convert.evaluation import reader


def compare(model: Any, tokenizer: Any, gguf: str, text: str, most: int) -> dict[str, Any]:
    """Raises SystemExit where the tokens differ."""
    import torch

    error = power = same = n = 0.0
    with contextlib.closing(reader.Reader(gguf)) as mine:
        tokens = mine.tokens(text)
        if tokenizer.encode(text, add_special_tokens=False) != [int(token) for token in tokens]:
            raise SystemExit(f"error: {gguf} reads other tokens than the checkpoint's tokenizer")
        for window in reader.windows(tokens, most):
            got = mine.logits(window).astype(np.float64)
            with torch.no_grad():
                ids = torch.tensor(window[None].astype(np.int64))
                wanted = model(ids).logits[0].double().numpy()
            error += ((got - wanted) ** 2).sum()
            power += (wanted**2).sum()
            same += (got.argmax(1) == wanted.argmax(1)).sum()
            n += len(window)
    return {"file": gguf, "n_tokens": int(n), "nmse": float(error / power), "same_top_token": float(same / n)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the folder of a Hugging Face checkpoint")
    parser.add_argument("gguf", nargs="+", help="what convert hf made of it")
    parser.add_argument("--text", help="a text file (the prompts that come with edge_speq)")
    parser.add_argument("--tokens", type=int, default=2048, help="most tokens to compare (%(default)s)")
    arguments = parser.parse_args()

    import torch
    import transformers

    causal: Any = transformers.AutoModelForCausalLM
    model = causal.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.checkpoint)
    text = reader.read_text(arguments.text)
    for gguf in arguments.gguf:
        print(json.dumps(compare(model, tokenizer, gguf, text, arguments.tokens)))


if __name__ == "__main__":
    main()
