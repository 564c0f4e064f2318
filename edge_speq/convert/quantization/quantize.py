"""Quantize a GGUF file with llama_model_quantize, and compute the tensor types and the exact file size in advance.

llama.cpp's dry run decides the types: it knows the mixes, and its fallbacks for rows that do not divide into blocks.
The file size follows from the types.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_speq import _native
from edge_speq import progress as watch
from edge_speq._native.log import captured
from edge_speq.convert.quantization import types
from edge_speq.convert.quantization.imatrix import Importance
from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic, container, layout
from edge_speq.gguf import model as gguf_model
from edge_speq.gguf.container import DEFAULT_ALIGNMENT, GGUFFile
from edge_speq.progress import Progress, silent

SLAB_BYTES = 128 << 20  # bytes of rows that llama.cpp holds at a time, as source, F32 and quantized
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
NUMBERS = ("general.quantization_version", "general.file_type")  # written into every quantized file
# line of the dry run: [ 3/ 91] NAME - [ne...], type = OLD, size = .. MiB -> .. MiB (NEW)
_LINE = re.compile(
    r"\[ *\d+/ *\d+\] (\S+) +- \[[^\]]*\], type = +(\w+), +size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A file type, and types by tensor: pairs of a pattern to search in the name and a type; the first match counts."""

    ftype: int
    overrides: tuple[tuple[str, str], ...] = ()
    importance: Importance | None = None
    importance_name: str = ""  # written into the file
    pure: bool = False  # no mix: every tensor gets the file type's main type
    texts: dict[str, str] = field(default_factory=dict)  # string keys of the file, 127 bytes at most


@dataclass(frozen=True, slots=True)
class QuantizeOutcome:
    """Result of a quantization, computed in advance."""

    n_bytes: int
    types: dict[str, str]  # type of every tensor
    fell_back: int  # tensors whose rows do not divide into blocks of the requested type
    bytes_by_type: dict[str, int]


def plan(source: str | Path, recipe: Recipe) -> QuantizeOutcome:
    """Return the types and size of the output; reads headers only.

    Raises EdgeError if the source cannot be quantized, or if a required importance matrix is missing.
    """
    file = gguf_model.check_model(source)
    _require_patterns(file, recipe)
    log = _call(Path(source), None, file, recipe)
    found = {match[1]: (match[3] or match[2]) for match in _LINE.finditer(log)}
    if found.keys() != file.tensors.keys():
        raise AssertionError(f"the dry run's log names {len(found)} of {len(file.tensors)} tensors")
    if recipe.importance is None and "will require an imatrix" in log:
        hint = "make one: edge-speq convert imatrix MODEL TEXT -o FILE, then --imatrix FILE"
        raise EdgeError("this type needs an importance matrix", hint, usage=True)
    sizes, total = Counter[str](), _header_bytes(file, recipe)
    for name, kind in found.items():
        tensor, number = file.tensors[name], types.number(kind)
        rows = 1
        for n in tensor.ne[1:]:
            rows *= n
        n_bytes = rows * types.row_bytes(number, tensor.ne[0])
        sizes[kind.lower()] += n_bytes
        total += layout.padded(n_bytes, DEFAULT_ALIGNMENT)
    fell_back = log.count("falling back to")
    return QuantizeOutcome(
        total, {name: kind.lower() for name, kind in found.items()}, fell_back, dict(sizes.most_common())
    )


def quantize(
    source: str | Path, out: str | Path, recipe: Recipe, *, force: bool = False, progress: Progress = silent
) -> QuantizeOutcome:
    """Write and check the quantized file. Raises EdgeError if the source cannot be quantized or the disk is full."""
    atomic.check(out, force, sources=gguf_model.check_model(source).paths)
    expected = plan(source, recipe)
    sources = gguf_model.check_model(source).paths
    with atomic.output(out, force, sources=sources, expected_bytes=expected.n_bytes) as temporary:
        run(source, temporary, recipe, expected, progress, out)
    return expected


def run(
    source: str | Path, temporary: Path, recipe: Recipe, expected: QuantizeOutcome, progress: Progress, out: str | Path
) -> None:
    """Quantize into a temporary file. `out` is the final output, named in errors only."""
    file = gguf_model.check_model(source)
    with watch.growth(temporary, expected.n_bytes, progress):
        _call(Path(source), temporary, file, recipe, out)
    written = temporary.stat().st_size
    if written != expected.n_bytes:
        atomic.require_space(temporary, out)
        raise EdgeError(f"llama.cpp wrote {written} bytes, not the {expected.n_bytes} that were expected")
    container.read(temporary, "quantized model")


def recipe(
    ftype: str,
    tensor_types: Sequence[str] = (),
    experts: str | None = None,
    layers: dict[int, str] | None = None,
    **options: Any,
) -> Recipe:
    """Return the Recipe of command-line options: `PATTERN=TYPE` first, then expert types by layer, then of all experts.

    Raises EdgeError for unknown types and invalid patterns.
    """
    overrides = []
    for text in tensor_types:
        pattern, equals, kind = text.rpartition("=")
        if not equals or not pattern:
            raise EdgeError(f"{text!r} is not PATTERN=TYPE", "write it like attn_v=q6_k", usage=True)
        types.tensor_type(kind)
        try:
            re.compile(pattern)
        except re.error as error:
            message = f"{pattern!r} is not a pattern: {error}"
            raise EdgeError(message, "give a regular expression", usage=True) from error
        overrides.append((pattern, kind))
    for layer, kind in sorted((layers or {}).items()):
        overrides.append((experts_of(layer), kind))
    if experts is not None:
        types.tensor_type(experts)
        overrides.append((experts_of(), experts))
    if ftype.lower() in types.FLOATS and overrides:
        message = f"llama.cpp uses tensor types only in quantized files, not in {ftype}"
        raise EdgeError(message, "give a quantized --type, such as q8_0", usage=True)
    return Recipe(types.ftype(ftype), tuple(overrides), **options)


