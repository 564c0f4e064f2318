"""The routed experts of a whole twin as a file of their own, as `edge-speq convert draft --experts-only` writes them.

    python tools/inflate.py models/tales-moe.gguf big.gguf --layers-times 8 ...
    python tools/inflate.py twin.gguf big-twin.gguf --layers-times 8 ...      # the same options
    python tools/twin_experts.py big.gguf big-twin.gguf -o big-experts.gguf

For twins that were not made by quantizing their target, which takes long where that is large. The two must have the
same routers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_speq.convert.quantization import draft
from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic, draft_experts, writer
from edge_speq.gguf import container as gguf_file
from edge_speq.gguf import model as gguf_model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("twin", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        target, twin = gguf_model.check_model(options.target), gguf_model.check_model(options.twin)
        if draft_experts.routers_hash(target) != draft_experts.routers_hash(twin):
            raise EdgeError(f"{options.twin} has other routers than {options.target}")
        keys = draft.keys(target, content="")
        with atomic.output(options.out, force=True) as temporary:
            writer.write(temporary, keys, draft.entries(gguf_file.read(options.twin)))
        draft_experts.read(gguf_file.read(options.out), target)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {options.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
