"""Reasoning between two tags at the beginning of an answer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from proxy.parsers.scanner import Scanner, Wait


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How one family of models writes what it thinks.

    Attributes:
        begin, end: the tags.
        is_open: whether an answer begins inside, also without the first tag.
    """

    begin: str
    end: str
    is_open: bool

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens of a tokenizer."""
        return self.begin, self.end

    def reader(self, prompt_end: str) -> Callable[[Scanner], Wait[None]]:
        """Reads the answer to a prompt that ends with `prompt_end`: a template may have written a tag there."""
        shown = prompt_end.rstrip()
        is_open = shown.endswith(self.begin) or (self.is_open and not shown.endswith(self.end))
        return functools.partial(self._read, is_open)

    def _read(self, is_open: bool, text: Scanner) -> Wait[None]:
        yield from text.space()
        if (yield from text.accept(self.begin)):
            text.drop()
        elif not is_open:
            return
        yield from text.find(self.end, "reasoning")
        text.drop()
