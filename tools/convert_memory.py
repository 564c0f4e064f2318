"""Peak memory of the verbs of `edge-speq convert`, beside two of the model's largest tensors: a table.

    python tools/convert_memory.py --scratch FOLDER --json convert_memory.json        # ten minutes, 4 GB on disk

The model has the shape of Mixtral-8x7B, one layer and random Q4_0 weights (inflate_model.py); the checkpoint of `hf` is
tests/support/tiny_checkpoint.py's, widened. Each verb runs in a process of its own. Of each it says:

resident    VmHWM, the kernel's own peak of all pages, pages of mapped files among them (`hf`: sum of two processes)
anonymous   RssAnon, the pages that are the program's own, sampled: what lives shorter than the period may be missed

The verdict is on "peak RSS bounded by two tensors": "yes"; "mapped" where only pages of mapped files exceed it, which
the kernel may drop at any time; "no" where the program's own pages do. The largest tensor is that of the files read; of
a checkpoint, the merged experts of a layer. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inflate_model

from edge_speq.gguf import container as gguf_file

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "tests" / "support" / "tiny_checkpoint.py"
PERIOD = 0.004  # seconds between samples
FIELDS = re.compile(rb"^(VmHWM|RssAnon|RssFile):\s+(\d+) kB", re.MULTILINE)
TOKENS = 512  # one window, the most that is held at a time; `draft` compares on the first half of the text only
# of the checkpoint, whose matrices must be square: F32 experts of 268 MB a tensor once merged
MERGED = {"HIDDEN": 2048, "EXPERT": 2048, "EXPERTS": 16, "LAYERS": 2}


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes. Of a process and its descendants together."""

    resident: int
    anonymous: int
    mapped: int  # of files
    seconds: float


@dataclass(frozen=True, slots=True)
class Verb:
    """A command line after `edge-speq convert`, and the file that it writes, if it does."""

    arguments: tuple[str, ...]
    made: Path | None = None
    keep: bool = False  # a later verb reads it


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one verb, in bytes."""

    command: str
    read_bytes: int
    written_bytes: int
    largest_tensor: int
    peak: Peak

    @property
    def verdict(self) -> str:
        bound = 2 * self.largest_tensor
        if self.peak.resident <= bound:
            return "yes"
        return "mapped" if self.peak.anonymous <= bound else "no"

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "verdict": self.verdict}


# --- measuring -------------------------------------------------------------------------------------------


def watch(command: Sequence[str]) -> Peak:
    """Raises SystemExit where the command fails."""
    started, resident, anonymous, mapped = time.perf_counter(), 0, 0, 0
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=_environment())
        while child.poll() is None:
            found = [_status(pid) for pid in _family(child.pid)]
            resident = max(resident, sum(status.get("VmHWM", 0) for status in found))
            anonymous = max(anonymous, sum(status.get("RssAnon", 0) for status in found))
            mapped = max(mapped, sum(status.get("RssFile", 0) for status in found))
            time.sleep(PERIOD)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"error: {' '.join(command)}\n{log.read().decode(errors='replace')[-2000:]}")
    return Peak(resident, anonymous, mapped, time.perf_counter() - started)


def _environment() -> dict[str, str]:
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *inherited])}


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_bytes().split()
    except OSError:  # it has ended
        return [pid]
    return [pid, *(found for child in children for found in _family(int(child)))]


def _status(pid: int) -> dict[str, int]:
    """Bytes by field; nothing of a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return {}
    return {name.decode(): int(kilobytes) << 10 for name, kilobytes in FIELDS.findall(text)}


# --- what is converted -----------------------------------------------------------------------------------


def write_model(path: Path, n_layer: int, n_vocab: int) -> None:
    """n_vocab tokens: logits of a window are as many columns wide."""
    inflate_model.N_VOCAB = n_vocab
    inflate_model.write(path, n_layer, inflate_model.SHAPES["mixtral"])


def write_checkpoint(folder: Path) -> int:
    """Returns the bytes of a layer's merged experts."""
    spec = importlib.util.spec_from_file_location("tiny_checkpoint", CHECKPOINTS)
    assert spec is not None and spec.loader is not None
    tiny: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    for name, value in MERGED.items():
        setattr(tiny, name, value)
    tiny.write_checkpoint(folder)
    return 4 * MERGED["EXPERTS"] * MERGED["EXPERT"] * MERGED["HIDDEN"]


def write_text(path: Path) -> Path:
    """One window: a token a byte."""
    path.write_text(("It was late, and nobody had seen the boat come in. " * TOKENS)[:TOKENS], encoding="utf-8")
    return path


