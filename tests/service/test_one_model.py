"""A cluster serves one model: a worker of another is not registered, and gets no request from any proxy."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster_manager.registry import Registry
from cluster_manager.store import MemoryStore
from pdserve.cluster_client import ClusterClient
from pdserve.config import ClusterConfig
from pdserve.errors import ModelMismatch
from pdserve.model_fingerprint import model_fingerprint
from pdserve.protocol import is_another_model
from pdserve.worker import membership
from proxy.model_loading import load_model
from tests.fakes.proxy_cluster import ProxyCluster, proxy_cluster, served_model
from tests.fakes.proxy_cluster import until as proxy_until
from tests.manager import TestManager, until, worker


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def manager(request: pytest.FixtureRequest) -> AsyncIterator[TestManager]:
    uri = "memory://" if request.param == "memory" else request.getfixturevalue("etcd_server").uri
    async with TestManager(uri=uri, name=uuid.uuid4().hex) as running:
        yield running


async def test_a_worker_of_another_model_is_not_registered(manager: TestManager) -> None:
    async with ClusterClient(manager.url) as client:
        await client.register(worker("old", model="a model of before"))
        reply = await client.register(worker("w1", model="a", model_fingerprint="1-aaaa"))
        await client.register(worker("w2", model="/elsewhere/a", model_fingerprint="1-aaaa"))
        with pytest.raises(ModelMismatch) as caught:
            await client.register(worker("w3", model="b", model_fingerprint="1-bbbb"))
        assert (caught.value.status, caught.value.code) == (409, "model_mismatch")
        for named in ("w3", "1-bbbb", "(b)", "w1", "1-aaaa", "(a)"):
            assert named in caught.value.message
        assert [each.info.worker_id for each in (await client.workers()).workers] == ["old", "w1", "w2"]
        # A worker that comes back with another model has to wait for the others, too.
        with pytest.raises(ModelMismatch):
            await client.register(worker("w2", "2", model_fingerprint="1-bbbb"))
        await client.deregister("w1", reply.lease_id)
        await client.register(worker("w2", "3", model_fingerprint="1-bbbb"))
        await client.register(worker("w3", model="b", model_fingerprint="1-bbbb"))


async def test_of_two_models_that_come_at_once_at_most_one_stays() -> None:
    """Whatever happens between looking for others and being written."""

    class Interleaved(MemoryStore):
        async def grant(self, ttl_s: float) -> str:
            await asyncio.sleep(0)
            return await super().grant(ttl_s)

    registry = Registry(Interleaved(), "test", 60)
    infos = [worker("w1", model_fingerprint="1-aaaa"), worker("w2", model_fingerprint="1-bbbb")]
    results = await asyncio.gather(*map(registry.register, infos), return_exceptions=True)
    assert any(isinstance(result, ModelMismatch) for result in results)
    assert len((await registry.workers()).workers) == sum(isinstance(result, str) for result in results) <= 1


@pytest.mark.parametrize(
    ("ours", "theirs", "another"),
    [
        ("1-a", "1-b", True),
        ("1-a", "1-a", False),
        ("", "1-a", False),
        ("1-a", "", False),
        ("1-a", "2-b", False),
        ("", "", False),
    ],
)
def test_what_two_fingerprints_tell(ours: str, theirs: str, another: bool) -> None:
    assert is_another_model(ours, theirs) == another


async def test_a_worker_that_is_refused_says_so_once_and_joins_when_the_others_are_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(membership, "MISMATCH_PAUSE_S", 0.02)
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        reply = await client.register(worker("w1", model_fingerprint="1-aaaa"))
        asked: list[str] = []

        def make_info(incarnation: str) -> object:
            asked.append(incarnation)
            return worker("w2", incarnation, model_fingerprint="1-bbbb")

        member = membership.Membership(client, make_info, lambda: None, lambda: None)
        task = asyncio.create_task(member.run())
        with caplog.at_level(logging.INFO, membership.__name__):
            await until(lambda: len(asked) > 3)
            told = [record for record in caplog.records if record.name == membership.__name__]
            assert [(record.levelname, "1-aaaa" in record.message) for record in told] == [("ERROR", True)]
            await client.deregister("w1", reply.lease_id)
            await until(lambda: member.registered)
        await member.leave()
        await asyncio.wait_for(task, 5)


def of_model(cluster: ProxyCluster, **fingerprints: str) -> None:
    for each in cluster.workers:
        each.fingerprint = fingerprints[each.worker_id.replace("-", "_")]


def ids(cluster: ProxyCluster, role: str) -> list[str]:
    return sorted(link.worker_id for link in cluster.fleet.members.placeable(role))


async def metric(cluster: ProxyCluster, name: str) -> float:
    async with cluster.session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


async def test_a_proxy_with_weights_uses_workers_of_its_own_model_only(caplog: pytest.LogCaptureFixture) -> None:
    model = served_model(fingerprint="1-aaaa")
    async with proxy_cluster(contexts=2, generations=2, model=model, connect=False) as cluster:
        of_model(cluster, context_0="1-bbbb", context_1="1-aaaa", generation_0="1-aaaa", generation_1="1-bbbb")
        with caplog.at_level(logging.ERROR):
            await cluster.connect()
            cluster.apply("snapshot", workers=[each.record() for each in cluster.workers])
        assert (ids(cluster, "context"), ids(cluster, "generation")) == (["context-1"], ["generation-0"])
        for _ in range(4):
            status, _body = await cluster.post("completions", prompt="p", max_tokens=3)
            assert status == 200
        assert not cluster.contexts[0].received
        assert not cluster.generations[1].received
        told = [record.message for record in caplog.records if "gets no requests" in record.message]
        assert len(told) == 2, "each once"
        assert all("1-bbbb" in line and "1-aaaa" in line for line in told)
        assert await metric(cluster, "pdserve_proxy_workers_of_another_model") == 2
        assert await metric(cluster, 'pdserve_proxy_worker_connections{role="context"}') == 1


async def test_a_proxy_goes_by_the_first_worker_and_follows_a_cluster_to_its_next_model() -> None:
    async with proxy_cluster(contexts=2, generations=2, connect=False) as cluster:
        of_model(cluster, context_0="1-aaaa", context_1="1-bbbb", generation_0="1-aaaa", generation_1="1-bbbb")
        await cluster.connect()
        assert (ids(cluster, "context"), ids(cluster, "generation")) == (["context-0"], ["generation-0"])
        # An empty manager's first snapshot changes nothing while the sockets live.
        cluster.apply("snapshot", workers=[cluster.contexts[1].record(), cluster.generations[1].record()])
        assert (ids(cluster, "context"), ids(cluster, "generation")) == (["context-0"], ["generation-0"])
        # Those that drain leave the manager first; their sockets stay open for what they still do.
        for each in (cluster.contexts[0], cluster.generations[0]):
            await each.report(state="draining")
        await proxy_until(lambda: ids(cluster, "context") == ["context-1"])
        assert ids(cluster, "generation") == ["generation-1"]
        status, _ = await cluster.post("completions", prompt="p", max_tokens=3)
        assert status == 200
        assert not cluster.contexts[0].received


async def test_workers_that_tell_nothing_are_taken_as_they_are() -> None:
    async with proxy_cluster(
        contexts=1, generations=2, model=served_model(fingerprint="1-aaaa"), connect=False
    ) as cluster:
        of_model(cluster, context_0="", generation_0="", generation_1="1-aaaa")
        await cluster.connect()
        assert ids(cluster, "context") == ["context-0"]
        assert ids(cluster, "generation") == ["generation-0", "generation-1"]


def test_the_proxys_own_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 8}))

    def load(**keys: str) -> str | None:
        config = {"model": str(folder), "context_servers": {}, "generation_servers": {}, **keys}
        return load_model(ClusterConfig.model_validate(config)).fingerprint

    assert load() is None
    assert load(load_format="dummy") == model_fingerprint(folder, "DUMMY")
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    assert load() == model_fingerprint(folder)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert load() is None, "a proxy needs no weights"
