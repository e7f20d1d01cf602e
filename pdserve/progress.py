"""How far a long piece of work is: a bar where standard error is a terminal, elsewhere a line of the log now and then.

Work that is over within seconds says nothing in the log. Light to import.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType

from tqdm import tqdm  # type: ignore[import-untyped]

EVERY_S = 5.0
_BAR = "{desc}: {percentage:3.0f}%|{bar:30}| {elapsed}{postfix}"


class Progress:
    """One piece of work; a context manager around it.

    Args:
        log: of whoever does the work.
        what: the work, as "loading weights".
        total: how much there is of it, counted in `unit`.
        quiet: say nothing: others do the same work and one of them speaks.
    """

    def __init__(self, log: logging.Logger, what: str, total: float, unit: str, quiet: bool = False) -> None:
        self._log = log
        self._what = what
        self._total = total
        self._unit = unit
        self._quiet = quiet
        self._done = 0.0
        self._doing = ""
        self._started_s = self._said_s = time.monotonic()
        self._bar = tqdm(
            total=total, desc=what, leave=False, dynamic_ncols=True, bar_format=_BAR, disable=True if quiet else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, amount: float = 1) -> None:
        """So much more is done."""
        self._done += amount
        self._bar.update(amount)
        self.beat()

    def step(self, what: str) -> None:
        """The next unit begins, and the one before it, if there was one, is done."""
        if self._doing:
            self._done += 1
            self._bar.update(1)
        self._doing = what
        self._bar.set_postfix_str(what, refresh=False)
        self.beat()

    def beat(self) -> None:
        """Say how far it is, if that was not said lately. To be called in between where `advance` comes seldom."""
        if self._quiet or time.monotonic() - self._said_s < EVERY_S:
            return
        self._said_s = time.monotonic()
        if not self._bar.disable:
            self._bar.refresh()
        else:
            self._log.info("%s", self._line())

    def _line(self) -> str:
        doing = f", {self._doing}" if self._doing else ""
        elapsed_s = time.monotonic() - self._started_s
        share = self._done / self._total if self._total else 1.0
        return (
            f"{self._what}: {share:.0%} ({_number(self._done)} of {_number(self._total)} {self._unit}), "
            f"{elapsed_s:.0f} s{doing}"
        )


def _number(value: float) -> str:
    return f"{value:.1f}" if isinstance(value, float) and not value.is_integer() else f"{value:.0f}"
