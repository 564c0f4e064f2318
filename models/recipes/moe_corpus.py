"""Make training text for train_moe.py from public packages, in the four classes of the prompts.

    mkdir debs && cd debs && apt-get download r-cran-janeaustenr sword-text-web wordnet-base dict-jargon dict-devil \\
        python3.11-doc rust-doc && for deb in *.deb; do dpkg -x $deb ../root; done && cd ..
    python models/recipes/moe_corpus.py --packages root --held-out tests/data/prompts/*.jsonl -o corpus

Writes corpus/{prose,code,chat,textbook}.txt, documents separated by <|endoftext|>. Code comes from
the running Python's standard library and those packages of CODE that are installed. Dialogues are made of the other
classes and of WordNet.
Licences: novels of Jane Austen, World English Bible, Jargon File and Devil's Dictionary, public domain; WordNet's own,
permissive; Python and its documentation, PSF; Rust's books, MIT or Apache-2.0; packages BSD, MIT or Apache-2.0.
Documents that share a long line with held-out text are left out.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import html
import importlib.util
import json
import random
import re
import sys
import sysconfig
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

END = "<|endoftext|>"
CODE = ("sympy", "networkx", "numpy", "torch", "transformers", "pydantic", "starlette", "fastapi", "httpx", "rich")
LONG = 50  # characters of a line that is unlikely to occur twice by chance
COMMON = 5  # a line in more documents than these is boilerplate, licences for instance
MOST_FILE = 200_000  # bytes of a source file: larger ones are tables
STRING = b"\x00\x04\x00\x09", b"\x00\x08\x00\x09", b"\x00\x00\x00\x09"  # R's CHARSXP: ASCII, UTF-8, native


def novels(root: Path) -> Iterator[str]:
    """The character vectors of an R package's lazy-load database: zlib streams of R's serialization, one a novel."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")  # of the uncompressed object; the stream knows its own end
        stream = zlib.decompressobj()
        whole = stream.decompress(data[at + 4 :], size)
        at = len(data) - len(stream.unused_data)
        lines, place = [], 0
        while place + 8 <= len(whole):
            n = int.from_bytes(whole[place + 4 : place + 8], "big")
            if whole[place : place + 4] in STRING and n <= 200:
                lines.append(whole[place + 8 : place + 8 + n].decode("utf-8", "replace"))
                place += 8 + n
            else:
                place += 1
        text = unwrapped("\n".join(lines))
        yield from pieces(text, 20_000)


def bible(root: Path) -> Iterator[str]:
    """SWORD's zText: `bzs` holds offset and size of the zlib blocks of `bzz`, a book each, OSIS markup."""
    folder = root / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for part in ("ot", "nt"):
        index, data = (folder / f"{part}.bzs").read_bytes(), (folder / f"{part}.bzz").read_bytes()
        for at in range(0, len(index), 12):
            start, size = (int.from_bytes(index[at + i : at + i + 4], "little") for i in (0, 4))
            if not size:
                continue
            marked = zlib.decompress(data[start : start + size]).decode("utf-8", "replace")
            marked = re.sub(r"<note.*?</note>", "", marked, flags=re.DOTALL)
            paragraphs = re.split(r"<div[^>]*type=\"(?:x-p|section|chapter)\"[^>]*/?>", marked)
            plain = [" ".join(html.unescape(re.sub(r"<[^>]+>", " ", one)).split()) for one in paragraphs]
            yield from pieces("\n\n".join(re.sub(r" ([,.;:?!’”])", r"\1", one) for one in plain if one), 20_000)


def dictionaries(root: Path) -> Iterator[str]:
    for name in ("jargon", "devil"):
        packed = (root / f"usr/share/dictd/{name}.dict.dz").read_bytes()
        yield from pieces(textwrap.dedent(gzip.decompress(packed).decode("utf-8", "replace")), 8_000)


