"""What is told of peers that come and go: of the last ones each alone, of all others the sum."""

from __future__ import annotations

import msgspec

from kv_transfer.counters import KEPT_PEERS, OTHERS, Counters, merge
from pdserve.handoff import HandoffCost
from pdserve.protocol import TransferCounts


def meet(counters: Counters, peer: str, nbytes: int = 10, reason: str | None = None) -> None:
    counter = counters.of(peer, "sent")
    counter.handoff_started()
    counter.payload_started()
    counter.payload_ended()
    counter.moved(nbytes, "tcp")
    counter.handoff_ended(reason)
    if reason is None:
        counters.of(peer, "sent").completed(HandoffCost(peer, nbytes, busy_s=1.0, exposed_s=0.5))


def total(counts: list[TransferCounts]) -> tuple[int, int, int, int, float]:
    return (
        sum(each.bytes for each in counts),
        sum(each.transfers for each in counts),
        sum(sum(each.failures.values()) for each in counts),
        sum(sum(each.exposed_s.counts) for each in counts),
        sum(each.exposed_s.total for each in counts),
    )


def test_a_thousand_peers_are_told_in_few_lines_and_no_sum_falls() -> None:
    counters = Counters("UCX")
    before = total(counters.snapshot())
    for number in range(1000):
        meet(counters, f"context-{number}", reason="timeout" if number % 10 == 0 else None)
        now = total(counters.snapshot())
        assert all(new >= old for new, old in zip(now, before, strict=True))
        before = now
    counts = counters.snapshot()
    assert before == (10_000, 900, 100, 900, 450.0)
    assert len(counts) <= KEPT_PEERS + 2
    assert [each.peer for each in counts].count(OTHERS) == 1
    assert counts[-2].peer == "context-999"
    assert len(msgspec.msgpack.encode(counts)) < 20_000


def test_whoever_is_in_use_is_told_apart() -> None:
    counters = Counters("UCX", kept_peers=2)
    connected, handing_over = counters.of("connected", "sent"), counters.of("handing over", "received")
    connected.hold()
    handing_over.handoff_started()
    for number in range(10):
        meet(counters, f"p{number}")
    connected.moved(7, "tcp")
    handing_over.moved(5, "tcp")
    found = {each.peer: each for each in counters.snapshot()}
    assert (found["connected"].bytes, found["handing over"].bytes) == (7, 5)
    assert found["handing over"].in_flight == 1
    connected.let_go()
    handing_over.handoff_ended(None)
    for number in range(10, 20):
        meet(counters, f"p{number}")
    counts = counters.snapshot()
    assert not {"connected", "handing over"} & {each.peer for each in counts}
    assert sum(each.bytes for each in counts) == 7 + 5 + 20 * 10
    assert {each.direction for each in counts if each.peer == OTHERS} == {"sent", "received"}


def test_who_was_met_again_is_kept_longer() -> None:
    counters = Counters("UCX", kept_peers=2)
    for peer in ("a", "b", "a", "c", "d"):
        meet(counters, peer)
    assert [each.peer for each in counters.snapshot()] == ["a", "c", "d", OTHERS]


def test_ranks_that_have_forgotten_different_peers_still_add_up() -> None:
    ranks = [Counters("UCX", kept_peers=2), Counters("UCX", kept_peers=4)]
    for number in range(8):
        for counters in ranks:
            meet(counters, f"p{number}")
    merged = merge([counters.snapshot() for counters in ranks])
    assert sum(each.bytes for each in merged) == 2 * 8 * 10
    assert len({(each.peer, each.direction) for each in merged}) == len(merged)
