"""A client's mistakes: each gets a 4xx that names the field, and the cluster goes on."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from tests.cluster import Cluster
from tests.small_model import SMALL_MODEL as MODEL

GOOD: dict[str, Any] = {"model": MODEL, "prompt": "Hi", "max_tokens": 2, "temperature": 0}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}

CASES: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("unknown model", "completions", {**GOOD, "model": "gpt-9"}, 404, "model"),
    ("missing model", "completions", {"prompt": "x"}, 400, "model"),
    ("missing prompt", "completions", {"model": MODEL}, 400, "prompt"),
    ("empty prompt", "completions", {**GOOD, "prompt": ""}, 400, "prompt"),
    ("prompt of a wrong type", "completions", {**GOOD, "prompt": {"a": 1}}, 400, "prompt"),
    ("token id out of the vocabulary", "completions", {**GOOD, "prompt": [1, 10**7]}, 400, "prompt"),
    ("negative token id", "completions", {**GOOD, "prompt": [-1]}, 400, "prompt"),
    ("prompt too long", "completions", {**GOOD, "prompt": [5] * 9000}, 400, "max_seq_len"),
    ("negative max_tokens", "completions", {**GOOD, "max_tokens": -1}, 400, "max_tokens"),
    ("max_tokens of a wrong type", "completions", {**GOOD, "max_tokens": "many"}, 400, "max_tokens"),
    ("temperature too high", "completions", {**GOOD, "temperature": 9}, 400, "temperature"),
    ("top_p out of range", "completions", {**GOOD, "top_p": 1.5}, 400, "top_p"),
    ("n of zero", "completions", {**GOOD, "n": 0}, 400, "n"),
    ("unknown field", "completions", {**GOOD, "temprature": 1}, 400, "temprature"),
    ("no messages", "chat/completions", {**CHAT, "messages": []}, 400, "messages"),
    ("message without a role", "chat/completions", {**CHAT, "messages": [{"content": "x"}]}, 400, "messages"),
    ("unknown role", "chat/completions", {**CHAT, "messages": [{"role": "x", "content": "y"}]}, 400, "messages"),
    ("negative max_tokens in chat", "chat/completions", {**CHAT, "max_tokens": -5}, 400, "max_tokens"),
]


async def post(url: str, route: str, data: bytes, content_type: str = "application/json") -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/{route}", data=data, headers={"Content-Type": content_type}) as response,
    ):
        return response.status, json.loads(await response.read())


@pytest.mark.parametrize(("route", "body", "status", "named"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
async def test_a_bad_field_is_named(
    small_cluster: Cluster, route: str, body: dict[str, Any], status: int, named: str
) -> None:
    got, answer = await post(small_cluster.url, route, json.dumps(body).encode())
    assert got == status, answer
    error = answer["error"]
    assert error["type"] == "invalid_request_error"
    assert named in str(error["param"]) or named in error["message"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"{not json", 400),
        (b"", 400),
        (b"[1, 2]", 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"model": "m", "prompt": "' + b"x" * (10 << 20) + b'"}', 413),
    ],
    ids=["malformed", "empty", "array", "invalid utf-8", "NaN", "deep", "10 MB"],
)
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_a_bad_body_is_refused(small_cluster: Cluster, route: str, data: bytes, status: int) -> None:
    got, answer = await post(small_cluster.url, route, data)
    assert got == status, answer
    assert answer["error"]["message"]


async def test_unknown_routes_and_methods(small_cluster: Cluster) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{small_cluster.url}/v1/nothing") as response:
            assert response.status == 404
            assert "/v1/nothing" in (await response.json())["error"]["message"]
        async with session.get(f"{small_cluster.url}/v1/completions") as response:
            assert response.status == 405


async def test_the_cluster_goes_on(small_cluster: Cluster) -> None:
    await post(small_cluster.url, "completions", json.dumps({**GOOD, "prompt": [5] * 9000}).encode())
    status, answer = await post(small_cluster.url, "completions", json.dumps(GOOD).encode())
    assert status == 200, answer
    every = small_cluster.all_blocks()
    assert small_cluster.wait_blocks(every) == every
