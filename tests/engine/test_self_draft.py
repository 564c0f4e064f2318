"""A model that drafts for itself, with a twin's experts or those in slots: in its own KV cache, and no text knows."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from support import speculation

from edge_speq import EdgeError, EdgeLlama
from edge_speq.convert.quantization import draft as convert_draft
from edge_speq.gguf import container, draft_experts


@pytest.fixture(scope="module")
def experts_only(bundled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("twin") / "experts.gguf"
    convert_draft.make(bundled[0], out, convert_draft.recipe(bundled[0], "q2_k"), experts_only=True)
    return out


@pytest.fixture(scope="module", params=["self", "twin"])
def draft(request: pytest.FixtureRequest, experts_only: Path) -> str:
    return "self" if request.param == "self" else str(experts_only)


@pytest.mark.parametrize(
    "options", [{}, {"on_miss": "hybrid", "next_layer_prefetch": False, "resident": "1/4"}, {"deterministic": True}]
)
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.long), 4])
def test_texts_are_those_without_a_draft(
    bundled: tuple[Path, Path], draft: str, k: int, options: dict[str, object]
) -> None:
    asked = speculation.prompts()[:6]
    with speculation.llm(bundled[0]) as plain:
        expected = speculation.texts(plain, asked)
        sampled = speculation.texts(plain, asked[:3], temperature=0.9, seed=5)
    with speculation.llm(bundled[0], draft=draft, draft_tokens=k, **options) as model:
        assert speculation.texts(model, asked) == expected
        assert speculation.texts(model, asked[:3], temperature=0.9, seed=5) == sampled
        stats = model.stats()
    assert stats.foresight == "twin"
    assert 0 < stats.speculation.accepted < stats.speculation.drafted
    assert stats.experts.prefetched_used > 0


def test_twins_share_all_but_their_experts(bundled: tuple[Path, Path], experts_only: Path, twin: Path) -> None:
    """A twin of the same types as a model of its own takes more, and reads keys and values of its own making."""
    asked = speculation.prompts()[:8]
    seen = {}
    for name, path in (("shared", experts_only), ("own", twin)):
        with speculation.llm(bundled[0], draft=path, draft_tokens=2, vram_budget="1GiB", resident="1/2") as model:
            speculation.texts(model, asked)
            seen[name] = model.stats()
    with speculation.llm(bundled[0], draft_tokens=2, vram_budget="1GiB", resident="1/2") as model:
        alone = model.stats()
    experts = sum(tensor.n_bytes for tensor in container.read(experts_only).tensors.values())
    assert 0 <= seen["shared"].used_bytes - alone.used_bytes - experts < 1 << 20
    assert seen["shared"].plan.fixed_bytes >= alone.plan.fixed_bytes + experts
    assert seen["shared"].speculation.acceptance > seen["own"].speculation.acceptance - 0.05


def test_a_budget_counts_the_experts(bundled: tuple[Path, Path], experts_only: Path) -> None:
    with speculation.llm(bundled[0], draft=experts_only, resident=None, vram_budget="40MiB") as model:
        stats = model.stats()
        assert stats.plan.placement == "slots"
        assert stats.used_bytes <= 40 << 20
    with pytest.raises(EdgeError, match="smallest possible budget"):
        EdgeLlama(str(bundled[0]), draft=experts_only, draft_tokens=2, n_ctx=512, vram_budget="20MiB")


def test_the_experts_in_slots_suffice_or_nothing_is_drafted(bundled: tuple[Path, Path]) -> None:
    with speculation.llm(
        bundled[0], draft="self", resident="1/16", on_miss="hybrid", next_layer_prefetch=False, draft_tokens=4
    ) as model:
        with speculation.llm(bundled[0]) as plain:
            assert speculation.texts(model, ["Once"]) == speculation.texts(plain, ["Once"])
        assert model.stats().speculation.drafted == 0  # some block has fewer than a token needs


def test_saved_states_do_not_know_of_drafts(bundled: tuple[Path, Path], draft: str) -> None:
    with speculation.llm(bundled[0], draft=draft, draft_tokens=3) as model:
        stream = model.generate(model.tokenize(b"The old house"), temp=0.0)
        begun = [next(stream) for _ in range(7)]
        state = model.save_state()
        n_cells = llama_cpp.llama_memory_seq_pos_max(model._ctx.memory, 0) + 1
        rest = [next(stream) for _ in range(9)]
        stream.close()
        assert n_cells <= model.stats().plan.max_width + state.n_tokens
        model.load_state(state)
        again = model.generate([begun[-1]], temp=0.0, reset=False)
        assert [next(again) for _ in range(9)] == rest
        again.close()


def test_a_cancelled_draft_leaves_the_context_as_it_was(bundled: tuple[Path, Path], draft: str) -> None:
    with speculation.llm(bundled[0], draft=draft, draft_tokens=4) as model:
        prompt = model.tokenize(b"A fox and a hare")
        expected = greedy(model, prompt, 12)
        for delay in (0.005, 0.01, 0.02, 0.03, 0.05, 0.07):
            timer = threading.Timer(delay, model.cancel)
            timer.start()
            text = list(prompt)
            with contextlib.suppress(EdgeError):
                text += itertools.islice(model.generate(prompt, temp=0.0), 300)
            timer.join()
            with speculation.llm(bundled[0]) as plain:  # goes on where the cancellation left it
                assert greedy(model, text, 6) == greedy(plain, text, 6)
            assert greedy(model, prompt, 12) == expected


def greedy(model: EdgeLlama, tokens: list[int], n: int) -> list[int]:
    stream = model.generate(tokens, temp=0.0)
    found = [next(stream) for _ in range(n)]
    stream.close()
    return found


def test_a_draft_that_is_cancelled_leaves_no_logits_behind(bundled: tuple[Path, Path], draft: str) -> None:
    """The next request has the same tokens: its first token is not sampled from what was drafted."""
    with speculation.llm(bundled[0], draft=draft, draft_tokens=4) as model:
        stream = model.generate(model.tokenize(b"The old house"), temp=0.0)
        text = [*model.tokenize(b"The old house"), next(stream), next(stream)]
        model._speculator.plan_prefetch = model.cancel  # type: ignore[method-assign]  # between draft and verify
        with pytest.raises(EdgeError, match="cancelled"):
            text += stream
        del model._speculator.plan_prefetch
        with speculation.llm(bundled[0]) as plain:
            assert greedy(model, text, 5) == greedy(plain, text, 5)


def test_a_reset_between_tokens_does_not_end_the_stream(bundled: tuple[Path, Path], draft: str) -> None:
    with speculation.llm(bundled[0], draft=draft, draft_tokens=2) as model:
        stream = model.generate(model.tokenize(b"The old house"), temp=0.0)
        next(stream)
        next(stream)
        model.reset()
        assert len([next(stream) for _ in range(5)]) == 5
        stream.close()


@pytest.mark.parametrize("share", ["1/2", "3/4"])
def test_routers_that_choose_in_groups_stay_among_residents(tiny, share: str) -> None:
    """Out-of-group experts have a score of minus infinity: what is in no slot must still come after them."""
    path = tiny.moe("deepseek2", n_expert=32, n_expert_used=4)
    with speculation.llm(path) as plain, speculation.llm(path, draft="self", resident=share, draft_tokens=3) as model:
        assert speculation.texts(model, ["ab", "cd"]) == speculation.texts(plain, ["ab", "cd"])
    with speculation.llm(path, draft=path, policy="moe-spec", resident=share, draft_tokens=3) as model:
        speculation.texts(model, ["ab", "cd"])
        routing = model._hook.routing()
        assert max(len(np.unique(block)) for block in routing) <= 6
        assert len({tuple(row) for block in routing for row in block}) > len(
            routing
        )  # tokens still choose for themselves


def test_the_context_shifts_under_it(bundled: tuple[Path, Path], draft: str) -> None:
    options = {"n_ctx": 96, "context_shift": True, "n_keep": 4}
    with speculation.llm(bundled[0], **options) as plain:
        expected = speculation.texts(plain, ["Once upon a time"], max_tokens=200)
    with speculation.llm(bundled[0], draft=draft, draft_tokens=3, **options) as model:
        assert speculation.texts(model, ["Once upon a time"], max_tokens=200) == expected
        assert model.stats().speculation.accepted > 0


def test_slots_of_other_counts_serve_it(bundled: tuple[Path, Path], draft: str) -> None:
    with speculation.llm(bundled[0]) as plain:
        expected = speculation.texts(plain, ["Once", "Dear"])
    with speculation.llm(bundled[0], draft=draft, draft_tokens=2, resident="1/2", vram_budget="1GiB") as model:
        for share in ("1/3", "3/4", "1/4"):
            model.resize(resident=share)
            assert speculation.texts(model, ["Once", "Dear"]) == expected


def test_a_model_without_slots_does_not_draft_for_itself(bundled: tuple[Path, Path], draft: str) -> None:
    with speculation.llm(bundled[0], draft=draft, resident=None) as model:  # everything fits
        stats = model.stats()
        assert stats.plan.placement == "all"
        assert stats.plan.max_draft_tokens == 0
        assert "cannot draft for itself" in stats.plan.reason
    with pytest.raises(EdgeError, match="has no slots"):
        EdgeLlama(str(bundled[0]), draft=draft, policy="cpu-moe", n_ctx=128)


def test_experts_of_another_model_are_refused(
    bundled: tuple[Path, Path], experts_only: Path, tiny, tmp_path: Path
) -> None:
    with pytest.raises(EdgeError, match="experts of another model"):
        EdgeLlama(str(tiny.moe("qwen3moe")), draft=experts_only, resident="1/2", n_ctx=128)
    other = tmp_path / "other.gguf"
    data = experts_only.read_bytes()
    at = data.index(draft_experts.ROUTERS_HASH.encode()) + len(draft_experts.ROUTERS_HASH) + 12
    other.write_bytes(data[:at] + b"0" * 64 + data[at + 64 :])
    with pytest.raises(EdgeError, match="made for other routers"):
        EdgeLlama(str(bundled[0]), draft=other, resident="1/2", n_ctx=128)
    other.write_bytes(data[: len(data) // 2])
    with pytest.raises(EdgeError, match="cannot load the draft"):
        EdgeLlama(str(bundled[0]), draft=other, resident="1/2", n_ctx=128)


@pytest.mark.parametrize("arch", ["deepseek2", "gpt-oss", "granitemoe", "olmoe"])
def test_other_architectures(tiny, arch: str, tmp_path: Path) -> None:
    path, out = tiny.moe(arch, "Q8_0"), tmp_path / "experts.gguf"
    convert_draft.make(path, out, convert_draft.recipe(path, "q4_0"), experts_only=True)
    with speculation.llm(path) as plain:
        expected = speculation.texts(plain, ["ab", "cd"])
    for draft in ("self", str(out)):
        with speculation.llm(path, draft=draft, resident="3/4", draft_tokens=3) as model:
            assert speculation.texts(model, ["ab", "cd"]) == expected
            assert model.stats().speculation.drafted > 0


def test_ngrams_are_a_draft_by_name(bundled: tuple[Path, Path]) -> None:
    text = "one two three four five six seven eight nine ten " * 4
    with speculation.llm(bundled[0]) as plain, speculation.llm(bundled[0], draft="ngram", draft_tokens=4) as model:
        assert speculation.texts(model, [text]) == speculation.texts(plain, [text])
        assert model.stats().speculation.accepted > 0
        assert model.stats().foresight != "twin"


def test_commands_take_it(bundled: tuple[Path, Path], draft: str) -> None:
    def run(*arguments: str) -> dict[str, object]:
        command = [sys.executable, "-m", "edge_speq", *arguments, "--draft", draft, "--resident", "1/2", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return json.loads(done.stdout)

    out = run("run", str(bundled[0]), "-n", "24", "--draft-tokens", "2", "--temp", "0")
    assert out["speculation"]["drafted"] > 0
    plan = run("plan", str(bundled[0]))
    wanted = 0 if draft == "self" else sum(t.n_bytes for t in container.read(draft).tensors.values())
    assert plan["memory"]["draft"]["model_bytes"] == wanted
    assert plan["draft"]["path"] == draft and plan["draft"]["expert_bytes"] == wanted


def test_foreseen_sets_are_those_of_free_routers(bundled: tuple[Path, Path]) -> None:
    """With few experts in slots their draft still names experts that are in none."""
    with speculation.llm(bundled[0], draft="self", resident="1/2", draft_tokens=2, policy="twin") as model:
        speculation.texts(model, speculation.prompts()[:4])
        quality = model._speculator.quality
        assert quality is not None
        assert np.mean(quality.recall) > 0.5
