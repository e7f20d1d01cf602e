"""One handoff, told from both engines' sides in a thread of its own: what they ask for, and what must come of it."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import Tensor

from pdserve.handoff import HandoffEvent, ImportDone
from pdserve.protocol import Key
from tests.transfer.chaos.plan import HandoffPlan
from tests.transfer.chaos.site import GRACE_S, TIMEOUT_S, Site, outcome_of, wait_until
from tests.transfer.harness import only
from tests.transfer.shards import fill, whole_cache

ATTEMPT = 1
SLACK_S = 2.5
"""What a busy machine, frozen threads and a late connection may add to a handoff's deadline."""

EXPECTED: dict[str | None, set[str]] = {
    None: {"done"},
    "context aborts when offering": {"aborted"},
    "context aborts before acceptance": {"aborted"},
    "context aborts after acceptance": {"aborted"},
    "context aborts under way": {"aborted"},
    "context aborts when complete": {"aborted", "done"},
    "generation aborts before the offer": {"refused", "aborted"},
    "generation aborts when offered": {"aborted", "refused"},
    "generation aborts after acceptance": {"aborted", "refused"},
    "generation aborts under way": {"aborted", "refused"},
    "generation aborts when complete": {"aborted", "refused", "done"},
    "both abort under way": {"aborted", "refused"},
    "never accepted": {"aborted", "refused"},
    "never computed": {"aborted", "refused"},
    "accepted into too few blocks": {"protocol", "refused"},
    "stale attempt": {"done"},
    "superseded under way": {"aborted", "refused"},
    "is stale": {"refused"},
}
"""How the context side hears of the end, when nothing else goes wrong. Of several ranks, one may be refused where the
others have begun."""


NEVER = ("never accepted", "never computed")
"""Such a handoff waits for nothing that is under way, and ends by its request's deadline alone."""


