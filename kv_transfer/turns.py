"""Hands out a fixed number of equal things to whoever needs one: a client gets one a turn until it needs no more.

Life of an item: free → taken by a client → `release` by that client. Used by one event loop only; `num_taken` may be
read from anywhere.
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
    """Hands out `items`. With `later`, which calls back in the loop's next turn, one a turn of the loop: using one
    keeps the thread busy, and what the one before was taken for may be ready meanwhile."""

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
        """An item for what is not due yet, if that leaves half of all for what is."""
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
