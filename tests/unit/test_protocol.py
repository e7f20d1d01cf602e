"""What is no message is `MalformedMessage`, whatever is wrong with it, wherever it comes from."""

from __future__ import annotations

import json

import msgspec
import pytest

from kv_transfer import wire
from kv_transfer.ranks import calls
from pdserve.engine.run.ranks import messages
from pdserve.errors import MalformedMessage, TransferError, from_info
from pdserve.protocol import (
    AbortRequest,
    Key,
    decode,
    encode,
    from_engine_decoder,
    from_worker_decoder,
    to_engine_decoder,
    to_worker_decoder,
)
from tests.frames import NO_MESSAGE_IDS, NO_MESSAGES

DECODERS = [to_worker_decoder, from_worker_decoder, to_engine_decoder, from_engine_decoder]
DEEP = b"\x91" * 100_000


def test_a_message_comes_as_it_was() -> None:
    assert decode(to_worker_decoder, encode(AbortRequest(Key("r", 1)))) == AbortRequest(Key("r", 1))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("frame", NO_MESSAGES, ids=NO_MESSAGE_IDS)
def test_no_message_of_a_socket(decoder: msgspec.msgpack.Decoder[object], frame: bytes) -> None:
    with pytest.raises(MalformedMessage) as caught:
        decode(decoder, frame)
    error = from_info(caught.value.to_info())
    assert isinstance(error, MalformedMessage)
    assert "\n" not in str(error)


@pytest.mark.parametrize("frame", [*NO_MESSAGES, DEEP], ids=[*NO_MESSAGE_IDS, "only deep"])
def test_no_message_between_ranks(frame: bytes) -> None:
    for read in (calls.decode_call, calls.decode_report, messages.decode, messages.decode_report):
        with pytest.raises(MalformedMessage):
            read(frame)


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"type":"failed\xff"}', b"1e999", json.dumps({"type": 1}).encode()])
def test_no_report_of_a_rank(line: bytes) -> None:
    with pytest.raises(MalformedMessage):
        messages.decode_report(line)


@pytest.mark.parametrize(
    "body",
    [*NO_MESSAGES, DEEP, b"\x94\x0a\x01\xa2\xff\xfe\xa0", b"\x93\x0b" + DEEP],
    ids=[*NO_MESSAGE_IDS, "only deep", "invalid reason", "deep field"],
)
def test_no_message_of_a_transceiver(body: bytes) -> None:
    with pytest.raises(TransferError) as caught:
        wire.decode(bytes((wire.WIRE_VERSION,)) + body)
    assert caught.value.reason == "protocol"
