"""The fuzzing campaign: mutants of every tiny architecture, the validator's verdict on each, and llama.cpp's end on
what it let through.

    python tests/attacks/fuzz.py --mutants 1000 --first-seed 0 --json findings.json [ARCHITECTURE...]

A finding is a mutant that the validator accepts and that then ends the process, hangs, asks for more than a gibibyte
or raises anything but EdgeError; or one on which the validator itself raises anything but GGUFError. `(architecture,
seed)` makes it again. Exit code 1 with findings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from attacks.bad_gguf import Parts
from attacks.mutants import mutant
from support import tiny_models

from edge_speq.gguf.container import GGUFError
from edge_speq.gguf.model import check_model

LOADER = Path(__file__).parent / "load_gguf.py"
BATCH = 100
KNOWN = ("Memory is not initialized",)  # llama_cpp's assertion on diffusion and embedding models: EdgeLlama's to mend
SIZES: dict[str, Any] = {"n_layer": 2, "n_expert": 8, "n_ff": 32}


@dataclass
class Campaign:
    n_mutants: int = 0
    n_accepted: int = 0
    n_decoded: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)


def original(arch: tiny_models.Arch, folder: Path) -> Parts:
    return Parts.of(tiny_models.write_tiny(folder / f"{arch}.gguf", arch, **SIZES))


def run(arch: tiny_models.Arch, seeds: range, folder: Path, campaign: Campaign) -> None:
    parts = original(arch, folder)
    accepted: dict[str, int] = {}
    for seed in seeds:
        campaign.n_mutants += 1
        path = folder / f"{arch}-{seed}.gguf"
        path.write_bytes(mutant(parts, seed))
        try:
            check_model(path)
            accepted[str(path)] = seed
        except GGUFError:
            path.unlink()
        except Exception:
            path.unlink()
            why = traceback.format_exc().strip().splitlines()
            campaign.findings.append({"arch": arch, "seed": seed, "status": "validator", "why": " ".join(why[-3:])})
        if len(accepted) == BATCH or (seed == seeds[-1] and accepted):
            load_all(arch, accepted, campaign)
            accepted = {}


def load_all(arch: str, accepted: dict[str, int], campaign: Campaign) -> None:
    done = subprocess.run([sys.executable, str(LOADER), *accepted], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    for path, (status, why) in json.loads(done.stdout).items():
        campaign.n_accepted += 1
        campaign.n_decoded += status == 0
        if status not in (0, 1) and not any(known in why for known in KNOWN):
            campaign.findings.append({"arch": arch, "seed": accepted[path], "status": status, "why": why})
        Path(path).unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=tiny_models.ARCHITECTURES)
    parser.add_argument("--mutants", type=int, default=1000, help="of each architecture (1000)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the findings")
    arguments = parser.parse_args()
    campaign = Campaign()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.mutants)
    for arch in arguments.architectures:
        start, before = time.monotonic(), (campaign.n_accepted, campaign.n_decoded, len(campaign.findings))
        with tempfile.TemporaryDirectory() as folder:
            run(arch, seeds, Path(folder), campaign)
        after = (campaign.n_accepted, campaign.n_decoded, len(campaign.findings))
        accepted, decoded, found = (b - a for a, b in zip(before, after, strict=True))
        seconds = time.monotonic() - start
        print(
            f"{arch}: {len(seeds)} mutants, {accepted} accepted, {decoded} decoded, {found} findings, {seconds:.0f} s"
        )
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(campaign.findings, indent=1))
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())
