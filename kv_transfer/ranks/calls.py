"""What an engine asks of its transceivers, as data: the same on rank 0, which is asked, and on those it tells.

Frames never leave the host, and carry no version. A call that depends on what the engine has computed names the number
of steps that rank 0 had launched by then.
"""

from __future__ import annotations

import msgspec

from kv_transfer.layout import Span, Tables
from kv_transfer.staging import StagingUse
from pdserve import protocol
from pdserve.errors import ErrorInfo, TransferError, from_info
from pdserve.handoff import HandoffCost
from pdserve.protocol import Key, KvAddress, KvRank, TransferCounts


class Offer(msgspec.Struct, frozen=True, array_like=True, tag=1):
    key: Key
    peer: KvAddress
    num_tokens: int
    tables: Tables


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
    tables: Tables
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


EXPORT_CALLS = (Offer, Computed, Finish, AbortExport)
ExportCall = Offer | Computed | Finish | AbortExport
ImportCall = Accept | AbortImport
Call = ExportCall | ImportCall
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


def reason_of(call: AbortExport | AbortImport) -> TransferError | None:
    """Why another rank's handoff has failed; None if the engine has withdrawn it."""
    return None if call.error is None else as_transfer_error(call.error)


def alive_s(timeout_s: float) -> float:
    """How often a follower says that it is there, where a handoff may take `timeout_s`."""
    return min(1.0, timeout_s / 4)
