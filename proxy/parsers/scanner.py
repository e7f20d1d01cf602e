"""Text that comes in fragments, read by a generator that waits at its end.

A parser's reader is a generator over one `Scanner`. It asks for what should stand next; where the text does not reach
so far, it yields, and goes on when there is more. So it is written as if the text were there as a whole, and how the
text was cut changes nothing. `FragmentParser` runs one reader.

Each character leaves the scanner once: as an event, or dropped as markup. What is held until that is known is bounded.
"""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")
Wait = Generator[None, None, T]
"""What reads: each yield waits for more text."""

EventKind = Literal["content", "reasoning", "name", "arguments"]

MAX_HELD = 64 * 1024
"""Characters. What has not become a call by then is content."""

MAX_STRING = 256
"""Characters of a key, a name or a type. Answers that are no calls are not held up for long."""

_SPACE = " \t\r\n"
_NAME = frozenset(string.ascii_letters + string.digits + "_-")
_STRUCTURE = re.compile(r'[^"{}\[\]]*')
_STRING = re.compile(r'[^"\\]*')


class Event(NamedTuple):
    """A part of a message. `name` begins a call, whose `arguments` follow in fragments."""

    kind: EventKind
    text: str


class Malformed(Exception):
    """What stands in the text is not what the format asks for there."""


class Scanner:
    """See the module.

    `events` are those since the parser last took them. `ended` says that no text follows.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = False
        self._text = ""
        self._start = 0
        self._at = 0

    def feed(self, text: str) -> None:
        """Add a fragment; forgets what has left."""
        self._text = self._text[self._start :] + text
        self._at -= self._start
        self._start = 0

    @property
    def held(self) -> str:
        """What was read and has not left yet."""
        return self._text[self._start : self._at]

    @property
    def _num_held(self) -> int:
        return self._at - self._start

    def drop(self) -> None:
        """What is held was markup."""
        self._start = self._at

    def give(self, kind: EventKind) -> None:
        """What is held becomes an event."""
        if self._at > self._start:
            self.events.append(Event(kind, self.held))
            self._start = self._at

    @contextlib.contextmanager
    def or_content(self) -> Iterator[None]:
        """Where the block finds something malformed, what is held is content, and reading goes on behind the block."""
        try:
            yield
        except Malformed:
            self.give("content")

    def find(self, marker: str, kind: EventKind = "content") -> Wait[bool]:
        """Give out what stands before `marker`, which is read and held. False at the end of the text, all of which has
        then been given out."""
        while True:
            place = self._text.find(marker, self._at)
            self._at = place if place >= 0 else len(self._text) - self._num_open(marker)
            self.give(kind)
            if place >= 0:
                self._at += len(marker)
                return True
            if self.ended:
                return False
            yield

    def give_rest(self) -> None:
        """All that is there and has not left becomes content."""
        self._at = len(self._text)
        self.give("content")

    def peek(self) -> Wait[str]:
        """The next character, "" at the end of the text. Raises Malformed if too much is held."""
        if self._num_held >= MAX_HELD:
            raise Malformed
        while self._at >= len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def accept(self, literal: str) -> Wait[bool]:
        """Read `literal` if it is next."""
        while True:
            there = self._text[self._at : self._at + len(literal)]
            if there == literal:
                self._at += len(literal)
                return True
            if self.ended or not literal.startswith(there):
                return False
            yield

    def expect(self, literal: str) -> Wait[None]:
        """Read `literal`. Raises Malformed if it is not next."""
        if not (yield from self.accept(literal)):
            raise Malformed

    def space(self) -> Wait[None]:
        """Read white space, if there is some."""
        while (character := (yield from self.peek())) and character in _SPACE:
            self._at += 1

    def name(self) -> Wait[str]:
        """Read letters, digits, `_` and `-` of ASCII."""
        begin = self._num_held
        while (character := (yield from self.peek())) and character in _NAME and self._num_held - begin < MAX_STRING:
            self._at += 1
        return self.held[begin:]

    def json_string(self) -> Wait[str]:
        """Read a JSON string; its value. Raises Malformed if it is none, or longer than a key or a name may be."""
        begin = self._num_held
        yield from self.expect('"')
        while (character := (yield from self.peek())) and character != '"':
            self._at += 1
            if character == "\\" and (yield from self.peek()):
                self._at += 1
            if self._num_held - begin > MAX_STRING:
                raise Malformed
        yield from self.expect('"')
        try:
            return str(json.loads(self.held[begin:]))
        except ValueError:
            raise Malformed from None

    def json_object(self, kind: EventKind | None = None) -> Wait[None]:
        """Read a JSON object up to its last bracket; what stands between is not looked at.

        Args:
            kind: of the events as which it is given out at once, as it comes; None holds it.

        Raises:
            Malformed: no object begins here, or the text ends in it.
        """
        if (yield from self.peek()) != "{":
            raise Malformed
        depth, in_string = 0, False
        while True:
            character = yield from self._run(_STRING if in_string else _STRUCTURE, kind)
            if character == '"':
                in_string = not in_string
            elif in_string:
                yield from self._run(None, kind)
            else:
                depth += 1 if character in "{[" else -1
                if depth == 0:
                    break
        if kind is not None:
            self.give(kind)

    def _run(self, ordinary: re.Pattern[str] | None, kind: EventKind | None) -> Wait[str]:
        """Read all characters that `ordinary` matches, and the one behind them, which is returned."""
        while True:
            end = len(self._text) if kind is not None else min(len(self._text), self._start + MAX_HELD)
            if ordinary is not None:
                match = ordinary.match(self._text, self._at, end)
                self._at = match.end() if match else self._at
            if self._at < end:
                self._at += 1
                return self._text[self._at - 1]
            if kind is not None:
                self.give(kind)
            elif self._num_held >= MAX_HELD:
                raise Malformed
            if self.ended:
                raise Malformed
            yield

    def _num_open(self, marker: str) -> int:
        """How many characters at the end of the text may begin `marker`."""
        length = len(self._text)
        place = length if self.ended else max(self._at, length - len(marker) + 1)
        while (place := self._text.find(marker[0], place)) >= 0:
            if marker.startswith(self._text[place:]):
                return length - place
            place += 1
        return 0


class FragmentParser:
    """Runs one reader over a text.

    Args:
        reader: what it leaves unread is content.
    """

    def __init__(self, reader: Callable[[Scanner], Wait[None]]) -> None:
        self._is_over = False
        self._scanner = Scanner()
        self._reader: Generator[None, None, Any] = self._read(reader)
        next(self._reader)

    def push(self, text: str) -> list[Event]:
        """The events that became certain with `text`."""
        if self._is_over:
            return [Event("content", text)] if text else []
        self._scanner.feed(text)
        return self._resume()

    def flush(self) -> list[Event]:
        """The rest, now that no text follows. To be called once."""
        self._scanner.ended = True
        return self._resume()

    def _read(self, reader: Callable[[Scanner], Wait[None]]) -> Wait[None]:
        yield
        with self._scanner.or_content():
            yield from reader(self._scanner)
        self._scanner.give_rest()
        self._is_over = True

    def _resume(self) -> list[Event]:
        next(self._reader, None)
        events, self._scanner.events = self._scanner.events, []
        return events
