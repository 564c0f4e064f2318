"""Convert Hugging Face checkpoints to GGUF with llama.cpp's converter in a child process, then quantize.

The patched llama-cpp-python includes the converter of the pinned llama.cpp as data (native/edge_build.py). Its
requirements (torch, transformers, ...) are the extra `convert`; only the child process imports them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from edge_speq import progress as watch
from edge_speq.convert.huggingface import hf_child
from edge_speq.convert.quantization import quantize
from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic
from edge_speq.gguf import model as gguf_model
from edge_speq.progress import Progress, silent
from edge_speq.system import install_hint

OWN_TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")  # types that the converter writes
PACKAGES = ("torch", "transformers", "safetensors", "sentencepiece", "yaml", "tqdm", "requests")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True, slots=True)
class ConvertResult:
    n_bytes: int
    pre: str | None = None  # llama.cpp's name of the pre-tokenizer, if any
    pre_by: str | None = None  # source of the name: "known", "definition" or "option"
    probe_agrees: bool | None = None  # llama.cpp tokenizes hf_child.PROBE as the checkpoint's tokenizer does
    outcome: quantize.QuantizeOutcome | None = None


@dataclass(slots=True)
class _Told:
    """Messages of the child process."""

    n_bytes: int = 0
    tokenizer: dict[str, Any] = field(default_factory=dict)


def convert(
    folder: str | Path,
    out: str | Path,
    recipe: quantize.Recipe | None,
    outtype: str,
    *,
    pre: str | None = None,
    name: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
    quantizing: Progress = silent,
) -> ConvertResult:
    """Convert a checkpoint to `outtype`, one of OWN_TYPES, and quantize the result if there is a recipe.

    With a recipe, the unquantized file is temporary. Raises EdgeError if the converter or the quantization fails.
    """
    model, converter = _checked(Path(folder)), converter_folder()
    sources = [path for path in model.iterdir() if path.is_file()]
    target = atomic.check(out, force, sources=sources)
    order = {"converter": str(converter), "model": str(model), "outtype": outtype, "pre": pre, "name": name}
    if recipe is None and not dry_run:
        with atomic.output(out, force, sources=sources) as temporary:
            return _convert(order, temporary, target, progress)
    with atomic.scratch(target) as whole:
        made = _convert({**order, "dry_run": dry_run}, whole, target, progress)
        if recipe is None:
            atomic.require_free(target, made.n_bytes)
            return made
        outcome = quantize.plan(whole, recipe)
        if dry_run:
            atomic.require_free(target, made.n_bytes + outcome.n_bytes)
        else:
            with atomic.output(out, force, sources=sources, expected_bytes=outcome.n_bytes) as temporary:
                quantize.run(whole, temporary, recipe, outcome, quantizing, target)
    return ConvertResult(outcome.n_bytes, made.pre, made.pre_by, made.probe_agrees, outcome)


def intermediate(folder: str | Path) -> str:
    """Return the lossless outtype for the dtype in the checkpoint's config, "auto" if it is unknown."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "auto"
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    kind = config.get("dtype") or config.get("torch_dtype") or inner.get("dtype") or inner.get("torch_dtype")
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(str(kind), "auto")


def converter_folder() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EdgeError("llama-cpp-python is not installed", "pip install ./native .")
    folder = Path(spec.origin).parent / "_convert"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        message = "the installed llama-cpp-python does not carry llama.cpp's converter"
        raise EdgeError(message, "install the patched build again: pip install ./native .")
    return folder


def _checked(folder: Path) -> Path:
    if getattr(sys, "frozen", False):  # there is no interpreter for the child
        raise EdgeError("a frozen application cannot run llama.cpp's converter", "use an installed edge-speq")
    if not folder.is_dir():
        raise EdgeError(f"there is no folder {folder}", "give the folder of a Hugging Face checkpoint", usage=True)
    if not any((folder / name).is_file() for name in ("config.json", "params.json")):
        raise EdgeError(f"{folder} holds no config.json", "give the folder of a Hugging Face checkpoint", usage=True)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgeError(f"llama.cpp's converter needs {', '.join(missing)}", install_hint("convert"))
    return folder.resolve()


def _convert(order: dict[str, Any], temporary: Path, target: Path, progress: Progress) -> ConvertResult:
    if {"{", "}"} & set(target.name):
        message = f"llama.cpp's converter takes the name {target.name} for a template"
        raise EdgeError(message, "give a name without braces", usage=True)
    told = _run({"dry_run": False, **order, "out": str(temporary)}, temporary, target, progress)
    gguf_model.check_model(temporary)
    if temporary.stat().st_size != told.n_bytes:
        raise EdgeError(f"the converter wrote {temporary.stat().st_size} bytes and had announced {told.n_bytes}")
    tokenizer = told.tokenizer
    if not tokenizer:
        return ConvertResult(told.n_bytes)
    agrees = tokenize(temporary, hf_child.PROBE) == tokenizer["probe"]
    if not agrees and tokenizer["by"] != "known":
        message = (
            f"llama.cpp's pre-tokenizer {tokenizer['pre']} tokenizes a text differently from the checkpoint's tokenizer"
        )
        raise EdgeError(message, "name another one with --pre", usage=tokenizer["by"] == "option")
    return ConvertResult(told.n_bytes, tokenizer["pre"], tokenizer["by"], agrees)


def tokenize(path: Path, text: str) -> list[int]:
    """Return the tokens of a text with llama.cpp, loading only the file's vocabulary."""
    import llama_cpp

    from edge_speq import _native
    from edge_speq.runtime import loading

    _native.load_backends()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with contextlib.closing(loading.load_model(path, params, "converted model")) as model:
        return [int(token) for token in model.tokenize(text.encode(), False, False)]


def _run(order: dict[str, Any], temporary: Path, target: Path, progress: Progress) -> _Told:
    told, ended = _Told(), False
    with tempfile.TemporaryFile() as log, _child(order, log) as child, contextlib.ExitStack() as watching:
        assert child.stdout is not None
        for line in child.stdout:
            result = json.loads(line)
            if "n_bytes" in result:
                told.n_bytes = int(result["n_bytes"])
                if not order["dry_run"]:
                    atomic.require_free(target, told.n_bytes)
                watching.enter_context(watch.growth(temporary, told.n_bytes, progress))
            elif "tokenizer" in result:
                told.tokenizer = result["tokenizer"]
            elif "missing" in result:
                raise EdgeError(f"llama.cpp's converter needs {result['missing']}", install_hint("convert"))
            elif "error" in result:
                atomic.require_space(temporary, target)
                raise EdgeError(f"llama.cpp's converter failed: {result['error']}", "its log has more: --verbose")
            ended = ended or "done" in result
        status = child.wait()
    if not ended:
        atomic.require_space(temporary, target)
        raise EdgeError(f"llama.cpp's converter ended with status {status}", "it may have run out of memory")
    return told


@contextlib.contextmanager
def _child(order: dict[str, Any], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the converter's process, and kill it after the block. Its log goes to stderr if logging is verbose."""
    shown = logging.getLogger("edge_speq").isEnabledFor(logging.DEBUG)
    package = str(Path(hf_child.__file__).parents[3])
    inherited = os.environ.get("PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"}
    environment |= {**OFFLINE, "PYTHONPATH": os.pathsep.join([package, inherited] if inherited else [package])}
    command = [sys.executable, "-m", hf_child.__name__, json.dumps(order)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if shown else log,
        env=environment,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                stream.close()