class Story:
    """`tell` runs it; `check` says whether it went as it must."""

    def __init__(self, plan: HandoffPlan, context: Site, generation: Site, attempt: int = ATTEMPT) -> None:
        self.plan = plan
        self.context = context
        self.generation = generation
        self.key = Key(f"h{plan.number}", attempt)
        self.meddled = False
        self.offered = False
        self.children: list[Story] = []
        self._accepted = False
        self._refused_silently = False
        self._began_s = 0.0
        self._took_s = 0.0

    def __str__(self) -> str:
        sides = (self.context, self.generation)
        ends = [f"{site.worker_id} says {_words(site.ending(self.key))}" for site in sides]
        return f"{self.key} ({self.plan.num_tokens} tokens, {self.plan.meddling or 'left alone'}): {', '.join(ends)}"

    @property
    def family(self) -> list[Story]:
        """This one, and other attempts that were made meanwhile."""
        return [self, *self.children]

    @property
    def outcome(self) -> str:
        return outcome_of(self.context.ending(self.key))

    @property
    def received(self) -> str:
        return outcome_of(self.generation.ending(self.key))

    def tell(self) -> None:
        plan, context = self.plan, self.context
        cache = whole_cache(context.layouts[0], plan.num_tokens, plan.number + self.key.attempt)
        source = context.take(plan.num_tokens)
        for pool, of in zip(context.worker.pools, context.layouts, strict=True):
            fill(pool, of, source, cache)
        if self._is("generation aborts before the offer"):
            self._abort("generation")
        self._began_s = time.monotonic()
        self.offered = True
        context.worker.exporter.offer(self.key, self.generation.worker.address, plan.num_tokens, source)
        if self._is("context aborts when offering"):
            self._abort("context")
        for num_tokens in plan.chunks[:1]:
            self._computed(num_tokens)
        target = self._accept()
        self._compute()
        if self.meddled and self.plan.meddling in NEVER:
            self._wait_in_vain()
        wait_until(lambda: context.ending(self.key) is not None, self._seconds_left())
        self._took_s = time.monotonic() - self._began_s
        context.give_back(source)
        if target is not None:
            self._receive(target, cache)

    def ended_in(self, *others: str) -> bool:
        """Whether both sides heard of an end as if no other fault had touched it, or of one of `others`."""
        allowed = {*EXPECTED[self.plan.meddling], *others}
        return self.outcome in allowed and self.received in {*allowed, "unheard"}

    def check(self) -> None:
        """What holds whatever was done to it, after everything is quiet."""
        ends, arrivals = self.context.worker.endings(self.key), self.generation.worker.endings(self.key)
        assert len(ends) == 1, f"{self}: {ends}"
        assert self._took_s < self._limit_s, f"{self}: took {self._took_s:.2f} s"
        assert len(arrivals) <= 1, f"{self}: {arrivals}"
        if self.generation.was_offered(self.key) and not self._refused_silently:
            wait_until(lambda: self.generation.ending(self.key) is not None, 1.0)  # it follows the counters
            assert self.generation.ending(self.key), f"{self}: the generation worker never heard of the end"
        if self.outcome == "done":
            # Rank 0 may end before it has heard that its followers are done, and its requests with it.
            lost = self.generation.ended and len(self.generation.layouts) > 1
            assert self.received == "done" or (lost and self.received == "aborted"), str(self)

    def _is(self, *meddling: str) -> bool:
        if self.plan.meddling not in meddling:
            return False
        self.meddled = True
        return True

    def _abort(self, *sides: str) -> None:
        if "context" in sides:
            self.context.worker.exporter.abort(self.key)
        if "generation" in sides:
            self._refused_silently |= not self._accepted
            self.generation.worker.importer.abort(self.key)

    def _accept(self) -> list[int] | None:
        """Accept, if it comes to that; returns the blocks."""
        generation, plan = self.generation, self.plan
        wait_until(lambda: generation.was_offered(self.key) or self._is_over(), self._seconds_left())
        if not generation.was_offered(self.key) or self._is("never accepted"):
            return None
        if self._is("generation aborts when offered"):
            self._abort("generation")
            return None
        if self._is("context aborts before acceptance"):
            self._abort("context")
        target = generation.take(plan.num_tokens)
        accepted = target[:-1] if self._is("accepted into too few blocks") else target
        self._accepted = True
        generation.worker.importer.accept(self.key, accepted, self._cached_tokens)
        if self._is("context aborts after acceptance"):
            self._abort("context")
        if self._is("generation aborts after acceptance"):
            self._abort("generation")
        return target

    def _compute(self) -> None:
        for num_tokens in self.plan.chunks[1:]:
            self._computed(num_tokens)
        if self._is("context aborts under way"):
            self._abort("context")
        if self._is("generation aborts under way"):
            self._abort("generation")
        if self._is("both abort under way"):
            self._abort("context", "generation")
        if self.generation.was_offered(self.key) and self._is("stale attempt"):
            self._tell_another(ATTEMPT - 1, "is stale")
        if self.generation.was_offered(self.key) and self._is("superseded under way"):
            self._tell_another(ATTEMPT + 1, None)
        if self._is("never computed"):
            return
        self.context.worker.exporter.finish(self.key, self._first_token)
        if self._is("context aborts when complete"):
            self._abort("context")
        if self._is("generation aborts when complete"):
            self._abort("generation")

    def _wait_in_vain(self) -> None:
        """For longer than a transfer may take; then the request's deadline passes."""
        wait_until(self._is_over, 1.2 * TIMEOUT_S)
        self._abort("context", "generation")

    def _tell_another(self, attempt: int, meddling: str | None) -> None:
        """Another attempt at the same request, while this one is under way."""
        plan = replace(self.plan, meddling=meddling)
        self.children.append(Story(plan, self.context, self.generation, attempt))
        self.children[-1].tell()

    def _computed(self, num_tokens: int) -> None:
        """Rank 0 says so when it has launched the step, the others launch theirs a little later."""
        worker = self.context.worker
        worker.launch(0)
        worker.exporter.computed(self.key, num_tokens)
        if len(worker.nodes) > 1:
            worker.launch(*range(1, len(worker.nodes)))

    def _receive(self, target: list[int], cache: Tensor) -> None:
        """What an import's end means for its blocks."""
        generation = self.generation
        wait_until(lambda: generation.ending(self.key) is not None, self._seconds_left())
        ending = generation.ending(self.key)
        assert ending is not None, f"{self}: the import has not ended"
        if isinstance(ending, ImportDone):
            assert ending.first_token == self._first_token
            generation.assert_holds(target, cache, self._cached_tokens)
            time.sleep(0.02)  # while the sequence decodes, nobody else writes to its blocks
            generation.assert_holds(target, cache, self._cached_tokens)
        generation.give_back(target)

    def _is_over(self) -> bool:
        return self.context.ending(self.key) is not None or self.generation.ending(self.key) is not None

    @property
    def _cached_tokens(self) -> int:
        return self.plan.cached_blocks * only(self.generation.layouts[0]).tokens_per_block

    @property
    def _first_token(self) -> int:
        return self.plan.number * 10 + self.key.attempt

    @property
    def _limit_s(self) -> float:
        ranks = len(self.context.layouts) + len(self.generation.layouts)
        in_vain_s = 1.2 * TIMEOUT_S if self.plan.meddling in NEVER else 0.0
        return TIMEOUT_S + SLACK_S + in_vain_s + (GRACE_S if ranks > 2 else 0.0)

    def _seconds_left(self) -> float:
        return max(0.0, self._began_s + self._limit_s - time.monotonic())


def _words(ending: HandoffEvent | None) -> str:
    error = getattr(ending, "error", None)
    return outcome_of(ending) + (f" ({error})" if error else "")
