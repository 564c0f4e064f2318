"""Check the project's prose: banned turns of phrase, references that nobody can follow, sentences that are too long.

    python tools/prose_lint.py [FILE or FOLDER ...]  # without arguments the whole repository

Reads Markdown, and comments and strings of Python and C++ files. prose_banned.txt lists the phrases. Prints
"file:line: phrase -> suggestion" for every finding and a count per folder; exits with 1 if there are findings.
"""

from __future__ import annotations

import ast
import collections
import io
import os
import re
import sys
import tokenize
from bisect import bisect
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("*.md", "docs", "models", "edge_speq", "benchmarks", "examples", "tools", "native/src", "native/include")
MAX_WORDS = 40  # of a sentence in Markdown
MIN_WORDS = 3  # shorter strings are names, formats and keys
CODE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`[^`\n]+`|\]\([^)]*\)|<https?:[^>]*>|<!--.*?-->", re.DOTALL)
BLOCK_START = re.compile(r"\s*(?:[-*+] |\d+\. |#+ |> |$)")
CPP = re.compile(r"'\\?.'" r'|"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
Block = list[tuple[int, str]]  # the lines of one text, with their numbers


def banned() -> list[tuple[re.Pattern[str], str]]:
    text = Path(__file__).with_name("prose_banned.txt").read_text(encoding="utf-8")
    pairs = re.findall(r"^(?!#)(.+) => (.+)$", text, re.MULTILINE)
    return [(re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE), instead) for pattern, instead in pairs]


def numbered(text: str, first: int = 1) -> Block:
    return [(first + i, line.strip(" \t*")) for i, line in enumerate(text.split("\n"))]


def joined(lines: Iterable[tuple[int, str]]) -> Iterator[Block]:  # those on consecutive lines
    for _, group in groupby(enumerate(lines), lambda pair: pair[1][0] - pair[0]):
        yield [line for _, line in group]


def markdown(text: str) -> Iterator[Block]:
    """Yield paragraphs, list items and table cells, without code and link targets."""
    text = CODE.sub(lambda found: "\n" * found[0].count("\n"), text)
    text = INLINE.sub(lambda found: "x" + "\n" * found[0].count("\n"), text)
    block: Block = []
    for number, line in enumerate(text.split("\n"), 1):
        is_row = line.lstrip().startswith("|")
        if is_row or BLOCK_START.match(line):
            yield block
            block = []
        if is_row:
            yield from ([(number, cell.strip())] for cell in line.strip().strip("|").split("|"))
        elif not line.startswith("#"):
            block.append((number, line.strip()))
    yield block


def python(text: str) -> Iterator[Block]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    yield from joined((t.start[0], t.string.lstrip("#! ")) for t in tokens if t.type == tokenize.COMMENT)
    nodes = list(ast.walk(ast.parse(text)))
    inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part != node}
    for node in nodes:
        said = ""
        if isinstance(node, ast.JoinedStr):
            said = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            said = node.value
        if isinstance(node, ast.expr) and len(said.split()) >= MIN_WORDS:
            yield numbered(said, node.lineno)


def cpp(text: str) -> Iterator[Block]:
    found = ((found[0], text.count("\n", 0, found.start()) + 1) for found in CPP.finditer(text))
    texts = ((said, first) for said, first in found if said[0] == "/" or len(said.split()) >= MIN_WORDS)
    yield from joined(line for said, first in texts for line in numbered(said.strip('"/* '), first))


READERS = {".md": markdown, ".py": python, ".cpp": cpp, ".h": cpp}


def findings(block: Block, phrases: list[tuple[re.Pattern[str], str]], is_doc: bool) -> Iterator[tuple[int, str]]:
    text = " ".join(line for _, line in block)
    ends = list(accumulate(len(line) + 1 for _, line in block))
    found = [(hit.start(), f"{hit[0]} -> {instead}") for phrase, instead in phrases for hit in phrase.finditer(text)]
    for sentence in re.finditer(r"\S.*?(?:[.!?](?= |$)|$)", text) if is_doc else ():
        if (words := len(re.findall(r"[A-Za-z][\w'’-]*", sentence[0]))) > MAX_WORDS:
            found.append((sentence.start(), f"{sentence[0][:40]}... -> {words} words: split it, {MAX_WORDS} at most"))
    yield from ((block[bisect(ends, offset)][0], said) for offset, said in sorted(found))


def files(names: list[str]) -> Iterator[Path]:
    for path in [Path(name) for name in names] or [path for place in PLACES for path in sorted(ROOT.glob(place))]:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (each for each in found if each.suffix in READERS)


def main() -> int:
    phrases, counts = banned(), collections.Counter[str]()
    for path in files(sys.argv[1:]):
        shown = Path(os.path.relpath(path, ROOT))
        for block in READERS[path.suffix](path.read_text(encoding="utf-8")):
            for line, text in findings(block, phrases, path.suffix == ".md"):
                counts[shown.parent.as_posix()] += 1
                print(f"{shown.as_posix()}:{line}: {text}")
    print(*(f"{count:5} in {folder}" for folder, count in sorted(counts.items())), sep="\n", file=sys.stderr)
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
