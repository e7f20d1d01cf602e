"""What the proxy says where it serves nothing: parts of OpenAI's API by name, readiness, and the page of its API."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path

import openai
import pytest

from pdserve.errors import NotServed
from proxy.endpoints import ENDPOINTS
from proxy.routes.unserved import UNSERVED
from tests.fakes.proxy_cluster import ProxyCluster, proxy_cluster, until


@pytest.fixture
async def cluster() -> AsyncIterator[ProxyCluster]:
    async with proxy_cluster() as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("POST", "/v1/embeddings", "embeddings"),
        ("POST", "/v1/images/generations", "image endpoints"),
        ("POST", "/v1/audio/speech", "audio endpoints"),
        ("POST", "/v1/moderations", "moderations"),
        ("GET", "/v1/files", "files"),
        ("DELETE", "/v1/files/file-1", "files"),
        ("GET", "/v1/batches/b/cancel", "batches"),
        ("PATCH", "/v1/fine_tuning/jobs", "fine-tuning jobs"),
        ("GET", "/v1/assistants/", "assistants"),
        ("POST", "/v1/responses", "responses"),
    ],
)
async def test_a_part_of_openais_api_is_refused_by_name(
    cluster: ProxyCluster, method: str, path: str, name: str
) -> None:
    async with cluster.session.request(method, path, data=b"{" if method == "POST" else None) as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_served")
    assert error["message"] == f"{name} are not served by pdserve"


async def test_unknown_routes_keep_their_answer(cluster: ProxyCluster) -> None:
    for path in ("/v1/nowhere", "/v1/embeddingsx", "/embeddings", "/v1"):
        async with cluster.session.post(path) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")


async def test_openais_client_does_not_repeat_what_is_not_served(cluster: ProxyCluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=2) as client:
        with pytest.raises(openai.NotFoundError, match="embeddings are not served by pdserve"):
            await client.embeddings.create(model="fake", input="a")
    async with cluster.session.get("/metrics") as response:
        counted = [
            line for line in (await response.text()).splitlines() if "/v1/embeddings" in line and "total" in line
        ]
    assert [line.rpartition(" ")[2] for line in counted] == ["1.0"]


def test_nothing_is_served_and_refused() -> None:
    assert not {row.path for row in ENDPOINTS} & UNSERVED.keys()
    assert NotServed.status == 404


async def test_ready_is_whether_a_request_would_be_taken_now() -> None:
    conditional = {"max_context_queue_tokens": 1000}
    async with proxy_cluster(max_concurrent_requests=1, conditional=conditional) as cluster:
        assert await asked(cluster, "/ready") == (200, None)
        assert await asked(cluster, "/health") == (200, None)
        cluster.generations[0].behaviour.hang = True
        slow = asyncio.create_task(cluster.post("completions", prompt="p", max_tokens=5))
        await until(lambda: cluster.service.admission.open_choices == 1)
        assert await asked(cluster, "/ready") == (503, "not_ready"), "there is no place"
        assert await asked(cluster, "/health") == (200, None)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        await until(lambda: cluster.service.admission.open_choices == 0)
        await cluster.contexts[0].stop()
        await until(lambda: not cluster.fleet.members.placeable("context"))
        assert await asked(cluster, "/health") == (503, "not_ready"), "a context worker is asked for"
        assert await asked(cluster, "/ready") == (200, None), "generation workers do without"
        await cluster.generations[0].stop()
        await until(lambda: not cluster.fleet.members.placeable("generation"))
        assert await asked(cluster, "/ready") == (503, "not_ready"), "nobody is there"


@pytest.mark.parametrize("held", ["body_bytes", "prompt_tokens"])
async def test_a_proxy_that_holds_all_it_may_is_not_ready(held: str) -> None:
    limits = {"max_total_body_bytes": 2048, "max_body_bytes": 1024, "max_total_prompt_tokens": 1000}
    async with proxy_cluster(**limits) as cluster:
        with cluster.service.admission.visit() as visit:
            visit.take(1, "prompt")
            visit.hold_bytes(2048 if held == "body_bytes" else 10)
            visit.hold_tokens(1000 if held == "prompt_tokens" else 10, "prompt")
            assert await asked(cluster, "/ready") == (503, "not_ready")
        assert await asked(cluster, "/ready") == (200, None)


async def test_a_proxy_that_goes_away_is_not_ready(cluster: ProxyCluster) -> None:
    cluster.service.admission.draining = True
    assert await asked(cluster, "/ready") == (503, "draining")
    assert (await asked(cluster, "/health"))[0] == 503


async def asked(cluster: ProxyCluster, path: str) -> tuple[int, str | None]:
    """The status, and the code of an error, which must say when to come back."""
    async with cluster.session.get(path) as response:
        body = await response.json()
        assert ("Retry-After" in response.headers) == (response.status == 503)
        return response.status, body.get("error", {}).get("code")


async def test_the_page_of_the_api_needs_nothing_from_elsewhere(cluster: ProxyCluster) -> None:
    async with cluster.session.get("/docs") as response:
        assert (response.status, response.content_type) == (200, "text/html")
        policy = response.headers["Content-Security-Policy"]
        page = await response.text()
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "://" not in page
    assert 'fetch("openapi.json")' in page
    assert "innerHTML" not in page


def test_the_page_is_a_file_of_the_package() -> None:
    assert files("pdserve").joinpath("api_page.html").is_file()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "api_page.html" in project["tool"]["setuptools"]["package-data"]["pdserve"]