def books(root: Path) -> Iterator[str]:
    """Python's documentation (reStructuredText) and Rust's books (HTML)."""
    docs = root / "usr/share/doc"
    for path in sorted((docs / "python3.11/html/_sources").rglob("*.txt")):
        yield path.read_text(encoding="utf-8", errors="replace")
    for book in ("book", "reference", "nomicon", "rust-by-example", "edition-guide", "embedded-book"):
        for path in sorted((docs / "rust-doc/html" / book).rglob("*.html")):
            main = re.search(r"<main>(.*?)</main>", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
            if main and path.name != "print.html":
                marked = re.sub(r"</(?:p|h\d|pre|li)>", "\n\n", main[1])
                plain = html.unescape(re.sub(r"<[^>]+>", "", marked))
                yield re.sub(r"\n\s*\n+", "\n\n", plain).strip()


def code() -> Iterator[str]:
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for name in CODE:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            print(f"{name} is not installed: left out", file=sys.stderr)
        else:
            folders.append(Path(found.origin).parent)
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).parts
            if {"site-packages", "tests", "test", "idlelib"} & set(inside) or not 400 < path.stat().st_size < MOST_FILE:
                continue
            yield path.read_text(encoding="utf-8", errors="replace")


def turn(question: str, answer: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def definitions(root: Path, held_out: str) -> Iterator[str]:
    """Questions after words of WordNet, except for words that held-out text asks after."""
    asked = {word.lower() for word in re.findall(r"(?:Define|\bword|\bnoun|\bdoes) \"?(\w+)", held_out)}
    forms = "Define {}.", 'What does "{}" mean?', 'What is the meaning of the word "{}"?', 'Define the {} "{}".'
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / f"usr/share/wordnet/data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue
            head, gloss = line.split(" | ", 1)
            word = re.sub(r"\(\w+\)", "", head.split(" ")[4]).replace("_", " ")
            if word.lower() not in asked:
                form = random.choice(forms)
                question = form.format(*((part, word) if form.count("{}") == 2 else (word,)))
                yield turn(question, gloss.strip()[:1].upper() + gloss.strip()[1:] + ".")


def stories(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        paragraphs = [one for one in text.split("\n\n") if 80 < len(one) < 900]
        for first, second in zip(paragraphs[::5], paragraphs[1::5], strict=False):
            start = " ".join(re.split(r"(?<=[.?!]) ", first)[:2])
            yield turn(
                f"{random.choice(('Continue the story', 'Continue', 'Write what happens next'))}: {start}", second
            )


def functions(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in tree.body:
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if isinstance(node, ast.FunctionDef) and doc and len(doc) > 20:
                source = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
                first = " ".join(doc.split("\n\n")[0].split())[:200]
                asks = (
                    f"Write a Python function named {node.name}. {first}",
                    f"Write a Python function {node.name} with this purpose: {first}",
                )
                if len(source) < 2500:
                    yield turn(random.choice(asks), source)


def unwrapped(text: str) -> str:
    return "\n\n".join(" ".join(one.split()) for one in re.split(r"\n\s*\n", text) if one.strip())


def pieces(text: str, size: int) -> Iterator[str]:
    """Documents of about `size` characters, cut between paragraphs."""
    kept: list[str] = []
    for paragraph in text.split("\n\n"):
        kept.append(paragraph)
        if sum(map(len, kept)) > size:
            yield "\n\n".join(kept)
            kept = []
    if kept:
        yield "\n\n".join(kept)


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG}


def unseen(texts: list[str], held_out: set[str]) -> list[str]:
    """Without documents that share a line with held-out text, boilerplate aside."""
    shared = [long_lines(text) & held_out for text in texts]
    often = Counter(line for lines in shared for line in lines)
    return [text for text, lines in zip(texts, shared, strict=True) if all(often[line] > COMMON for line in lines)]


def read_held_out(paths: Iterable[Path]) -> str:
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [json.loads(line)["prompt"] for line in text.splitlines()] if path.suffix == ".jsonl" else [text]
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="the folder that the packages were unpacked into")
    parser.add_argument(
        "--held-out", type=Path, nargs="*", default=[], help="prompts (.jsonl) and texts to keep unseen"
    )
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    random.seed(1)
    root, held_out = arguments.packages, read_held_out(arguments.held_out)
    lines = long_lines(held_out)
    prose = unseen([*novels(root), *bible(root), *dictionaries(root)], lines)
    sources = unseen(list(code()), lines)
    random.shuffle(sources)
    chat = [*definitions(root, held_out), *stories(prose), *functions(sources)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, texts in {
        "prose": prose,
        "code": sources,
        "chat": chat,
        "textbook": unseen(list(books(root)), lines),
    }.items():
        random.shuffle(texts)
        whole = END.join(texts)
        (arguments.out / f"{name}.txt").write_text(whole, encoding="utf-8")
        print(f"{name}: {len(texts)} documents, {len(whole.encode()) / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
