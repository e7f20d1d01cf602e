"""Steps between their launch and their collection.

Owns the steps in flight and what waits for them: sequences that ended meanwhile, whose blocks a step still writes to,
and imports, which the transceiver may hear of only when no copy of blocks is under way any more. (A block that an
import gets may have been given up just before, and its content be on its way to the host; the transceiver writes on a
stream of its own.)

Life of a step: `launch`, then `collect`, in the same order. Of a step that fails, in either, nothing is known to be
computed or copied; what was launched after it fails with it, since it may have read what the first should have written.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as List

from pdserve.engine.schedule.batch import BatchResult, Runner
from pdserve.engine.schedule.handoffs import Handoffs
from pdserve.engine.schedule.plan import Plan
from pdserve.engine.schedule.scheduler import Scheduler
from pdserve.engine.schedule.sequence import Sequence, SequenceState
from pdserve.errors import EngineError

log = logging.getLogger(__name__)


class StepPipeline:
    """The runner as the engine uses it. Counts the steps that succeeded; the seconds are those spent here."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, handoffs: Handoffs, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_steps = self.prefill_tokens = self.decode_tokens = 0
        self.step_seconds = 0.0
        self._clock = clock
        self._runner = runner
        self._scheduler = scheduler
        self._handoffs = handoffs
        self._flights: deque[Plan] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def launch(self, plan: Plan) -> None:
        """Start the step of `plan`, if it has anything to do, and let the transceiver know of its imports.

        The runner's error is raised if it can't be launched: the steps before it must be collected, and the sequences
        of `plan` set back. Imports that its copies have nothing to do with are accepted all the same.
        """
        started_s = self._clock()
        if not plan.is_empty:
            try:
                plan.launched = self._runner.launch(plan.items, plan.copies)
            except Exception:
                self._scheduler.sharing.not_copied(plan)
                if not plan.copies:
                    self._accept(plan.accepted)
                raise
            self._scheduler.launched(plan)
            self._flights.append(plan)
        self._accept(plan.accepted)
        self.step_seconds += self._clock() - started_s

    def collect(self) -> tuple[Plan, list[BatchResult] | Exception]:
        """Wait for the oldest step; its results, or why it has failed."""
        started_s = self._clock()
        plan = self._flights.popleft()
        results = self._results(plan)
        failed = isinstance(results, Exception)
        if failed:
            self._scheduler.sharing.failed(plan)
            for later in self._flights:
                later.is_doomed = True
        else:
            self._scheduler.sharing.succeeded(plan)
            self.num_steps += 1
            self.prefill_tokens += plan.num_prefill_tokens
            self.decode_tokens += plan.num_decode_tokens
        for sequence, item in zip(plan.sequences, plan.items, strict=True):
            self._scheduler.collected(sequence, item)
        for sequence in plan.imports:
            sequence.num_in_flight -= 1
            is_lost = failed and sequence in plan.accepted
            if sequence.state is SequenceState.AWAITING_KV and not is_lost:
                self._handoffs.accept(sequence)
        for sequence in (*plan.sequences, *plan.imports):
            if sequence.state is SequenceState.ABORTING:
                self._handoffs.free(sequence)
        self.step_seconds += self._clock() - started_s
        return plan, results

    def _accept(self, imports: List[Sequence]) -> None:
        """Let the transceiver know of `imports` as soon as no copy is under way."""
        copying = [plan for plan in self._flights if plan.copies]
        for sequence in imports:
            if copying:
                sequence.num_in_flight += 1
                copying[-1].imports.append(sequence)
            else:
                self._handoffs.accept(sequence)

    def _results(self, plan: Plan) -> list[BatchResult] | Exception:
        assert plan.launched is not None
        try:
            results = plan.launched.results()
            if len(results) != len(plan.items):
                raise EngineError(f"the runner returned {len(results)} results for {len(plan.items)} items")
        except Exception as error:
            if not plan.is_doomed:
                log.exception("%s failed", plan)
            return error
        return EngineError("the step before it has failed") if plan.is_doomed else results
