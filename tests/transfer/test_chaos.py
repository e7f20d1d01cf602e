"""The short form of `make chaos`: every way in which an engine ends a handoff, and some worlds full of faults."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.protocol import Role
from tests.transfer.chaos.engines import EngineWorld
from tests.transfer.chaos.plan import MEDDLING, MODEL, HandoffPlan, RoundPlan, WorldPlan
from tests.transfer.chaos.processes import FAULTS, ProcessWorld
from tests.transfer.chaos.report import Tally
from tests.transfer.chaos.world import World, run_world

PLAIN: dict[str, Any] = MODEL | {"tokens_per_block": 4, "dtype": "bfloat16"}
OTHER: dict[str, Any] = MODEL | {"tokens_per_block": 8, "dtype": "float32"}
WORLDS = {
    "one rank each": WorldPlan([(1, [5], PLAIN)], [(1, [5], PLAIN)]),
    "resharded": WorldPlan([(2, [5], PLAIN)], [(1, [2, 3], OTHER)]),
}


@pytest.mark.parametrize("plan", WORLDS.values(), ids=list(WORLDS))
def test_an_engine_may_end_its_handoff_in_every_state_and_harms_no_other(plan: WorldPlan) -> None:
    tally = Tally()
    handoffs = [
        HandoffPlan(number, 0, 0, 37, 0, (9, 20, 30), 0.0, meddling)
        for number, meddling in enumerate(each for meddling in MEDDLING for each in (meddling, None))
    ]
    with World(plan) as world:
        world.run(RoundPlan(handoffs[: len(MEDDLING)], [], None), tally)
        world.run(RoundPlan(handoffs[len(MEDDLING) :], [], None), tally)
    assert tally.num_faults == len(MEDDLING)


@pytest.mark.parametrize("number", range(4))
def test_a_world_of_transceivers(number: int) -> None:
    tally = Tally()
    run_world(1, number, tally, 3)
    assert tally.num_faults > 10


def test_a_world_of_engines() -> None:
    tally = Tally()
    EngineWorld(1, 0).run(tally, 3)
    assert tally.num_faults > 10
    assert tally.totals["answers of engines"] > 20


@pytest.mark.parametrize("role", ["context", "generation"])
def test_a_world_of_processes(role: Role) -> None:
    tally = Tally()
    ProcessWorld(1, 0, role).run(tally, FAULTS)
    assert tally.num_faults == len(FAULTS)
