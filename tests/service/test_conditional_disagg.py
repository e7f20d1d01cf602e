"""Prompts that generation workers compute themselves: short ones, those of a long queue, those of an outage."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pdserve.errors import EngineError
from proxy.fleet.fleet import Placement
from tests.fakes.fake_worker import FakeWorker, token_at
from tests.fakes.proxy_cluster import ProxyCluster, proxy_cluster, until

SEED = 7
COUNT = 6


async def answer(cluster: ProxyCluster, num_tokens: int, max_tokens: int = COUNT, **fields: Any) -> dict[str, Any]:
    """The one choice of a request that must succeed, its tokens checked."""
    fields = {"prompt": [5] * num_tokens, "max_tokens": max_tokens, "seed": SEED, "return_token_ids": True, **fields}
    status, body = await cluster.post("completions", **fields)
    assert status == 200, body
    expected = [token_at(SEED, num_tokens + index, 300) for index in range(max_tokens)]
    assert body["choices"][0]["token_ids"] == expected
    return dict(body["choices"][0])


def phases(worker: FakeWorker) -> list[tuple[str, int]]:
    """Phase and number of tokens of everything `worker` received."""
    return [(request.phase, len(request.token_ids)) for request in worker.received]


async def local_prefills(cluster: ProxyCluster) -> dict[str, float]:
    """The proxy's counter, by reason."""
    async with cluster.session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    counts = [line.rsplit(" ", 1) for line in lines if line.startswith("pdserve_proxy_local_prefills_total{")]
    return {name.split('"')[1]: float(value) for name, value in counts}


def placed(placement: Placement) -> tuple[str | None, str | None, str | None]:
    context, generation, local = placement
    return context and context.worker_id, generation and generation.worker_id, local


async def lose_context_worker(cluster: ProxyCluster) -> None:
    """End the only one, and wait until the proxy knows."""
    cluster.apply("delete", worker_id="context-0")
    await cluster.contexts[0].stop()
    await until(lambda: not cluster.fleet.members.placeable("context"))


@contextlib.asynccontextmanager
async def backlog(cluster: ProxyCluster, worker: FakeWorker, *prompts: int) -> AsyncIterator[None]:
    """Requests with prompts of so many tokens, which are not computed: they stay in line at `worker`."""
    tasks, held = [], set()
    worker.behaviour.hang = True
    for num_tokens in prompts:
        # One that a context worker computes is sent to a generation worker as well.
        expected = num_received(cluster) + (2 if worker.role == "context" else 1)
        tasks.append(asyncio.create_task(cluster.post("completions", prompt=[5] * num_tokens, max_tokens=COUNT)))
        await until(lambda: num_received(cluster) == expected)  # noqa: B023
        await asyncio.sleep(0)
        assert len(worker.received[-1].token_ids) == num_tokens, "it went elsewhere"
        held.add(worker.received[-1].key)
    worker.behaviour.hang = False
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: worker.open_keys.isdisjoint(held))


def num_received(cluster: ProxyCluster) -> int:
    return sum(len(worker.received) for worker in cluster.workers)


async def test_by_default_context_workers_compute_every_prompt() -> None:
    async with proxy_cluster() as cluster, backlog(cluster, cluster.contexts[0], 1000):
        assert placed(cluster.fleet.place(1, True)) == ("context-0", "generation-0", None)
        assert placed(cluster.fleet.place(1, False)) == ("context-0", None, None)


async def test_short_prompts_stay_with_their_generation_worker() -> None:
    async with proxy_cluster(conditional={"max_local_prefill_length": 8}) as cluster:
        (context,), (generation,) = cluster.contexts, cluster.generations
        await answer(cluster, 8)
        assert (phases(context), phases(generation)) == ([], [("both", 8)])
        await answer(cluster, 9)
        assert (phases(context), phases(generation)) == ([("context", 9)], [("both", 8), ("generation", 9)])
        await answer(cluster, 3, max_tokens=1)
        assert phases(context)[1:] == [("context", 3)], "there is nothing to hand over"
        assert await local_prefills(cluster) == {"short": 1}


