"""One network link with its messages: encoding, liveness, and what is due from the peer.

`ExportLink` and `ImportLink` have one each. Owns the network link. Life cycle: open → dropped, by this side, by the
peer, by a broken link, or because the peer was silent for too long. Then `on_lost` is called once, and the future of
every payload fails, at the latest in this turn of the event loop. A dropped connection ignores what is sent over it.

While something is due from the peer, the peer must say something within `stall_timeout_s`, if only Pong. Otherwise a
frozen process would hold up handoffs until their deadline, and with them staging buffers that other handoffs wait for.
A handoff that has ended must give its buffers back within the same time. Time in which our own thread was held up does
not count: what the peer said in it has not been read yet.
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
    """The part of a handoff that waits for the peer. `number` names it on this connection; `ended_at_s` is when it
    ended, None before."""

    @property
    def number(self) -> int: ...

    @property
    def ended_at_s(self) -> float | None: ...


class Ticket:
    """Something that is due from the peer, for `owner`, until it is settled."""

    def __init__(self, owner: Owner, due: set[Ticket]) -> None:
        self.owner = owner
        self._due = due
        due.add(self)

    def settle(self) -> None:
        """It has come, or is not needed any more. May be called twice."""
        self._due.discard(self)


class Connection:
    """See the module.

    Args:
        link: the network's; owned by the connection from now on.
        on_message: called with each message of the peer.
        on_lost: called once, when the connection is dropped.
        stall_timeout_s: how long the peer may be silent while something is due from it.
        checked: whether every message that is sent gets a checksum.
    """

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
        """Send `payload`. Until it is sent, something is due from the peer, for `owner`."""
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
