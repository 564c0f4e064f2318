"""EdgeLlama: a llama_cpp.Llama whose experts live in slots and whose draft looks ahead for them."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
from jinja2 import TemplateError

from edge_speq import _native
from edge_speq.core import ExpertCounters, Stats, Timing
from edge_speq.drafting.base import Draft
from edge_speq.drafting.draft_model import DraftModel
from edge_speq.drafting.external import ObjectDraft
from edge_speq.engine import loop
from edge_speq.engine.draft_length.controller import DraftLengthController
from edge_speq.engine.exclusive import ExclusiveUse
from edge_speq.engine.generation import Generation
from edge_speq.engine.loop import Tokens
from edge_speq.engine.resizable import Resizable
from edge_speq.engine.self_draft import SelfDraft
from edge_speq.engine.speculator import Speculator
from edge_speq.errors import EdgeError
from edge_speq.planning import survey
from edge_speq.planning.shared_budget import Budget
from edge_speq.policies import oracle, prediction
from edge_speq.policies import registry as presets
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.learned import network_file
from edge_speq.runtime import loading as engine
from edge_speq.runtime.cancellation import Cancellation
from edge_speq.runtime.grammar import require_grammar
from edge_speq.units import parse_rate

if TYPE_CHECKING:
    from edge_speq.engine.step_records import OnStep, StepRecords

LAPTOP_LINK = 12_500_000_000  # bytes per second: PCIe 4 x8

log = logging.getLogger("edge_speq")

IN_MEMORY = (llama_cpp.LLAMA_LOAD_MODE_NONE, llama_cpp.LLAMA_LOAD_MODE_MLOCK)  # read, not mapped


class EdgeLlama(Resizable):
    """A llama_cpp.Llama with a bounded set of experts on the compute device.

    Args (besides those of llama_cpp.Llama, which all keep their meaning; n_gpu_layers defaults to all):
        draft: path of a draft GGUF with the model's vocabulary; of a twin's experts alone (`edge-speq convert draft
            --experts-only`), with which the model drafts for itself, in its own KV cache; "self": it does so with its
            experts in slots, at no cost in memory; "ngram": what followed the same tokens earlier in the text.
        draft_model: a llama_cpp.llama_speculative.LlamaDraftModel instead, such as LlamaPromptLookupDecoding.
        use_mmap: left out, slots on a GPU read the experts into page-locked memory where there is plenty of it, since
            fetches are then several times faster; True maps the file whatever happens, False never does.
        resident: share of the routed-expert bytes that slots may hold, 0.25 or "1/4".
        vram_budget: bytes ("6GiB") for everything on the compute device, or "auto", what is free less a margin (policy
            auto's default on a GPU). On a CPU-only machine it bounds RAM, mapped file pages not counted. A Budget
            is shared by all models that it is given to.
        speculation: draft tokens per step, or "auto": as many as pay, which may be none.
        policy: "auto" (slots with foresight, or no slots where everything fits or nothing bounds them), "lfru" (slots
            that keep what was demanded often of late), "lru" (slots that keep what was demanded last), "cpu-moe"
            (experts stay on the CPU) or "all" (everything resident). Also with slots, in docs/presets.md: published
            systems ("moe-speq", ...), of which "moe-prism" and "moe-spec" are lossy, and the parts of "auto".
        compute: "device": missing experts are fetched, and computed on the device; "hybrid": some are fetched while the
            CPU computes the others from where they lie, so that both are done as early as possible; "hybrid-ahead":
            that, and experts that a block's input says the next will want are fetched meanwhile; "auto": on a GPU
            the same, with whichever of the first two has been faster of late.
        context_shift: when the context is full, discard half of it and go on, as llama.cpp's server does, instead of
            ending the text. max_tokens may then exceed the context; without it a text ends after n_ctx tokens.
        n_keep: tokens at the front that a shift never discards, -1 for the whole prompt.
        link: bytes per second ("12.5GB/s") that transfers are slowed down to, to stand in for a slower machine.
        deterministic: transfers take virtual time over such a link, and nothing follows the clock: counters repeat.
        profile: what `edge-speq tune` found: "auto" looks for one of this model, draft and device, a path names one. It
            fills in what is left at its default, the draft too where tune chose among several, and is not used where it
            was made for something else: see stats().
        latency_limit_ms: milliseconds that drafting and verifying a step should take at most with speculation "auto".
        foresight: a file of `edge-speq tune --learn`, for policies "auto" and "learned"; of `edge-speq trace` for
            "oracle", which knows what that text demanded.
        on_step: called with a steps.StepRecord after each verify step; an exception of it ends the request.

    Raises EdgeError for everything a caller can mend. One instance serves one thread at a time: another one that
    generates, evaluates or loads a state meanwhile gets an EdgeError. cancel() and close() may come from any thread.
    """

    _redirect_output = False  # read by the patched llama_cpp.Llama

    def __init__(
        self,
        model_path: str,
        *,
        draft: str | Path | None = None,
        draft_model: Any = None,
        resident: float | str | None = None,
        vram_budget: int | str | Budget | None = None,
        speculation: int | str = "auto",
        policy: str = "auto",
        compute: str = "auto",
        context_shift: bool = False,
        n_keep: int = 0,
        link: int | str | None = None,
        deterministic: bool = False,
        profile: str | Path | None = None,
        foresight: str | Path | None = None,
        latency_limit_ms: float | None = None,
        on_step: OnStep | None = None,
        n_gpu_layers: int = -1,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._edge_arguments = {
            "draft": draft,
            "draft_model": draft_model,
            "resident": resident,
            "vram_budget": vram_budget,
            "speculation": speculation,
            "policy": policy,
            "compute": compute,
            "context_shift": context_shift,
            "n_keep": n_keep,
            "link": link,
            "deterministic": deterministic,
            "profile": profile,
            "foresight": foresight,
            "latency_limit_ms": latency_limit_ms,
            "on_step": on_step,
        }
        if n_keep < -1:
            raise EdgeError(f"n_keep={n_keep} is not a number of tokens", "give 0 or more, or -1", usage=True)
        asked = {name: self._edge_arguments[name] for name in survey.ARGUMENTS}
        self._profile: dict[str, Any] | None = None
        if profile is not None and link is None and not deterministic:
            from edge_speq.planning import profile as profiles  # importing EdgeLlama is to be fast

            self._profile = profiles.apply(profile, model_path, asked, kwargs)
        self._wanted = survey.request(model_path, **asked)
        self._link = parse_rate(link) if link is not None else LAPTOP_LINK if deterministic else 0
        self._deterministic = deterministic
        self._trace = oracle.load_for_policy(foresight, self._wanted.policy)
        self._learned = network_file.load_for_policy(None if self._trace else foresight, self._wanted.policy)
        self._share = self._wanted.resident
        self._fixed_bytes = self._slot_bytes = 0
        self._may_page_lock = "use_mmap" not in kwargs
        self.device = self._wanted.device
        self._hook: _native.Hook | None = None
        self._shifts, self._n_keep = context_shift, n_keep
        self._timing = Timing()
        self._steps = None if on_step is None else _steps(on_step)
        self._turns, self._cancellation = ExclusiveUse(), Cancellation()
        try:
            super().__init__(model_path, n_gpu_layers=n_gpu_layers, verbose=verbose, **kwargs)
            self.draft_model = draft_model
            self._open_context()
            self._look_ahead()
            if self._wanted.shared is not None:
                self._wanted.shared.join(self._wanted, self)
        except TemplateError as error:  # the file's chat template is compiled while loading
            self.close()
            raise EdgeError(
                f"cannot load {model_path}: {error}", "the file itself is at fault: convert it again"
            ) from error
        except ValueError as error:  # what llama_cpp.Llama says of its arguments, or of the file
            self.close()
            raise EdgeError(f"cannot load {model_path}: {error}", "verbose=True shows llama.cpp's reason") from error
        except BaseException:
            self.close()
            raise

    def _configure(self, model_params: Any, context_params: Any) -> None:
        wanted = self._wanted
        self._draft_params, self._keep_alive = survey.prepare(wanted, model_params, context_params)
        found = survey.survey(
            wanted, model_params, self._draft_params, context_params if wanted.budget_bytes is not None else None
        )
        self._experts, self._plan = found.experts, survey.decide(wanted, found)
        log.info("plan: %s", self._plan.reason)
        if self._plan.placement == "slots" and self.lora_path is not None:
            raise EdgeError("slots do not serve LoRA adapters", "use policy all or cpu-moe", usage=True)
        if self._plan.placement == "slots" and context_params.embeddings:
            raise EdgeError("slots do not serve embeddings", "use policy all or cpu-moe", usage=True)
        slots, mode = self._plan.placement == "slots", model_params.load_mode
        may_page_lock = slots and self._may_page_lock and mode == llama_cpp.LLAMA_LOAD_MODE_MMAP and self.device.is_gpu
        if may_page_lock and engine.fits_in_memory(self._experts.total_bytes):
            model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        if slots and model_params.load_mode in IN_MEMORY:
            engine.pin_experts(self._keep_alive)
        elif self._plan.placement == "all":
            model_params.tensor_buft_overrides = None

    def _model_loaded(self) -> None:
        if self._plan.placement == "slots":
            # a laptop's block computes about half as long as one of its experts travels
            block_ns = int(5e8 * self._experts.groups[0].expert_bytes / self._link) if self._deterministic else 0
            compute, threads = self._compute, self.context_params.n_threads
            place, ahead = compute.removesuffix("-ahead"), compute in ("auto", "hybrid-ahead")
            transfers = _native.Transfers(self._link, self._deterministic, block_ns, place, threads, ahead)
            self._hook = _native.Hook(
                self._model.model, self._experts, self._plan.max_width, self._plan.slots, transfers, reads_prompts=True
            )
            # closed after the context that uses it and before the model that it hangs on
            self._stack.callback(self._hook.detach)
            self._cancellation.also = self._hook.cancel

    @property
    def _compute(self) -> str:
        """Where missing experts are computed. Auto is "device" without a GPU, where a fetch is a copy, in deterministic
        mode, since hybrid placement follows the clock, and for lru, a baseline that fetches."""
        wanted = self._wanted
        if wanted.compute == "auto" and (not self.device.is_gpu or self._deterministic or wanted.policy == "lru"):
            return "device"
        return wanted.compute

    def _look_ahead(self) -> None:
        k_max = self._plan.max_draft_tokens
        if k_max and (self._is_recurrent or self._is_hybrid):
            log.warning("the model's recurrent state cannot be rolled back: speculation is off")
            k_max = 0
        draft = self._load_draft(k_max) if k_max else None
        self._lookahead = Speculator(
            draft=draft,
            governor=DraftLengthController(
                k_max,
                fixed=self._wanted.speculation is not None,
                timed=not self._deterministic,
                latency_limit_ms=self._edge_arguments["latency_limit_ms"],
            ),
            policy=self._make_policy(draft, k_max) if self._hook is not None else None,
            hook=self._hook,
            n_vocab=self._n_vocab,
            admits=self._hook is not None and self._compute != "device" and not self._hook.costs().fetches_some,
            virtual=self._deterministic,
        )
        self._measure()
        used, bound = self.memory_used(), self._plan.budget_bytes
        if bound is not None and used > bound:
            raise EdgeError(
                f"{used} bytes are in use on {self.device.name}, over the budget of {bound}",
                f"ask for at least {used} bytes",
            )

    def _make_policy(self, draft: Draft | None, k_max: int) -> Policy:
        has_twin = draft is not None and prediction.is_twin(self._experts, draft.experts)
        link, learned = self._link or LAPTOP_LINK, self._learned
        if learned is not None:
            learned.require(self._experts, None if draft is None else draft.experts)
        setting = PolicyContext.nominal(
            self._experts, self._plan.slots, k_max, link, learned, has_twin=has_twin, known=self._trace
        )
        fixed, clock = self._wanted.speculation is not None, not self._deterministic
        limited = self._edge_arguments["latency_limit_ms"] is not None
        policy = presets.live(self._wanted.policy, setting, is_fixed=fixed, has_clock=clock, is_limited=limited)
        if self._hook is not None:
            self._hook.use_budget(policy.expert_budget)
            self._hook.keep_prompts(policy.reads_prompts)
        return policy

    def _load_draft(self, k_max: int) -> Draft | None:
        if self._wanted.draft_model is not None:
            return ObjectDraft(self._wanted.draft_model)
        if self._wanted.guesses.itself and self._hook is not None:
            return SelfDraft(self, self._hook, self._wanted.guesses.twin, self._plan.max_width)
        if self._wanted.draft is None:
            return None
        context_params = survey.draft_contexts(self._wanted, self.context_params)
        context_params.cb_eval = type(context_params.cb_eval)(0)
        context_params.embeddings = False
        draft = DraftModel(self._wanted.draft, self._draft_params, context_params, k_max + 2, self._cancellation)
        self._stack.callback(draft.close)
        draft.require_vocabulary_of(self._model.model)
        return draft

    def close(self) -> None:
        """Frees models, contexts and slots, from any thread: a step that runs is cancelled first. stats() keeps the
        counters. Raises EdgeError from a callback of a step."""
        if "_stack" not in self.__dict__:  # the arguments were refused
            return
        if self._wanted.shared is not None:
            self._wanted.shared.drop(self._wanted)
        with self._turns.use(alone=True, hurry=self._cancellation.set), self._cancellation.lock:
            self._cancellation.also = None
            super().close()
        if self._wanted.shared is not None:
            self._wanted.shared.rebalance()

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
    ) -> Tokens:
        """Yields tokens after the prompt, as llama_cpp.Llama.generate does; tokens sent in become text."""
        request = Generation(self)
        sampling = {
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "temp": temp,
            "repeat_penalty": repeat_penalty,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "tfs_z": tfs_z,
            "mirostat_mode": mirostat_mode,
            "mirostat_tau": mirostat_tau,
            "mirostat_eta": mirostat_eta,
            "penalize_nl": penalize_nl,
            "logits_processor": request.guarded(logits_processor),
            "grammar": grammar,
        }
        stream = self._tokens_of(request, list(tokens), stopping_criteria, sampling, reset=reset)
        return self._turns.guarded(stream, request)

    def _tokens_of(
        self, request: Generation, tokens: list[int], stopping_criteria: Any, sampling: dict[str, Any], *, reset: bool
    ) -> Tokens:
        started = time.perf_counter()
        self._require_open()
        self._forget_cancellation()
        if self._shifts and len(tokens) > self._size:  # what _create_completion says when nothing shifts
            raise ValueError(f"Requested tokens ({len(tokens)}) exceed context window of {self._size}")
        self._mirostat_mu = ctypes.c_float(2.0 * sampling["mirostat_tau"])
        if sampling["grammar"] is not None:
            require_grammar(sampling["grammar"]._grammar, self._model.vocab)
        # closed at once: it refers to itself, and its native memory would wait for the garbage collector
        with contextlib.closing(self._init_sampler(**sampling)) as sampler:
            request.begin(self._lookahead, sampler, stopping_criteria)
            self._timing.n_prompt += len(tokens)
            pending = self._reuse_prefix(tokens) if reset else tokens
            if not pending and self._requires_eval:
                reason = "there is nothing to continue: the prompt is empty"
                raise EdgeError(reason, "give at least one token", usage=True)
            self._n_kept = self.n_tokens + len(pending) if self._n_keep < 0 else self._n_keep
            yield from loop.timed(loop.generate(request, pending), self._timing, started)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Any:
        if self._shifts:
            if kwargs.get("logprobs") is not None:
                raise EdgeError(
                    "logprobs need every token's logits", "load the model without context_shift", usage=True
                )
            if (kwargs.get("max_tokens") or 0) <= 0:
                kwargs["max_tokens"] = self._size  # no limit, says llama_cpp.Llama, and means the context
        chunks = super()._create_completion(*args, **kwargs)
        return chunks if self._steps is None else self._steps.over(chunks)

    def cancel(self) -> None:
        """From any thread: the request that is open raises EdgeError("cancelled"); the text so far stays.

        On the CPU the graph that runs ends at its next node, with slots at the next block; other graphs of a GPU run to
        the end of their ubatch. No effect when no request is open.
        """
        if self._turns.is_open:
            self._cancellation.set()

    def stats(self) -> Stats:
        """What happened since the model was loaded, from any thread. A snapshot: later events do not change it."""
        from edge_speq import __version__

        counters = ExpertCounters()  # a dense model
        if self._hook is not None:
            with self._cancellation.lock:  # nothing native is freed meanwhile
                counters = self._hook.counters()
        elif self._experts.n_expert:
            counters = ExpertCounters(total=self._experts.total, hits=None, misses=None, cpu_computed=None)
        return Stats(
            timing=copy.copy(self._timing),
            speculation=copy.copy(self._lookahead.counts),
            experts=counters,
            plan=self._plan,
            used_bytes=self._fixed_bytes + self._slot_bytes if self._ctx.ctx is not None else 0,
            device=str(self.device),
            llama_cpp_commit=_native.llama_cpp_commit(),
            edge_speq_version=__version__,
            foresight=self._lookahead.name,
            foreseen=self._lookahead.foreseen,
            policy=self._lookahead.policy,
            policy_failures=self._lookahead.failures,
            profile=self._profile,
            lossy=bool(survey.losses(self._wanted, self._experts, self._plan.max_draft_tokens)),
        )

    def __getstate__(self) -> dict[str, Any]:
        if self._wanted.shared is not None:
            raise EdgeError("a model that shares a Budget cannot be pickled", "load it with a budget of its own")
        state: dict[str, Any] = super().__getstate__()
        return state | self._edge_arguments


def _steps(on_step: OnStep) -> StepRecords:
    from edge_speq.engine.step_records import StepRecords

    return StepRecords(on_step)
