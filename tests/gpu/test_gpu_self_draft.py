"""On a GPU: a model that drafts for itself computes what it computes without drafts, to the bit."""

from __future__ import annotations

import contextlib
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llama_cpp import _internals as internals
from support import exactness, speculation

from edge_speq import _native
from edge_speq.convert.quantization import draft as convert_draft
from edge_speq.gguf import container, draft_experts
from edge_speq.gguf import model as gguf_model
from edge_speq.runtime import loading

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def experts_only(bundled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("twin") / "experts.gguf"
    convert_draft.make(bundled[0], out, convert_draft.recipe(bundled[0], "q2_k"), experts_only=True)
    return out


def logits_between_drafts(model: internals.LlamaModel, hook: _native.Hook, uses: str, n: int) -> np.ndarray:
    """Of n tokens decoded one by one; before each, two are decoded with other experts and taken back."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 256, 64, 64
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    tokens = np.random.default_rng(3).integers(4, model.n_vocab(), n).tolist()
    rows, drafted = [], 0
    with (
        contextlib.closing(internals.LlamaContext(model=model, params=params)) as context,
        contextlib.closing(internals.LlamaBatch(n_tokens=64, embd=0, n_seq_max=1)) as batch,
    ):
        for past, token in enumerate(tokens):
            for i in range(2 if uses else 0):
                if hook.use_experts(uses):
                    loading.decode(context, batch, [tokens[past - i]], past + i, 1, hook=hook)
                    drafted += hook.routing().shape[1]
            hook.use_experts("own")
            context.kv_cache_seq_rm(-1, past, -1)
            loading.decode(context, batch, [token], past, 1, hook=hook)
            rows.append(np.ctypeslib.as_array(context.get_logits(), shape=(model.n_vocab(),)).copy())
    assert drafted > n // 2 or not uses
    return np.stack(rows)


@pytest.mark.parametrize("uses", ["draft", "resident"])
def test_drafts_leave_no_trace_in_the_logits(bundled: tuple[Path, Path], experts_only: Path, uses: str) -> None:
    twin = draft_experts.read(container.read(experts_only), gguf_model.check_model(bundled[0]))
    seen = []
    with exactness.loaded(bundled[0]) as model:
        experts = _native.model_experts(model.model)
        half = [g.n_experts // 2 for g in experts.groups]
        for draft in ("", uses):
            hook = _native.Hook(model.model, experts, exactness.MAX_WIDTH, half)
            hook.poison_free_slots()
            hook.load_draft_experts(str(twin.path), twin.tensors)
            seen.append(logits_between_drafts(model, hook, draft, 40))
            hook.detach()
    assert np.isfinite(seen[0]).all()
    np.testing.assert_array_equal(seen[1], seen[0])


@pytest.mark.parametrize("name", ["twin", "self"])
def test_a_model_drafts_for_itself(bundled: tuple[Path, Path], experts_only: Path, name: str) -> None:
    draft = experts_only if name == "twin" else "self"
    with speculation.llm(bundled[0], draft=draft, draft_tokens=2, vram_budget="1GiB", resident="1/2") as model:
        speculation.texts(model, speculation.prompts()[:12])
        stats = model.stats()
        assert model.memory_used() == stats.used_bytes
    print(f"{name}: acceptance {stats.speculation.acceptance:.3f}, hits {stats.experts.hit_rate:.3f}")
    assert stats.foresight == "twin"
    assert stats.speculation.acceptance > 0.3
    assert stats.experts.prefetched_used > 0


def test_a_budget_of_experts_bounds_verify_steps(bundled: tuple[Path, Path]) -> None:
    with speculation.llm(bundled[0], draft=bundled[1], policy="moe-spec", draft_tokens=4) as model:
        speculation.texts(model, speculation.prompts()[:4])
        routing = model._hook.routing()
        assert routing.shape[1] > 1
        assert max(len(np.unique(block)) for block in routing) <= 6
