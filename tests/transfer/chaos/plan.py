"""What happens in a world, drawn from its number: workers, handoffs, meddling, spoiled messages. Values only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.transfer.chaos.script import FROM_CONTEXT, FROM_GENERATION, HARMLESS, Strike
from tests.transfer.faults import FAULTS, Fault

MODEL: dict[str, Any] = {"model": "m", "num_layers": 5, "kv_factor": 2, "num_kv_heads": 3, "head_dim": 4}
SHAPES: tuple[tuple[int, list[int]], ...] = ((1, [5]), (1, [5]), (2, [5]), (1, [2, 3]), (3, [4, 1]))
"""Tensor parallelism, and the layers of each pipeline stage. Half of all workers have one rank."""

MEDDLING = (
    "context aborts when offering",
    "context aborts before acceptance",
    "context aborts after acceptance",
    "context aborts under way",
    "context aborts when complete",
    "generation aborts before the offer",
    "generation aborts when offered",
    "generation aborts after acceptance",
    "generation aborts under way",
    "generation aborts when complete",
    "both abort under way",
    "never accepted",
    "never computed",
    "accepted into too few blocks",
    "stale attempt",
    "superseded under way",
)
"""What an engine may do to its own handoff, in each of its states."""

UPSETS = ("kill", "restart", "freeze", "held relay", "stranger")
"""What happens to a whole worker. Relays, within a worker, may only be slow. A stranger has another model."""

SHORT_FAULTS = tuple(fault for fault in FAULTS if fault not in HARMLESS)


@dataclass(frozen=True)
class HandoffPlan:
    """`chunks` end where the context engine says how far it is; `late_s` after the round's start it is offered."""

    number: int
    sender: int
    receiver: int
    num_tokens: int
    cached_blocks: int
    chunks: tuple[int, ...]
    late_s: float
    meddling: str | None


@dataclass(frozen=True)
class Upset:
    worker: str
    what: str
    rank: int
    after_s: float


@dataclass(frozen=True)
class RoundPlan:
    handoffs: Sequence[HandoffPlan]
    strikes: Sequence[Strike]
    upset: Upset | None


@dataclass(frozen=True)
class WorldPlan:
    """The layout of each context and each generation worker, as arguments of `shards.worker`, and whether KV is read
    where it is, between pools that are alike."""

    senders: Sequence[tuple[int, list[int], dict[str, Any]]]
    receivers: Sequence[tuple[int, list[int], dict[str, Any]]]
    direct_reads: bool = False


def name_of(role: str, index: int) -> str:
    return f"{role}-{index}"


def draw_world(dice: random.Random) -> WorldPlan:
    """Two context workers and two generation workers; in half of all worlds all pools are alike."""
    alike = dice.random() < 0.5

    def one() -> tuple[int, list[int], dict[str, Any]]:
        tp_size, partition = dice.choice(SHAPES)
        own = {
            "tokens_per_block": 4 if alike else dice.choice([3, 4, 8]),
            "dtype": "bfloat16" if alike else dice.choice(["bfloat16", "float32", "float16"]),
        }
        return tp_size, partition, MODEL | own

    return WorldPlan([one(), one()], [one(), one()], dice.random() < 0.5)


def draw_round(dice: random.Random, world: WorldPlan, number: int) -> RoundPlan:
    """Some handoffs between every pair of workers. At least one pair is left alone by whatever breaks connections."""
    pairs = [(i, j) for i in range(len(world.senders)) for j in range(len(world.receivers))]
    upset = _draw_upset(dice, world)
    spared = dice.choice(pairs)
    handoffs: list[HandoffPlan] = []
    strikes: list[Strike] = []
    for sender, receiver in pairs:
        for _ in range(dice.randint(2, 4)):
            handoffs.append(_draw_handoff(dice, world, number * 100 + len(handoffs), sender, receiver))
        pair = name_of("context", sender), name_of("generation", receiver)
        strikes += [_draw_strike(dice, *pair, ("dup", "late")) for _ in range(dice.randint(0, 3))]
        if dice.random() < 0.3:
            strikes.append(Strike(*pair, "payload", dice.choice(["truncate", "corrupt"]), dice.randint(1, 6)))
        if (sender, receiver) != spared and dice.random() < 0.6:
            strikes.append(_draw_strike(dice, *pair, SHORT_FAULTS))
    if dice.random() < 0.8:  # one at most: several in a row would stand still for longer than peers wait
        sender, receiver = dice.choice(pairs)
        strikes.append(_draw_strike(dice, name_of("context", sender), name_of("generation", receiver), ("pause",)))
    return RoundPlan(handoffs, strikes, upset)


def _draw_strike(dice: random.Random, context: str, generation: str, faults: Sequence[Fault]) -> Strike:
    forth = dice.random() < 0.5
    ends = (context, generation) if forth else (generation, context)
    message = dice.choice(FROM_CONTEXT if forth else FROM_GENERATION)
    fault = dice.choice(faults)
    if message == "payload" and fault == "reorder":
        fault = "drop"  # payload has no order
    often = message in ("payload", "Data", "Sent", "Readable", "Grant", "Ready", "Offer", "Accept", "Complete", "Done")
    return Strike(*ends, message, fault, dice.randint(1, 4) if often else 1)


def _draw_handoff(dice: random.Random, world: WorldPlan, number: int, sender: int, receiver: int) -> HandoffPlan:
    num_tokens = dice.randint(1, 40)
    width = world.receivers[receiver][2]["tokens_per_block"]
    chunks = sorted({dice.randint(1, num_tokens) for _ in range(dice.randint(0, 3))})
    return HandoffPlan(
        number,
        sender,
        receiver,
        num_tokens,
        dice.randint(0, num_tokens // width) if dice.random() < 0.3 else 0,
        tuple(chunks),
        dice.choice([0.0, 0.0, 0.02, 0.1]),
        dice.choice(MEDDLING) if dice.random() < 0.4 else None,
    )


def _draw_upset(dice: random.Random, world: WorldPlan) -> Upset | None:
    if dice.random() < 0.6:
        return None
    role, shapes = dice.choice([("context", world.senders), ("generation", world.receivers)])
    index = dice.randrange(len(shapes))
    num_ranks = shapes[index][0] * len(shapes[index][1])
    impossible = {"held relay" if num_ranks == 1 else "", "stranger" if role == "context" else ""}
    what = dice.choice([each for each in UPSETS if each not in impossible])
    rank = dice.randrange(1, num_ranks) if what == "held relay" else dice.randrange(num_ranks)
    return Upset(name_of(role, index), what, rank, dice.choice([0.0, 0.01, 0.05, 0.15]))
