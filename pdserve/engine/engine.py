"""One model's engine: requests in, frames of tokens out, one `step` at a time.

Owns the life of every request from `submit` to its one `Finished`. Scheduling is the `Scheduler`'s, blocks are the
`BlockManager`'s, dealings with the mover `Handoffs`'; the model is the runner's. It has no thread and no socket: its
host (`EngineProcess`, `LLM`) calls everything from one thread, except `post`, which any thread may call::

    engine.submit(request)
    while engine.has_work:
        frame = engine.step()

Step n + 1 is launched before the results of step n are looked at, so the device never waits for the host; the tokens
between the two stay on the device. `overlap=False` looks first.

A failed step ends its own requests with `EngineError` and the engine goes on; when steps fail in a row, `failure` is
set, everything is finished, and the host must end.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable

from pdserve.engine.admission import RequestTable, check_fields, check_limits
from pdserve.engine.batch import BatchItem, BatchResult, LaunchedStep, Runner
from pdserve.engine.block_manager import BlockManager
from pdserve.engine.handoffs import Ending, Handoffs
from pdserve.engine.scheduler import Plan, Scheduler
from pdserve.engine.sequence import Sequence, SequenceState
from pdserve.errors import DeadlineExceeded, EngineError, Overloaded, PdserveError
from pdserve.handoff import HandoffEvent, KvExporter, KvImporter
from pdserve.protocol import (
    EngineStats,
    Finished,
    FinishReason,
    GenerateRequest,
    Key,
    OutputFrame,
    TokenDelta,
)

log = logging.getLogger(__name__)

# A device error usually sticks to the process: when this many steps fail in a row, a new process is needed.
MAX_FAILED_STEPS = 3


def _ignore() -> None:
    pass


class Engine:
    """In-flight batching over one `Runner`.

    Args:
        max_queue_size: requests that may wait; one more is `Overloaded`.
        overlap: launch each step before the one before it is collected, if the runner is asynchronous.
        exporter: takes KV away, for context requests with a peer.
        importer: brings KV in, for generation requests.
        wake: called, from any thread, when an event was posted.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_queue_size: int = 4096,
        enable_chunked_prefill: bool = True,
        enable_block_reuse: bool = True,
        overlap: bool = True,
        exporter: KvExporter | None = None,
        importer: KvImporter | None = None,
        wake: Callable[[], None] = _ignore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits = runner.limits
        self.failure: EngineError | None = None
        self._runner = runner
        self._max_queue_size = max_queue_size
        self._chunked = enable_chunked_prefill
        self._max_in_flight = 1 if overlap and runner.is_asynchronous else 0
        self._in_flight: deque[tuple[Plan, LaunchedStep]] = deque()
        self._wake = wake
        self._clock = clock
        self._blocks = BlockManager(limits.num_blocks, limits.tokens_per_block, enable_block_reuse)
        self._scheduler = Scheduler(self._blocks, limits, enable_chunked_prefill)
        self._requests = RequestTable()
        self._handoffs = Handoffs(self._scheduler, self._requests, limits.vocab_size, exporter, importer)
        self._events: deque[HandoffEvent] = deque()
        self._deltas: list[TokenDelta] = []
        self._finished: list[Finished] = []
        self._arrivals = itertools.count()
        self._may_progress = False
        self._failed_steps = 0
        self._steps = self._prefill_tokens = self._decode_tokens = self._cached_tokens = 0
        self._step_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something now. Without, only `submit`, `post` or a deadline bring more."""
        if self._may_progress or self._in_flight or self._events or self._finished:
            return True
        deadline_s = self._requests.next_deadline_s()
        return deadline_s is not None and deadline_s <= self._clock()

    @property
    def is_idle(self) -> bool:
        """Whether no request is open and the mover holds no block."""
        return not self._requests and not self._handoffs.held

    def seconds_to_deadline(self) -> float | None:
        """How long the host may sleep before the next request's deadline; None without requests."""
        deadline_s = self._requests.next_deadline_s()
        return None if deadline_s is None else max(0.0, deadline_s - self._clock())

    def submit(self, request: GenerateRequest) -> None:
        """Take a request up. Never raises: a refusal is a `Finished` with its error, in the next frame."""
        now_s = self._clock()
        self._may_progress = True
        try:
            older = self._requests.supersede(request.key)
        except PdserveError as error:
            self._finished.append(Finished(request.key, "error", error=error.to_info()))
            return
        if older is not None:
            self._finish(older, "abort", now_s)
        try:
            self._take_up(request, now_s)
        except PdserveError as error:
            self._requests.end(request.key)
            self._finished.append(Finished(request.key, "error", error=error.to_info()))
            if request.phase == "generation":
                self._handoffs.refuse(request.key)

    def abort(self, key: Key) -> None:
        """End a request on its client's behalf; one that is not live (any more) is ignored."""
        sequence = self._requests.find(key)
        if sequence is not None:
            self._may_progress = True
            self._finish(sequence, "abort", self._clock())

    def post(self, event: HandoffEvent) -> None:
        """Tell the engine what the mover has done; from any thread."""
        self._events.append(event)
        self._wake()

    def step(self) -> OutputFrame:
        """Handle what has happened, launch a batch if there is one, and return all there is to say."""
        now_s = self._clock()
        while self._events:
            self._end(self._handoffs.handle(self._events.popleft(), now_s), now_s)
        for sequence in self._requests.expired(now_s):
            error = DeadlineExceeded(f"not finished after {sequence.request.timeout_s:g} s", "timeout_s")
            self._finish(sequence, "error", now_s, error)
        plan = self._plan()
        self._may_progress = bool(plan.items or self._in_flight)
        self._note_start(plan, now_s)
        self._handoffs.announce(plan)
        if plan.items:
            self._launch(plan)
        self._collect_all_but(self._max_in_flight if plan.items else 0)
        return self._take_frame()

    def fail_all(self, error: PdserveError) -> OutputFrame:
        """Finish every open request with `error`: the host is ending."""
        for sequence in list(self._requests):
            self._finish(sequence, "error", self._clock(), error)
        return self._take_frame()

    def stats(self) -> EngineStats:
        """Gauges and counters; those of the transceiver are left empty."""
        scheduler = self._scheduler
        live = len(self._requests)
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            awaiting_kv=live - len(scheduler.running) - len(scheduler.waiting),
            blocks=self._blocks.counts(),
            steps=self._steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=scheduler.num_preemptions,
            step_seconds=self._step_seconds,
        )

    def check(self) -> None:
        """Recompute the block books from all sequences. Raises `BrokenInvariant`."""
        self._scheduler.check([*self._requests, *self._handoffs.held.values()])

    def _take_up(self, request: GenerateRequest, now_s: float) -> None:
        if self.failure is not None:
            raise self.failure
        check_fields(request, self.limits)
        self._handoffs.check_phase(request)
        sequence = Sequence(request, self.limits, next(self._arrivals), now_s)
        # An earlier attempt may have produced all there is, and lost only its last message.
        reason = sequence.end_reason() if sequence.output_ids else None
        if reason is None:
            check_limits(request, self.limits, self._chunked)
            if self._num_queued() >= self._max_queue_size:
                raise Overloaded(f"{self._max_queue_size} requests are waiting", "max_queue_size")
        self._requests.add(sequence)
        if reason is not None:
            self._finish(sequence, reason, now_s)
        elif request.phase == "generation":
            self._end(self._handoffs.expect(sequence, now_s), now_s)
        else:
            self._scheduler.waiting[sequence] = None

    def _num_queued(self) -> int:
        scheduler, handoffs = self._scheduler, self._handoffs
        return len(self._requests) - len(scheduler.running) - len(scheduler.receiving) - len(handoffs.exporting)

    def _note_start(self, plan: Plan, now_s: float) -> None:
        """First admission of a sequence: from here its prefill counts, or what reuse saved of it."""
        for sequence in itertools.chain(plan.admitted, plan.accepted):
            milestones = sequence.milestones
            if milestones.scheduled_s is None and milestones.decode_from_s is None:
                sequence.num_cached_tokens = sequence.num_computed
                self._cached_tokens += sequence.num_computed
                if sequence.request.phase != "generation":
                    milestones.scheduled_s = now_s

    def _plan(self) -> Plan:
        plan = self._scheduler.plan(ahead=bool(self._in_flight))
        if plan is None:
            self._collect_all_but(0)
            plan = self._scheduler.plan()
            assert plan is not None, "without a step in flight nothing is missing"
        return plan

    def _launch(self, plan: Plan) -> None:
        started_s = self._clock()
        try:
            launched = self._runner.launch(plan.items)
        except Exception:
            log.exception("%s could not be launched", plan)
            # Later steps can't name tokens of a step that may not have run.
            self._collect_all_but(0)
            self._fail_step(plan)
            return
        self._scheduler.launched(plan)
        self._in_flight.append((plan, launched))
        self._step_seconds += self._clock() - started_s

    def _collect_all_but(self, num_left: int) -> None:
        while len(self._in_flight) > num_left:
            self._collect(*self._in_flight.popleft())

    def _collect(self, plan: Plan, launched: LaunchedStep) -> None:
        started_s = self._clock()
        results = self._await_results(plan, launched)
        for sequence, item in zip(plan.sequences, plan.items, strict=True):
            self._scheduler.collected(sequence, item)
            if sequence.state is SequenceState.ABORTING:
                self._handoffs.free(sequence)
        if results is None:
            return
        self._failed_steps = 0
        now_s = self._clock()
        for sequence, item, result in zip(plan.sequences, plan.items, results, strict=True):
            if sequence.state is SequenceState.RUNNING:
                self._apply(sequence, item, result, now_s)
        self._steps += 1
        self._prefill_tokens += plan.num_prefill_tokens
        self._decode_tokens += self.limits.max_num_tokens - plan.budget_tokens - plan.num_prefill_tokens
        self._step_seconds += self._clock() - started_s

    def _await_results(self, plan: Plan, launched: LaunchedStep) -> list[BatchResult] | None:
        """None: the step has failed, and with it its requests."""
        try:
            results = launched.results()
            if len(results) != len(plan.items):
                raise EngineError(f"the runner returned {len(results)} results for {len(plan.items)} items")
        except Exception:
            log.exception("%s failed", plan)
            self._fail_step(plan)
            return None
        return results

    def _apply(self, sequence: Sequence, item: BatchItem, result: BatchResult, now_s: float) -> None:
        self._scheduler.advance(sequence, len(item.token_ids))
        if result.prompt_logprobs and sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs += result.prompt_logprobs
        if sequence.handoff_open:
            self._handoffs.computed(sequence)
        token_id = result.token_id
        if token_id is None:
            return
        logprobs = None if result.logprob is None else [result.logprob]
        delta = TokenDelta(sequence.key, len(sequence.output_ids), [token_id], logprobs, sequence.prompt_logprobs)
        self._deltas.append(delta)
        sequence.append(token_id)
        if sequence.milestones.first_token_s is None:
            self._note_first_token(sequence, now_s)
        reason = sequence.end_reason()
        if reason is not None:
            self._finish(sequence, reason, now_s)
        elif sequence.handoff_open:
            self._handoffs.export(sequence, token_id)
        elif sequence.request.phase == "context":
            self._finish(sequence, "handoff", now_s)

    def _note_first_token(self, sequence: Sequence, now_s: float) -> None:
        sequence.prompt_logprobs = None
        milestones = sequence.milestones
        milestones.first_token_s = now_s
        if sequence.handoff_open:
            milestones.handoff_from_s = now_s
        elif milestones.decode_from_s is None:
            milestones.decode_from_s = now_s

    def _fail_step(self, plan: Plan) -> None:
        """Finish the requests of a step that failed, those still open."""
        now_s = self._clock()
        self._failed_steps += 1
        for sequence in plan.sequences:
            if self._requests.find(sequence.key) is sequence:
                self._finish(sequence, "error", now_s, EngineError("a step of the engine failed"))
        if self._failed_steps >= MAX_FAILED_STEPS:
            self.failure = EngineError(f"{self._failed_steps} steps failed in a row")
            for sequence in list(self._requests):
                self._finish(sequence, "error", now_s, self.failure)

    def _end(self, ending: Ending | None, now_s: float) -> None:
        if ending is not None:
            self._finish(ending.sequence, ending.reason, now_s, ending.error)

    def _finish(
        self, sequence: Sequence, reason: FinishReason, now_s: float, error: PdserveError | None = None
    ) -> None:
        """The one end of a request, towards client, mover and blocks."""
        self._requests.end(sequence.key)
        timings = sequence.milestones.timings(now_s)
        info = None if error is None else error.to_info()
        self._finished.append(Finished(sequence.key, reason, sequence.usage(), timings, info))
        self._handoffs.close(sequence)

    def _take_frame(self) -> OutputFrame:
        frame = OutputFrame(self._deltas, self._finished)
        self._deltas, self._finished = [], []
        return frame
