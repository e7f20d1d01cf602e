"""What rank 0 tells its followers, and what they report. Frames never leave the host, and carry no version."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from pdserve import protocol
from pdserve.engine.run.step import ChunkRoom, Step
from pdserve.engine.schedule.batch import BlockCopy
from pdserve.errors import ErrorInfo


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a follower is told at its start, as JSON on its standard input. `args` is a dumped `LlmArgs`.

    `reports` is the file descriptor to write `Report`s to, a line of JSON each. `attachment` is for whatever the host
    joins to each rank.
    """

    rank: int
    args: dict[str, object]
    model_folder: str
    meeting_place: str
    commands: str
    reports: int
    log_level: str
    attachment: str = ""


class MakePool(msgspec.Struct, frozen=True, tag="make_pool"):
    """The number of blocks that all ranks have room for."""

    num_blocks: int


class Prepare(msgspec.Struct, frozen=True, tag="prepare"):
    """Clear block 0, where steps that warmed up have written, and do ahead what later steps would wait for.

    `max_tokens` are those of a step, `max_seq_len` those of the longest sequence.
    """

    max_tokens: int
    max_seq_len: int


class Capture(msgspec.Struct, frozen=True, tag="capture"):
    """Capture CUDA graphs as `DecodeGraphs` says; the pools must be unused and are left as they were."""

    sizes: list[int]
    max_blocks: int
    room: ChunkRoom | None


class MakeHostBlocks(msgspec.Struct, frozen=True, tag="make_host_blocks"):
    """Allocate so many blocks on the host for each cache group."""

    num_blocks: int


class CopyBlocks(msgspec.Struct, frozen=True, tag="copy_blocks"):
    """Launch `copies`, one after the other."""

    copies: list[BlockCopy]


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the process."""


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """The follower has its device, and waits for the others at the meeting place."""


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The weights are loaded, and there is room for so many blocks."""

    num_blocks: int


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The follower's process runs, whatever it waits for; said with each heartbeat once it has loaded."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The follower's last words."""

    error: ErrorInfo


Order = Prepare | Capture | MakeHostBlocks | CopyBlocks | Step
"""What all ranks do to their `StepExecutor`; of a `Step` rank 0 does more."""
Command = MakePool | Order | Stop
Report = Joined | Loaded | Alive | Failed


def encode(command: Command) -> bytes:
    return _encoder.encode(command)


def decode(frame: bytes) -> Command:
    """Raises `MalformedMessage`."""
    return protocol.decode(_decoder, frame)


def decode_report(line: bytes) -> Report:
    """Raises `MalformedMessage`."""
    return protocol.decode(_report_decoder, line)


def _to_bytes(values: Any) -> bytes:
    data: bytes = values.tobytes()
    return data


def _from_bytes(_: type, data: bytes) -> Any:
    # A copy, because torch wants memory that may be written to.
    return np.frombuffer(data, np.int64).copy()


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_bytes)
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command, dec_hook=_from_bytes)
_report_decoder: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)
