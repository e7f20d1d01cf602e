"""Real processes over UCX: a worker here, and two of the other role elsewhere, of which one is killed or frozen.

Whatever becomes of the victim, in whatever moment of a handoff: its handoffs end once and in time, those with the
bystander end well, and no byte is where it should not be. Then it is thawed, or started again at its old address.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from kv_transfer.networks.ucx import UcxNetwork
from pdserve.config import CacheTransceiverConfig
from pdserve.handoff import ExportDone, ImportDone, ImportOffered
from pdserve.protocol import Key, KvAddress, Role
from tests.transfer.chaos.report import Tally
from tests.transfer.chaos.site import outcome_of, wait_until
from tests.transfer.faults import FaultyNetwork
from tests.transfer.harness import ENDINGS, POISON, TOKENS_PER_BLOCK, Node, accept_into, layout, pool_tensor, rows
from tests.transfer.peer import Peer, blocks_from, peer

LAYOUT = layout(num_layers=4, num_kv_heads=4, head_dim=256)
BLOCKS = 50
PARTS = {"victim": (range(24), range(24, 26)), "bystander": (range(26, 36), range(36, 46))}
"""Blocks of each handoff, the same on both sides; those left over must never be touched."""

FAULTS = ("killed before", "killed under way", "killed after", "frozen under way", "paused under way", "all restarted")
STALL_S = 0.8
TIMEOUT_S = 2.5
SLACK_S = 2.0
MESSAGES = {"context": ("Offer", "payload", "Data", "Sent", "Complete"), "generation": ("Accept", "Grant", "Done")}
"""What the worker here sends: the victim is struck right before one of these."""


class ProcessWorld:
    """World `number` of `seed`, with a worker of `role` here."""

    def __init__(self, seed: int, number: int, role: Role) -> None:
        self._dice = random.Random(f"{seed}/{number}/processes")
        self._role = role
        self._others: Role = "generation" if self._role == "context" else "context"
        self._round = 0
        self._here: Node
        self._peers: dict[str, Peer] = {}
        self._stacks = {name: ExitStack() for name in PARTS}
        self._awaited: tuple[str, int] = ("", 0)
        self._strike: Callable[[], None] = lambda: None

    def draw(self, num_rounds: int) -> list[str]:
        """So many faults."""
        return [self._dice.choice(FAULTS) for _ in range(num_rounds)]

    def run(self, tally: Tally, faults: Sequence[str]) -> None:
        """A round with each of `faults`. Raises AssertionError, which says in which round what was wrong."""
        self._here = self._start_here(0)
        try:
            for name in PARTS:
                self._start(name, 0)
            for number, fault in enumerate(faults):
                self._round = number
                try:
                    outcomes = self._run_round(fault)
                except AssertionError as error:
                    raise AssertionError(f"round {number}: {self._others} worker {fault}: {error}") from error
                tally.fault(f"processes: {self._others} worker {fault}", outcomes)
        finally:
            for stack in self._stacks.values():
                stack.close()
            self._here.close()

    def _run_round(self, fault: str) -> list[str]:
        victim = self._peers["victim"]
        name = self._dice.choice(MESSAGES[self._role])
        nth = self._dice.randint(1, 6) if name in ("payload", "Data", "Sent", "Grant") else 1
        under_way = fault.endswith("under way")
        self._strike = victim.freeze if fault.split()[0] in ("frozen", "paused") else victim.kill
        self._awaited = (name, nth) if under_way else ("", 0)
        if fault == "killed before":
            victim.kill()
        elif fault == "all restarted":
            self._restart_all()
        began_s = time.monotonic()
        if fault != "killed before" or self._role == "context":
            self._offer("victim")
        self._offer("bystander")
        if under_way:
            assert wait_until(lambda: self._awaited[1] == 0, 5.0), f"message {nth} of type {name} was never sent"
        if fault == "paused under way":
            time.sleep(STALL_S / 3)
            victim.thaw()
        healthy = fault in ("killed after", "paused under way", "all restarted")
        for part in PARTS:
            well = healthy or part == "bystander"
            self._await_endings(part, began_s, well)
            self._check(part, well)
        outcomes = [outcome_of(ending) for key, _ in self._handoffs("victim") for ending in self._here.endings(key)]
        self._come_to_rest(fault, victim)
        return outcomes

    def _come_to_rest(self, fault: str, victim: Peer) -> None:
        """Buffers are back on every side that lives; the victim has its one ending for what it had begun."""
        self._here.assert_staging_free()
        if fault == "frozen under way":
            victim.thaw()
        if fault.startswith("killed"):
            victim.kill()
            self._start("victim", victim.address.port)
        for part, each in self._peers.items():
            assert wait_until(lambda each=each: each.staging_in_use_bytes() == 0, 5.0), f"{part}: buffers are not back"
            assert wait_until(lambda part=part: self._ended_there(part), 5.0), f"{part}: {self._peers[part].events()}"
        for pool in self._targets():
            self._assert_rest_untouched(pool)
            pool.view(torch.uint8).fill_(POISON)
        self._here.events.clear()

    def _restart_all(self) -> None:
        """Everybody is started again at the old address; what still names an old instance is refused."""
        old = self._peers["victim"].address if self._role == "context" else self._here.address
        port = self._here.address.port
        self._here.close()
        self._here = self._start_here(port)
        for name in PARTS:
            self._start(name, self._peers[name].address.port)
        key = Key("48", self._round)
        if self._role == "context":
            self._here.exporter.offer(key, old, 4, [48])
            assert outcome_of(self._here.wait_ending(key, 3.0)) == "refused"
        else:
            self._peers["victim"].offer(key, old, 4, range(48, 49), 4)
            assert wait_until(lambda: self._outcome_there("victim", key) == "refused", 3.0)
            assert not self._here.events

    def _start(self, name: str, port: int) -> None:
        self._stacks[name].close()
        pool = pool_tensor(BLOCKS, self._dice.randrange(1000) if self._others == "context" else None, LAYOUT)
        options: dict[str, Any] = {"role": self._others, "port": port} if self._others == "generation" else {}
        started = peer(pool, f"{name}-0", quiet=True, **({"role": "context"} | self._options | options))
        self._peers[name] = self._stacks[name].enter_context(started)

    def _start_here(self, port: int) -> Node:
        pool = pool_tensor(BLOCKS, self._dice.randrange(1000) if self._role == "context" else None, LAYOUT)
        options: dict[str, Any] = {"on_offer": accept_into(blocks_from), "port": port}
        options = options if self._role == "generation" else {}
        return Node(pool, "here-0", role=self._role, network=self._network, **self._options, **options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"of": LAYOUT, "staging_tokens": 32, "stall_timeout_s": STALL_S, "timeout_ms": round(TIMEOUT_S * 1000)}

    def _network(self, config: CacheTransceiverConfig, device: torch.device) -> FaultyNetwork:
        return FaultyNetwork(self._decide, UcxNetwork(device))

    def _decide(self, message: str) -> None:
        name, left = self._awaited
        if message == name and left > 0:
            if left == 1:
                self._strike()
            self._awaited = name, left - 1

    def _handoffs(self, part: str) -> list[tuple[Key, range]]:
        return [(Key(str(blocks[0]), self._round), blocks) for blocks in PARTS[part]]

    def _offer(self, part: str) -> None:
        handoffs = [(key, len(blocks) * TOKENS_PER_BLOCK, blocks) for key, blocks in self._handoffs(part)]
        if self._role == "context":
            to: KvAddress = self._peers[part].address
            for key, num_tokens, blocks in handoffs:
                self._here.exporter.offer(key, to, num_tokens, blocks)
                self._here.exporter.finish(key, 1)
        else:
            to = self._here.address
            self._peers[part].offer_all([(key, to, count, blocks, count) for key, count, blocks in handoffs])

    def _await_endings(self, part: str, began_s: float, well: bool) -> None:
        limit_s = began_s + TIMEOUT_S + SLACK_S - time.monotonic()
        for key, _ in self._handoffs(part):
            offered = [event.key for event in list(self._here.events) if isinstance(event, ImportOffered)]
            if self._role == "context" or well or key in offered:
                self._here.wait_ending(key, max(0.1, limit_s))
            assert len(self._here.endings(key)) <= 1

    def _check(self, part: str, well: bool) -> None:
        for key, blocks in self._handoffs(part):
            ends = self._here.endings(key)
            if well:
                assert [isinstance(end, ExportDone | ImportDone) for end in ends] == [True], f"{part} {key}: {ends}"
            for end in ends:
                assert outcome_of(end) in ("done", "peer_lost", "timeout"), f"{part} {key}: {end}"
                if outcome_of(end) == "done":
                    there, here = rows(self._peers[part].tensor, blocks), rows(self._here.tensor, blocks)
                    assert torch.equal(there, here), f"{part} {key}: the KV that came is not what was sent"

    def _outcome_there(self, part: str, key: Key) -> str:
        ends = [event for event in self._peers[part].events() if event.key == key and isinstance(event, ENDINGS)]
        assert len(ends) <= 1, f"{part} {key}: {ends}"
        return outcome_of(ends[0] if ends else None)

    def _ended_there(self, part: str) -> bool:
        """Whether all that a peer has begun has ended, once."""
        begun = {event.key for event in self._peers[part].events()}
        return all(self._outcome_there(part, key) != "unheard" for key in begun)

    def _targets(self) -> list[torch.Tensor]:
        return [self._here.tensor] if self._role == "generation" else [each.tensor for each in self._peers.values()]

    def _assert_rest_untouched(self, pool: torch.Tensor) -> None:
        used = {block for part in PARTS.values() for blocks in part for block in blocks}
        rest = [block for block in range(BLOCKS) if block not in used]
        assert bool((rows(pool, rest) == POISON).all()), "a block that nobody named was written to"
