"""Finds the sequence that made a step fail: runs the step's sequences again in ever smaller groups.

The engine calls it; it runs and ends nothing itself. Owns the groups that are still to be tried, and the count of
failures that no single sequence explains. An investigation: `suspect` takes the sequences of a failed step, which the
engine has set back. While there are suspects, each step runs only the group that `next_group` returns, and the engine
waits for it. Then it calls `clear` with the sequences of a step that succeeded, or `suspect` with those of one that
failed. A group of one that fails is the culprit. All other sequences wait meanwhile: for a step of n, one of them bad,
about 2 log2(n) small steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as List

from pdserve.engine.schedule.sequence import Sequence, SequenceState

# After so many failures in a row that no sequence explains, no step is expected to succeed any more.
MAX_UNEXPLAINED_FAILURES = 3


class Isolation:
    """See the module. It is true while there are suspects."""

    def __init__(self) -> None:
        self._groups: deque[list[Sequence]] = deque()
        self._trial: list[Sequence] = []
        self._found_any = False
        self._num_unexplained = 0

    def __bool__(self) -> bool:
        """Whether there are suspects."""
        return bool(self._groups or self._trial)

    @property
    def is_hopeless(self) -> bool:
        """Whether steps keep failing whichever sequences are in them."""
        return self._num_unexplained >= MAX_UNEXPLAINED_FAILURES

    def next_group(self) -> list[Sequence]:
        """The suspects that the next step runs, without others; empty if there are none. Sequences that do not run any
        more are left out."""
        self._end_trial(())
        while self._groups:
            self._trial = [each for each in self._groups.popleft() if each.state is SequenceState.RUNNING]
            if self._trial:
                return self._trial
        self._close()
        return []

    def suspect(self, rows: List[Sequence]) -> Sequence | None:
        """A step of `rows` has failed: suspect all of them. Returns the culprit, if `rows` is that one sequence."""
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
        """A step of `rows` has succeeded, or there was nothing to run for them: they are no suspects any more."""
        if not self:
            self._num_unexplained = 0
            return
        self._end_trial(rows)
        if not self._groups:
            self._close()

    def _end_trial(self, rows: Iterable[Sequence]) -> None:
        """`rows` of the group were in the step. The rest of the group, for which it had no room, is tried next."""
        tried = set(rows)
        left, self._trial = [each for each in self._trial if each not in tried], []
        if left:
            self._groups.appendleft(left)

    def _close(self) -> None:
        """No group is left to try: count the failure as unexplained unless a culprit was found."""
        self._num_unexplained = 0 if self._found_any else self._num_unexplained + 1
        self._trial, self._found_any = [], False
