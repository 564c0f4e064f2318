"""What a draft argument names: a model with a context of its own, a twin's experts alone, "self", or "ngram"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_speq.core import MemoryUse, Plan
from edge_speq.drafting.ngram import NGramDraft
from edge_speq.errors import EdgeError
from edge_speq.gguf import container, draft_experts
from edge_speq.gguf import model as gguf_model
from edge_speq.gguf.container import GGUFFile
from edge_speq.gguf.draft_experts import DraftExpertsFile

SELF, NGRAM = "self", "ngram"  # no files


@dataclass(frozen=True, slots=True)
class DraftSpec:
    path: Path | None = None  # of a model with a context of its own
    model: object | None = None  # a LlamaDraftModel
    itself: bool = False  # the target drafts for itself, with the experts of `twin` or with those in slots
    twin: DraftExpertsFile | None = None

    @property
    def memory(self) -> MemoryUse:
        """What drafting for itself takes on the compute device."""
        return MemoryUse(self.twin.n_bytes if self.twin is not None else 0)


NONE = DraftSpec()


def read(draft: str | Path | None, target: GGUFFile) -> DraftSpec:
    """Raises EdgeError for a file that is no draft of the target."""
    if draft is None:
        return NONE
    if draft == NGRAM:
        return DraftSpec(model=NGramDraft())
    if draft == SELF:
        return DraftSpec(itself=True)
    file = container.read(draft, "draft")
    if draft_experts.is_experts_only(file):
        return DraftSpec(itself=True, twin=draft_experts.read(file, target))
    gguf_model.check(file)
    return DraftSpec(Path(draft))


def is_file(draft: str | Path | None) -> bool:
    return draft is not None and draft not in (SELF, NGRAM)


def require_slots(plan: Plan, asked: str) -> str:
    """A model drafts for itself through its slots' hook: what to say where it has none. Raises EdgeError where such a
    policy was asked for."""
    if plan.placement == asked:
        message = f"policy {asked} has no slots, which a model that drafts for itself needs"
        raise EdgeError(message, "name a draft model, or leave the policy out", usage=True)
    return f"{plan.reason}; without slots it cannot draft for itself"
