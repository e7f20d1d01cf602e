"""A rank that ends takes its engine with it, at once and by name; nobody waits for it, and no process stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pdserve.config import KvCacheConfig
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.run.ranks.messages import Failed, decode_report
from pdserve.engine.run.ranks.ranks import FollowerProgram, Followers
from pdserve.engine.schedule.batch import RunnerLost
from pdserve.engine.schedule.engine import Engine
from pdserve.errors import ConfigError, EngineError
from pdserve.llm import LLM, SamplingParams
from pdserve.process import child_environment
from pdserve.protocol import EngineFailed, EngineReady, OutputFrame
from tests.fakes.fake_runner import FakeRunner
from tests.rank_processes import followers
from tests.unit.engine_bench import Client, request, run
from tests.unit.test_engine_process import Server, is_finished, server
from tests.unit.tiny_models import args, save

__all__ = ["server"]

TIMEOUT_S = 60.0
TP2: dict[str, Any] = {"tensor_parallel_size": 2, "num_threads": 1}


def wait_until(happened: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save("llama", folder)
    return folder


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    assert not followers()


def test_a_follower_that_listens_late_misses_nothing(model: Path, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    ranks = Followers(args(model, **TP2), model, FollowerProgram("tests.fakes.late_follower", str(heard)), pytest.fail)
    ranks.wait_until_joined()
    assert ranks.agree_on_blocks(10) == 8
    ranks.close()
    assert heard.read_text() == "8"


END_NOW = """
import sys, threading
from pdserve.engine.run.ranks.messages import RankSpec
from pdserve.engine.run.ranks.rank_process import end_now
from pdserve.errors import TransferError
spec = RankSpec(rank=1, args={}, model_folder="", meeting_place="", commands="", reports=int(sys.argv[1]), log_level="")
error = TransferError("the KV transceiver's thread has ended", "aborted")
threading.Thread(target=end_now, args=(spec, error)).start()
threading.Event().wait()
"""


def test_a_rank_ends_from_any_thread_and_says_why() -> None:
    ours, theirs = os.pipe()
    run = subprocess.run(
        [sys.executable, "-c", END_NOW, str(theirs)], pass_fds=(theirs,), timeout=TIMEOUT_S * 3, capture_output=True
    )
    os.close(theirs)
    with os.fdopen(ours, "rb") as reports:
        report = decode_report(reports.read())
    assert isinstance(report, Failed)
    assert report.error.message == "rank 1: the KV transceiver's thread has ended"
    assert run.returncode == 1


def test_a_rank_whose_report_makes_no_sense_is_lost(model: Path) -> None:
    losses: list[Exception] = []
    ranks = Followers(args(model, **TP2), model, FollowerProgram("tests.fakes.mad_follower", ""), losses.append)
    wait_until(lambda: bool(losses))
    ranks.close()
    assert "rank 1 makes no sense" in str(losses[0])


def test_requests_of_an_llm_fail_when_a_rank_dies(model: Path) -> None:
    cache = KvCacheConfig(max_tokens=1024)
    with LLM(model, skip_tokenizer_init=True, device="cpu", max_batch_size=4, kv_cache_config=cache, **TP2) as llm:
        assert len(llm.generate([5, 6, 7], SamplingParams(max_tokens=3)).outputs[0].token_ids) == 3
        (follower,) = followers()
        follower.suspend()
        pending = llm.generate_async([5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True))
        with pytest.raises(TimeoutError):
            pending.result(0.5)
        follower.kill()
        with pytest.raises(EngineError, match=f"rank 1 \\(pid {follower.pid}\\) ended with SIGKILL"):
            pending.result(TIMEOUT_S)
        with pytest.raises(EngineError, match="ended with SIGKILL"):
            llm.generate_async([5, 6, 7], SamplingParams(max_tokens=3)).result(TIMEOUT_S)


def test_a_rank_that_dies_between_requests_is_noticed_by_the_next(model: Path) -> None:
    runner = ModelRunner(args(model, **TP2))
    try:
        (follower,) = followers()
        follower.kill()
        wait_until(lambda: not psutil.pid_exists(follower.pid))
        engine = Engine(runner)
        engine.submit(request())
        error = engine.step().finished[0].error
        assert error is not None
        assert error.message == f"rank 1 (pid {follower.pid}) ended with SIGKILL"
        assert isinstance(engine.failure, RunnerLost)
    finally:
        runner.close()


def test_a_lost_runner_ends_every_request_at_once() -> None:
    runner = FakeRunner()
    runner.failures = [RunnerLost("rank 1 is gone")]
    engine = Engine(runner)
    for index in range(20):
        engine.submit(request(f"r{index}"))
    errors = [each.error for each in engine.step().finished]
    assert [error.message for error in errors if error is not None] == ["rank 1 is gone"] * 20
    engine.submit(request("later"))
    assert engine.step().finished[0].error is not None


@pytest.mark.parametrize(("layers", "said_by"), [((1, 2), "rank 1: kv"), ((2, 1), "kv")])
def test_what_a_rank_finds_wrong_at_the_start_is_said_by_its_key(
    layers: tuple[int, int], said_by: str, tmp_path: Path
) -> None:
    """A block of one layer just fits into a rank's memory, so the rank with two layers refuses."""
    save("llama-yarn-rope", tmp_path)
    cache = KvCacheConfig(cpu_memory_bytes=1 << 20, tokens_per_block=1024)
    changes = {"pipeline_parallel_size": 2, "pp_partition": layers, "kv_cache_config": cache}
    with pytest.raises(
        ConfigError, match=f"^{said_by}_cache_config.cpu_memory_bytes: .* do not hold one block"
    ) as caught:
        ModelRunner(args(tmp_path, **changes))
    assert caught.value.param == "kv_cache_config.cpu_memory_bytes"


