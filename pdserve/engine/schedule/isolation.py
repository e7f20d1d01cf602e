"""Which request a failed step is due to: the step's rows are run again in ever smaller groups.

Owns the groups that are still to be tried and the count of failures that no row explains; runs and ends nothing. Life
of an investigation: `suspect` takes the rows of a failed step, which the engine has set back to what is proven. While
anybody is suspected, each step runs one group, `next_group`, and is waited for: `clear` takes the rows of one that
succeeded, `suspect` those of one that failed, until a group of one is left, whose row is to blame. Everybody else waits
meanwhile: a step of n rows, one of them bad, costs about 2 log2(n) small steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as List

from pdserve.engine.schedule.sequence import Sequence, SequenceState

# After so many failures without a row to blame, and no ordinary step that succeeds in between, none is to be expected.
MAX_UNEXPLAINED_FAILURES = 3


class Isolation:
    """The suspects of steps that failed lately."""

    def __init__(self) -> None:
        self._groups: deque[list[Sequence]] = deque()
        self._trial: list[Sequence] = []
        self._found_any = False
        self._num_unexplained = 0

    def __bool__(self) -> bool:
        """Whether anybody is suspected."""
        return bool(self._groups or self._trial)

    @property
    def is_hopeless(self) -> bool:
        """Whether steps keep failing whoever is in them."""
        return self._num_unexplained >= MAX_UNEXPLAINED_FAILURES

    def next_group(self) -> list[Sequence]:
        """Whom the next step runs alone; nobody if nobody is suspected. Who does not run any more is left out."""
        self._end_trial(())
        while self._groups:
            self._trial = [each for each in self._groups.popleft() if each.state is SequenceState.RUNNING]
            if self._trial:
                return self._trial
        self._close()
        return []

    def suspect(self, rows: List[Sequence]) -> Sequence | None:
        """A step of `rows` has failed. Returns the one that is to blame, if it is clear by now."""
        self._end_trial(rows)
        culprit = rows[0] if len(rows) == 1 else None
        if culprit is not None:
            self._found_any = True
        elif rows:
            middle = len(rows) // 2
            self._groups.extendleft([list(rows[middle:]), list(rows[:middle])])
        if not self._groups:
            self._close()
        return culprit

    def clear(self, rows: Iterable[Sequence]) -> None:
        """A step of `rows` has succeeded, or there is nothing to run for them."""
        if not self:
            self._num_unexplained = 0
            return
        self._end_trial(rows)
        if not self._groups:
            self._close()

    def _end_trial(self, rows: Iterable[Sequence]) -> None:
        """Of a group, `rows` were in the step; those for whom there was no room in it come next."""
        tried = set(rows)
        left, self._trial = [each for each in self._trial if each not in tried], []
        if left:
            self._groups.appendleft(left)

    def _close(self) -> None:
        """Nobody is left to be tried: was anybody to blame?"""
        self._num_unexplained = 0 if self._found_any else self._num_unexplained + 1
        self._trial, self._found_any = [], False
