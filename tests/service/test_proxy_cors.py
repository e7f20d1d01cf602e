"""Pages in a browser may call the proxy: the question before the request, and the permission on every answer."""

from __future__ import annotations

import pytest

from tests.fakes.proxy_cluster import proxy_cluster

PAGE = "https://page.example"
QUESTION = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/models"])
async def test_the_question_is_answered(route: str) -> None:
    async with proxy_cluster() as cluster, cluster.session.options(route, headers=QUESTION) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        assert response.headers["Access-Control-Allow-Headers"] == QUESTION["Access-Control-Request-Headers"]


async def test_answers_errors_and_streams_may_be_read() -> None:
    async with proxy_cluster() as cluster:
        for fields, status in (
            ({"prompt": "p", "max_tokens": 2}, 200),
            ({"prompt": "p", "max_tokens": 2, "stream": True}, 200),
            ({"prompt": ""}, 400),
        ):
            body = {"model": "fake", **fields}
            async with cluster.session.post("/v1/completions", json=body, headers={"Origin": PAGE}) as response:
                assert response.status == status
                assert response.headers["Access-Control-Allow-Origin"] == "*"
                assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
        async with cluster.session.get("/version") as response:
            assert "Access-Control-Allow-Origin" not in response.headers, "no page asks"


async def test_only_the_pages_of_the_configuration_may() -> None:
    async with proxy_cluster(cors_allow_origins=[PAGE]) as cluster:
        for origin, allowed in ((PAGE, PAGE), ("https://other.example", None)):
            headers = {**QUESTION, "Origin": origin}
            async with cluster.session.options("/v1/models", headers=headers) as response:
                assert response.status == 204
                assert response.headers.get("Access-Control-Allow-Origin") == allowed
                assert ("Access-Control-Allow-Methods" in response.headers) == (allowed is not None)
                assert response.headers["Vary"] == "Origin"


async def test_options_without_a_page_is_as_any_method() -> None:
    async with proxy_cluster() as cluster, cluster.session.options("/v1/models") as response:
        assert response.status == 405
