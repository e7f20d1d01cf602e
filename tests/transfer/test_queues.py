"""Requests that wait for a seat in a full generation worker: whole engines, whose KV is handed over as it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pdserve.config import ProxyConfig
from pdserve.protocol import GenerateRequest, Key, Phase, Sampling
from proxy.fleet.fleet import Placement
from proxy.generation import Generation, GenerationSpec
from proxy.metrics import Metrics
from tests.fakes.fake_runner import SMALL_LIMITS, expected_output
from tests.transfer.chaos.engine_host import BLOCKS, EngineHost
from tests.transfer.chaos.script import Script

TRANSFER_S = 0.4
SEATS = 2
WIDTH = 4
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 20
WAIT_S = 60.0
DEADLINE_S = 1.0


class Cluster:
    """A context worker, and a generation worker of few seats and slow steps; what the proxy asks of its fleet."""

    def __init__(self, step_s: float) -> None:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"timeout_s": TRANSFER_S, "stall_timeout_s": 5.0}
        self.context = EngineHost("context-0", "context", WIDTH, Script(), loop, **options)
        options |= {"max_batch_size": SEATS, "step_s": step_s}
        self.generation = EngineHost("generation-0", "generation", WIDTH, Script(), loop, **options)

    def place(self, num_tokens: int, needs_generation: bool, avoid: Collection[str] = ()) -> Placement:
        workers: Any = (self.context, self.generation)
        return Placement(*workers)

    def cancel_call(self, callback: object) -> None:
        pass

    def failures(self) -> dict[str, int]:
        """Of handoffs, by reason."""
        hosts = (self.context, self.generation)
        failures = [counts.failures for host in hosts for counts in host.transceiver.counts()]
        return {reason: count for each in failures for reason, count in each.items()}

    async def assert_at_rest(self) -> None:
        for host in (self.context, self.generation):
            await until(host.is_quiet)
            host.assert_at_rest()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 (an engine in another thread)
            await asyncio.sleep(0.01)


@asynccontextmanager
async def cluster(step_s: float) -> AsyncIterator[Cluster]:
    made = Cluster(step_s)
    try:
        yield made
    finally:
        made.context.close()
        made.generation.close()


def prompt(number: int) -> list[int]:
    return [2 + (number * 7 + index) % 40 for index in range(PROMPT_TOKENS)]


async def test_a_full_batch_makes_requests_wait_and_none_fail() -> None:
    """For longer than a transfer may take; each prompt is computed once. They are more than the context pool
    holds, so that it fills with handoffs that wait."""
    count = 14
    assert count * PROMPT_TOKENS > BLOCKS * WIDTH
    async with cluster(step_s=0.01) as fleet:
        specs = [
            GenerationSpec(
                f"r{number}",
                prompt(number),
                Sampling(seed=number, max_tokens=OUTPUT_TOKENS, ignore_eos=True),
                asyncio.get_running_loop().time() + WAIT_S,
            )
            for number in range(count)
        ]
        ends = [asyncio.Event() for _ in specs]
        limits = ProxyConfig(max_retries=0, max_worker_losses=0)
        generations = [
            Generation(spec, fleet, Metrics(), limits, end.set, wake_on_tokens=False)  # type: ignore[arg-type]
            for spec, end in zip(specs, ends, strict=True)
        ]
        for generation in generations:
            generation.start()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*(end.wait() for end in ends))
        for spec, generation in zip(specs, generations, strict=True):
            assert generation.error is None
            assert generation.output.tokens == expected_output(spec.prompt_ids, spec.sampling, SMALL_LIMITS)[0]
        assert fleet.context.ask(fleet.context.engine.stats).prefill_tokens == count * PROMPT_TOKENS
        assert fleet.generation.ask(fleet.generation.engine.stats).prefill_tokens == 0
        assert fleet.failures() == {}
        await fleet.assert_at_rest()


class Ignored:
    """A client that the end alone is asked of, at the engines."""

    def on_delta(self, *_: object) -> None: ...
    def on_finished(self, *_: object) -> None: ...


@pytest.mark.parametrize("impatient", ["context", "generation"])
async def test_a_request_that_waits_for_a_seat_ends_by_its_own_deadline(impatient: str) -> None:
    """On either side, whichever comes first; the sender's blocks are held until then."""
    async with cluster(step_s=0.05) as fleet:

        def submit(name: str, number: int, phase: Phase, timeout_s: float) -> None:
            host, peer = (fleet.context, fleet.generation) if phase == "context" else (fleet.generation, fleet.context)
            tokens = prompt(number)
            request = GenerateRequest(
                key=Key(name, 0),
                token_ids=tokens,
                num_prompt_tokens=len(tokens),
                sampling=Sampling(seed=number, max_tokens=40, ignore_eos=True),
                timeout_s=timeout_s,
                phase=phase,
                peer=peer.info.kv.address(),
            )
            host.submit(request, Ignored())

        for number in range(SEATS):
            for phase in ("context", "generation"):
                submit(f"seated{number}", number, phase, WAIT_S)
        await until(lambda: fleet.generation.ask(fleet.generation.engine.stats).running == SEATS)
        for phase in ("context", "generation"):
            submit("waiting", SEATS, phase, DEADLINE_S if phase == impatient else WAIT_S)
        host = fleet.context if impatient == "context" else fleet.generation
        other = fleet.generation if impatient == "context" else fleet.context
        await until(lambda: Key("waiting", 0) in host.client.finished)
        await until(lambda: Key("waiting", 0) in other.client.finished)
        codes = [each.client.finished[Key("waiting", 0)].error for each in (host, other)]
        assert [None if code is None else code.code for code in codes] == [
            "deadline_exceeded",
            "transfer_error.aborted",
        ]
        await until(lambda: len(fleet.generation.client.finished) == SEATS + 1)
        assert all(fleet.generation.client.end(f"seated{number}").reason == "length" for number in range(SEATS))
        await fleet.assert_at_rest()