def experts_of(block: int | None = None) -> str:
    """Return the pattern of the routed experts of one block, or of all blocks."""
    number = "[0-9]+" if block is None else str(block)
    return rf"^blk\.{number}\.ffn_(up|gate|down|gate_up)_exps\.weight$"


def _require_patterns(file: GGUFFile, recipe: Recipe) -> None:
    for pattern, _ in recipe.overrides:
        if not any(re.search(pattern, name) for name in file.tensors):
            message = f"no tensor of {file.paths[0]} has a name like {pattern!r}"
            raise EdgeError(message, "edge-speq convert verify FILE --json lists the names", usage=True)


def _header_bytes(file: GGUFFile, recipe: Recipe) -> int:
    """Return the header bytes of llama.cpp's output: the source's keys without split.* keys, and the added keys."""
    first = min(tensor.offset for tensor in file.tensors.values() if tensor.file == file.paths[0])
    n_bytes = first
    starts = sorted((entry.offset - 8 - len(key.encode()), key) for key, entry in file.fields.items())
    ends = [start for start, _ in starts[1:]] + [first]
    replaced = {**_texts(recipe), **_numbers(file, recipe)}
    for (start, key), end in zip(starts, ends, strict=True):
        if key in SPLIT_KEYS or key in replaced or key in NUMBERS:
            n_bytes -= end - start
    n_bytes += sum(8 + len(key.encode()) + 4 + 4 for key in {*NUMBERS, *_numbers(file, recipe)})
    n_bytes += sum(8 + len(key.encode()) + 4 + 8 + len(text) for key, text in _texts(recipe).items())
    for tensor in file.tensors.values():
        n_dims = max((i + 1 for i, n in enumerate(tensor.ne) if n > 1), default=1)
        n_bytes += layout.entry_bytes(tensor, n_dims)
    return layout.padded(n_bytes, DEFAULT_ALIGNMENT)


def _texts(recipe: Recipe) -> dict[str, bytes]:
    found = {key: text.encode()[:127] for key, text in recipe.texts.items()}
    if recipe.importance is not None:
        found["quantize.imatrix.file"] = recipe.importance_name.encode()[:127]
    return found


def _numbers(file: GGUFFile, recipe: Recipe) -> dict[str, int]:
    found = {}
    if layout.alignment(file) != DEFAULT_ALIGNMENT:
        found["general.alignment"] = DEFAULT_ALIGNMENT  # llama.cpp ignores the key when it pads
    if recipe.importance is not None:
        found["quantize.imatrix.entries_count"] = len(recipe.importance.sums)
        found["quantize.imatrix.chunks_count"] = recipe.importance.chunks
    return found


def _call(source: Path, out: Path | None, file: GGUFFile, recipe: Recipe, target: str | Path = "") -> str:
    """Call llama_model_quantize, as a dry run without `out`. Return its log; raises EdgeError with its reason."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.allow_requantize = recipe.ftype, recipe.pure, True
    params.dry_run, params.max_buf_size = out is None, SLAB_BYTES
    keep_alive = [_set_types(params, recipe), _set_keys(params, file, recipe), _set_importance(params, recipe)]
    _native.load_backends()
    with captured() as log:
        status = llama_cpp.llama_model_quantize(_path(source), _path(out or source), ctypes.byref(params))
    del keep_alive
    if status:
        if out is not None:
            atomic.require_space(out, target)
        reason = re.findall(r"failed to quantize: (.+)", log.text)
        raise EdgeError(f"llama.cpp cannot quantize {source}: {reason[-1] if reason else 'it gives no reason'}")
    return log.text


def _path(path: Path) -> bytes:
    return str(path).encode()


def _set_types(params: Any, recipe: Recipe) -> Any:
    import llama_cpp

    array = (llama_cpp.llama_model_tensor_override * (len(recipe.overrides) + 1))()  # an empty entry ends the list
    for slot, (pattern, kind) in zip(array, recipe.overrides, strict=False):
        slot.pattern, slot.type = pattern.encode(), types.number(kind)
    params.tt_overrides = array
    return array


def _set_keys(params: Any, file: GGUFFile, recipe: Recipe) -> Any:
    import llama_cpp

    numbers, texts = _numbers(file, recipe), _texts(recipe)
    array = (llama_cpp.llama_model_kv_override * (len(numbers) + len(texts) + 1))()  # an empty key ends the list
    for slot, (key, value) in zip(array, [*numbers.items(), *texts.items()], strict=False):
        slot.key = key.encode()
        if isinstance(value, int):
            slot.tag, slot.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            slot.tag, slot.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value
    if len(array) > 1:
        params.kv_overrides = array
    return array


def _set_importance(params: Any, recipe: Recipe) -> Any:
    import llama_cpp

    if recipe.importance is None:
        return None
    means = recipe.importance.means()
    array = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    for slot, (name, values) in zip(array, means.items(), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = array
    return array, means
