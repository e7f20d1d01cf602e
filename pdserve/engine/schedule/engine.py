"""One model's engine: requests in, frames of tokens out, one `step` at a time.

Owns the life of every request from `submit` to its one `Finished`. `Scheduler` decides what a step computes, `KvCache`
has the blocks, `StepPipeline` the steps in flight, `Handoffs` speaks to the transceiver, and the runner has the model.
The engine has no thread and no socket: its host (`EngineProcess` or `BackgroundEngine`) calls everything from one
thread, except `post`, which any thread may call::

    engine.submit(request)
    while engine.has_work:
        frame = engine.step()

Step n + 1 is launched before the results of step n are read, so the device never waits for the host. The tokens that
step n samples reach step n + 1 on the device. With `overlap=False` the results are read first.

A step that fails ends only the request that caused it, with `EngineError`: all sequences in flight are set back to
what is proven, and the step's sequences run again in ever smaller groups until the bad one runs alone (`Isolation`).
The whole engine fails in three cases: the runner is lost, its probe fails, or steps fail whichever sequences are in
them. Then `failure` is set, every request is finished with it, and the host must end.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List

from pdserve.engine.schedule.admission import RequestTable, check_limits
from pdserve.engine.schedule.batch import BatchItem, BatchResult, Runner, RunnerLost
from pdserve.engine.schedule.handoffs import Ending, Handoffs
from pdserve.engine.schedule.isolation import Isolation
from pdserve.engine.schedule.kv_cache import KvCache
from pdserve.engine.schedule.options import EngineOptions
from pdserve.engine.schedule.planned_step import PlannedStep
from pdserve.engine.schedule.prompts import BatchWait
from pdserve.engine.schedule.request_rules import RequestRules
from pdserve.engine.schedule.scheduler import Scheduler
from pdserve.engine.schedule.sequence import Sequence, SequenceState
from pdserve.engine.schedule.step_pipeline import StepPipeline
from pdserve.errors import DeadlineExceeded, EngineError, Overloaded, PdserveError
from pdserve.handoff import HandoffEvent, KvExporter, KvImporter
from pdserve.protocol import EngineStats, Finished, FinishReason, GenerateRequest, Key, OutputFrame, TokenLogprob

log = logging.getLogger(__name__)


def _ignore() -> None:
    pass


class Engine:
    """In-flight batching over one `Runner`.

    Args:
        exporter: sends the KV of context requests that name a peer. None: such requests are refused.
        importer: receives the KV of generation requests. None: such requests are refused.
        wake: called after each `post`, from the thread that posts.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        runner: Runner,
        options: EngineOptions | None = None,
        *,
        exporter: KvExporter | None = None,
        importer: KvImporter | None = None,
        wake: Callable[[], None] = _ignore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits = runner.limits
        self.failure: EngineError | None = None
        self._runner = runner
        self._options = options = options or EngineOptions()
        self._max_in_flight = 1 if options.overlap and runner.is_asynchronous else 0
        self._wake = wake
        self._clock = clock
        self._blocks = KvCache(limits, options, runner.num_host_blocks)
        self._scheduler = Scheduler(self._blocks, limits, options)
        self._requests = RequestTable()
        self._rules = RequestRules(limits)
        self._handoffs = Handoffs(self._scheduler, self._requests, limits.vocab_size, exporter, importer)
        runner.exporter = exporter
        self._steps = StepPipeline(runner, self._scheduler, self._handoffs, clock)
        self._batch_wait = BatchWait(options.batch_wait_s, limits.max_batch_size)
        self._frame = OutputFrame([], [])
        self._events: deque[HandoffEvent] = deque()
        self._arrivals = itertools.count()
        self._may_progress = False
        self._isolation = Isolation()
        self._cached_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something now. If not, only `submit`, `abort`, `post` or a deadline change that."""
        if self._may_progress or self._steps or self._events or self._frame.deltas or self._frame.finished:
            return True
        alarm_s = self._next_alarm_s()
        return alarm_s is not None and alarm_s <= self._clock()

    @property
    def is_idle(self) -> bool:
        """Whether no request is open and the transceiver holds no block."""
        return not self._requests and not self._handoffs.held

    def seconds_to_deadline(self) -> float | None:
        """Seconds until the next deadline of a request, or until prompts that are held back may start. None: no request
        is open."""
        alarm_s = self._next_alarm_s()
        return None if alarm_s is None else max(0.0, alarm_s - self._clock())

    def submit(self, request: GenerateRequest) -> None:
        """Take a request up. Never raises: a request that is refused ends in a `Finished` with the error, in the next
        frame. An older attempt of the same request is aborted."""
        now_s = self._clock()
        self._may_progress = True
        try:
            self._rules.check_key(request.key)
            older = self._requests.supersede(request.key)
        except PdserveError as error:
            self._refuse(request.key, error)
            return
        if older is not None:
            self._finish(older, "abort", now_s)
        try:
            self._take_up(request, now_s)
        except PdserveError as error:
            self._requests.end(request.key)
            self._refuse(request.key, error)
            if request.phase == "generation":
                self._handoffs.refuse(request.key)

    def abort(self, key: Key) -> None:
        """End a request that its client no longer wants. A key that is not open is ignored."""
        sequence = self._requests.find(key)
        if sequence is not None:
            self._may_progress = True
            self._finish(sequence, "abort", self._clock())

    def post(self, event: HandoffEvent) -> None:
        """Queue an event of the transceiver for the next `step`. From any thread."""
        self._events.append(event)
        self._wake()

    def step(self) -> OutputFrame:
        """Handle events and deadlines, launch the next step if there is one, collect the one before, and return the
        tokens and ends that its clients have not been told."""
        now_s = self._clock()
        while self._events:
            self._end(self._handoffs.handle(self._events.popleft(), now_s), now_s)
        for sequence in self._requests.expired(now_s):
            error = DeadlineExceeded(f"not finished after {sequence.request.timeout_s:g} s", "timeout_s")
            self._finish(sequence, "error", now_s, error)
        step = self._plan(now_s)
        self._may_progress = bool(not step.is_empty or self._steps)
        self._note_start(step, now_s)
        self._handoffs.announce(step)
        self._launch(step)
        self._collect_all_but(self._max_in_flight if step.items and not self._isolation else 0)
        return self._take_frame()

    def fail_all(self, error: PdserveError) -> OutputFrame:
        """Finish every open request with `error`. The host calls it before it ends."""
        for sequence in list(self._requests):
            self._finish(sequence, "error", self._clock(), error)
        return self._take_frame()

    def stats(self) -> EngineStats:
        """Gauges and counters of the engine. The host fills in those of the transceiver."""
        scheduler, steps = self._scheduler, self._steps
        # Only a cache of one group has blocks in host memory, or reuses part of a block.
        blocks, live = self._blocks.groups[0], len(self._requests)
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            awaiting_kv=live - len(scheduler.running) - len(scheduler.waiting),
            blocks=self._blocks.counts(),
            steps=steps.num_steps,
            prefill_tokens=steps.prefill_tokens,
            decode_tokens=steps.decode_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=scheduler.num_preemptions,
            step_seconds=steps.step_seconds,
            host_blocks=blocks.host.num_blocks,
            host_blocks_used=len(blocks.host),
            offloaded_blocks=blocks.num_offloaded,
            onboarded_blocks=blocks.num_onboarded,
            partially_reused_blocks=blocks.num_partial_matches,
        )

    def check(self) -> None:
        """Recompute the counts of blocks from all sequences and compare. Raises `BrokenInvariant`."""
        for _ in self.checks():
            pass

    def checks(self) -> Iterator[None]:
        """As `check`, a slice for each `next`. Nothing else of the engine may be called before it is through."""
        return self._scheduler.checks([*self._requests, *self._handoffs.held.values()])

    def _take_up(self, request: GenerateRequest, now_s: float) -> None:
        if self.failure is not None:
            raise self.failure
        self._rules.check(request)
        self._handoffs.check_phase(request)
        sequence = Sequence(request, self.limits, next(self._arrivals), now_s)
        if request.kv_only:
            self._requests.add(sequence)
            self._end(self._handoffs.move_scratch(sequence, now_s), now_s)
            return
        # An earlier attempt may have produced all there is, and lost only its last message.
        reason = sequence.end_reason() if sequence.output_ids else None
        if reason is None:
            check_limits(request, self.limits, self._options.enable_chunked_prefill)
            max_queue_size = self._options.max_queue_size
            if self._num_queued() >= max_queue_size:
                raise Overloaded(f"{max_queue_size} requests are waiting", "max_queue_size")
        self._requests.add(sequence)
        if reason is not None:
            self._finish(sequence, reason, now_s)
        elif request.phase == "generation":
            self._end(self._handoffs.expect(sequence, now_s), now_s)
        else:
            self._scheduler.waiting[sequence] = None

    def _num_queued(self) -> int:
        scheduler, handoffs = self._scheduler, self._handoffs
        num_served = len(scheduler.running) + len(scheduler.receiving) + len(handoffs.exporting)
        return len(self._requests) - num_served - len(handoffs.expecting_scratch)

    def _note_start(self, step: PlannedStep, now_s: float) -> None:
        """Note when the sequences that `step` admits for the first time started, and how much of them was cached."""
        for sequence in itertools.chain(step.admitted, step.accepted):
            milestones = sequence.milestones
            if milestones.scheduled_s is None and milestones.decode_from_s is None:
                sequence.num_cached_tokens = sequence.num_computed
                self._cached_tokens += sequence.num_computed
                if sequence.request.phase != "generation":
                    milestones.scheduled_s = now_s

    def _next_alarm_s(self) -> float | None:
        deadline_s = self._requests.next_deadline_s()
        held_until_s = self._batch_wait.until_s
        return deadline_s if held_until_s is None or deadline_s is None else min(held_until_s, deadline_s)

    def _plan(self, now_s: float) -> PlannedStep:
        scheduler = self._scheduler
        while suspects := self._isolation.next_group() if self._isolation else ():
            step = scheduler.plan(only=suspects)
            assert step is not None, "nothing is in flight while somebody is suspected"
            if not step.is_empty or step.accepted:
                return step
            self._isolation.clear(suspects)
        start_prompts = not self._batch_wait.holds(scheduler.waiting, scheduler.running, now_s)
        step = scheduler.plan(bool(self._steps), start_prompts)
        if step is None:
            self._collect_all_but(0)
            # If that step has failed, it has set sequences back, and suspects run first.
            step = self._plan(now_s) if self._isolation else scheduler.plan(False, start_prompts)
            assert step is not None, "without a step in flight nothing is missing"
        return step

    def _launch(self, step: PlannedStep) -> None:
        try:
            self._steps.launch(step)
        except Exception as error:
            log.exception("%s could not be launched", step)
            # Later steps can't name tokens of a step that may not have run.
            self._collect_all_but(0)
            self._recover(step, error)

    def _collect_all_but(self, num_left: int) -> None:
        while len(self._steps) > num_left:
            step, results = self._steps.collect()
            if isinstance(results, Exception):
                self._recover(step, results)
                continue
            self._isolation.clear(step.sequences)
            now_s = self._clock()
            for sequence, item, result in zip(step.sequences, step.items, results, strict=True):
                if sequence.state is SequenceState.RUNNING:
                    self._apply(sequence, item, result, now_s)

    def _apply(self, sequence: Sequence, item: BatchItem, result: BatchResult, now_s: float) -> None:
        if result.prompt_logprobs and sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs += result.prompt_logprobs
        num_taken, reason = 0, None
        for token_id in result.token_ids:
            sequence.append(token_id)
            num_taken += 1
            reason = sequence.end_reason()
            if reason is not None:
                break
        num_tokens = len(item.token_ids)
        self._scheduler.advance(sequence, num_tokens, num_tokens - item.num_sampled + num_taken)
        if num_taken > 1:
            self._steps.decode_tokens += num_taken - 1
        if num_taken:
            self._tell(sequence, result.logprobs[:num_taken], reason, now_s)

    def _tell(
        self, sequence: Sequence, logprobs: List[TokenLogprob], reason: FinishReason | None, now_s: float
    ) -> None:
        """Tell the client of new tokens, if it is time. With a `reason`, the last of them ends the request."""
        is_first = sequence.milestones.first_token_s is None
        if logprobs:
            sequence.untold_logprobs += logprobs
        # The first token goes out at once, and `_finish` tells the last; the others go out `stream_interval` at a time.
        if is_first or len(sequence.output_ids) - sequence.num_told >= self._options.stream_interval:
            self._frame.deltas.append(sequence.tell())
        if is_first:
            sequence.note_first_token(now_s)
        if reason is not None:
            self._finish(sequence, reason, now_s)
        elif sequence.handoff_open:
            self._handoffs.export(sequence, sequence.output_ids[-1])
        elif sequence.request.phase == "context":
            self._finish(sequence, "handoff", now_s)

    def _recover(self, step: PlannedStep, error: Exception) -> None:
        """`step` has failed. Discard the steps launched after it, set their sequences back, and look for the culprit.

        A culprit that is found is finished with an error. If no later step can succeed, every request is.
        """
        # The results of later steps mean nothing: they build on tokens and KV that may never have been computed.
        void = [step, *(self._steps.collect()[0] for _ in range(len(self._steps)))]
        self._may_progress = True
        self.failure = self.failure or self._find_failure(error)
        now_s = self._clock()
        failed = EngineError("a step of the engine failed")
        for sequence in dict.fromkeys(each for one in void for each in one.casualties()):
            if self._is_open(sequence) and not self._scheduler.sharing.set_back(sequence):
                self._finish(sequence, "error", now_s, self.failure or failed)
        rows = [each for each in step.sequences if self._is_open(each) and each.state is SequenceState.RUNNING]
        culprit = self._isolation.suspect(rows)
        if culprit is not None:
            log.error("%s: a step with nothing but it in it failed", culprit.key)
            self._finish(culprit, "error", now_s, self.failure or failed)
        if self._isolation.is_hopeless and self.failure is None:
            self.failure = EngineError("steps of the engine fail whatever is in them")
        if self.failure is not None:
            for sequence in list(self._requests):
                self._finish(sequence, "error", now_s, self.failure)

    def _find_failure(self, error: Exception) -> EngineError | None:
        """Why no step can succeed after `error`; None if the runner's probe shows that steps can. When it returns,
        nothing that was enqueued before still runs."""
        try:
            if isinstance(error, RunnerLost):
                raise error
            self._runner.probe()
        except RunnerLost as lost:
            return lost
        except Exception:
            log.exception("the runner can't run any step")
            return EngineError("the engine can't run any step")
        return None

    def _is_open(self, sequence: Sequence) -> bool:
        return self._requests.find(sequence.key) is sequence

    def _end(self, ending: Ending | None, now_s: float) -> None:
        if ending is not None:
            self._finish(ending.sequence, ending.reason, now_s, ending.error)

    def _finish(
        self, sequence: Sequence, reason: FinishReason, now_s: float, error: PdserveError | None = None
    ) -> None:
        """End a request: tell its client, and let `Handoffs` free its blocks. Every request ends here, or in
        `_refuse`."""
        self._requests.end(sequence.key)
        if sequence.num_told < len(sequence.output_ids):
            self._frame.deltas.append(sequence.tell())
        self._frame.finished.append(sequence.finished(reason, now_s, error))
        self._handoffs.close(sequence)

    def _refuse(self, key: Key, error: PdserveError) -> None:
        """End a request that was refused before it was scheduled."""
        self._frame.finished.append(Finished(key, "error", error=error.to_info()))

    def _take_frame(self) -> OutputFrame:
        frame, self._frame = self._frame, OutputFrame([], [])
        return frame