async def test_short_prompts_take_no_context_workers_turn() -> None:
    settings = {"max_local_prefill_length": 8}
    async with proxy_cluster(contexts=2, placement="round_robin", conditional=settings) as cluster:
        for _ in range(4):
            await answer(cluster, 20)
            await answer(cluster, 2)
        assert [len(worker.received) for worker in cluster.contexts] == [2, 2]


async def test_a_backlog_sends_a_prompt_whole_to_a_generation_worker_with_a_shorter_one() -> None:
    async with proxy_cluster(conditional={"max_context_queue_tokens": 100}) as cluster:
        (context,), (generation,) = cluster.contexts, cluster.generations
        async with backlog(cluster, context, 100):
            assert placed(cluster.fleet.place(5, True)) == ("context-0", "generation-0", None), (
                "just as many as allowed"
            )
        async with backlog(cluster, context, 100, 1):
            context.received.clear()
            generation.received.clear()
            await answer(cluster, 50)
            (request,) = generation.received
            assert (request.phase, request.peer, len(request.token_ids)) == ("both", None, 50)
            await answer(cluster, 4, max_tokens=1)
            assert phases(generation)[1:] == [("both", 4)], "not even one token is asked of the context worker"
            assert context.received == []
            assert await local_prefills(cluster) == {"queue": 2}


async def test_all_choices_of_a_prompt_and_its_logprobs_come_from_a_generation_worker_as_well() -> None:
    async with proxy_cluster(conditional={"max_context_queue_tokens": 10}) as cluster:
        (generation,) = cluster.generations
        async with backlog(cluster, cluster.contexts[0], 60):
            fields = {"prompt": [5] * 4, "max_tokens": 3, "n": 3, "echo": True, "logprobs": 2}
            status, body = await cluster.post("completions", **fields)
            assert status == 200, body
            assert [len(choice["logprobs"]["token_logprobs"]) for choice in body["choices"]] == [7, 7, 7]
            assert body["usage"]["prompt_tokens"] == 4
            assert phases(generation)[1:] == [("both", 4)] * 3


async def test_a_generation_workers_own_backlog_counts_until_its_first_token() -> None:
    async with proxy_cluster(generations=2, conditional={"max_context_queue_tokens": 10}) as cluster:
        first, second = cluster.generations
        lines = {link.worker_id: link for link in cluster.fleet.members.links}
        async with backlog(cluster, cluster.contexts[0], 60):
            async with backlog(cluster, second, 10), backlog(cluster, first, 5, 6):
                tokens = [lines[worker.worker_id].load.pending_prefill_tokens for worker in (first, second)]
                assert tokens == [11, 10], "the shortest line got the next prompt, whatever its place in the turn"
                assert placed(cluster.fleet.place(1, True)) == (None, "generation-1", "queue")
                async with backlog(cluster, second, 20), backlog(cluster, first, 20):
                    assert placed(cluster.fleet.place(1, True))[0] == "context-0", "four times 30 are more than 60"
            await answer(cluster, 12)
            assert all(lines[worker.worker_id].load.pending_prefill_tokens == 0 for worker in (first, second))
            assert placed(cluster.fleet.place(1, True))[2] == "queue"


async def test_other_proxies_decodes_are_no_backlog_but_their_waiting_prompts_are() -> None:
    async with proxy_cluster(conditional={"max_context_queue_tokens": 1000}) as cluster:
        (context,), (generation,) = cluster.contexts, cluster.generations
        lines = {link.worker_id: link for link in cluster.fleet.members.links}
        await generation.report(running=50)
        await context.report(running=2)
        await until(
            lambda: lines["generation-0"].load.open_requests == 50 and lines["context-0"].load.open_requests == 2
        )
        assert lines["context-0"].load.pending_prefill_tokens == 2048
        assert placed(cluster.fleet.place(1, True)) == (None, "generation-0", "queue")
        await generation.report(running=50, waiting=2)
        await until(lambda: lines["generation-0"].load.open_requests == 52)
        assert placed(cluster.fleet.place(1, True)) == ("context-0", "generation-0", None)


async def test_what_waits_at_a_generation_worker_of_our_own_is_counted_once() -> None:
    async with proxy_cluster(conditional={"max_context_queue_tokens": 10}) as cluster:
        (context,), (generation,) = cluster.contexts, cluster.generations
        line = next(link for link in cluster.fleet.members.links if link.worker_id == "generation-0")
        async with backlog(cluster, context, 60), backlog(cluster, generation, 50):
            await generation.report(running=2, waiting=1)
            await until(lambda: line.load.open_requests == 3)
            assert line.load.pending_prefill_tokens == 50


