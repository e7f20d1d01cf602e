"""Workers that die, freeze, come and go: what was started is finished, exactly."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import proxy.attempt
import proxy.retry_budget
from pdserve.errors import Draining, EngineError, ErrorInfo, NotReady, Overloaded, PdserveError, TransferError
from tests.fakes.fake_worker import FakeWorker, token_at
from tests.fakes.proxy_cluster import ProxyCluster, proxy_cluster, until

PROMPT = [5, 6, 7]
COUNT = 12
SEED = 77
EXPECTED = [token_at(SEED, len(PROMPT) + i, 300) for i in range(COUNT)]
FIELDS: dict[str, Any] = {"prompt": PROMPT, "max_tokens": COUNT, "seed": SEED, "return_token_ids": True}


async def tokens(cluster: ProxyCluster, stream: bool) -> list[int]:
    """The output of one request that must succeed."""
    if not stream:
        status, body = await cluster.post("completions", **FIELDS)
        assert status == 200, body
        assert body["usage"]["completion_tokens"] == COUNT
        return list(body["choices"][0]["token_ids"])
    async with cluster.session.post("/v1/completions", json={"model": "fake", "stream": True, **FIELDS}) as response:
        text = await response.text()
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]", lines
    return [token for line in lines for token in json.loads(line)["choices"][0]["token_ids"]]


def all_received(workers: list[FakeWorker]) -> list[tuple[str, int, int]]:
    """Worker, attempt and number of tokens of every submission."""
    return [(w.worker_id, r.key.attempt, len(r.token_ids)) for w in workers for r in w.received]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("die_at", [1, 2, 7, COUNT - 1])
async def test_a_generation_worker_that_dies_is_replaced_and_the_stream_continues(stream: bool, die_at: int) -> None:
    async with proxy_cluster(generations=2) as cluster:
        for worker in cluster.generations:
            worker.behaviour.die_at = die_at
        cluster.generations[1].behaviour.die_at = None
        # In turn among equals: the first request goes to generation-0.
        assert await tokens(cluster, stream) == EXPECTED
        assert all_received(cluster.contexts) == [("context-0", 0, 3), ("context-0", 1, 3 + die_at)]
        # The very last token is again a first one, which a context worker makes alone.
        again = [] if die_at == COUNT - 1 else [("generation-1", 1, 3 + die_at)]
        assert all_received(cluster.generations) == [("generation-0", 0, 3), *again]
        retried = cluster.contexts[0].received[1]
        assert retried.num_prompt_tokens == len(PROMPT)
        assert retried.token_ids == PROMPT + EXPECTED[:die_at]
        assert retried.sampling.max_tokens == COUNT
        await cluster.nothing_open()


async def test_a_context_worker_that_dies_before_its_token_is_replaced() -> None:
    async with proxy_cluster(contexts=2) as cluster:
        cluster.contexts[0].behaviour.die_at = 0
        assert await tokens(cluster, False) == EXPECTED
        assert all_received(cluster.contexts) == [("context-0", 0, 3), ("context-1", 1, 3)]
        assert len(cluster.generations[0].aborted) == 1, "the first attempt is withdrawn on the other side too"


async def test_a_context_worker_that_dies_after_the_handoff_does_not_matter() -> None:
    async with proxy_cluster() as cluster:
        cluster.contexts[0].behaviour.omit_handoff = True
        cluster.generations[0].behaviour.token_delay_s = 0.03
        request = asyncio.create_task(tokens(cluster, True))
        await asyncio.sleep(0.15)
        await cluster.contexts[0].drop_sockets()
        assert await request == EXPECTED
        assert len(cluster.generations[0].received) == 1


WITHDRAWN = TransferError("the context worker withdrew the request", "aborted").to_info()


async def test_an_output_that_ends_with_its_first_token_is_no_failure_though_the_other_worker_hears_of_it_first() -> (
    None
):
    async with proxy_cluster() as cluster:
        (context,), (generation,) = cluster.contexts, cluster.generations
        context.behaviour.script, context.behaviour.first_token_delay_s = [9], 0.15
        generation.behaviour.refuse, generation.behaviour.times = WITHDRAWN, 10
        status, body = await cluster.post("completions", **FIELDS)
        assert status == 200, body
        assert (body["choices"][0]["token_ids"], body["choices"][0]["finish_reason"]) == ([9], "stop")
        assert all_received(cluster.workers) == [("context-0", 0, 3), ("generation-0", 0, 3)]
        await cluster.nothing_open()


async def test_a_context_worker_that_gave_up_and_says_no_more_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(proxy.attempt.PATIENCE_S, "doubted", 0.1)
    async with proxy_cluster(contexts=2) as cluster:
        cluster.contexts[0].behaviour.hang = True
        cluster.generations[0].behaviour.refuse = WITHDRAWN
        assert await tokens(cluster, False) == EXPECTED
        assert [request.key.attempt for request in cluster.contexts[0].received] == [0]
        assert [request.key.attempt for request in cluster.contexts[1].received] == [1]
        assert cluster.contexts[0].aborted == [cluster.contexts[0].received[0].key]
        await cluster.nothing_open()


async def test_the_only_worker_is_waited_for() -> None:
    async with proxy_cluster() as cluster:
        cluster.generations[0].behaviour.die_at = 4
        assert await tokens(cluster, True) == EXPECTED
        assert [request.key.attempt for request in cluster.generations[0].received] == [0, 1]


async def test_a_worker_that_returns_later_is_waited_for_until_the_deadline() -> None:
    async with proxy_cluster(request_timeout_s=5.0) as cluster:
        worker = cluster.generations[0]
        worker.behaviour.token_delay_s = 0.02
        request = asyncio.create_task(tokens(cluster, False))
        await until(lambda: len(worker.received) == 1)
        await asyncio.sleep(0.1)
        await worker.stop()
        await asyncio.sleep(0.2)
        assert not request.done()
        worker.incarnation = "2"
        await worker.start(worker.port)
        cluster.apply("put", worker_id=worker.worker_id, worker=worker.record())
        assert await request == EXPECTED


async def test_waiting_for_a_worker_ends_with_the_deadline() -> None:
    async with proxy_cluster(request_timeout_s=0.4) as cluster:
        cluster.generations[0].behaviour.hang = True
        request = asyncio.create_task(cluster.post("completions", **FIELDS))
        await until(lambda: len(cluster.generations[0].received) == 1)
        await cluster.generations[0].stop()
        assert (await request)[0] == 504


@pytest.mark.parametrize("error", [EngineError("x"), Overloaded("full"), Draining("leaving")])
async def test_a_retryable_refusal_is_tried_elsewhere(error: Any) -> None:
    async with proxy_cluster(generations=2) as cluster:
        cluster.generations[0].behaviour.refuse = error.to_info()
        cluster.generations[0].behaviour.times = 99
        for _ in range(4):
            assert await tokens(cluster, False) == EXPECTED
        async with cluster.session.get("/metrics") as response:
            assert f'pdserve_proxy_retries_total{{error="{error.code}"}}' in await response.text()


async def long_answer(cluster: ProxyCluster, count: int) -> None:
    """A request for `count` tokens that must succeed."""
    status, body = await cluster.post("completions", **{**FIELDS, "max_tokens": count})
    assert status == 200, body
    expected = [token_at(SEED, len(PROMPT) + index, 300) for index in range(count)]
    assert body["choices"][0]["token_ids"] == expected


@pytest.mark.parametrize("gives_up", [Draining("leaving").to_info(), EngineError("a step failed").to_info(), None])
async def test_a_request_survives_any_number_of_workers_of_which_each_takes_it_further(
    gives_up: ErrorInfo | None,
) -> None:
    """A rolling restart, and worse: every generation worker gives 100 tokens and is gone, over and over."""
    async with proxy_cluster(generations=3, max_retries=1) as cluster:
        for worker in cluster.generations:
            worker.behaviour.give_up_after, worker.behaviour.gives_up = 100, gives_up
            worker.behaviour.chunks = (25,)
        await long_answer(cluster, 1000)
        assert sum(len(worker.received) for worker in cluster.generations) == 10
        await cluster.nothing_open()


@pytest.mark.parametrize("error", [Draining("leaving"), Overloaded("full"), NotReady("no engine")])
async def test_refusals_cost_nothing_and_are_put_up_with_at_a_slowing_pace(
    monkeypatch: pytest.MonkeyPatch, error: PdserveError
) -> None:
    monkeypatch.setattr(proxy.retry_budget, "FIRST_PAUSE_S", 0.005)
    async with proxy_cluster(max_retries=0) as cluster:
        for worker in cluster.workers:
            worker.behaviour.refuse, worker.behaviour.times = error.to_info(), 3
        assert await tokens(cluster, True) == EXPECTED
        assert [worker.behaviour.times for worker in cluster.workers] == [0, 0]


async def test_refusals_without_end_are_few_and_end_with_the_deadline() -> None:
    async with proxy_cluster(request_timeout_s=1.0) as cluster:
        worker = cluster.generations[0]
        worker.behaviour.refuse, worker.behaviour.times = Draining("leaving").to_info(), 10**6
        assert (await cluster.post("completions", **FIELDS))[0] == 504
        assert len(worker.received) < 10, "it asks less and less often"
        await cluster.nothing_open()


async def test_a_request_without_a_token_is_refused_when_everybody_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.retry_budget, "FULL_PATIENCE_S", 0.2)
    async with proxy_cluster(contexts=2) as cluster:
        for worker in cluster.contexts:
            worker.behaviour.refuse, worker.behaviour.times = Overloaded("full").to_info(), 10**6
        async with cluster.session.post("/v1/completions", json={"model": "fake", **FIELDS}) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "1")
            assert (await response.json())["error"]["message"] == "full"
        await cluster.nothing_open()


async def test_failures_in_a_row_without_a_token_end_a_request() -> None:
    async with proxy_cluster(generations=2, max_retries=2) as cluster:
        for worker in cluster.generations:
            worker.behaviour.refuse, worker.behaviour.times = EngineError("x").to_info(), 10**6
        for worker in cluster.contexts:
            worker.behaviour.hang = True
        status, body = await cluster.post("completions", **FIELDS)
        assert (status, body["error"]["code"]) == (500, "engine_error")
        assert sum(len(worker.received) for worker in cluster.generations) == 3


async def test_a_prompt_that_kills_its_workers_kills_as_many_as_it_may() -> None:
    async with proxy_cluster(contexts=2, max_retries=9, max_worker_losses=2) as cluster:
        for worker in cluster.contexts:
            worker.behaviour.die_at, worker.behaviour.times = 0, 10**6
        status, body = await cluster.post("completions", **FIELDS)
        assert (status, body["error"]["code"]) == (502, "worker_lost")
        assert sum(len(worker.received) for worker in cluster.contexts) == 3
        await cluster.nothing_open()


@pytest.mark.parametrize("reason", ["timeout", "refused", "protocol"])
async def test_after_a_failed_handoff_neither_worker_is_asked_again_where_there_is_another(reason: str) -> None:
    async with proxy_cluster(generations=2) as cluster:
        (context,), (frozen, busy) = cluster.contexts, cluster.generations
        await busy.report(running=5)
        frozen.behaviour.hang = True
        context.behaviour.refuse = TransferError("the handoff failed", reason).to_info()
        assert await tokens(cluster, False) == EXPECTED
        # The only context worker can't be avoided, which is no reason to go back to the frozen one.
        assert all_received([context]) == [("context-0", 0, 3), ("context-0", 1, 3)]
        assert all_received([frozen, busy]) == [("generation-0", 0, 3), ("generation-1", 1, 3)]


async def test_a_lost_end_is_no_loss_when_all_tokens_are_there() -> None:
    async with proxy_cluster(max_retries=0) as cluster:
        cluster.generations[0].behaviour.die_at = COUNT + 1
        original = FakeWorker._finish

        async def vanish(self: FakeWorker, request: Any, socket: Any, reason: str) -> None:
            if self.role == "generation":
                await socket.close()
            else:
                await original(self, request, socket, reason)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeWorker, "_finish", vanish)
            assert await tokens(cluster, True) == EXPECTED


async def test_many_requests_survive_random_deaths() -> None:
    async with proxy_cluster(contexts=2, generations=2, max_retries=20) as cluster:
        for worker in cluster.workers:
            worker.behaviour.token_delay_s = 0.002
        requests = [asyncio.create_task(tokens(cluster, index % 2 == 0)) for index in range(24)]
        for round_number in range(4):
            await asyncio.sleep(0.02)
            await cluster.workers[round_number].drop_sockets()
        for request in requests:
            assert await request == EXPECTED
        await cluster.nothing_open()
        await until(lambda: not any(link.load.open_requests for link in cluster.fleet.members.links))
        assert all(link.load.pending_prefill_tokens == 0 for link in cluster.fleet.members.links)
