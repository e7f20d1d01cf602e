"""One answer's text as the parts of a message: reasoning first, then content and tool calls.

White space next to reasoning or a call belongs to the markup and is left out. In an answer without either, every
character is content.
"""

from __future__ import annotations

from collections.abc import Iterable

from proxy.parsers.calls import ToolFormat
from proxy.parsers.reasoning import ReasoningFormat
from proxy.parsers.scanner import Event, EventKind, FragmentParser

_MAX_SPACE = 1024
"""Characters of white space that are held back."""


class MessageParser:
    """See the module. `push` each fragment, then `flush` once; the parts do not depend on how the text was cut.

    Args:
        tools: how calls are written; None: no call is looked for.
        reasoning: how reasoning is written; None: none is looked for.
        prompt_end: the end of the prompt's text.

    `num_calls` counts the calls so far.
    """

    def __init__(self, tools: ToolFormat | None, reasoning: ReasoningFormat | None, prompt_end: str = "") -> None:
        self.num_calls = 0
        self._reasoning = None if reasoning is None else FragmentParser(reasoning.reader(prompt_end))
        self._tools = None if tools is None else FragmentParser(tools.read)
        self._last: EventKind | None = None
        self._space = ""
        self._is_long = False

    def push(self, text: str) -> list[Event]:
        """The parts that became certain with `text`, neighbours of one kind in one."""
        if not text:
            return []
        events = [Event("content", text)] if self._reasoning is None else self._reasoning.push(text)
        return self._spaced(self._with_calls(events))

    def flush(self) -> list[Event]:
        """The rest, now that no text follows."""
        events = self._with_calls([] if self._reasoning is None else self._reasoning.flush())
        parts = self._spaced([*events, *([] if self._tools is None else self._tools.flush())])
        if self._space and self._last in (None, "content") and self.num_calls == 0:
            parts.append(Event("content", self._space))
        return parts

    def _with_calls(self, events: Iterable[Event]) -> list[Event]:
        if self._tools is None:
            return list(events)
        found: list[Event] = []
        for event in events:
            found += self._tools.push(event.text) if event.kind == "content" else [event]
        return found

    def _spaced(self, events: Iterable[Event]) -> list[Event]:
        """Hold white space back until it is known what follows it."""
        parts: list[Event] = []
        for kind, read in events:
            text = read if kind in ("name", "arguments") else self._without_end(kind, read)
            if not text:
                continue
            if kind == "name":
                self.num_calls += 1
                self._space, self._is_long = "", False
            self._last = kind
            if parts and kind != "name" and parts[-1].kind == kind:
                text = parts.pop().text + text
            parts.append(Event(kind, text))
        return parts

    def _without_end(self, kind: EventKind, text: str) -> str:
        """What of the white space held and `text` is certain; the white space at its end is held then.

        A run of white space that is too long for that is certain as a whole.
        """
        if not self._space and self._last == kind and not text[-1].isspace():
            self._is_long = False
            return text
        if kind == "content" and self._last == "reasoning":
            self._space, self._is_long = "", False
            text = text.lstrip()
        elif kind == "reasoning" and self._last is None:
            text = text.lstrip()
        text = self._space + text
        end = len(text.rstrip())
        self._is_long = len(text) - end > _MAX_SPACE or (self._is_long and end == 0)
        if self._is_long:
            end = len(text)
        self._space = text[end:]
        return text[:end]
