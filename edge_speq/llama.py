"""EdgeLlama: a llama_cpp.Llama whose experts live in slots and whose draft looks ahead for them."""

from __future__ import annotations

import copy
import ctypes
import logging
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from jinja2 import TemplateError
from llama_cpp import Llama

from edge_speq import _native, engine, foresight, plan, speculate
from edge_speq.core import (
    COMPUTES,
    POLICIES,
    EdgeError,
    ExpertCounters,
    Experts,
    MemoryUse,
    Speculation,
    Stats,
    Timing,
    parse_share,
    parse_speculation,
    require_choice,
)
from edge_speq.governor import Governor

log = logging.getLogger("edge_speq")


class EdgeLlama(Llama):  # type: ignore[misc]  # llama_cpp is not strictly typed
    """A llama_cpp.Llama with a bounded set of experts on the compute device.

    Args (besides those of llama_cpp.Llama, which all keep their meaning; n_gpu_layers defaults to all):
        draft: path of a draft GGUF with the model's vocabulary.
        use_mmap: False with slots on a GPU reads the experts into page-locked memory: several times faster fetches.
        resident: share of the routed-expert bytes that slots may hold, 0.25 or "1/4".
        vram_budget: bytes ("6GiB") for everything on the compute device, or "auto", what is free less a margin (policy
            auto's default on a GPU). On a CPU-only machine it bounds RAM, mapped file pages not counted.
        speculation: draft tokens per step, or "auto".
        policy: "auto" (slots with foresight, or no slots where everything fits or nothing bounds them), "lru"
            (slots, demand loads only), "cpu-moe" (experts stay on the CPU) or "all" (everything resident).
        compute: "auto" or "device": missing experts are fetched and computed on the device.

    Raises EdgeError for everything a caller can mend. One instance serves one thread at a time.
    """

    _redirect_output = False  # read by the patched llama_cpp.Llama
    n_tokens: int
    _requires_eval: bool

    def __init__(
        self,
        model_path: str,
        *,
        draft: str | Path | None = None,
        resident: float | str | None = None,
        vram_budget: int | str | None = None,
        speculation: int | str = "auto",
        policy: str = "auto",
        compute: str = "auto",
        n_gpu_layers: int = -1,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._edge_arguments = {
            "draft": draft,
            "resident": resident,
            "vram_budget": vram_budget,
            "speculation": speculation,
            "policy": policy,
            "compute": compute,
        }
        require_choice("policy", policy, POLICIES)
        require_choice("compute", compute, COMPUTES)
        if policy in ("all", "cpu-moe") and resident is not None:
            raise EdgeError(f"resident does not apply to policy {policy}", "leave one of them out", usage=True)
        if kwargs.pop("draft_model", None) is not None:
            raise EdgeError("draft_model is not supported yet", "give a draft GGUF as draft=", usage=True)
        self._policy = policy
        self._wanted_k = parse_speculation(speculation)
        self._resident = None if resident is None else parse_share(resident)
        self._draft_path = None if draft is None or self._wanted_k == 0 else engine.check_model_file(draft, "draft")
        engine.check_model_file(model_path)

        _native.load_backends()
        self.device = _native.compute_device()
        unbounded = vram_budget is None and self._resident is None and policy == "auto"
        self._budget_bytes = plan.budget("auto" if unbounded and self.device.is_gpu else vram_budget, self.device)

        self._hook: _native.Hook | None = None
        self._draft: engine.DraftModel | None = None
        self._foresight: foresight.Foresight | None = None
        self._draft_routing: foresight.Routing | None = None
        self._stopping_criteria: Any = None
        self._timing, self._speculation = Timing(), Speculation()
        self._pending: list[int] = []
        self._n_rows = 0  # logits rows of the last verify
        self._n_kept = 0
        self._unserved = False  # narrow graphs were not served from slots, and it was said
        try:
            super().__init__(model_path, n_gpu_layers=n_gpu_layers, verbose=verbose, **kwargs)
            self._load_draft()
        except (ValueError, TemplateError) as error:  # the file's chat template is compiled while loading
            self.close()
            raise EdgeError(
                f"cannot load {model_path}: {error}", "the file itself is at fault: convert it again"
            ) from error
        except BaseException:
            self.close()
            raise

    def _configure(self, model_params: Any, context_params: Any) -> None:
        context_params.swa_full = True  # rolling back drafted tokens needs the whole window
        self._draft_params = engine.copy_params(model_params)
        # repacked weights are copies in RAM, which a budget would have to count
        self._draft_params.use_extra_bufts = self._budget_bytes is None
        self._keep_alive = engine.experts_on_host(model_params)
        self._experts, fixed_bytes = self._survey(model_params, context_params)
        self._plan = plan.plan(
            self._experts,
            policy=self._policy,
            resident=self._resident,
            budget_bytes=self._budget_bytes,
            fixed_bytes=fixed_bytes,
            speculation=self._wanted_k,
            has_draft=self._draft_path is not None,
            experts_mapped=not self.device.is_gpu,
        )
        log.info("plan: %s", self._plan.reason)
        if self._plan.policy == "slots" and self.lora_path is not None:
            raise EdgeError("slots do not serve LoRA adapters", "use policy all or cpu-moe", usage=True)
        if self._plan.policy == "slots" and model_params.load_mode == llama_cpp.LLAMA_LOAD_MODE_NONE:
            engine.pin_experts(self._keep_alive)
        elif self._plan.policy == "all":
            model_params.tensor_buft_overrides = None

    def _survey(self, model_params: Any, context_params: Any) -> tuple[Experts, int]:
        """The model's experts and, where a budget asks, the bytes on the device of everything but slots."""
        contexts = engine.copy_params(context_params) if self._budget_bytes is not None else None
        if contexts is not None and contexts.n_ctx == 0:
            contexts.n_batch = contexts.n_ubatch = 512  # llama_cpp.Llama fills these in after loading
        experts, target = engine.dry_load(Path(self.model_path), model_params, contexts, "model")
        draft = MemoryUse()
        if self._draft_path is not None and contexts is not None:
            _, draft = engine.dry_load(self._draft_path, self._draft_params, contexts, "draft")
        return experts, target.total + draft.total

    def _model_loaded(self) -> None:
        if self._plan.policy == "slots":
            self._hook = _native.Hook(self._model.model, self._experts, self._plan.max_width, self._plan.slots)
            # closed after the context that uses it and before the model that it hangs on
            self._stack.callback(self._hook.detach)

    def _load_draft(self) -> None:
        k_max = self._plan.k_max
        if k_max and (self._is_recurrent or self._is_hybrid):
            log.warning("the model's recurrent state cannot be rolled back: speculation is off")
            k_max = 0
        self._governor = Governor(k_max, fixed=self._wanted_k is not None)
        if self._draft_path is not None and k_max:
            context_params = engine.copy_params(self.context_params)
            context_params.cb_eval = type(context_params.cb_eval)(0)
            self._draft = engine.DraftModel(self._draft_path, self._draft_params, context_params, k_max + 2)
            self._stack.callback(self._draft.close)
            self._draft.require_vocabulary_of(self._model.model)
        if self._hook is not None and self._policy == "auto":
            self._foresight = foresight.choose(self._experts, self._draft.experts if self._draft else None)
        used = self.memory_used()
        if self._budget_bytes is not None and used > self._budget_bytes:
            raise EdgeError(
                f"{used} bytes are in use on {self.device.name}, over the budget of {self._budget_bytes}",
                f"ask for at least {used} bytes",
            )

    def _require_open(self) -> None:
        if self._ctx.ctx is None:
            raise EdgeError("the model is closed")

    def close(self) -> None:
        """Frees models, contexts and slots. stats() keeps the counters."""
        if "_stack" in self.__dict__:  # absent when the arguments were refused
            super().close()

    # --- generating ------------------------------------------------------------------------------------

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        grammar: Any = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yields tokens after the prompt, as llama_cpp.Llama.generate does; tokens sent in become text."""
        self._mirostat_mu = ctypes.c_float(2.0 * mirostat_tau)
        self._stopping_criteria = stopping_criteria
        self._sampler = self._init_sampler(
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            temp=temp,
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            tfs_z=tfs_z,
            mirostat_mode=mirostat_mode,
            mirostat_tau=mirostat_tau,
            mirostat_eta=mirostat_eta,
            penalize_nl=penalize_nl,
            logits_processor=logits_processor,
            grammar=grammar,
        )
        self._timing.n_prompt += len(tokens)
        started = time.perf_counter()
        pending = self._reuse_prefix(list(tokens)) if reset else list(tokens)
        if not pending and self._requires_eval:
            raise EdgeError("there is nothing to continue: the prompt is empty", "give at least one token", usage=True)
        yield from speculate.timed(speculate.generate(self, pending), self._timing, started)

    def _reuse_prefix(self, tokens: list[int]) -> list[int]:
        """Keeps what the KV cache shares with tokens and returns the rest; [] when its logits are live too."""
        held = self._input_ids
        n = min(len(held), len(tokens))
        different = np.flatnonzero(held[:n] != np.asarray(tokens[:n], dtype=np.intc))
        shared = int(different[0]) if len(different) else n
        if shared == len(tokens) == self.n_tokens and shared and not self._requires_eval:
            return []
        shared = min(shared, len(tokens) - 1)  # the last token is decoded again for its logits
        if shared <= 0 or not self._ctx.kv_cache_seq_rm(-1, shared, -1):
            self.reset()
            return tokens
        self.n_tokens = shared
        self._requires_eval = True
        return tokens[shared:]

    def eval(self, tokens: Sequence[int]) -> None:
        """Decodes tokens into the context, as llama_cpp.Llama.eval does."""
        if len(tokens):
            self.verify(list(tokens), [])

    # --- the engine of speculate.generate --------------------------------------------------------------

    def draft(self, pending: list[int]) -> list[int]:
        self._speculation.steps += 1
        self._draft_routing = None
        room = min(self._plan.max_width, self._n_ctx - self.n_tokens, self.n_batch) - len(pending)
        room = min(room, self._governor.k())
        if self._draft is None or room <= 0:
            return []
        text = np.concatenate([self._input_ids, np.asarray(pending, dtype=np.intc)])
        # a clone draws the random numbers that the target's sampler is about to draw: similar distributions
        # then pick the same token. A Python logits processor cannot be cloned.
        if self._sampler.custom_samplers:
            sampler = llama_cpp.llama_sampler_init_greedy()
        else:
            sampler = llama_cpp.llama_sampler_clone(self._sampler.sampler)
        try:
            drafted, self._draft_routing = self._draft.propose(text, room, sampler)
        finally:
            llama_cpp.llama_sampler_free(sampler)
        padding = next((i for i, token in enumerate(drafted) if token >= self._n_vocab), None)
        drafted = drafted[:padding]  # a draft's vocabulary may be padded further than ours
        self._speculation.drafted += len(drafted)
        return drafted

    def foresee(self) -> None:
        if self._foresight is None or self._hook is None:
            return
        self._hook.scores[:] = self._foresight.worth()
        orders = foresight.orders(self._foresight.expect(self._draft_routing))
        self._hook.prefetch(orders, _native.NO_BUDGET if self._foresight.worth_fetching() else 0)

    def verify(self, pending: list[int], drafted: list[int]) -> None:
        self._require_open()
        self._pending, self._n_kept, self._n_rows = pending, 0, len(drafted) + 1
        if not pending:
            return
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        self._requires_eval = True  # until the step is settled
        tokens = pending + drafted
        # llama.cpp takes its batch threads from two tokens on; a verify step is as narrow as a decode step, and
        # more threads than that only wait for each other
        narrow = len(tokens) <= self._plan.max_width
        self._ctx.set_n_threads(self.n_threads, self.n_threads if narrow else self.n_threads_batch)
        for start in range(0, len(tokens), self.n_batch):
            chunk = tokens[start : start + self.n_batch]
            past = self.n_tokens + start
            last = start + len(chunk) == len(tokens)
            # without logits for every token the last block would lack rows of routing
            whole = len(chunk) <= self._plan.max_width
            n_logits = len(chunk) if whole else min(self._n_rows, len(chunk)) if last else 1
            engine.decode(self._ctx, self._batch, chunk, past, n_logits, hook=self._hook, logits_all=self._logits_all)
            self.input_ids[past : past + len(chunk)] = chunk
            if self._logits_all:
                logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(chunk) * self._n_vocab,))
                self.scores[past : past + len(chunk), :].reshape(-1)[:] = logits
            self._warn_if_unserved(len(chunk))
        self.n_tokens += len(pending)
        self._requires_eval = len(drafted) > 0

    def cancel(self) -> None:
        """From another thread: the generator that runs raises EdgeError("cancelled") at the next block that slots
        serve; the text so far stays. No effect without slots."""
        if self._hook is not None:
            self._hook.cancel()

    def _warn_if_unserved(self, width: int) -> None:
        if self._hook is None or self._unserved or width > min(self._plan.max_width, self.context_params.n_ubatch):
            return
        if not self._hook.routing().shape[1]:
            self._unserved = True
            log.warning("this model takes llama.cpp's stock path: its experts are not served from slots")

    def pick(self, row: int) -> int | None:
        self._require_open()
        from_last = row - self._n_rows
        token = int(self._sampler.sample(self._ctx, from_last))
        if self._stopping_criteria is not None:
            logits = np.ctypeslib.as_array(self._ctx.get_logits_ith(from_last), shape=(self._n_vocab,))
            if self._stopping_criteria(self._input_ids, logits):
                return None
        return token

    def keep(self) -> None:
        self.n_tokens += 1
        self._n_kept += 1
        self._speculation.accepted += 1

    def settle(self, *, mismatch: bool) -> None:
        if self._ctx.ctx is None:
            return  # closed under an open generator
        if self._foresight is not None and self._hook is not None:
            routing, n_pending = self._hook.routing(), len(self._pending)
            if routing.shape[1] == n_pending + self._n_rows - 1:  # a prompt in several batches leaves only the last
                self._foresight.observe(routing)
        self._governor.observe(self._n_kept, mismatch=mismatch)
        if self._n_kept + 1 < self._n_rows:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        else:
            self._requires_eval = False

    def memory_used(self) -> int:
        """Bytes on the compute device: dense weights, KV caches, draft, compute buffers and slots."""
        on_gpu = self.device.is_gpu
        used = _native.memory_used(self._ctx.ctx, on_gpu).total
        if self._draft is not None:
            used += self._draft.memory_used()
        return used + (self._hook.bytes_held() if self._hook is not None else 0)

    def stats(self) -> Stats:
        """What happened since the model was loaded. A snapshot: later events do not change it."""
        from edge_speq import __version__

        counters = ExpertCounters()  # a dense model
        if self._hook is not None:
            counters = self._hook.counters()
        elif self._experts.n_expert:
            counters = ExpertCounters(total=self._experts.total, hits=None, misses=None, cpu_computed=None)
        return Stats(
            timing=copy.copy(self._timing),
            speculation=copy.copy(self._speculation),
            experts=counters,
            plan=self._plan,
            used_bytes=self.memory_used() if self._ctx.ctx is not None else 0,
            device=str(self.device),
            llama_cpp_commit=_native.llama_cpp_commit(),
            edge_speq_version=__version__,
            foresight=self._foresight.name if self._foresight is not None else "none",
        )

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("draft_model", None)
        return state | self._edge_arguments
