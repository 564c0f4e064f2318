"""edge-speq inspect: show what a GGUF file holds and whether it can be loaded. Reads only the header."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from typing import Any

from edge_speq.gguf.container import TOKENS, GGUFFile, Tensor
from edge_speq.gguf.model import EXPERTS, architecture, check_model, hyperparameter
from edge_speq.units import format_bytes

PARTS = ("gate", "up", "gate_up", "down")  # parts of one expert
ROLES = {"router": ("ffn_gate_inp.",), "attention": ("attn_",), "shared expert": ("shexp", "chexps")}
ROLES |= {"feed-forward": ("ffn_",), "embedding": ("token_embd", "output.")}


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show the contents of a GGUF file",
        description="Checks a GGUF file and shows its experts and types.",
    )
    p.add_argument("model", metavar="FILE", help="a GGUF file, the first one of a split model")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("-v", "--verbose", action="store_true", help="show the log")
    p.set_defaults(command=inspect)


def inspect(arguments: argparse.Namespace) -> int:
    summary = summarize(check_model(arguments.model))
    print(json.dumps(summary) if arguments.json else report(summary))
    return 0


def summarize(file: GGUFFile) -> dict[str, Any]:
    name, tokens = file.fields.get("general.name"), file.fields.get(TOKENS)
    types: dict[str, Counter[str]] = defaultdict(Counter)
    for tensor in file.tensors.values():
        types[role(tensor)][tensor.type] += tensor.n_bytes
    n_bytes = {kind: sum(counts.values()) for kind, counts in types.items()}
    return {
        "files": [str(path) for path in file.paths],
        "gguf_version": file.version,
        "size_bytes": file.size,
        "architecture": architecture(file) or None,
        "name": name.value if name is not None and isinstance(name.value, str) else None,
        "context_length": hyperparameter(file, "context_length"),
        "n_layer": hyperparameter(file, "block_count"),
        "n_vocab": tokens.count if tokens is not None else None,
        "n_tensors": len(file.tensors),
        "experts": {
            "n_expert": hyperparameter(file, "expert_count"),
            "n_expert_used": hyperparameter(file, "expert_used_count"),
            "total_bytes": n_bytes.pop("expert", 0),
            "groups": expert_groups(file),
        },
        "dense_bytes": sum(n_bytes.values()),
        "bytes_by_role_and_type": {kind: dict(counts.most_common()) for kind, counts in types.items()},
    }


def role(tensor: Tensor) -> str:
    if EXPERTS.fullmatch(tensor.name):
        return "expert"
    if len(tensor.ne) == 1:
        return "norm or bias"
    found = (kind for kind, marks in ROLES.items() if any(mark in tensor.name for mark in marks))
    return next(found, "other")


def expert_groups(file: GGUFFile) -> list[dict[str, Any]]:
    """Return groups of blocks whose experts agree in types and shapes, in the order of their first block."""
    blocks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for tensor in file.tensors.values():
        match = EXPERTS.fullmatch(tensor.name)
        if match and len(tensor.ne) == 3:
            blocks[match[1]][match[2]] = tensor
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for _, block in sorted(blocks.items(), key=lambda item: int(item[0])):
        parts = [(part, block[part]) for part in PARTS if part in block]
        group = groups.setdefault(
            tuple((part, tensor.type, tensor.ne) for part, tensor in parts),
            {
                "types": {part: tensor.type for part, tensor in parts},
                "n_blocks": 0,
                "n_experts": 0,
                "expert_bytes": sum(tensor.n_bytes // tensor.ne[2] for _, tensor in parts),
            },
        )
        group["n_blocks"] += 1
        group["n_experts"] += parts[0][1].ne[2]
    return list(groups.values())


def report(summary: dict[str, Any]) -> str:
    s, e = summary, summary["experts"]
    n_files = len(s["files"])
    lines = [
        f"model      {_printable(s['name'] or 'unnamed')}, architecture {s['architecture']}, {s['n_layer']} layers, "
        f"context {s['context_length']}, {s['n_vocab'] or 'no'} tokens in the vocabulary",
        f"file       {format_bytes(s['size_bytes'])} in {n_files} file{'s' * (n_files > 1)}, "
        f"GGUF v{s['gguf_version']}, {s['n_tensors']} tensors",
        f"dense      {format_bytes(s['dense_bytes'])}",
    ]
    if e["groups"]:
        used = f"{e['n_expert_used']} of {e['n_expert']} experts per token and block"
        lines.append(f"experts    {format_bytes(e['total_bytes'])}, {used}")
    for group in e["groups"]:
        types = ", ".join(f"{part} {kind}" for part, kind in group["types"].items())
        lines.append(
            f"           {group['n_blocks']} blocks with {format_bytes(group['expert_bytes'])} per expert: {types}"
        )
    for kind, counts in s["bytes_by_role_and_type"].items():
        types = ", ".join(f"{format_bytes(n_bytes)} {name}" for name, n_bytes in counts.items())
        lines.append(f"{'types' if kind == next(iter(s['bytes_by_role_and_type'])) else '':10} {kind}: {types}")
    return "\n".join(lines)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
