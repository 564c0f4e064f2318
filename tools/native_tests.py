"""Build native/tests against the installed wheel's libraries and run them: ASan with UBSan, then TSan.

    python tools/native_tests.py

Our sources are compiled with the sanitizer, ggml comes as it is installed; its headers are taken from the
pinned sdist in the build cache. Warnings are errors here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path(__file__).resolve().parent.parent / "native"
sys.path.insert(0, str(NATIVE))

from _build import source  # noqa: E402
from _build.patches import apply_patches  # noqa: E402
from _build.upstream import Upstream  # noqa: E402

TIMEOUT = 600  # seconds: what waits for something that never comes is a failure, too
SANITIZERS = {
    "address,undefined": ["-fno-sanitize-recover=all"],
    "thread": [],
}
# Sources without their suffix, under native/src. The patched llama.cpp that they link is the installed wheel's.
ROUTER_PREDICTOR = "prefetch/router_predictor"
CORE = (
    *(
        f"slots/{name}"
        for name in ("slot_pool", "slot_store", "slot_cache", "hybrid_demand", "in_flight", "prefill_admission")
    ),
    *("prefetch/worker", "prefetch/next_layer", ROUTER_PREDICTOR, "cpu/balancer"),
    *("util/link", "util/faults", "util/expert_table"),
)
CORE_WITHOUT_PREDICTOR = tuple(name for name in CORE if name != ROUTER_PREDICTOR)  # a test brings a scripted one
CPU = tuple(f"cpu/{name}" for name in ("cost_calibration", "cpu_experts", "expert_matmul", "thread_pool"))
HOOK = (
    *CPU,
    *(f"hook/{name}" for name in ("hook", "graph_builder", "block_executor", "hybrid_executor", "prefill")),
    *("hook/device_only_graphs", "hook/draft_experts", "util/vocab"),
    *("policy/policy_kernels", "policy/prefill_counts", "api/api", "api/policy_kernels_api"),
)
TESTS = {
    "test_slot_pool": ("slots/slot_pool",),
    "test_balancer": ("cpu/balancer",),
    "test_thread_pool": ("cpu/thread_pool",),
    "test_slot_cache": CORE,
    "test_in_flight": CORE_WITHOUT_PREDICTOR,
    "test_cost_calibration": (*CORE, *CPU),
    "test_allocations": (*CORE_WITHOUT_PREDICTOR, "cpu/expert_matmul", "cpu/thread_pool"),
    "test_hook": (*CORE, *HOOK),
    "test_draft_experts": (*CORE, *HOOK),
}
MODEL = NATIVE.parent / "models" / "tales-moe.gguf"


def installed_libraries() -> Path:
    import llama_cpp

    return Path(llama_cpp.__file__).parent / "lib"


def compiler_command(tree: Path) -> list[str]:
    vendor = tree / "vendor" / "llama.cpp"
    ggml = vendor / "ggml"
    system = [vendor / "src", vendor / "include", ggml / "include", ggml / "src"]  # the last for a test's own device
    return [
        os.environ.get("CXX", "g++"),
        *("-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror"),
        *('-DEDGE_SPEQ_HEADER_SHA256=""', '-DEDGE_SPEQ_LLAMA_COMMIT=""'),
        *(f"-I{NATIVE / folder}" for folder in ("include", "src")),
        *(argument for folder in system for argument in ("-isystem", str(folder))),
    ]


def sanitizer_flags(sanitizer: str) -> list[str]:
    return [f"-fsanitize={sanitizer}", *SANITIZERS[sanitizer]]


def compile_objects(compiler: list[str], sanitizer: str, out: Path) -> dict[str, Path]:
    """Compile all sources and tests once. Return the object of each, by name."""
    src = NATIVE / "src"
    sources = {path.relative_to(src).with_suffix("").as_posix(): path for path in src.rglob("*.cpp")}
    sources |= {test: NATIVE / "tests" / f"{test}.cpp" for test in TESTS}
    objects = {name: out / f"{name.replace('/', '-')}.o" for name in sources}

    def compile_one(name: str) -> None:
        files = ["-c", str(sources[name]), "-o", str(objects[name])]
        subprocess.run([*compiler, *sanitizer_flags(sanitizer), *files], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))
    return objects


def link_test(compiler: list[str], test: str, sanitizer: str, objects: dict[str, Path]) -> Path:
    libraries = installed_libraries()
    program = objects[test].with_suffix("")
    link = [
        f"-L{libraries}",
        "-lllama",
        "-lggml",
        "-lggml-cpu",
        "-l:libggml-base.so.0",
        f"-Wl,-rpath,{libraries}",
        "-pthread",
    ]
    files = [str(objects[name]) for name in (*TESTS[test], test)]
    subprocess.run([*compiler, *sanitizer_flags(sanitizer), *files, "-o", str(program), *link], check=True)
    return program


def run_test(program: Path) -> str:
    """Run a test program. Return "ok" or what went wrong."""
    try:
        status = subprocess.run([str(program), str(MODEL)], check=False, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT} s"
    return "ok" if status == 0 else f"FAILED with status {status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", metavar="TEST", help=f"run these only, of {', '.join(TESTS)}")
    chosen = parser.parse_args().tests or list(TESTS)
    if unknown := set(chosen) - set(TESTS):
        parser.error(f"no such test: {', '.join(sorted(unknown))}")
    results = []
    with tempfile.TemporaryDirectory(prefix="edge-native-tests-") as work:
        out = Path(work)
        upstream = Upstream.load(NATIVE / "upstream.toml")
        tree = source.unpack(source.fetch(upstream), out / "sdist")
        apply_patches([NATIVE / "patches" / name for name in upstream.patches], tree)
        compiler = compiler_command(tree)
        for sanitizer in SANITIZERS:
            folder = out / sanitizer.partition(",")[0]
            folder.mkdir()
            objects = compile_objects(compiler, sanitizer, folder)
            for test in chosen:
                results.append(run_test(link_test(compiler, test, sanitizer, objects)))
                print(f"{test} under {sanitizer}: {results[-1]}", flush=True)
    passed = results.count("ok")
    print(f"{passed} passed, {len(results) - passed} failed")
    return int(passed < len(results))


if __name__ == "__main__":
    sys.exit(main())
