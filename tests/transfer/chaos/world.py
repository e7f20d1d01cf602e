"""Two context workers and two generation workers of one process, and some rounds of handoffs between all of them.

After each round everything must be quiet, every block back and as it was, and each handoff must have ended as its story
says. Those that no fault has touched must have ended well.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count

from pdserve.protocol import Key
from tests.transfer.chaos.plan import MODEL, HandoffPlan, RoundPlan, Upset, WorldPlan, draw_round, draw_world, name_of
from tests.transfer.chaos.report import Tally
from tests.transfer.chaos.script import Script, Strike
from tests.transfer.chaos.site import STALL_S, TIMEOUT_S, Site, outcome_of, wait_until
from tests.transfer.chaos.story import SLACK_S, Story
from tests.transfer.shards import worker

OTHER_MODEL = {"model": "another", "tokens_per_block": 4, "dtype": "bfloat16"}
QUIET_S = TIMEOUT_S + 2 * STALL_S + SLACK_S


class World:
    """The workers of `plan`, started; use as a context manager."""

    def __init__(self, plan: WorldPlan) -> None:
        self._script = Script()
        self._asides: list[tuple[str, str]] = []
        self._numbers = count()
        self.sites: dict[str, Site] = {}
        for role, shapes in (("generation", plan.receivers), ("context", plan.senders)):
            for index, (tp_size, partition, fields) in enumerate(shapes):
                name = name_of(role, index)
                self.sites[name] = Site(
                    name, role, worker(tp_size, partition, **fields), self._script, plan.direct_reads
                )

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for site in self.sites.values():
            site.worker.close()

    def run(self, plan: RoundPlan, tally: Tally) -> None:
        """One round. Raises AssertionError."""
        self._script.begin(plan.strikes)
        stories: list[Story] = []
        with _threads() as start:
            if plan.upset is not None:
                start(self._upset, plan.upset)
            for handoff in plan.handoffs:
                start(self._tell, handoff, stories)
        for name, site in self.sites.items():
            assert wait_until(site.is_quiet, QUIET_S), f"{name} does not come to rest: {_unrest(site)}"
        self._check(plan, stories)
        _count(plan, stories, tally)
        for fault, outcome in self._asides:
            tally.fault(fault, [outcome])
        self._asides.clear()
        for site in self.sites.values():
            site.assert_at_rest()

    def _tell(self, handoff: HandoffPlan, stories: list[Story]) -> None:
        time.sleep(handoff.late_s)
        sites = [self.sites[name_of("context", handoff.sender)], self.sites[name_of("generation", handoff.receiver)]]
        story = Story(handoff, *sites)
        stories.append(story)
        story.tell()

    def _upset(self, upset: Upset) -> None:
        time.sleep(upset.after_s)
        site = self.sites[upset.worker]
        if upset.what == "freeze":
            site.freeze(upset.rank)
        elif upset.what == "held relay":
            site.hold_relay(upset.rank)
        elif upset.what == "stranger":
            self._meet_a_stranger(site)
        else:
            site.kill() if upset.what == "kill" else site.close()
            self.sites[upset.worker] = reborn = site.reborn()
            if upset.worker.startswith("generation"):
                self._offer(self.sites[name_of("context", 0)], site, reborn, "offer to an old instance")

    def _meet_a_stranger(self, site: Site) -> None:
        """A context worker of another model finds out at once, and leaves no trace."""
        layouts = worker(1, [MODEL["num_layers"]], **MODEL | OTHER_MODEL)
        stranger = Site(f"stranger-{next(self._numbers)}", "context", layouts, self._script, site.direct_reads)
        try:
            assert self._offer(stranger, site, site, "handshake with another model") == "layout"
        finally:
            stranger.worker.close()

    def _offer(self, sender: Site, target: Site, there_now: Site, fault: str) -> str:
        """Offer what must be refused, by the address of `target`; whoever is there now never hears of it."""
        key, source = Key(f"{fault} {next(self._numbers)}", 0), sender.take(1)
        sender.worker.exporter.offer(key, target.worker.address, 1, source)
        assert wait_until(lambda: sender.ending(key) is not None, QUIET_S), f"{key} did not end"
        outcome = outcome_of(sender.ending(key))
        assert outcome != "done", str(key)
        assert not there_now.was_offered(key), f"{key} reached {there_now.worker_id}"
        sender.give_back(source)
        self._asides.append((fault, outcome))
        return outcome

    def _check(self, plan: RoundPlan, stories: list[Story]) -> None:
        """Each story by itself, and that it has suffered from nothing but what was done to its pair of workers."""
        for pair in {_pair(story) for story in stories}:
            fired = [each for each in plan.strikes if each.fired and {each.sender, each.target} == pair]
            excuses = _excuses(fired, plan.upset if plan.upset is not None and plan.upset.worker in pair else None)
            if excuses and any(len(self.sites[name].layouts) > 1 for name in pair):
                excuses |= {"timeout", "refused"}
            lives_to_lose = sum(strike.hits_one_handoff for strike in fired)
            for story in chain(*(each.family for each in stories if _pair(each) == pair)):
                story.check()
                if excuses is None or story.ended_in(*excuses):
                    continue
                lives_to_lose -= 1
                assert lives_to_lose >= 0, f"{story}, though nothing was done to it that explains this"
                assert story.ended_in("protocol", "checksum", "peer_lost", "refused", *excuses), str(story)


def _excuses(fired: Sequence[Strike], upset: Upset | None) -> set[str] | None:
    """The words by which handoffs between two workers may end early, each as soon as its cause is there; None for any.

    Of a death or a broken link one hears at once, and need not wait for the deadline. (Of several ranks, one to which
    the dead had not spoken yet must; and once one has given up, others' offers are refused: see the caller.)
    """
    excuses: set[str] = set()
    for what in {strike.fault for strike in fired if strike.breaks} | ({upset.what} if upset else set()):
        if what == "cut":
            excuses |= {"peer_lost"}
        elif what in ("kill", "restart"):
            excuses |= {"peer_lost", "aborted", "refused"}
        elif what not in ("held relay", "stranger"):
            return None
    return excuses


def run_world(seed: int, number: int, tally: Tally, num_rounds: int) -> None:
    """World `number` of `seed`. Raises AssertionError, which says in which round what was wrong."""
    dice = random.Random(f"{seed}/{number}")
    plan = draw_world(dice)
    with World(plan) as world:
        for index in range(num_rounds):
            drawn = draw_round(dice, plan, index)
            try:
                world.run(drawn, tally)
            except Exception as error:
                fired = [strike for strike in drawn.strikes if strike.fired]
                raise AssertionError(f"round {index}: {error}\n{plan}\n{drawn.upset}, {fired}") from error


def _pair(story: Story) -> frozenset[str]:
    return frozenset((story.context.worker_id, story.generation.worker_id))


def _count(plan: RoundPlan, stories: list[Story], tally: Tally) -> None:
    for strike in plan.strikes:
        if strike.fired:
            met = [story.outcome for story in stories if _pair(story) == {strike.sender, strike.target}]
            tally.fault(strike.name, met)
    for story in stories:
        if story.meddled:
            tally.fault(story.plan.meddling or "", [story.outcome])
    if plan.upset is not None and plan.upset.what != "stranger":
        met = [story.outcome for story in stories if plan.upset.worker in _pair(story)]
        tally.fault(f"{plan.upset.what} {plan.upset.worker.split('-')[0]} worker", met)
    outcomes = [story.outcome for each in stories for story in each.family]
    tally.totals["handoffs"] += len(outcomes)
    tally.totals["handoffs that arrived, bit for bit"] += outcomes.count("done")


def _unrest(site: Site) -> str:
    counts = [(each.peer, each.in_flight) for node in site.worker.nodes for each in node.transceiver.counts()]
    return f"staging {[node.transceiver.staging_in_use_bytes for node in site.worker.nodes]}, in flight {counts}"


@contextmanager
def _threads() -> Iterator[Callable[..., None]]:
    """Starts threads; on leaving waits for all, and raises what the first of them to fail has raised."""
    threads: list[threading.Thread] = []
    failures: list[str] = []

    def run(call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception:
            failures.append(traceback.format_exc())

    def start(call: Callable[..., None], *arguments: object) -> None:
        threads.append(threading.Thread(target=run, args=(call, *arguments), daemon=True))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()
    if failures:
        raise AssertionError(failures[0])
