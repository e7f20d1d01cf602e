"""Errors keep their meaning across processes."""

from __future__ import annotations

import pytest

from pdserve.errors import (
    ErrorInfo,
    LayoutMismatch,
    LimitExceeded,
    Overloaded,
    PdserveError,
    TransferError,
    from_info,
)


@pytest.mark.parametrize(
    "error",
    [
        LimitExceeded("too long", "max_seq_len"),
        Overloaded("busy"),
        TransferError("late", "timeout"),
        LayoutMismatch("differs", "head_dim"),
    ],
)
def test_an_error_comes_back_as_itself(error: PdserveError) -> None:
    back = from_info(error.to_info())
    assert type(back) is type(error)
    assert back.to_info() == error.to_info()


def test_a_newer_peers_error_keeps_what_the_client_needs() -> None:
    info = ErrorInfo("teapot", "I am one", "pot", 418, True)
    back = from_info(info)
    assert back.to_info() == info
    assert back.to_openai()["error"] == {
        "message": "I am one",
        "type": "invalid_request_error",
        "param": "pot",
        "code": "teapot",
    }


def test_a_transfer_failure_has_a_known_reason() -> None:
    with pytest.raises(ValueError, match="gremlins"):
        TransferError("x", "gremlins")
