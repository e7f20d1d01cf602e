"""When one rank of several fails, whichever it is, all end, once and in time, and the next handoff is right again."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from pdserve.handoff import ExportDone, ExportFailed, ImportDone, ImportFailed, ImportOffered
from pdserve.protocol import Key
from tests.transfer.faults import FAULTS, Fault, FaultyNetwork, Once
from tests.transfer.harness import accept_into
from tests.transfer.ranked import PLAIN, TARGET, MakeWorker, assert_arrived, offer, pair, workers
from tests.transfer.shards import worker

__all__ = ["make"]

make = pytest.fixture(workers)


class OnRank(Once):
    """Spoils a message on whichever rank it is given to."""

    @property
    def options(self) -> dict[str, Any]:
        return {"network": lambda config, device: FaultyNetwork(self)}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("message", ["OpenLink", "Offer", "Data", "Sent", "Complete", "payload"])
def test_one_rank_that_fails_fails_all_with_one_error(make: MakeWorker, message: str, rank: int) -> None:
    fault = OnRank(message, "truncate" if message == "payload" else "drop")
    options = {"timeout_ms": 800, "stall_timeout_s": 0.4}
    gen = make(worker(2, [5], **PLAIN), "g", "generation", on_offer=accept_into(lambda key: TARGET), **options)
    ctx = make(worker(2, [5], **PLAIN), "c", "context", of_rank={rank: fault.options}, **options)
    key = Key("r", 0)
    offer(ctx, gen, key, 20)
    ctx.exporter.finish(key, 1)
    failed = ctx.wait(ExportFailed, key)
    assert failed.error.reason in {"timeout", "protocol", "peer_lost", "refused"}
    if gen.leader.events:
        gen.wait(ImportFailed, key)
    ctx.assert_staging_free()
    gen.assert_staging_free()
    assert len(ctx.endings(key)) == 1
    assert len(gen.endings(key)) <= 1
    again = Key("r", 1)
    cache = offer(ctx, gen, again, 20)
    ctx.exporter.finish(again, 1)
    gen.wait(ImportDone, again)
    ctx.wait(ExportDone, again)
    assert_arrived(gen, cache)


@pytest.mark.parametrize("seed", range(5))
def test_many_faults_on_any_rank(make: MakeWorker, seed: int) -> None:
    dice, faults = random.Random(seed), threading.Event()
    faults.set()

    def decide(name: str) -> Fault | None:
        return dice.choice(FAULTS) if faults.is_set() and dice.randrange(25) == 0 else None

    options = {"timeout_ms": 1000, "stall_timeout_s": 0.5, "staging_tokens": 16}
    options |= {"network": lambda config, device: FaultyNetwork(decide)}
    gen = make(worker(3, [5], **PLAIN), "g", "generation", on_offer=accept_into(lambda key: TARGET), **options)
    ctx = make(worker(1, [2, 3], **PLAIN), "c", "context", **options)
    for attempt in range(5):
        key = Key("r", attempt)
        if attempt == 3:
            faults.clear()  # it may still suffer from a link that is being made
        for node in ctx.nodes if attempt == 4 else ():
            node.wait_until(lambda node=node: not node.is_connecting(), "no link is being made")  # type: ignore[misc]
        cache = offer(ctx, gen, key, 27, seed=attempt)
        ctx.exporter.computed(key, 13)
        ctx.exporter.finish(key, attempt)
        ending = ctx.leader.wait_ending(key)
        if any(isinstance(event, ImportOffered) and event.key == key for event in gen.leader.events):
            gen.leader.wait_ending(key)
        if attempt == 4 or ending == ExportDone(key):
            assert gen.endings(key) == [ImportDone(key, attempt)]
            assert_arrived(gen, cache)
        ctx.assert_staging_free()
        gen.assert_staging_free()
    assert ctx.endings(key) == [ExportDone(key)]
    for attempt in range(5):
        assert len(ctx.endings(Key("r", attempt))) == 1
        assert len(gen.endings(Key("r", attempt))) <= 1


def test_a_rank_that_answers_nothing_is_lost_and_nothing_more_is_begun(make: MakeWorker) -> None:
    ctx, gen = pair(make, timeout_ms=300, grace_s=0.2)
    ctx.relays[1].hold = True
    key = Key("r", 0)
    offer(ctx, gen, key, 20)
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, TARGET, 0)
    ctx.exporter.finish(key, 1)
    gen.wait(ImportDone, key)
    error = ctx.wait(ExportFailed, key, 2.0).error
    assert "rank 1" in error.message
    began_s = time.monotonic()
    offer(ctx, gen, Key("next", 0), 20)
    assert ctx.wait(ExportFailed, Key("next", 0)).error == error
    assert time.monotonic() - began_s < 5.0
    ctx.relays[1].release()
    time.sleep(0.05)
    assert len(ctx.endings(key)) == 1


def test_closing_ends_what_is_open(make: MakeWorker) -> None:
    for closed in ("context", "generation"):
        ctx, gen = pair(make)
        keys = [Key(f"r{i}", 0) for i in range(3)]
        for key in keys:
            offer(ctx, gen, key, 20)
            gen.wait(ImportOffered, key)
            gen.importer.accept(key, TARGET, 0)
            ctx.exporter.computed(key, 19)
        (ctx if closed == "context" else gen).close()
        for key in keys:
            # "refused": a rank that has closed already got the offer late.
            assert ctx.wait(ExportFailed, key).error.reason in {"aborted", "peer_lost", "refused"}
            assert gen.wait(ImportFailed, key).error.reason in {"aborted", "peer_lost"}
            assert len(ctx.endings(key)) == len(gen.endings(key)) == 1
