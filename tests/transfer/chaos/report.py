"""Counts faults and what came of them, and prints the table."""

from __future__ import annotations

from collections import Counter

OUTCOMES = ("done", "timeout", "peer_lost", "aborted", "refused", "protocol", "checksum", "layout", "error", "unheard")


class Tally:
    """Per kind of fault: how many were injected, and how the handoffs (or requests) that they met have ended."""

    def __init__(self) -> None:
        self.injected: Counter[str] = Counter()
        self.outcomes: dict[str, Counter[str]] = {}
        self.totals: Counter[str] = Counter()

    @property
    def num_faults(self) -> int:
        return self.injected.total()

    def fault(self, name: str, outcomes: list[str]) -> None:
        self.injected[name] += 1
        self.outcomes.setdefault(name, Counter()).update(outcomes)

    def add(self, other: Tally) -> None:
        self.injected += other.injected
        self.totals += other.totals
        for name, outcomes in other.outcomes.items():
            self.outcomes.setdefault(name, Counter()).update(outcomes)

    def table(self) -> str:
        """A row for each kind of fault, a column for each outcome that there was."""
        columns = [each for each in OUTCOMES if any(counts[each] for counts in self.outcomes.values())]
        width = max((len(name) for name in self.injected), default=5)
        lines = [f"{'fault':{width}}  injected" + "".join(f"{each:>11}" for each in columns)]
        for name in sorted(self.injected):
            cells = "".join(f"{self.outcomes[name][each] or '':>11}" for each in columns)
            lines.append(f"{name:{width}}  {self.injected[name]:8}{cells}")
        lines.append(f"{'all':{width}}  {self.num_faults:8}")
        lines += [f"{count} {what}" for what, count in sorted(self.totals.items())]
        return "\n".join(lines)
