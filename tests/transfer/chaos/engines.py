"""A proxy's requests over engines whose KV crosses a bad network: one context worker, two generation workers.

Each request is a real `proxy.generation.Generation`, which tries again as the proxy does. Whatever happens, an answer
that is complete is the one that was expected, and in the end no engine holds a block.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Collection
from typing import Any

from pdserve.config import ProxyConfig
from pdserve.protocol import Sampling
from proxy.fleet.fleet import Placement
from proxy.generation import Generation, GenerationSpec
from proxy.metrics import Metrics
from tests.fakes.fake_runner import SMALL_LIMITS, expected_output
from tests.transfer.chaos.engine_host import EngineHost
from tests.transfer.chaos.report import Tally
from tests.transfer.chaos.script import FROM_CONTEXT, FROM_GENERATION, HARMLESS, Script, Strike
from tests.transfer.faults import FAULTS, SLEEPS_S

ROLES = {"context-0": "context", "generation-0": "generation", "generation-1": "generation"}
REQUESTS = 12
LIMITS = ProxyConfig(max_retries=6, max_worker_losses=6)
DEADLINE_S = 25.0
QUIET_S = 6.0


class EngineWorld:
    """World `number` of `seed`: its rounds, in a loop that is the proxy's."""

    def __init__(self, seed: int, number: int) -> None:
        self._dice = random.Random(f"{seed}/{number}/engines")
        self._script = Script()
        self._hosts: dict[str, EngineHost] = {}
        self._widths = {name: self._dice.choice([4, 4, 8]) for name in ROLES}
        self._turns = itertools.count()

    def run(self, tally: Tally, num_rounds: int) -> None:
        asyncio.run(self._run(tally, num_rounds))

    async def _run(self, tally: Tally, num_rounds: int) -> None:
        loop = asyncio.get_running_loop()
        for name, role in ROLES.items():
            self._hosts[name] = EngineHost(name, role, self._widths[name], self._script, loop)
        try:
            for number in range(num_rounds):
                await self._run_round(number, tally)
        finally:
            for host in self._hosts.values():
                host.close()

    async def _run_round(self, number: int, tally: Tally) -> None:
        strikes = [self._draw_strike() for _ in range(self._dice.randint(4, 14))]
        self._script.begin(strikes)
        upset = self._dice.choice([None, "kill", "freeze", "failing step"])
        victim = self._dice.choice(list(ROLES))
        upsetting = asyncio.create_task(self._upset(upset, victim, self._dice.random() * 0.1))
        requests = [self._request(f"{number}-{each}") for each in range(REQUESTS)]
        leaving = [self._dice.random() < 0.15 for _ in requests]
        lives = [
            self._live(each, self._dice.random() * 0.1, leaves) for each, leaves in zip(requests, leaving, strict=True)
        ]
        generations = await asyncio.gather(*lives)
        await upsetting
        outcomes = [_outcome(each) for each in generations]
        for generation in generations:
            _check_answer(generation)
        await self._check_rest()
        for strike in strikes:
            if strike.fired:
                tally.fault(f"engines: {strike.name}", outcomes)
        if upset is not None:
            tally.fault(f"engines: {upset} {ROLES[victim]} worker", outcomes)
        for leaves, outcome in zip(leaving, outcomes, strict=True):
            if leaves:
                tally.fault("engines: client leaves", [outcome])
        tally.totals["answers of engines"] += outcomes.count("done")

    def _request(self, name: str) -> GenerationSpec:
        dice = self._dice
        prompt = [3] * dice.randint(0, 12) + [dice.randint(2, 6) for _ in range(dice.randint(1, 24))]
        sampling = Sampling(seed=dice.randint(0, 99), max_tokens=dice.randint(1, 14))
        deadline = asyncio.get_running_loop().time() + DEADLINE_S
        return GenerationSpec(name, prompt, sampling, deadline, frozenset(SMALL_LIMITS.eos_token_ids))

    async def _live(self, spec: GenerationSpec, late_s: float, leaves: bool) -> Generation:
        ended = asyncio.Event()
        await asyncio.sleep(late_s)
        generation = Generation(spec, self, Metrics(), LIMITS, ended.set, wake_on_tokens=False)  # type: ignore[arg-type]
        generation.start()
        if leaves:
            await asyncio.sleep(late_s / 10)
            generation.abort()
        await ended.wait()
        return generation

    async def _upset(self, what: str | None, victim: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        host = self._hosts[victim]
        if what == "freeze":
            host.freeze(SLEEPS_S["freeze"])
        elif what == "failing step":
            host.runner.late_failures.append(RuntimeError("injected"))
        elif what == "kill":
            host.die()
            loop = asyncio.get_running_loop()
            again = EngineHost(victim, ROLES[victim], self._widths[victim], self._script, loop, host.port)
            self._hosts[victim] = again

    async def _check_rest(self) -> None:
        for name, host in self._hosts.items():
            host.runner.late_failures.clear()
            for _ in range(round(QUIET_S / 0.02)):
                if host.is_quiet():
                    break
                await asyncio.sleep(0.02)
            assert host.is_quiet(), f"{name} does not come to rest: {host.engine.stats()} {host.transceiver.counts()}"
            host.assert_at_rest()

    def _draw_strike(self) -> Strike:
        dice = self._dice
        pair = ["context-0", dice.choice(["generation-0", "generation-1"])]
        forth = dice.random() < 0.5
        message = dice.choice(FROM_CONTEXT if forth else FROM_GENERATION)
        fault = dice.choice([*FAULTS, *HARMLESS[:2]])
        if message == "payload" and fault == "reorder":
            fault = "corrupt"
        return Strike(*(pair if forth else pair[::-1]), message, fault, dice.randint(1, 5))

    def place(self, num_tokens: int, needs_generation: bool, avoid: Collection[str] = ()) -> Placement:
        """As `Fleet.place`: whom to avoid comes last."""
        generations = sorted(
            (host for name, host in self._hosts.items() if ROLES[name] == "generation"),
            key=lambda host: host.worker_id in avoid,
        )
        if not any(host.worker_id in avoid for host in generations) and next(self._turns) % 2:
            generations.reverse()
        chosen: Any = generations[0] if needs_generation else None
        context: Any = self._hosts["context-0"]
        return Placement(context, chosen)

    def call_on_change(self, callback: object) -> None:
        raise AssertionError("every worker is always there")

    def cancel_call(self, callback: object) -> None:
        pass


def _outcome(generation: Generation) -> str:
    if generation.error is not None:
        return "error"
    return "done" if generation.reason is not None else "aborted"


def _check_answer(generation: Generation) -> None:
    spec = generation.spec
    expected, reason = expected_output(spec.prompt_ids, spec.sampling, SMALL_LIMITS)
    got = generation.output.tokens
    assert got == expected[: len(got)], f"{spec}: {got} instead of {expected}"
    if generation.reason is not None:
        assert (got, generation.reason) == (expected, reason), f"{spec}: ended with {generation.reason} after {got}"
    elif generation.error is not None:
        assert generation.error.retryable, f"{spec}: {generation.error!r}"
