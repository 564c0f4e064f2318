"""Child process that runs llama.cpp's converter: `python -m edge_speq.convert.huggingface.hf_child ORDER`.

ORDER is a JSON object: `converter` (its folder), `model`, `out`, `outtype`, `pre` (a name or null), `name` (or null),
`dry_run`. stdout gets one JSON object per line: {"n_bytes": ..} before the data are written, {"tokenizer": ..}, and at
the end {"done": true}, {"missing": package} or {"error": message}. The process exits when stdin is closed, which
happens when its parent dies.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_speq.convert.huggingface.pretokenizer import recognize

# Text that the checkpoint's tokenizer and llama.cpp must tokenize alike: words, case, contractions, digits, spaces,
# line ends, punctuation, accents, scripts without spaces, emoji.
PROBE = (
    "Hello world, it's  a test; THEY'LL see 1234567 and 3.14!\n\n  Indented\ttabs \r\n x=y+1;//c\n"
    "Ça été naïve — „Größe“ Ёлка привет 你好，世界 こんにちは 한국어 שלום สวัสดี 🙂👍🏽 e\u0301 ...   end "
)


def main() -> None:
    order = json.loads(sys.argv[1])
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the converter's prints must not mix with the results

    def tell(**result: Any) -> None:
        results.write(json.dumps(result) + "\n")
        results.flush()

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run(order, tell)
        tell(done=True)
    except ModuleNotFoundError as error:
        tell(missing=error.name)
    except SystemExit as error:
        tell(error="the converter does not support this model" if error.code else "the converter gave up")
    except BaseException as error:
        traceback.print_exc()
        text = str(error).strip().splitlines()
        tell(error=f"{type(error).__name__}: {text[0] if text else 'no message'}")
    os._exit(0)


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def run(order: dict[str, Any], tell: Callable[..., None]) -> None:
    converter = Path(order["converter"])
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    base = importlib.import_module("conversion.base")
    _name_pre_tokenizer(base.TextModel, order["pre"], tell)
    _announce_size(base.ModelBase, order["dry_run"], tell)
    arguments = [order["model"], "--outfile", order["out"], "--outtype", order["outtype"]]
    if order["name"] is not None:
        arguments += ["--model-name", order["name"]]
    sys.argv = [str(converter / "convert_hf_to_gguf.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _name_pre_tokenizer(model: Any, named: str | None, tell: Callable[..., None]) -> None:
    """Wrap get_vocab_base_pre: use the user's name, or the converter's, or the one that the definition implies."""
    known = model.get_vocab_base_pre

    def pre(self: Any, tokenizer: Any) -> str:
        name, how = named, "option"
        if name is None:
            try:
                name, how = known(self, tokenizer), "known"
            except NotImplementedError:
                backend = getattr(tokenizer, "backend_tokenizer", None)
                name = recognize(json.loads(backend.to_str())) if backend is not None else None
                how = "definition"
        if name is None:
            raise ValueError("its pre-tokenizer is not known; name one with --pre")
        tell(tokenizer={"pre": name, "by": how, "probe": tokenizer.encode(PROBE, add_special_tokens=False)})
        return str(name)

    model.get_vocab_base_pre = pre


def _announce_size(model: Any, dry_run: bool, tell: Callable[..., None]) -> None:
    """Wrap write, to report the size of the file before the tensor data are written.

    A dry run writes the header and leaves a hole for the data.
    """

    def write(self: Any) -> None:
        self.prepare_tensors()
        self.prepare_metadata(vocab_only=False)
        writer = self.gguf_writer
        writer.write_header_to_file(path=self.fname_out)
        writer.write_kv_data_to_file()
        (file,) = writer.fout
        tensors = [item for shard in writer.tensors for item in shard.items()]
        # header entry: name, dimensions, type and offset
        entries = sum(8 + len(name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8 for name, tensor in tensors)
        n_bytes = writer.ggml_pad(file.tell() + entries, writer.data_alignment)
        n_bytes += sum(writer.ggml_pad(tensor.nbytes, writer.data_alignment) for _, tensor in tensors)
        tell(n_bytes=n_bytes)
        if dry_run:
            writer.write_ti_data_to_file()
            file.truncate(n_bytes)
        else:
            writer.write_tensors_to_file(progress=False)
        writer.close()

    model.write = write


if __name__ == "__main__":
    main()
