"""Parse the `draft` option: a draft model's path, a file of low-bit experts, "self" or "ngram"."""

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

SELF, NGRAM = "self", "ngram"  # values that are not files


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """A validated `draft` option. All fields at their defaults mean no draft."""

    path: Path | None = None  # of a draft model with a separate context
    model: object | None = None  # a LlamaDraftModel
    itself: bool = False  # self-drafting, with the experts of `twin` or with resident ones
    twin: DraftExpertsFile | None = None

    @property
    def memory(self) -> MemoryUse:
        """Memory of self-drafting on the compute device."""
        return MemoryUse(self.twin.n_bytes if self.twin is not None else 0)


NONE = DraftSpec()


def read(draft: str | Path | None, target: GGUFFile) -> DraftSpec:
    """Parse a `draft` option. Raises EdgeError if its file cannot be used as a draft of the target."""
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
    """Return True if the option names a file."""
    return draft is not None and draft not in (SELF, NGRAM)


def require_slots(plan: Plan, asked: str) -> str:
    """Return the plan's reason with a note that self-drafting is off, since it needs slots.

    Raises EdgeError if the caller asked for a policy without slots, `asked`.
    """
    if plan.placement == asked:
        message = f"policy {asked} has no slots, which a model that drafts for itself needs"
        raise EdgeError(message, "name a draft model, or leave the policy out", usage=True)
    return f"{plan.reason}; without slots it cannot draft for itself"
