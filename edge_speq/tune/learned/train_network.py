"""Train the network of edge_speq.policies.learned on traces, with torch, in batches of steps.

Token ids and the draft's routing are dropped at random, so that the network learns to handle unseen tokens and draft
tokens without routing. Some passages are held out: training stops when their loss no longer falls, and the stored
quality is measured on them. With one thread and a seed, the same traces give the same file on the same machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.errors import EdgeError
from edge_speq.policies.learned.network_file import VERSION, Geometry, Weights, geometry_hash
from edge_speq.system import install_hint
from edge_speq.trace import Trace
from edge_speq.tune.learned.training_set import Samples, gather, geometries, split

HIDDEN = 32
EPOCHS, PATIENCE = 30, 3
BATCHES = 64  # batches per epoch, at least, if there are enough steps
LEAST_BATCH, MOST_BATCH, HELD_BATCH = 8, 64, 256  # steps
RATE, SLOWER, WEIGHT_DECAY = 4e-3, 0.4, 1e-5
FORGET = 0.15  # share of token ids, and of draft routings, that are dropped
SHORTER = 0.3  # share of steps of which only the first tokens are predicted
LEAST_SEEN = 2  # occurrences that a token needs in the traces to get an embedding row
FEWEST_STEPS = 64
GAIN = 1e-4  # relative decrease of the held-out loss that counts as progress
THRESHOLD = 0.5  # probability from which an expert counts as predicted
PLACES = 8
HIGHEST = 20.0  # largest exponent, as in edge_speq.policies.learned.network

Say = Callable[[str], None]


def learn(
    traces: Sequence[Trace],
    *,
    seed: int = 1,
    hidden: int = HIDDEN,
    epochs: int = EPOCHS,
    say: Say = lambda _: None,
) -> Weights:
    """Train and return the weights. Raises EdgeError without torch, for traces of several models, or for few steps."""
    target, draft = geometries(traces)
    torch = _torch()
    samples = gather(traces, draft)
    train, held = split(samples)
    if len(train) < FEWEST_STEPS or not len(held):
        raise EdgeError(f"{len(samples)} recorded steps are too few to learn from", "record more prompts", usage=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fixed order of summation makes training deterministic
    try:
        training = _Training(torch, target, draft, samples, train, seed, hidden)
        loss = training.run(train, held, epochs, say)
        found = {"steps": len(held), "log_loss": loss, **training.quality(held)}
    finally:
        torch.set_num_threads(threads)
    about = {"seed": seed, "traces": [trace.path.name for trace in traces], "steps": len(train), "held_out": found}
    return training.exported(about)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise EdgeError("learning needs torch", install_hint("train")) from error
    return torch


class _Training:
    def __init__(
        self,
        torch: Any,
        target: Geometry,
        draft: Geometry | None,
        samples: Samples,
        train: npt.NDArray[np.intp],
        seed: int,
        hidden: int,
    ) -> None:
        self._torch, self._target, self._draft, self._samples = torch, target, draft, samples
        tokens = samples.tokens[train, 1:]
        ids, counts = np.unique(tokens[tokens >= 0], return_counts=True)
        self._tokens = ids[counts >= LEAST_SEEN].astype(np.int32)
        self._total = target[0] * target[1]
        self._is_twin = draft is not None and draft[:2] == target[:2]
        self._random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self._w = self._parameters(hidden)

    def run(self, train: npt.NDArray[np.intp], held: npt.NDArray[np.intp], epochs: int, say: Say) -> float:
        """Train, keep the parameters with the lowest held-out loss, and return that loss."""
        optimizer = self._torch.optim.AdamW(self._w.values(), lr=RATE, weight_decay=WEIGHT_DECAY)
        best, kept, worse = float("inf"), self._copied(), 0
        batch = min(MOST_BATCH, max(LEAST_BATCH, len(train) // BATCHES))
        for epoch in range(epochs):
            order = self._random.permutation(train)
            for at in range(0, len(order), batch):
                optimizer.zero_grad()
                self._loss(order[at : at + batch], learning=True).backward()
                optimizer.step()
            now = self._held_loss(held)
            say(f"epoch {epoch + 1}: loss {now:.4f} on held-out passages")
            if now < best * (1 - GAIN):
                best, kept, worse = now, self._copied(), 0
                continue
            worse += 1
            optimizer.param_groups[0]["lr"] *= SLOWER
            if worse == PATIENCE:
                break
        self._w = kept
        return best

    def _copied(self) -> dict[str, Any]:
        return {name: value.detach().clone() for name, value in self._w.items()}

    def _parameters(self, hidden: int) -> dict[str, Any]:
        torch, n_blocks = self._torch, self._target[0]
        rows, drafts = len(self._tokens) + 1, 0 if self._draft is None else self._draft[0] * self._draft[1]
        tables = {"token_in": rows, "before_in": rows, "draft_in": drafts + 1, "last_in": self._total}
        made = {name: 0.1 * torch.randn(n, hidden) for name, n in tables.items()}
        made |= {"place": torch.full((PLACES,), 0.5), "bias": torch.full((hidden,), 0.1)}
        for out, bias, history in (("out", "out_bias", "history"), ("later_out", "later_bias", "later_history")):
            made[out] = 0.1 * torch.randn(hidden, self._total)
            made[bias] = torch.full((self._total,), -0.5)
            made[history] = torch.tensor([[0.3], [0.3], [0.0]]).repeat(1, n_blocks)
        made |= {"twin": torch.full((n_blocks,), 2.0 if self._is_twin else 0.0), "later_mix": torch.zeros(3)}
        return {name: value.requires_grad_() for name, value in made.items()}

    # --- one batch -----------------------------------------------------------------------------------------

    def _loss(self, which: npt.NDArray[np.intp], *, learning: bool) -> Any:
        coming, following, wanted, asked = self._hazards(which, learning=learning)
        loss = self._cross_entropy(coming, wanted)
        later = self._samples.after[which]
        has_after = (later >= 0) & (asked == self._samples.width[which])
        if has_after.any():
            after = self._demanded(later[has_after], self._samples.width[later[has_after]])
            loss = loss + self._cross_entropy(following[has_after], after)
        return loss

    def _cross_entropy(self, hazard: Any, wanted: Any) -> Any:
        """Return the mean binary cross entropy over steps and experts, for probabilities 1 - exp(-hazard)."""
        hazard = hazard.clamp(min=1e-6, max=40.0)
        return (wanted * -self._torch.log(-self._torch.expm1(-hazard)) + (1 - wanted) * hazard).mean()

    def _hazards(self, which: npt.NDArray[np.intp], *, learning: bool) -> tuple[Any, Any, Any, npt.NDArray[np.intp]]:
        """Return the hazards of the coming and of the following step, the demanded keys, and the tokens asked per step.

        Shapes: [batch, keys] three times, and [batch].
        """
        torch, w, random, s = self._torch, self._w, self._random, self._samples.some(which)
        widest = s.chosen.shape[1]
        asked = s.width.astype(np.intp)
        known = s.drafted[:, :, 0] >= 0 if s.drafted.shape[2] else np.zeros(s.drafted.shape[:2], dtype=bool)
        rows = self._rows(s.tokens)
        if learning:
            asked = np.where(random.random(len(which)) < SHORTER, random.integers(1, asked + 1), asked)
            known &= random.random(known.shape) >= FORGET
            rows[random.random(rows.shape) < FORGET] = 0
        history = torch.from_numpy(s.history.astype(np.float32))
        base = torch.exp(self._powers(history, "history") + w["out_bias"])
        hidden = torch.relu(self._inputs(s, rows) + self._drafted(s.drafted[:, :widest], known[:, :widest]))
        mask = torch.from_numpy((np.arange(widest) < asked[:, None]).astype(np.float32))[:, :, None]
        coming = base * self._summed(hidden, mask, s.drafted[:, :widest], known[:, :widest])
        mean = (hidden * mask).sum(1) / mask.sum(1)
        guess = torch.exp(self._powers(history, "later_history") + w["later_bias"] + mean @ w["later_out"])
        following = self._following(s.drafted[:, widest:], known[:, widest:], base, guess)
        return coming, following, self._demanded(which, asked), asked

    def _powers(self, history: Any, name: str) -> Any:
        return (history * self._w[name].repeat_interleave(self._target[1], dim=1)).sum(1)

    def _demanded(self, which: npt.NDArray[np.intp], asked: npt.NDArray[Any]) -> Any:
        keys = self._samples.chosen[which]
        wanted = np.zeros((len(which), self._total), dtype=np.float32)
        step, token = np.nonzero(np.arange(keys.shape[1]) < asked[:, None])
        wanted[step[:, None], keys[step, token]] = 1
        return self._torch.from_numpy(wanted)

    def _inputs(self, s: Samples, rows: npt.NDArray[np.intp]) -> Any:
        """Return the hidden inputs, [batch, tokens, hidden], that do not depend on the draft."""
        w, places = self._w, np.minimum(np.arange(rows.shape[1] - 1), PLACES - 1)
        has_last = s.last[:, :1] >= 0
        last = self._sums("last_in", np.where(has_last, s.last, 0)) * self._torch.from_numpy(has_last)
        return w["token_in"][rows[:, 1:]] + w["before_in"][rows[:, :-1]] + w["place"][places, None] * last[:, None]

    def _rows(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
        at = np.searchsorted(self._tokens, ids)
        return np.where(np.append(self._tokens, -1)[at] == ids, at + 1, 0) * (ids >= 0)

    def _drafted(self, keys: npt.NDArray[np.int32], known: npt.NDArray[np.bool_]) -> Any:
        """Return the hidden inputs, [batch, tokens, hidden], of the draft's known or unknown routing, with the bias."""
        unknown = self._w["draft_in"][-1] + self._w["bias"]
        if not known.any():
            return unknown
        flat = np.where(known[:, :, None], keys, 0).reshape(-1, keys.shape[2])
        sums = self._sums("draft_in", flat).reshape(*known.shape, -1) + self._w["bias"]
        return self._torch.where(self._torch.from_numpy(known)[:, :, None], sums, unknown)

    def _sums(self, name: str, keys: npt.NDArray[np.int32]) -> Any:
        ids = self._torch.from_numpy(keys.astype(np.int64))
        return self._torch.nn.functional.embedding_bag(ids, self._w[name], mode="sum")

    def _summed(self, hidden: Any, mask: Any, keys: npt.NDArray[np.int32], known: npt.NDArray[np.bool_]) -> Any:
        torch, z = self._torch, hidden @ self._w["out"]
        if self._is_twin:
            chosen = np.zeros(z.shape, dtype=np.float32)
            step, token = np.nonzero(known)
            chosen[step[:, None], token[:, None], keys[step, token]] = 1
            z = z + torch.from_numpy(chosen) * self._w["twin"].repeat_interleave(self._target[1])
        return (torch.exp(z.clamp(max=HIGHEST)) * mask).sum(1)

    def _following(self, keys: npt.NDArray[np.int32], known: npt.NDArray[np.bool_], base: Any, guess: Any) -> Any:
        """Return the hazards of the following step: from the draft's routing ahead if known, mixed with the guess."""
        torch, w = self._torch, self._w
        mix = torch.nn.functional.softplus(w["later_mix"])
        if not known.any():
            return mix[2] * guess
        mask = torch.from_numpy(known.astype(np.float32))[:, :, None]
        hidden = torch.relu(w["token_in"][0] + w["before_in"][0] + self._drafted(keys, known))
        seen = mix[0] * base * self._summed(hidden, mask, keys, known) + mix[1] * guess
        return torch.where(torch.from_numpy(known.any(axis=1))[:, None], seen, mix[2] * guess)

    # --- results -------------------------------------------------------------------------------------------

    def _held_loss(self, held: npt.NDArray[np.intp]) -> float:
        batches = [held[at : at + HELD_BATCH] for at in range(0, len(held), HELD_BATCH)]
        with self._torch.no_grad():
            return sum(float(self._loss(batch, learning=False)) * len(batch) for batch in batches) / len(held)

    def quality(self, held: npt.NDArray[np.intp]) -> dict[str, float]:
        """Return precision and recall of the predicted experts of the coming step."""
        counts = np.zeros(3)
        with self._torch.no_grad():
            for at in range(0, len(held), HELD_BATCH):
                coming, _, wanted, _ = self._hazards(held[at : at + HELD_BATCH], learning=False)
                foreseen, demanded = -np.expm1(-coming.numpy()) >= THRESHOLD, wanted.numpy() > 0
                counts += (foreseen & demanded).sum(), foreseen.sum(), demanded.sum()
        both, predicted, n_demanded = counts.tolist()
        return {"precision": both / max(1.0, predicted), "recall": both / max(1.0, n_demanded)}

    def exported(self, about: dict[str, Any]) -> Weights:
        arrays = {name: value.detach().numpy().astype(np.float32) for name, value in self._w.items()}
        arrays["later_mix"] = np.log1p(np.exp(arrays["later_mix"]))
        sizes = {"tokens": len(self._tokens), "hidden": len(arrays["bias"]), "places": PLACES}
        models = {"target": list(self._target), "draft": None if self._draft is None else list(self._draft)}
        meta = {"version": VERSION, "hash": geometry_hash(self._target, self._draft), **models, **sizes, **about}
        return Weights(meta, tokens=self._tokens, **arrays)
