"""Steps in flight: launched at the runner, and not collected yet.

The engine calls it. Two things wait here for a step to be collected. A sequence that ended meanwhile keeps its blocks,
to which the step may still write. An import is named to the transceiver only when no copy of blocks is under way: its
blocks may have been evicted just now, their content may still be on its way to host memory, and the transceiver writes
on a stream of its own.

Life of a step: `launch`, then `collect`, in the order of the launches. If a step fails, in either, nothing of it counts
as computed or copied. The steps launched after it fail, too: they may have read what it should have written.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as List

from pdserve.engine.schedule.batch import BatchResult, Runner
from pdserve.engine.schedule.handoffs import Handoffs
from pdserve.engine.schedule.planned_step import PlannedStep
from pdserve.engine.schedule.scheduler import Scheduler
from pdserve.engine.schedule.sequence import Sequence, SequenceState
from pdserve.errors import EngineError

log = logging.getLogger(__name__)


class StepPipeline:
    """See the module.

    Attributes:
        num_steps, prefill_tokens, decode_tokens: of the steps that succeeded.
        step_seconds: time that the engine's thread has spent in `launch` and `collect`.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, handoffs: Handoffs, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_steps = self.prefill_tokens = self.decode_tokens = 0
        self.step_seconds = 0.0
        self._clock = clock
        self._runner = runner
        self._scheduler = scheduler
        self._handoffs = handoffs
        self._flights: deque[PlannedStep] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def launch(self, step: PlannedStep) -> None:
        """Start `step`, unless it is empty, and name the blocks of its imports to the transceiver.

        Raises:
            Exception: the runner's. The caller collects the steps before, and sets the sequences of `step` back. If the
                step had no copies, its imports have been accepted nevertheless.
        """
        started_s = self._clock()
        if not step.is_empty:
            try:
                step.launched = self._runner.launch(step.items, step.copies)
            except Exception:
                self._scheduler.sharing.not_copied(step)
                if not step.copies:
                    self._accept(step.accepted)
                raise
            self._scheduler.launched(step)
            self._flights.append(step)
        self._accept(step.accepted)
        self.step_seconds += self._clock() - started_s

    def collect(self) -> tuple[PlannedStep, list[BatchResult] | Exception]:
        """Wait for the oldest step in flight. Returns it with a result for each of its items, or with its error."""
        started_s = self._clock()
        step = self._flights.popleft()
        results = self._results(step)
        failed = isinstance(results, Exception)
        if failed:
            self._scheduler.sharing.failed(step)
            for later in self._flights:
                later.is_doomed = True
        else:
            self._scheduler.sharing.succeeded(step)
            self.num_steps += 1
            self.prefill_tokens += step.num_prefill_tokens
            self.decode_tokens += step.num_decode_tokens
        for sequence, item in zip(step.sequences, step.items, strict=True):
            self._scheduler.collected(sequence, item)
        for sequence in step.imports:
            sequence.num_in_flight -= 1
            is_lost = failed and sequence in step.accepted
            if sequence.state is SequenceState.AWAITING_KV and not is_lost:
                self._handoffs.accept(sequence)
        for sequence in (*step.sequences, *step.imports):
            if sequence.state is SequenceState.ABORTING:
                self._handoffs.free(sequence)
        self.step_seconds += self._clock() - started_s
        return step, results

    def _accept(self, imports: List[Sequence]) -> None:
        """Name the blocks of `imports` to the transceiver: now, or when the last step with copies is collected."""
        copying = [step for step in self._flights if step.copies]
        for sequence in imports:
            if copying:
                sequence.num_in_flight += 1
                copying[-1].imports.append(sequence)
            else:
                self._handoffs.accept(sequence)

    def _results(self, step: PlannedStep) -> list[BatchResult] | Exception:
        assert step.launched is not None
        try:
            results = step.launched.results()
            if len(results) != len(step.items):
                raise EngineError(f"the runner returned {len(results)} results for {len(step.items)} items")
        except Exception as error:
            if not step.is_doomed:
                log.exception("%s failed", step)
            return error
        return EngineError("the step before it has failed") if step.is_doomed else results
