"""What the proxy takes on at once: sums, whom they refuse, and that all is given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdserve.config import ProxyConfig
from pdserve.errors import Draining, LimitExceeded, Overloaded
from proxy.admission import SMALL_BODY_BYTES, Admission


def admission(**limits: Any) -> Admission:
    return Admission(ProxyConfig(**limits), lambda _: None)


async def test_choices_are_counted_not_requests() -> None:
    gate = admission(max_concurrent_requests=10)
    with gate.visit() as first, gate.visit() as second:
        first.take(7, "n")
        with pytest.raises(Overloaded):
            second.take(4, "n")
        second.take(3, "n")
        with pytest.raises(Overloaded), gate.visit():
            pass
    with gate.visit() as alone:
        alone.take(10, "n")


async def test_more_choices_than_places_can_never_fit() -> None:
    gate = admission(max_concurrent_requests=10)
    with gate.visit() as visit, pytest.raises(LimitExceeded) as caught:
        visit.take(11, "prompt")
    assert caught.value.param == "prompt"


async def test_a_visit_holds_no_place_before_it_takes_one() -> None:
    gate = admission(max_concurrent_requests=1)
    with gate.visit(), gate.visit(), gate.visit() as third:
        third.take(1, "n")


async def test_large_bodies_leave_room_for_small_ones() -> None:
    gate = admission(max_body_bytes=1 << 20, max_total_body_bytes=2 << 20)
    with gate.visit() as large, gate.visit() as larger, gate.visit() as small:
        large.hold_bytes(1 << 20)
        with pytest.raises(Overloaded):
            larger.hold_bytes((1 << 19) + 1)
        small.hold_bytes(SMALL_BODY_BYTES)
    with gate.visit() as again:
        again.hold_bytes(1 << 20)


async def test_prompt_tokens_are_bounded_in_sum() -> None:
    gate = admission(max_total_prompt_tokens=1000)
    with gate.visit() as first, gate.visit() as second:
        first.hold_tokens(600, "prompt")
        with pytest.raises(Overloaded):
            second.hold_tokens(401, "prompt")
    with gate.visit() as alone:
        alone.hold_tokens(500, "messages")
        with pytest.raises(LimitExceeded) as caught:
            alone.hold_tokens(501, "messages")
    assert caught.value.param == "messages"
    with gate.visit() as after:
        after.hold_tokens(1000, "prompt")


async def test_draining_refuses_and_waits_for_what_is_open() -> None:
    gate = admission()
    with gate.visit() as reading, gate.visit() as visit:
        visit.take(2, "n")
        gate.draining = True
        with pytest.raises(Draining), gate.visit():
            pass
        with pytest.raises(Draining):
            reading.take(1, "n")
        idle = asyncio.create_task(gate.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await asyncio.wait_for(idle, 10)
