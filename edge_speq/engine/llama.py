"""EdgeLlama: a llama_cpp.Llama that keeps experts in slots and prefetches them with the help of a draft."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import time
from collections.abc import Sequence
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
from edge_speq.engine.load_progress import LoadProgress, Progress
from edge_speq.engine.loop import Tokens
from edge_speq.engine.observer import NativeLoad, StepObserver
from edge_speq.engine.resizable import Resizable
from edge_speq.engine.self_draft import SelfDraft
from edge_speq.engine.speculator import Speculator
from edge_speq.engine.step_records import OnStep, step_records
from edge_speq.errors import EdgeError
from edge_speq.planning import survey
from edge_speq.planning.load_request import LoadRequest, split_options
from edge_speq.policies import oracle, prediction
from edge_speq.policies import registry as presets
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.learned import network_file
from edge_speq.runtime import loading
from edge_speq.runtime.cancellation import Cancellation
from edge_speq.runtime.grammar import require_grammar

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge_speq.planning.load_options import LoadOptions

HOOKS = ("on_step", "observer", "progress", "n_gpu_layers", "verbose")  # keyword arguments outside LoadRequest
LAPTOP_LINK = 12_500_000_000  # bytes per second: PCIe 4 x8

log = logging.getLogger("edge_speq")

IN_MEMORY = (llama_cpp.LLAMA_LOAD_MODE_NONE, llama_cpp.LLAMA_LOAD_MODE_MLOCK)  # the file is read, not mapped


class EdgeLlama(Resizable):
    """A llama_cpp.Llama with a bounded set of experts on the compute device.

    Args:
        model_path: a GGUF file.
        on_step: called with a StepRecord after each verify step. If it raises, the request ends with its exception.
        observer: a StepObserver, called for the load, requests, decodes and steps.
        progress: called with the fraction of the model that is loaded, from 0 to 1. Returning False ends the load.
        n_gpu_layers: layers on the GPU, -1 for all of them.
        verbose: let llama.cpp write its log to stderr; by default it goes to the logging module.
        options: options of planning.load_request.LoadRequest (docs/reference/options.md), and every other keyword
            argument of llama_cpp.Llama with its usual meaning.

    Raises EdgeError for every failure that the caller can fix. One instance serves one thread at a time: a second
    thread that generates, evaluates or loads a state gets an EdgeError. Any thread may call cancel() and close().
    """

    _redirect_output = False  # read by the patched llama_cpp.Llama

    def __init__(
        self,
        model_path: str,
        *,
        on_step: OnStep | None = None,
        observer: StepObserver | None = None,
        progress: Progress | None = None,
        n_gpu_layers: int = -1,
        verbose: bool = False,
        **options: Unpack[LoadOptions],
    ) -> None:
        ours, stock = split_options(options, HOOKS)
        request = LoadRequest(str(model_path), **ours)
        self._callbacks = {"on_step": on_step, "observer": observer}
        self._profile: dict[str, Any] | None = None
        if request.profile is not None and request.throttle_link is None and not request.deterministic:
            from edge_speq.planning import profile as profiles  # lazily: importing EdgeLlama must be fast

            request, self._profile = profiles.apply(request, stock)
        self._options, self._request = request, survey.resolve(request)
        self._observer, self._progress = observer, None if progress is None else LoadProgress(progress)
        self._link = request.throttle_link or (LAPTOP_LINK if request.deterministic else 0)
        self._deterministic = request.deterministic
        self._recorded = oracle.load_for_policy(request.trace, request.policy)
        self._learned = network_file.load_for_policy(request.predictor, request.policy)
        self._share = request.resident
        self._fixed_bytes = self._slot_bytes = 0
        self._may_page_lock = "use_mmap" not in stock
        self.device = self._request.device
        self._hook: _native.Hook | None = None
        self._watching: _native.Hook | None = None  # only reads routing, if the plan has no slots
        self._shifts, self._n_keep = request.context_shift, request.n_keep
        self._timing = Timing()
        self._steps = step_records(on_step, observer)
        self._exclusive, self._cancellation = ExclusiveUse(), Cancellation()
        try:
            super().__init__(str(model_path), n_gpu_layers=n_gpu_layers, verbose=verbose, **stock)
            self.draft_model = request.draft_model
            self._open_context()
            self._look_ahead()
            if self._request.shared is not None:
                self._request.shared.join(self._request, self)
        except BaseException as error:
            self.close()
            if self._progress is not None:
                self._progress.raise_error(model_path)
            raise _explained(error, str(model_path)) from error

    def _configure(self, model_params: Any, context_params: Any) -> None:
        request = self._request
        self._draft_params, self._keep_alive = survey.prepare(request, model_params, context_params)
        found = survey.survey(
            request, model_params, self._draft_params, context_params if request.budget_bytes is not None else None
        )
        self._experts, self._plan = found.experts, survey.decide(request, found)
        log.info("plan: %s", self._plan.reason)
        if self._plan.placement == "slots" and self.lora_path is not None:
            raise EdgeError("slots do not serve LoRA adapters", "use policy all or cpu-moe", usage=True)
        if self._plan.placement == "slots" and context_params.embeddings:
            raise EdgeError("slots do not serve embeddings", "use policy all or cpu-moe", usage=True)
        slots, mode = self._plan.placement == "slots", model_params.load_mode
        may_page_lock = slots and self._may_page_lock and mode == llama_cpp.LLAMA_LOAD_MODE_MMAP and self.device.is_gpu
        if may_page_lock and loading.fits_in_memory(self._experts.total_bytes):
            model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        if slots and model_params.load_mode in IN_MEMORY:
            loading.pin_experts(self._keep_alive)
        elif self._plan.placement == "all":
            model_params.tensor_buft_overrides = None
        if self._progress is not None:
            self._progress.attach(request, model_params, self._draft_params)
        if self._observer is not None:
            native = (model_params, context_params, self._draft_params)
            self._observer.on_load(NativeLoad(request, self._experts, self._plan, *native))

    def _model_loaded(self) -> None:
        if self._plan.placement != "slots":
            if self._observer is not None and self._observer.needs_routing and self._experts.n_blocks:
                self._watching = _native.Hook(
                    self._model.model, self._experts, self._plan.max_width, reads_prefill=True
                )
                self._stack.callback(self._watching.detach)
            return
        # on a laptop a block computes for about half the time of one expert's transfer
        block_ns = int(5e8 * self._experts.groups[0].expert_bytes / self._link) if self._deterministic else 0
        transfers = _native.Transfers(
            self._link,
            self._deterministic,
            block_ns,
            self._on_miss,
            self.context_params.n_threads,
            self._request.next_layer_prefetch and self._on_miss != "fetch",
        )
        self._hook = _native.Hook(
            self._model.model, self._experts, self._plan.max_width, self._plan.slots, transfers, reads_prefill=True
        )
        # closed after the context, which uses it, and before the model, which it refers to
        self._stack.callback(self._hook.detach)
        self._cancellation.also = self._hook.cancel

    @property
    def _on_miss(self) -> str:
        """How missing experts are served. "auto" means "fetch" without a GPU, since a fetch is only a memory copy, and
        in deterministic mode, since hybrid execution depends on measured times."""
        if self._request.on_miss == "auto" and (not self.device.is_gpu or self._deterministic):
            return "fetch"
        return self._request.on_miss

    @property
    def _has_fixed_length(self) -> bool:
        """True if every step drafts as many tokens as the plan allows."""
        observed = self._observer is not None and self._observer.fixes_draft_length
        return self._request.draft_tokens is not None or observed

    def _look_ahead(self) -> None:
        k_max = self._plan.max_draft_tokens
        if k_max and (self._is_recurrent or self._is_hybrid):
            log.warning("the model's recurrent state cannot be rolled back: speculation is off")
            k_max = 0
        draft = self._load_draft(k_max) if k_max else None
        self._speculator = Speculator(
            draft=draft,
            governor=DraftLengthController(
                k_max,
                fixed=self._has_fixed_length,
                timed=not self._deterministic,
                latency_limit_ms=self._options.latency_limit_ms,
            ),
            policy=self._make_policy(draft, k_max) if self._hook is not None else None,
            hook=self._hook,
            n_vocab=self._n_vocab,
            admits=self._hook is not None and self._on_miss != "fetch" and not self._hook.costs().fetches_some,
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
        context = PolicyContext.nominal(
            self._experts, self._plan.slots, k_max, link, learned, has_twin=has_twin, known=self._recorded
        )
        fixed, clock = self._has_fixed_length, not self._deterministic
        limited = self._options.latency_limit_ms is not None
        policy = presets.live(self._request.policy, context, is_fixed=fixed, has_clock=clock, is_limited=limited)
        if self._hook is not None:
            self._hook.use_budget(policy.expert_budget)
            self._hook.admit_from_prefill(policy.reads_prompts)
        return policy

    def _load_draft(self, k_max: int) -> Draft | None:
        draft = self._open_draft(k_max)
        return draft if draft is None or self._observer is None else self._observer.on_draft(draft)

    def _open_draft(self, k_max: int) -> Draft | None:
        if self._request.draft_model is not None:
            return ObjectDraft(self._request.draft_model)
        if self._request.draft_spec.itself and self._hook is not None:
            return SelfDraft(self, self._hook, self._request.draft_spec.twin, self._plan.max_width)
        if self._request.draft is None:
            return None
        context_params = survey.draft_contexts(self._request, self.context_params)
        context_params.cb_eval = type(context_params.cb_eval)(0)
        context_params.embeddings = False
        draft = DraftModel(self._request.draft, self._draft_params, context_params, k_max + 2, self._cancellation)
        self._stack.callback(draft.close)
        draft.require_vocabulary_of(self._model.model)
        return draft

    def close(self) -> None:
        """Free models, contexts and slots, from any thread. A running step is cancelled first; stats() keeps working.

        Raises EdgeError if called from a callback of a step.
        """
        if "_stack" not in self.__dict__:  # __init__ refused the arguments
            return
        if self._request.shared is not None:
            self._request.shared.drop(self._request)
        with self._exclusive.enter(exclusive=True, interrupt=self._cancellation.set), self._cancellation.lock:
            self._cancellation.also = None
            super().close()
        if self._request.shared is not None:
            self._request.shared.rebalance()

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
        """Yield tokens after the prompt, as llama_cpp.Llama.generate does. Tokens sent in become part of the text."""
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
        return self._exclusive.guarded(stream, request)

    def _tokens_of(
        self, request: Generation, tokens: list[int], stopping_criteria: Any, sampling: dict[str, Any], *, reset: bool
    ) -> Tokens:
        started = time.perf_counter()
        self._require_open()
        self._forget_cancellation()
        if self._shifts and len(tokens) > self._size:  # as _create_completion does without context shift
            raise ValueError(f"Requested tokens ({len(tokens)}) exceed context window of {self._size}")
        self._mirostat_mu = ctypes.c_float(2.0 * sampling["mirostat_tau"])
        if sampling["grammar"] is not None:
            require_grammar(sampling["grammar"]._grammar, self._model.vocab)
        # closed explicitly: it refers to itself, so its native memory would wait for the garbage collector
        with contextlib.closing(self._init_sampler(**sampling)) as sampler:
            request.begin(self._speculator, sampler, stopping_criteria)
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
                kwargs["max_tokens"] = self._size  # llama_cpp.Llama's "no limit" means the context size
        chunks = super()._create_completion(*args, **kwargs)
        return chunks if self._steps is None else self._steps.over(chunks)

    def cancel(self) -> None:
        """Make the open request raise EdgeError("cancelled"), from any thread. The text generated so far stays.

        A running graph ends at its next node on the CPU and at its next block with slots. Other graphs on a GPU run to
        the end of their ubatch. No effect if no request is open.
        """
        if self._exclusive.is_open:
            self._cancellation.set()

    def stats(self) -> Stats:
        """Return a snapshot of all counters since the model was loaded, from any thread."""
        from edge_speq import __version__

        counters = ExpertCounters()  # a dense model
        if self._hook is not None:
            with self._cancellation.lock:  # close() cannot free the hook meanwhile
                counters = self._hook.counters()
        elif self._experts.n_expert:
            counters = ExpertCounters(total=self._experts.total, hits=None, misses=None, cpu_computed=None)
        return Stats(
            timing=copy.copy(self._timing),
            speculation=copy.copy(self._speculator.counts),
            experts=counters,
            plan=self._plan,
            used_bytes=self._fixed_bytes + self._slot_bytes if self._ctx.ctx is not None else 0,
            device=str(self.device),
            llama_cpp_commit=_native.llama_cpp_commit(),
            edge_speq_version=__version__,
            foresight=self._speculator.name,
            foreseen=self._speculator.foreseen,
            policy=self._speculator.policy,
            policy_failures=self._speculator.failures,
            profile=self._profile,
            lossy=bool(survey.losses(self._request, self._experts, self._plan.max_draft_tokens)),
        )

    def __getstate__(self) -> dict[str, Any]:
        if self._request.shared is not None:
            raise EdgeError("a model that shares a Budget cannot be pickled", "load it with its own vram_budget")
        state: dict[str, Any] = super().__getstate__()
        return state | self._options.options() | self._callbacks


def _explained(error: BaseException, model_path: str) -> BaseException:
    """Translate an exception that llama_cpp.Llama raised while loading into the one for the caller."""
    if isinstance(error, TemplateError):  # the file's chat template is compiled while loading
        return EdgeError(f"cannot load {model_path}: {error}", "the file's chat template is invalid: convert it again")
    if isinstance(error, ValueError):  # llama_cpp.Llama refused an argument or the file
        return EdgeError(f"cannot load {model_path}: {error}", "verbose=True shows llama.cpp's reason")
    return error
