"""Who guesses the tokens that come next, so that one step may yield several of them.

The runner draws after each draft as if it were output, and the first draft that is not drawn itself ends what counts of
the step. So drafts change how many steps an output takes, never what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Asked by the scheduler for each sequence that decodes, before each of its steps."""

    def propose(self, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        """At most `max_drafts` tokens of the vocabulary that may follow `token_ids`, prompt and output so far; none if
        there is nothing to go by."""
        ...
