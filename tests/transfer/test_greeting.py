"""What a transceiver takes for the greeting of another."""

from __future__ import annotations

import pytest

from kv_transfer.networks.greeting import MAGIC, MAX_GREETING_BYTES, VERSION, Seal
from pdserve.errors import TransferError

BODY = b"where I am"
SEAL = Seal("UCX")


def refusal(frame: bytes, seal: Seal = SEAL) -> str:
    with pytest.raises(TransferError) as caught:
        seal.open(frame)
    assert caught.value.reason == "protocol"
    return str(caught.value)


@pytest.mark.parametrize("body", [b"", BODY, bytes(1000)])
@pytest.mark.parametrize("key", [b"", b"a cluster's token"])
def test_what_was_sealed_comes_out(body: bytes, key: bytes) -> None:
    assert Seal("UCX", key).open(Seal("UCX", key).close(body)) == body


def test_no_byte_may_differ() -> None:
    frame = SEAL.close(BODY)
    for place in range(len(frame)):
        refusal(frame[:place] + bytes((frame[place] ^ 1,)) + frame[place + 1 :])


def test_no_byte_may_be_missing_or_left_over() -> None:
    frame = SEAL.close(BODY)
    for length in range(len(frame)):
        refusal(frame[:length])
    refusal(frame + b"x")


def test_it_says_what_is_wrong() -> None:
    assert "no KV transceiver" in refusal(b"GET / HTTP/1.1\r\n\r\n")
    assert "no KV transceiver" in refusal(b"pdserve-kv/1 x")
    assert "version 99" in refusal(MAGIC + bytes((99,)) + SEAL.close(BODY)[len(MAGIC) + 1 :])
    assert f"we in {VERSION}" in refusal(MAGIC + bytes((99,)) + SEAL.close(BODY)[len(MAGIC) + 1 :])
    assert "'NIXL'" in refusal(Seal("NIXL").close(BODY))
    assert "another key" in refusal(Seal("UCX", b"theirs").close(BODY), Seal("UCX", b"ours"))
    assert "another key" in refusal(SEAL.close(BODY), Seal("UCX", b"ours"))
    assert "no KV transceiver" in refusal(SEAL.close(bytes(MAX_GREETING_BYTES)))
