"""One link with its messages: encoding, liveness, and what is under way.

Owns the link. Life cycle: open → `drop`, by either end, by a broken link or by a peer that went silent; then `on_lost`
is called once, and every payload's future has failed or will in this turn of the loop. A connection that is dropped
swallows what is sent.

While a handoff waits for the peer, that must say something, if only Pong: otherwise a frozen process would hold up
handoffs until their deadline, and staging buffers that others wait for. And a handoff that has ended must give its
buffers back within the same time. Time in which this very thread was held up counts against nobody: what the peer has
said meanwhile is not read yet.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from kv_transfer.counters import PeerCounter
from kv_transfer.networks.base import Link
from kv_transfer.wire import Message, Ping, Pong, decode, encode
from pdserve.errors import TransferError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Owner(Protocol):
    """The handoff that a payload belongs to, by its `number` on this connection."""

    @property
    def number(self) -> int: ...

    @property
    def ended_at_s(self) -> float | None: ...


class Ticket:
    """Stands for something that is due from the peer, for `owner`, until it is settled."""

    def __init__(self, owner: Owner, due: set[Ticket]) -> None:
        self.owner = owner
        self._due = due
        due.add(self)

    def settle(self) -> None:
        """It has come, or never will. May be said twice."""
        self._due.discard(self)


class Connection:
    """A live link to a peer, which may be silent for `stall_timeout_s` while something is due from it; `checked` adds a
    checksum to every message that is sent."""

    def __init__(
        self,
        link: Link,
        on_message: Callable[[Message], None],
        on_lost: Callable[[TransferError], None],
        stall_timeout_s: float,
        checked: bool,
    ) -> None:
        self._link = link
        self._on_message = on_message
        self._on_lost = on_lost
        self._stall_timeout_s = stall_timeout_s
        self._checked = checked
        self._loop = asyncio.get_running_loop()
        self._due: set[Ticket] = set()
        self._heard_at_s = 0.0
        self._held_up_at_s = 0.0
        self._ticker: asyncio.TimerHandle | None = None
        self._counter: PeerCounter | None = None
        self.dropped = False

    def open(self) -> None:
        """Begin to deliver messages."""
        self._link.attach(self._receive, lambda cause: self.drop(TransferError(cause, "peer_lost")))

    def count_with(self, counter: PeerCounter) -> None:
        """Count what goes over it with the peer's `counter`, from now on."""
        assert self._counter is None, "a connection has one peer"
        self._counter = counter
        if not self.dropped:
            counter.hold()

    @property
    def transport(self) -> str:
        return self._link.transport

    def send(self, message: Message) -> None:
        if not self.dropped:
            self._link.send_control(encode(message, self._checked))

    def send_payload(self, tag: int, payload: Tensor, owner: Owner) -> asyncio.Future[None]:
        """Send `payload`, expecting the peer to take it."""
        future = self._link.send_payload(tag, payload)
        ticket = self.expect(owner)
        if self._counter is not None:
            self._counter.payload_started()
        future.add_done_callback(lambda future: self._payload_ended(future, ticket))
        return future

    def recv_payload(self, tag: int, payload: Tensor) -> asyncio.Future[int]:
        """Receive into `payload`; the caller holds a ticket for what it expects."""
        future = self._link.recv_payload(tag, payload)
        future.add_done_callback(self._note_life)
        return future

    def expect(self, owner: Owner) -> Ticket:
        """Something is due from the peer; until the ticket is settled it must not fall silent."""
        if not self._due:
            self._heard_at_s = time.monotonic()
        if self._ticker is None and not self.dropped:
            self._wait_for_tick()
        return Ticket(owner, self._due)

    def drop(self, error: TransferError) -> None:
        """Close the link; everything that depends on it fails with `error`."""
        if self.dropped:
            return
        self.dropped = True
        if self._ticker is not None:
            self._ticker.cancel()
        self._link.close()
        if self._counter is not None:
            self._counter.let_go()
        self._on_lost(error)

    def _receive(self, frame: bytes) -> None:
        self._heard_at_s = time.monotonic()
        try:
            message = decode(frame)
        except TransferError as error:
            self.drop(error)
            return
        if isinstance(message, Ping):
            self.send(Pong())
            if message.handoffs:
                self._on_message(message)
        elif not isinstance(message, Pong):
            self._take(message)

    def _take(self, message: Message) -> None:
        """The root of what a peer's message sets off: whatever is wrong with it costs this connection, and no other."""
        try:
            self._on_message(message)
        except Exception as error:
            log.exception("a %s could not be dealt with", type(message).__name__)
            what = f"a {type(message).__name__} could not be dealt with: {type(error).__name__}"
            self.drop(TransferError(what, "protocol"))

    def _payload_ended(self, future: asyncio.Future[None], ticket: Ticket) -> None:
        ticket.settle()
        if self._counter is not None:
            self._counter.payload_ended()
        self._note_life(future)

    def _note_life(self, future: asyncio.Future[Result]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._heard_at_s = time.monotonic()

    def _wait_for_tick(self) -> None:
        interval_s = self._stall_timeout_s / 4
        self._ticker = self._loop.call_later(interval_s, self._tick, time.monotonic() + 2 * interval_s)

    def _tick(self, at_the_latest_s: float) -> None:
        self._ticker = None
        if not self._due:
            return
        now_s = time.monotonic()
        if now_s > at_the_latest_s:
            self._held_up_at_s = now_s
        overdue_s = now_s - self._stall_timeout_s
        if self._held_up_at_s < overdue_s and self._heard_at_s < overdue_s:
            self.drop(TransferError(f"the peer was silent for {self._stall_timeout_s} s", "timeout"))
        elif self._held_up_at_s < overdue_s and any(_is_over(ticket.owner, overdue_s) for ticket in self._due):
            self.drop(TransferError("the peer did not give back what it was granted", "protocol"))
        else:
            self.send(Ping(self._awaited_handoffs()))
            self._wait_for_tick()

    def _awaited_handoffs(self) -> tuple[int, ...]:
        owners = {ticket.owner for ticket in self._due}
        return tuple(sorted(owner.number for owner in owners if owner.ended_at_s is None and owner.number > 0))


def _is_over(owner: Owner, since_s: float) -> bool:
    return owner.ended_at_s is not None and owner.ended_at_s < since_s
