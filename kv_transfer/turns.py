"""Shares out a fixed number of equal items, such as buffers, among clients that take turns.

A client that wants items gets one in each of its turns, until it wants no more. Life of an item: free → taken by a
client → given back by `release`. Used by one event loop only; `num_taken` may be read from any thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Taken = TypeVar("Taken", contravariant=True)

Later = Callable[[Callable[[], None]], object]


class TurnClient(Protocol[Taken]):
    """Part of a handoff that needs items."""

    @property
    def wants_turn(self) -> bool: ...

    def take(self, item: Taken) -> None:
        """Use `item`; called only while `wants_turn`. Must not raise."""


class Turns(Generic[Item]):
    """Shares `items` out.

    Args:
        later: calls back in the next turn of the event loop. With it, one item is handed out in each turn of the loop:
            using an item keeps the thread busy, and what the item before was taken for may be ready meanwhile.
    """

    def __init__(self, items: Iterable[Item], later: Later | None = None) -> None:
        self._free = list(items)
        self._waiting: OrderedDict[TurnClient[Item], None] = OrderedDict()
        self._num_items = len(self._free)
        self._dispatching = False
        self._later = later

    @property
    def num_taken(self) -> int:
        return self._num_items - len(self._free)

    def take_spare(self) -> Item | None:
        """An item for use ahead of need; None if a client waits, or if less than half of all items would be left."""
        if self._waiting or 2 * (len(self._free) - 1) < self._num_items:
            return None
        return self._free.pop()

    def request(self, client: TurnClient[Item]) -> None:
        """Queue `client` behind those that wait; it gets one item a turn until it wants no more."""
        self._waiting.setdefault(client)
        self._dispatch()

    def withdraw(self, client: TurnClient[Item]) -> None:
        """Take `client` out of the queue; items it holds stay its own."""
        self._waiting.pop(client, None)

    def release(self, item: Item) -> None:
        self._free.append(item)
        self._dispatch()

    def _dispatch(self) -> None:
        if self._dispatching:
            return
        self._dispatching, goes_on_later = True, False
        try:
            while self._free and self._waiting and not goes_on_later:
                client, _ = self._waiting.popitem(last=False)
                if client.wants_turn:
                    client.take(self._free.pop())
                    if client.wants_turn:
                        self._waiting.setdefault(client)
                    if self._later is not None:
                        self._later(self._go_on)
                        goes_on_later = True
        finally:
            self._dispatching = goes_on_later

    def _go_on(self) -> None:
        self._dispatching = False
        self._dispatch()
