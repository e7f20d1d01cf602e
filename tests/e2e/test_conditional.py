"""Generation workers that compute prompts when context workers have too long a line, or are away: the same answers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.cluster import Cluster, metric_of
from tests.e2e.reference import PROMPTS, Reference
from tests.e2e.test_answers import complete, greedy
from tests.small_model import SMALL_MODEL

CONFIG = {
    "conditional_disagg_config": {"max_context_queue_tokens": 20},
    "generation_servers": {"scheduler_config": {"max_mixed_prefill_tokens": 8}},
}


@pytest.fixture(scope="module")
def helping(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("helping"), {"model": str(small_model), **CONFIG}) as running:
        yield running


def local_prefills(cluster: Cluster, reason: str) -> float:
    return metric_of(cluster.url, "pdserve_proxy_local_prefills_total", reason=reason)


async def test_a_burst_is_shared_between_both_workers_and_answers_stay_the_same(
    helping: Cluster, small_reference: Reference
) -> None:
    every = helping.all_blocks()
    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(
            *(complete(session, helping.url, greedy(prompt, model=SMALL_MODEL)) for prompt in PROMPTS)
        )
    assert [answer["choices"][0]["text"] for answer in answers] == [small_reference.text(prompt) for prompt in PROMPTS]
    assert local_prefills(helping, "queue") > 0
    assert helping.metric("generation-0", "pdserve_kv_transfers_total", direction="received") > 0
    assert helping.wait_blocks(every) == every


async def test_an_outage_of_the_context_worker_costs_no_answer(helping: Cluster, small_reference: Reference) -> None:
    psutil.Process(helping.workers()["context-0"]["info"]["pid"]).send_signal(signal.SIGKILL)
    async with aiohttp.ClientSession() as session:
        answers = [await complete(session, helping.url, greedy(prompt, model=SMALL_MODEL)) for prompt in PROMPTS[:4]]
    assert [answer["choices"][0]["text"] for answer in answers] == [
        small_reference.text(prompt) for prompt in PROMPTS[:4]
    ]
    assert local_prefills(helping, "no_context") > 0
    helping.wait_ready()
