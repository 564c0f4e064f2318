"""Does `edge-speq serve` withstand its clients? Thousands of requests, good and bad, from many clients at once.

Starts the server in its own process, with a queue too short for all clients. Answers are compared with those of an
EdgeLlama in this process. Other requests are malformed, slow, half closed, given up. Between rounds, while the server
is idle, it notes the server's anonymous memory, descriptors and threads. Exit code 1: an answer that differs, a status
that was not expected, more memory than --limit MiB per 1,000 requests after the first rounds, any more descriptors or
threads, a server that complains or does not end when told to. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import store
from benchmarks.server_clients import CONTEXT, RESIDENT, TIMEOUT, Client, Expected
from benchmarks.soak import MIB, more_of, process_sample
from benchmarks.tables import markdown
from edge_speq.gguf import bundled as demo

ROUNDS = 10
WARMUP = 2  # of the rounds
QUEUE = 16  # fewer than clients, so that it is full now and then


@dataclass(frozen=True, slots=True)
class Sample:
    requests: int
    seconds: float
    anonymous_bytes: int
    descriptors: int
    threads: int


@dataclass(slots=True)
class Report:
    requests: int = 0
    clients: int = 0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)  # requests of each
    statuses: dict[str, int] = field(default_factory=dict)
    compared: int = 0  # answers with the library's
    samples: list[Sample] = field(default_factory=list)
    growth_mib_per_1000: float = 0.0
    exit_code: int | None = None
    problems: list[str] = field(default_factory=list)


class Process:
    """The server."""

    def __init__(self, model: str, draft: str | None) -> None:
        command = [sys.executable, "-m", "edge_speq", "serve", model, "--json", "--port", "0", "--queue", str(QUEUE)]
        command += ["--resident", RESIDENT, "-c", str(CONTEXT)] + (["--draft", draft] if draft else [])
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # see complaints
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the server did not start: {self.complaints()}")
        self.url: str = json.loads(line)["url"]

    def sample(self, requests: int, started: float) -> Sample:
        self._wait_until_idle()
        found = process_sample(Path("/proc", str(self._process.pid)))
        return Sample(requests, time.perf_counter() - started, *found)

    def _wait_until_idle(self) -> None:
        address = urlsplit(self.url)
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT)
            connection.request("GET", "/residency")
            busy = json.loads(connection.getresponse().read())["requests"]
            connection.close()
            time.sleep(0.3)
            if busy == {"served": 0, "waiting": 0}:
                return
        raise SystemExit("error: the server is still busy though no client is left")

    def complaints(self) -> list[str]:
        """Lines of its stderr that no client may cause; can be read once."""
        with self._log as log:
            log.seek(0)
            return [line.strip() for line in log if re.match(r"error|Traceback|Exception|\w*Error:", line)]

    def end(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=TIMEOUT)
            return self._process.returncode
        except subprocess.TimeoutExpired:
            self._process.kill()
            return -9


def _round(url: str, expected: Expected, n: int, n_clients: int, seed: int, report: Report) -> None:
    clients = [Client(url, expected, seed * 1000 + i) for i in range(n_clients)]
    left = iter(range(n))

    def work(client: Client) -> None:
        with contextlib.closing(client):
            while next(left, None) is not None:  # the iterator of a range is safe to share
                client.step()

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        report.kinds = dict(collections.Counter(report.kinds) + client.kinds)
        report.statuses = dict(collections.Counter(report.statuses) + client.statuses)
        report.compared += client.compared
        report.problems += client.problems
    report.requests += n


def soak(arguments: argparse.Namespace) -> Report:
    report, started = Report(clients=arguments.clients), time.perf_counter()
    expected = Expected(str(arguments.model), arguments.draft)
    server = Process(str(arguments.model), arguments.draft)
    try:
        for i in range(ROUNDS):
            n = arguments.requests * (i + 1) // ROUNDS - report.requests
            _round(server.url, expected, n, arguments.clients, i, report)
            report.samples.append(server.sample(report.requests, started))
            print(report.samples[-1], file=sys.stderr, flush=True)
    finally:
        report.exit_code = server.end()
        report.problems += server.complaints()
    report.seconds = time.perf_counter() - started
    judge(report, arguments.limit)
    return report


def judge(report: Report, limit: float) -> None:
    """Fill in the growth after the warm-up and its problems."""
    first, last = report.samples[WARMUP], report.samples[-1]
    report.growth_mib_per_1000 = (
        (last.anonymous_bytes - first.anonymous_bytes) / MIB / (last.requests - first.requests) * 1e3
    )
    if report.growth_mib_per_1000 > limit:
        report.problems.append(f"anonymous memory grows by {report.growth_mib_per_1000:.2f} MiB per 1,000 requests")
    report.problems += more_of(first, last)
    if report.exit_code != 0:
        report.problems.append(f"the server ended with exit code {report.exit_code}")


def table(report: dict[str, Any]) -> str:
    samples = [report["samples"][WARMUP], report["samples"][-1]]
    statuses = ", ".join(f"{n:,} × {status}" for status, n in sorted(report["statuses"].items()))
    rows = [
        ["requests of clients", f"{report['requests']:,} of {report['clients']}"],
        ["answers", statuses],
        ["compared with the library's", f"{report['compared']:,}, {len(report['problems'])} problems"],
        *(
            [name, " → ".join(f"{s[key] / unit:.{digits}f}" for s in samples)]
            for name, key, unit, digits in (
                ("anonymous memory after the warm-up, MiB", "anonymous_bytes", MIB, 1),
                ("descriptors", "descriptors", 1, 0),
                ("threads", "threads", 1, 0),
            )
        ),
    ]
    return markdown(("", "first → last"), rows)


def parser() -> argparse.ArgumentParser:
    made = store.parser(__doc__)
    made.add_argument("model", nargs="?", default=demo.path(demo.MODEL), help="default: the bundled one")
    made.add_argument("--draft", help="default: the bundled one with the bundled model")
    made.add_argument("--requests", type=int, default=10_000)
    made.add_argument("--clients", type=int, default=32)
    made.add_argument("--limit", type=float, default=1.0, help="MiB per 1,000 requests that are no leak (1)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = parser().parse_args(argv)
    if arguments.draft is None and Path(arguments.model) == demo.path(demo.MODEL):
        arguments.draft = str(demo.path(demo.DRAFT))
    report = soak(arguments)
    arguments.out.write_text(store.whole(asdict(report)), encoding="utf-8")
    print(f"{report.requests} requests of {report.clients} clients in {report.seconds:.0f} s: {report.statuses}")
    print(f"{report.compared} answers compared with the library's")
    print(f"growth: {report.growth_mib_per_1000:.3f} MiB per 1,000 requests")
    for problem, n in collections.Counter(report.problems).most_common(20):
        print(f"problem: {problem}" + f" ({n} times)" * (n > 1))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
