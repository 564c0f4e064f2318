"""Peak memory of the verbs of `edge-speq convert`, beside two of the model's largest tensors.

The model has the shape of Mixtral-8x7B, one layer and random Q4_0 weights; the checkpoint of `hf` is that of
tests/support/tiny_checkpoint.py, widened. Verbs run one after the other, each in its own process. It notes:

resident    VmHWM, the kernel's own peak of all pages, pages of mapped files among them (`hf`: sum of two processes)
anonymous   RssAnon, the pages of the program itself, sampled: what lives shorter than the period may be missed

The verdict is on "peak RSS bounded by two tensors": "yes"; "mapped" if only pages of mapped files exceed it, which the
kernel may drop at any time; "no" if the program's own pages do. The largest tensor is that of the files read; of a
checkpoint, the merged experts of a layer. Ten minutes, 4 GB on disk, Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
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

from benchmarks import store
from benchmarks.registry import ROOT
from benchmarks.tables import markdown
from edge_speq.gguf import container as gguf_file

CHECKPOINTS = next((ROOT / "tests").rglob("tiny_checkpoint.py"))
RECIPE = ROOT / "models" / "recipes" / "inflate_model.py"
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
    """Run the command. Raise SystemExit if it fails."""
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
    """Logits of a window are n_vocab columns wide."""
    recipe = loaded(RECIPE)
    recipe.N_VOCAB = n_vocab
    recipe.write(path, n_layer, recipe.SHAPES["mixtral"])


def loaded(path: Path) -> Any:
    """A file as a module, which may import its neighbours."""
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def write_checkpoint(folder: Path) -> int:
    """Return the bytes of a layer's merged experts."""
    tiny = loaded(CHECKPOINTS)
    for name, value in MERGED.items():
        setattr(tiny, name, value)
    tiny.write_checkpoint(folder)
    return 4 * MERGED["EXPERTS"] * MERGED["EXPERT"] * MERGED["HIDDEN"]


def write_text(path: Path) -> Path:
    """One window: a token a byte."""
    path.write_text(("It was late, and nobody had seen the boat come in. " * TOKENS)[:TOKENS], encoding="utf-8")
    return path


def verbs(scratch: Path, model: Path, text: Path) -> list[Verb]:
    """In an order in which each finds its files. The first reads headers only, so it shows the program alone."""
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


def table(record: dict[str, Any]) -> str:
    headings = (
        "verb", "read, MB", "written, MB", "largest tensor, MB", "resident, MB", "anonymous, MB", "resident / tensor",
        "anonymous / tensor", "s", "two tensors",
    )  # fmt: skip
    return markdown(headings, [_cells(found) for found in record["verbs"]])


def _cells(found: dict[str, Any]) -> list[str]:
    peak, tensor = found["peak"], found["largest_tensor"]
    sizes = (found["read_bytes"], found["written_bytes"], tensor, peak["resident"], peak["anonymous"])
    ratios = [f"{n / tensor:.2f}" for n in (peak["resident"], peak["anonymous"])]
    shown = [f"{n / 1e6:,.0f}" for n in sizes]
    return [f"`{found['command']}`", *shown, *ratios, f"{peak['seconds']:.0f}", found["verdict"]]


def parser() -> argparse.ArgumentParser:
    made = store.parser(__doc__)
    made.add_argument("--scratch", type=Path, help="a folder on a disk with 4 GB free")
    made.add_argument("--layers", type=int, default=1, help="of the model (%(default)s)")
    made.add_argument("--vocab", type=int, default=32000, help="tokens of the model, Mixtral's by default")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch, found = Path(folder), list[Measured]()
        model = scratch / "model.gguf"
        write_model(model, options.layers, options.vocab)
        for verb in verbs(scratch, model, write_text(scratch / "text.txt")):
            found.append(measure(verb, scratch))
        for path in scratch.glob("*.gguf"):
            path.unlink()
        checkpoint = scratch / "checkpoint"
        merged = write_checkpoint(checkpoint)
        found += [measure(verb, scratch, merged) for verb in checkpoint_verbs(scratch, checkpoint)]
    record = {
        "layers": options.layers,
        "vocab": options.vocab,
        "cpus": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "period_s": PERIOD,
        "verbs": [measured.to_dict() for measured in found],
    }
    options.out.write_text(store.whole(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
