"""Large and many requests: what they may take, that others go on meanwhile, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import normalizers

import proxy.intake
import proxy.text_work
import proxy.time_slice
from pdserve.http import receive
from pdserve.text.tokenizer import Tokenizer
from tests.fakes.proxy_cluster import ProxyCluster, byte_level_tokenizer, proxy_cluster, served_model, until

WORDS = "the quick brown fox jumps over the lazy dog " * 90
"""Less than 4,096 characters: short for one prompt."""


def head(length: int) -> bytes:
    """The head of a request, and the first byte of its body."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", "{"]).encode()


@contextlib.asynccontextmanager
async def counted_turns() -> AsyncIterator[Callable[[], int]]:
    """How often the event loop has come round."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(count())
    try:
        yield lambda: turns
    finally:
        task.cancel()


async def refusal(cluster: ProxyCluster, route: str, body: bytes) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    async with cluster.session.post(f"/v1/{route}", data=body, headers=headers) as response:
        return response.status, (await response.json()).get("error", {})


async def test_many_prompts_are_tokenized_and_submitted_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.time_slice, "_SLICE_S", 0.0)
    async with proxy_cluster(contexts=0, max_concurrent_requests=4096) as cluster:
        (worker,) = cluster.generations
        worker.max_seq_len = 8192
        cluster.apply("put", worker_id=worker.worker_id, worker=worker.record())
        encoded_in_loop = 0
        encode_batch, loop = Tokenizer.encode_batch, asyncio.get_running_loop()

        def counted(self: Tokenizer, texts: Any, special: bool) -> list[list[int]]:
            nonlocal encoded_in_loop
            encoded_in_loop += asyncio._get_running_loop() is loop
            return encode_batch(self, texts, special)

        monkeypatch.setattr(Tokenizer, "encode_batch", counted)
        async with counted_turns() as turns:
            status, body = await cluster.post("completions", prompt=[WORDS[:450]] * 2000, max_tokens=1)
            assert status == 200
            assert len(body["choices"]) == 2000
            assert encoded_in_loop == 0
            assert turns() > 4 * 2000, "at least one turn for each choice made, submitted, read and written"
        assert len(worker.received) == 2000


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_a_prompt_that_cannot_fit_is_refused_by_its_length(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    async with proxy_cluster() as cluster:
        monkeypatch.setattr(Tokenizer, "encode_now", lambda *_: pytest.fail("it was tokenized"))
        monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("it was tokenized"))
        text = "a" * 1_000_000
        param = "prompt" if route == "completions" else "messages"
        fields = {"prompt": text} if route == "completions" else {"messages": [{"role": "user", "content": text}]}
        status, body = await cluster.post(route, **fields)
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert (body["error"]["type"], body["error"]["param"]) == ("invalid_request_error", param)


async def test_where_length_says_nothing_a_part_is_tokenized_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rust = byte_level_tokenizer()
    rust.normalizer = normalizers.Strip()
    tokenizer = Tokenizer(rust)
    assert tokenizer.max_characters_per_token is None
    async with proxy_cluster(model=served_model(tokenizer=tokenizer)) as cluster:
        lengths: list[int] = []
        count = Tokenizer.count
        monkeypatch.setattr(Tokenizer, "count", lambda self, text: lengths.append(len(text)) or count(self, text))
        monkeypatch.setattr(Tokenizer, "encode_now", lambda *_: pytest.fail("all of it was tokenized"))
        status, error = await refusal(
            cluster, "completions", json.dumps({"model": "fake", "prompt": WORDS * 500}).encode()
        )
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert lengths == [proxy.text_work._BATCH_CHARACTERS]


async def test_a_long_text_of_few_tokens_is_served() -> None:
    rust = byte_level_tokenizer()
    rust.normalizer = normalizers.Strip()
    async with proxy_cluster(model=served_model(tokenizer=Tokenizer(rust))) as cluster:
        status, body = await cluster.post("completions", prompt=" " * 500_000 + "the fox", max_tokens=2)
        assert status == 200
        assert body["usage"]["prompt_tokens"] < 10


async def test_choices_count_as_requests() -> None:
    async with proxy_cluster(max_concurrent_requests=8) as cluster:
        cluster.generations[0].behaviour.hang = True
        status, body = await cluster.post("completions", prompt=["p"] * 3, n=3)
        assert (status, body["error"]["code"], body["error"]["param"]) == (400, "limit_exceeded", "n")
        slow = asyncio.create_task(cluster.post("completions", prompt=["p"] * 3, n=2))
        await until(lambda: len(cluster.generations[0].received) == 6)
        assert (await cluster.post("completions", prompt="p", n=3))[0] == 429
        cluster.generations[0].behaviour.hang = False
        assert (await cluster.post("completions", prompt="p", n=2))[0] == 200
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        await cluster.nothing_open()
        await until(lambda: cluster.service.metrics.in_flight._value.get() == 0)


async def test_prompt_tokens_count_once_a_choice() -> None:
    async with proxy_cluster(max_total_prompt_tokens=4000) as cluster:
        for worker in cluster.workers:
            worker.behaviour.hang = True
        for prompt in ([5] * 1000, "z" * 1000):
            status, body = await cluster.post("completions", prompt=prompt, n=5)
            assert (status, body["error"]["code"], body["error"]["param"]) == (400, "limit_exceeded", "prompt")
        slow = asyncio.create_task(cluster.post("completions", prompt=[5] * 1000, n=3))
        await until(lambda: len(cluster.generations[0].received) == 3)
        assert (await cluster.post("completions", prompt=[5] * 1001))[0] == 429
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        await cluster.nothing_open()
        for worker in cluster.workers:
            worker.behaviour.hang = False
        assert (await cluster.post("completions", prompt=[5] * 1000, max_tokens=2))[0] == 200


async def test_clients_that_send_slowly_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async with proxy_cluster(max_concurrent_requests=2) as cluster:
        receiving = 0

        async def counted(*arguments: Any) -> bytes:
            nonlocal receiving
            receiving += 1
            return await receive(*arguments)

        monkeypatch.setattr(proxy.intake, "receive", counted)
        port = int(cluster.url.rpartition(":")[2])
        writers = []
        for _ in range(8):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(999))
            writers.append(writer)
        await until(lambda: receiving == 8)
        assert (await cluster.post("completions", prompt="p", max_tokens=2))[0] == 200
        for writer in writers:
            writer.close()


async def test_held_bodies_are_bounded_in_sum() -> None:
    async with proxy_cluster(max_body_bytes=400_000, max_total_body_bytes=800_000) as cluster:
        release = asyncio.Event()

        async def part(size: int) -> AsyncIterator[bytes]:
            yield b"{" + b" " * size
            await release.wait()

        headers = {"Content-Type": "application/json"}
        admission = cluster.service.admission
        held = [
            asyncio.create_task(
                cluster.session.post("/v1/completions", data=part(290_000), headers=headers).__aenter__()
            )
            for _ in range(2)
        ]
        await until(lambda: admission._body_bytes > 580_000)
        status, error = await refusal(cluster, "completions", b"{" + b" " * 200_000)
        assert (status, error["code"]) == (429, "overloaded")
        assert (await cluster.post("completions", prompt="p", max_tokens=2))[0] == 200, "small ones still pass"
        release.set()
        for response in await asyncio.gather(*held):
            assert response.status == 400
            response.close()
        await until(lambda: admission._body_bytes == 0)


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    async with proxy_cluster(max_body_bytes=2048) as cluster:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(cluster.url.rpartition(":")[2]))
        writer.write(head(9_999_999))
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 20)
        writer.close()


def test_memory_comes_back_after_large_prompts() -> None:
    """Four prompts of 8 MB at once that are refused; in a process of its own, whose memory is nobody else's."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", "from tests.service import test_proxy_admission as t; t.report_memory()"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["statuses"] == [400] * 4
    assert report["after_mb"] - report["before_mb"] < 150, report
    assert report["peak_mb"] - report["before_mb"] < 600, report


def report_memory() -> None:
    asyncio.run(_report_memory())


async def _report_memory() -> None:
    rust = byte_level_tokenizer()
    rust.normalizer = normalizers.Strip()  # so that its length alone does not refuse a text
    process = psutil.Process()
    async with proxy_cluster(model=served_model(tokenizer=Tokenizer(rust))) as cluster:
        for worker in cluster.workers:
            worker.max_seq_len = 100_000
            cluster.apply("put", worker_id=worker.worker_id, worker=worker.record())
        body = json.dumps({"model": "fake", "prompt": "zq " * 2_600_000}).encode()
        before = peak = process.memory_info().rss
        requests = asyncio.gather(*(refusal(cluster, "completions", body) for _ in range(4)))
        while not requests.done():
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.01)
        statuses = [status for status, _ in await requests]
    after = process.memory_info().rss
    megabytes = {"before_mb": before >> 20, "after_mb": after >> 20, "peak_mb": peak >> 20}
    print(json.dumps({"statuses": statuses, **megabytes}))