def verbs(scratch: Path, model: Path, text: Path) -> list[Verb]:
    """In an order in which each finds what it reads. The first reads headers only: the program alone."""
    source, reading = str(model), ("--text", str(text), "--tokens", str(TOKENS))
    made = {name: scratch / f"{name}.gguf" for name in ("quantized", "twin", "parts", "profiled", "packed", "matrix")}
    split = ("split", source, "--sub-experts", "4", "-o")
    twin = ("draft", source, "--type", "q2_k", "-o", str(made["twin"]))
    quantize = ("quantize", source, str(made["quantized"]), "--type", "q4_k_m")
    return [
        Verb((*quantize, "--dry-run")),
        Verb(("verify", source)),
        Verb((*split, str(made["parts"]), "--no-profile"), made["parts"]),
        Verb((*split, str(made["profiled"]), "--profile", str(text)), made["profiled"]),
        Verb(("pack", source, "-o", str(made["packed"])), made["packed"]),
        Verb(("imatrix", source, str(text), "-o", str(made["matrix"])), made["matrix"]),
        Verb((*twin, *reading), made["twin"], keep=True),
        Verb(("verify", source, str(made["twin"]), *reading)),
        Verb(quantize, made["quantized"]),
        Verb((*twin, "--experts-only", "--no-measure", "--force"), made["twin"]),
    ]


def checkpoint_verbs(scratch: Path, checkpoint: Path) -> list[Verb]:
    made = {kind: scratch / f"hf-{kind}.gguf" for kind in ("q8_0", "q4_k_m")}
    return [Verb(("hf", str(checkpoint), "-o", str(out), "--outtype", kind), out) for kind, out in made.items()]


# --- the report ------------------------------------------------------------------------------------------


def measure(verb: Verb, scratch: Path, largest: int = 0) -> Measured:
    """`largest`: bytes of a tensor that is in no file."""
    read = [path for path in map(Path, verb.arguments) if path.is_absolute() and path != verb.made and path.exists()]
    peak = watch([sys.executable, "-m", "edge_speq", "convert", *verb.arguments])
    tensors = [largest, *map(_largest, read)]
    written = verb.made.stat().st_size if verb.made else 0
    if verb.made and not verb.keep:
        verb.made.unlink()
    shown = " ".join(verb.arguments).replace(f"{scratch}/", "").replace(f"{ROOT}/", "")
    return Measured(shown, sum(map(_size, read)), written, max(tensors), peak)


def _largest(path: Path) -> int:
    if path.suffix != ".gguf":
        return 0
    return max(tensor.n_bytes for tensor in gguf_file.read(path).tensors.values())


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def row(found: Measured) -> str:
    def mb(n_bytes: int) -> str:
        return f"{n_bytes / 1e6:,.0f}"

    peak, tensor = found.peak, found.largest_tensor
    sizes = [mb(n) for n in (found.read_bytes, found.written_bytes, tensor, peak.resident, peak.anonymous)]
    ratios = [f"{n / tensor:.2f}" for n in (peak.resident, peak.anonymous)]
    return f"| `{found.command}` | {' | '.join([*sizes, *ratios, f'{peak.seconds:.0f}', found.verdict])} |"


def write_record(path: Path, n_layer: int, n_vocab: int, found: Sequence[Measured]) -> None:
    record = {
        "layers": n_layer,
        "vocab": n_vocab,
        "cpus": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "period_s": PERIOD,
        "verbs": [measured.to_dict() for measured in found],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


HEAD = """| verb | read, MB | written, MB | largest tensor, MB | resident, MB | anonymous, MB | resident / tensor \
| anonymous / tensor | s | two tensors |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder on a disk with 4 GB free")
    parser.add_argument("--layers", type=int, default=1, help="of the model (%(default)s)")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens of the model, Mixtral's by default")
    parser.add_argument("--only", metavar="REGEX", default="", help="only verbs whose command line it matches")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    found: list[Measured] = []

    def add(verb: Verb, largest: int = 0) -> None:
        if re.search(options.only, " ".join(verb.arguments)):
            found.append(measure(verb, scratch, largest))
            print(row(found[-1]), flush=True)
            if options.json:
                write_record(options.json, options.layers, options.vocab, found)

    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        print(HEAD, flush=True)
        model = scratch / "model.gguf"
        write_model(model, options.layers, options.vocab)
        for verb in verbs(scratch, model, write_text(scratch / "text.txt")):
            add(verb)
        for path in scratch.glob("*.gguf"):
            path.unlink()
        checkpoint = scratch / "checkpoint"
        merged = write_checkpoint(checkpoint)
        for verb in checkpoint_verbs(scratch, checkpoint):
            add(verb, merged)


if __name__ == "__main__":
    main()