async def test_without_a_context_worker_answers_come_from_generation_workers() -> None:
    async with proxy_cluster(conditional={"max_context_queue_tokens": 10**6}) as cluster:
        (context,), (generation,) = cluster.contexts, cluster.generations
        context.max_seq_len = 1000
        cluster.apply("put", worker_id=context.worker_id, worker=context.record())
        assert cluster.fleet.max_seq_len() == 1000
        await answer(cluster, 30)
        await lose_context_worker(cluster)
        assert cluster.fleet.max_seq_len() == 2048
        await answer(cluster, 30)
        await answer(cluster, 30, max_tokens=1)
        assert phases(generation) == [("generation", 30), ("both", 30), ("both", 30)]
        assert await local_prefills(cluster) == {"no_context": 2}
        async with cluster.session.get("/health") as response:
            assert response.status == 503, "it asks for minimal_instances"


async def test_without_the_queue_setting_an_outage_leaves_short_prompts_only() -> None:
    async with proxy_cluster(conditional={"max_local_prefill_length": 8}) as cluster:
        await lose_context_worker(cluster)
        await answer(cluster, 8)
        for num_tokens, max_tokens in ((9, COUNT), (8, 1)):
            status, body = await cluster.post("completions", prompt=[5] * num_tokens, max_tokens=max_tokens)
            assert (status, body["error"]["message"]) == (503, "no context worker is connected and ready")


async def test_a_prompt_that_a_context_worker_failed_at_is_computed_by_a_generation_worker() -> None:
    async with proxy_cluster(conditional={"max_context_queue_tokens": 10**6}) as cluster:
        (context,), (generation,) = cluster.contexts, cluster.generations
        context.behaviour.refuse = EngineError("a step failed").to_info()
        await answer(cluster, 12)
        assert phases(generation) == [("generation", 12), ("both", 12)]
        assert len(context.received) == 1
        assert await local_prefills(cluster) == {"no_context": 1}


async def test_what_failed_at_the_only_generation_worker_goes_to_a_context_worker_if_that_is_enough() -> None:
    async with proxy_cluster(conditional={"max_context_queue_tokens": 10}) as cluster:
        (context,), (generation,) = cluster.contexts, cluster.generations
        async with backlog(cluster, context, 60):
            generation.behaviour.refuse = EngineError("a step failed").to_info()
            await answer(cluster, 12, max_tokens=1)
            assert phases(generation)[1:] == [("both", 12)]
            assert phases(context)[1:] == [("context", 12)]


@pytest.mark.parametrize("outage", [False, True])
async def test_the_only_generation_worker_is_tried_again(outage: bool) -> None:
    async with proxy_cluster(conditional={"max_local_prefill_length": 99}) as cluster:
        if outage:
            await lose_context_worker(cluster)
        cluster.generations[0].behaviour.refuse = EngineError("a step failed").to_info()
        await answer(cluster, 12)
        assert phases(cluster.generations[0]) == [("both", 12)] * 2
        assert await local_prefills(cluster) == {"short": 2}


@pytest.mark.parametrize("die_at", [0, 1, 4])
@pytest.mark.parametrize("outage", [False, True])
async def test_a_generation_worker_that_dies_with_a_whole_request_is_replaced(die_at: int, outage: bool) -> None:
    async with proxy_cluster(generations=2, conditional={"max_context_queue_tokens": 10}) as cluster:
        if outage:
            await lose_context_worker(cluster)
        async with backlog(cluster, cluster.contexts[0], *[] if outage else [60]):
            for worker in cluster.generations:
                worker.behaviour.die_at = die_at
                worker.behaviour.times = 0
                worker.received.clear()
            # In turn among equals: the backlog's own request went to the first.
            victim, other = cluster.generations if outage else cluster.generations[::-1]
            victim.behaviour.times = 1
            await answer(cluster, 12)
            assert (phases(victim), phases(other)) == ([("both", 12)], [("both", 12 + die_at)])
