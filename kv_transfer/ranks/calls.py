"""What an engine asks of its transceivers, as data: the same on rank 0, which is asked, and on those it tells.

Frames never leave the host, and carry no version. A call that depends on what the engine has computed names the number
of steps that rank 0 had launched by then.
"""

from __future__ import annotations

from functools import partial

import msgspec

from kv_transfer.layout import Span
from kv_transfer.mark_poller import Mark, MarkPoller
from kv_transfer.receiver import Receiver
from kv_transfer.sender import Sender
from kv_transfer.staging import StagingUse
from pdserve import protocol
from pdserve.errors import ErrorInfo, TransferError, from_info
from pdserve.handoff import HandoffCost
from pdserve.protocol import Key, KvAddress, KvRank, TransferCounts


class Offer(msgspec.Struct, frozen=True, array_like=True, tag=1):
    key: Key
    peer: KvAddress
    num_tokens: int
    block_ids: tuple[int, ...]


class Computed(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """`layers` of the model; None are all of every rank. What names layers is this rank's own, and not passed on."""

    key: Key
    num_tokens: int
    layers: Span | None
    step: int


class Finish(msgspec.Struct, frozen=True, array_like=True, tag=3):
    key: Key
    first_token: int
    step: int


class AbortExport(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """`error` is why another rank's has failed; None when the engine wants it."""

    key: Key
    error: ErrorInfo | None = None


class Accept(msgspec.Struct, frozen=True, array_like=True, tag=5):
    key: Key
    block_ids: tuple[int, ...]
    num_cached_tokens: int
    step: int


class AbortImport(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """As `AbortExport`."""

    key: Key
    error: ErrorInfo | None = None


class World(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Every rank of the worker, once all have started; the first frame that a follower gets."""

    ranks: tuple[KvRank, ...]


class Up(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A follower's first report: where it listens."""

    rank: int
    address: KvRank


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A follower's handoff is over, and it no longer touches the blocks. `counts` are all of its counters, `cost` is
    what a completed handoff took on this rank."""

    rank: int
    is_export: bool
    key: Key
    error: ErrorInfo | None
    first_token: int | None
    counts: list[TransferCounts]
    cost: HandoffCost | None = None


class Counted(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A follower's counters, the use of its staging, and why it can't make links; often while there is news, else every
    `alive_s`, as a sign of life."""

    rank: int
    counts: list[TransferCounts]
    staging: StagingUse
    hindrance: str = ""


Call = Offer | Computed | Finish | AbortExport | Accept | AbortImport
Report = Up | Ended | Counted

_encoder = msgspec.msgpack.Encoder()
_call_decoder: msgspec.msgpack.Decoder[Call | World] = msgspec.msgpack.Decoder(Call | World)
_report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Call | World | Report) -> bytes:
    return _encoder.encode(message)


def decode_call(frame: bytes) -> Call | World:
    """Raises `MalformedMessage`."""
    return protocol.decode(_call_decoder, frame)


def decode_report(frame: bytes) -> Report:
    """Raises `MalformedMessage`."""
    return protocol.decode(_report_decoder, frame)


def as_transfer_error(info: ErrorInfo) -> TransferError:
    error = from_info(info)
    return error if isinstance(error, TransferError) else TransferError(info.message, "aborted", info.param)


def alive_s(timeout_s: float) -> float:
    """How often a follower says that it is there, where a handoff may take `timeout_s`."""
    return min(1.0, timeout_s / 4)


class Ends:
    """One rank's sender and receiver, and how calls reach them. Belongs to the transceiver's loop."""

    def __init__(self, poller: MarkPoller, sender: Sender | None, receiver: Receiver | None) -> None:
        self._poller = poller
        self._sender = sender
        self._receiver = receiver

    @property
    def sender(self) -> Sender:
        assert self._sender is not None, "a generation worker's transceiver exports nothing"
        return self._sender

    @property
    def receiver(self) -> Receiver:
        assert self._receiver is not None, "a context worker's transceiver imports nothing"
        return self._receiver

    @property
    def staging(self) -> StagingUse:
        """Of both ends; from any thread."""
        return StagingUse.of_all(end.staging.use for end in (self._sender, self._receiver) if end is not None)

    def join(self, ranks: tuple[KvRank, ...], rank: int) -> None:
        """This is number `rank` of these."""
        if self._sender is not None:
            self._sender.join(ranks, rank)

    def run(self, call: Call, mark: Mark) -> None:
        """Do as `call` says; what was computed, not before `mark`."""
        if isinstance(call, Computed | Finish):
            if isinstance(call, Finish):
                # The mark is the engine's stream as it is now, perhaps with a later step in it; what was said of the
                # layers as they were launched is known to be true sooner.
                self.sender.expect(call.key, call.first_token)
            self._poller.when(mark, partial(self._push, call))
        elif isinstance(call, Offer):
            self.sender.offer(call.key, call.peer, call.num_tokens, call.block_ids)
        elif isinstance(call, Accept):
            self.receiver.accept(call.key, call.block_ids, call.num_cached_tokens, mark)
        else:
            error = None if call.error is None else as_transfer_error(call.error)
            (self.sender if isinstance(call, AbortExport) else self.receiver).abort(call.key, error)

    def close(self) -> None:
        """End every handoff and every connection."""
        if self._sender is not None:
            self._sender.close()
        if self._receiver is not None:
            self._receiver.close()

    async def settle(self) -> None:
        """After `close`: wait until no peer may read what was offered."""
        if self._sender is not None:
            await self._sender.settle()

    def _push(self, call: Computed | Finish, error: Exception | None) -> None:
        if error is not None:
            self.sender.abort(call.key, TransferError(f"the KV could not be computed: {error}", "aborted"))
        elif isinstance(call, Computed):
            self.sender.computed(call.key, call.num_tokens, call.layers)
        else:
            self.sender.finish(call.key, call.first_token)