def test_a_rank_that_dies_at_the_start(model: Path) -> None:
    killed = threading.Event()

    def kill_the_first() -> None:
        while not killed.is_set():
            for process in followers():
                process.kill()
                killed.set()
            time.sleep(0.01)

    threading.Thread(target=kill_the_first, daemon=True).start()
    try:
        with pytest.raises(RunnerLost, match="ended with SIGKILL"):
            ModelRunner(args(model, **TP2))
    finally:
        killed.set()


def test_an_error_of_rank_0_in_a_step_is_the_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The follower waits for what will never come: no later step can run."""
    runner = ModelRunner(args(model, **TP2))
    try:
        monkeypatch.setattr("pdserve.engine.run.ranks.ranks._EXPLANATION_S", 0.1)
        monkeypatch.setattr(runner.rank.decoder, "forward", lambda *_: 1 / 0)
        engine = Engine(runner)
        engine.submit(request())
        assert engine.step().finished[0].error is not None
        assert isinstance(engine.failure, RunnerLost)
    finally:
        runner.close()


def test_a_row_that_rank_0_can_not_sample_ends_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner(args(model, **TP2))
    try:
        sample = runner._sampler.sample

        def failing(logits: torch.Tensor, requests: Sequence[Any]) -> torch.Tensor:
            if any(each.sampling.seed == 13 for each in requests):
                raise RuntimeError("a failing row")
            return sample(logits, requests)

        monkeypatch.setattr(runner._sampler, "sample", failing)
        asked = [request(str(seed), [5 + seed, 6, 7], seed=seed, temperature=0.0, prompt_logprobs=1) for seed in (1, 2)]
        seen = []
        for bad in ([], [request("bad", [8, 9], seed=13, prompt_logprobs=1)]):
            engine, client = Engine(runner), Client()
            for each in (*bad, *asked):
                engine.submit(each)
            run(engine, client)
            assert engine.failure is None
            assert [client.finished[each.key].reason for each in bad] == ["error"] * len(bad)
            seen.append([client.tokens(each.key.request_id) for each in asked])
        assert seen[0] == seen[1]
        assert [len(tokens) for tokens in seen[1]] == [6, 6]
    finally:
        runner.close()


@contextmanager
def engine_process(model: Path, server: Server) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A started engine on two ranks: its process and its follower's."""
    argv = [sys.executable, "-m", "tests.fakes.parallel_child", str(model), *server.addresses]
    process = subprocess.Popen(argv, env=child_environment())
    try:
        server.until(lambda message: isinstance(message, EngineReady))
        yield process, psutil.Process(process.pid).children()[0]
    finally:
        process.kill()
        process.wait()


def test_an_engine_process_ends_with_a_rank(model: Path, server: Server) -> None:
    with engine_process(model, server) as (process, follower):
        follower.suspend()
        server.send(request(max_tokens=50))
        time.sleep(0.3)
        assert process.poll() is None
        follower.kill()
        failed = server.until(lambda message: isinstance(message, EngineFailed))[-1]
        assert isinstance(failed, EngineFailed)
        assert failed.error.message == f"rank 1 (pid {follower.pid}) ended with SIGKILL"
        assert process.wait(TIMEOUT_S) == 1


def test_an_engine_is_silent_while_a_rank_is_frozen(model: Path, server: Server) -> None:
    with engine_process(model, server) as (_, follower):
        assert server.beats_in(2.2) >= 3
        follower.suspend()
        server.beats_in(3.5)
        assert server.beats_in(1.5) == 0
        follower.resume()
        server.beats_in(1.5)
        assert server.beats_in(2.2) >= 3
        server.send(request())
        assert isinstance(server.until(is_finished)[-1], OutputFrame)


def test_ranks_end_with_the_engine_process(model: Path, server: Server) -> None:
    with engine_process(model, server) as (process, follower):
        process.kill()
        wait_until(lambda: not psutil.pid_exists(follower.pid))
        assert not followers()
