"""Chooses the workers of an attempt.

`Generation` calls it. Owns the routing policies, and the list of choices that wait until a worker appears. `Membership`
knows which workers there are, the `Load` of each what it has to do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import aiohttp

from pdserve.config import ClusterConfig
from pdserve.errors import NotReady
from pdserve.protocol import Role
from proxy.fleet.link import WorkerLink
from proxy.fleet.membership import Membership
from proxy.routing import POLICIES, Policy, pick
from proxy.routing.local_prefill import LocalPrefill, LocalReason


class Placement(NamedTuple):
    """The workers that serve one attempt: at least one of the two.

    Attributes:
        context: computes the prompt. None: the generation worker does both phases.
        generation: decodes. None: the attempt ends with its first token.
        local: why there is no context worker, although the configuration has some; None otherwise.
    """

    context: WorkerLink | None
    generation: WorkerLink | None
    local: LocalReason | None = None


class Fleet:
    """See the module. `members` are the workers that this proxy knows.

    Args:
        config: names the routing policy, whether there are context workers at all, and which prompts need none.
        session: makes the connections.
        sender: this proxy's name towards workers.
        fingerprint: of this proxy's model; None if it has no weights to tell by.
    """

    def __init__(
        self, config: ClusterConfig, session: aiohttp.ClientSession, sender: str, fingerprint: str | None = None
    ) -> None:
        self.disaggregated = config.context_servers.num_instances > 0
        self.members = Membership(session, sender, fingerprint, self.disaggregated, self._changed)
        make_policy = POLICIES[config.proxy.placement]
        self._policies: dict[Role, Policy] = {
            "context": make_policy("context"),
            "generation": make_policy("generation"),
        }
        self._local = LocalPrefill(config.conditional_disagg_config)
        self._waiters: dict[Callable[[], None], None] = {}

    def place(self, num_tokens: int, needs_generation: bool, avoid: Collection[str] = ()) -> Placement:
        """Choose the workers of one attempt.

        Args:
            num_tokens: tokens to compute before the first new one: the prompt, and the output that there is already.
            needs_generation: whether the attempt may go on after its first token.
            avoid: ids of workers to take only if there are no others.

        Raises:
            NotReady: no worker of a role that is needed is connected and ready.
        """
        generations = self.members.placeable("generation")
        if not self.disaggregated:
            return Placement(None, self._pick("generation", generations, avoid))
        contexts = self.members.placeable("context")
        # While there is a context worker, a generation worker in `avoid` does not get both phases.
        able = [link for link in generations if link.worker_id not in avoid] if contexts else generations
        # This comes before a context worker is picked: the policy would count that as its turn, and it would get
        # nothing.
        if needs_generation and able and self._local.is_short(num_tokens):
            return Placement(None, self._pick("generation", able, avoid), "short")
        context = pick(self._policies["context"], contexts, avoid)
        reason, takers = self._local.takers(None if context is None or context.worker_id in avoid else context, able)
        if reason is not None:
            return Placement(None, self._pick("generation", takers, avoid), reason)
        if context is None:
            raise _not_ready("context")
        return Placement(context, self._pick("generation", generations, avoid) if needs_generation else None)

    def max_seq_len(self) -> int:
        """Prompt and output tokens of one request that every ready worker takes.

        Raises:
            NotReady: no worker of a role that every request needs is connected and ready.
        """
        generations = self.members.placeable("generation")
        contexts = self.members.placeable("context") if self.disaggregated else []
        if self.disaggregated and not contexts and not self._local.is_possible:
            raise _not_ready("context")
        if not generations:
            raise _not_ready("generation")
        return min(link.info.max_seq_len for link in (*contexts, *generations))

    def call_on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when a worker has come, gone or changed its state."""
        self._waiters[callback] = None

    def cancel_call(self, callback: Callable[[], None]) -> None:
        self._waiters.pop(callback, None)

    def _pick(self, role: Role, links: Sequence[WorkerLink], avoid: Collection[str]) -> WorkerLink:
        link = pick(self._policies[role], links, avoid)
        if link is None:
            raise _not_ready(role)
        return link

    def _changed(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for callback in waiters:
            callback()


def _not_ready(role: Role) -> NotReady:
    return NotReady(f"no {role} worker is connected and ready")
