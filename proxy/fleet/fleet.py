"""The workers as requests see them: who serves the next attempt, what they can take, and when that may change.

Owns the routing policies and the requests that wait for a worker. Reads who is there from `Membership`, and what each
has to do from its `Load`.
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
    """Who serves one attempt; at least one of the two. Without a context worker, the other does both phases.

    `local` says why it does although the configuration has context workers.
    """

    context: WorkerLink | None
    generation: WorkerLink | None
    local: LocalReason | None = None


class Fleet:
    """The workers this proxy is connected to; `members` are those there are.

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
        """Workers for one attempt.

        Args:
            num_tokens: what is to be computed before the first new token: the prompt, and what there is of its output.
            needs_generation: whether the attempt may go on after its first token.
            avoid: ids of workers to take only if there are no others.

        Raises:
            NotReady: no worker of a role that is needed is connected and ready.
        """
        generations = self.members.placeable("generation")
        if not self.disaggregated:
            return Placement(None, self._pick("generation", generations, avoid))
        contexts = self.members.placeable("context")
        # A generation worker that is to be avoided does not get both phases while a context worker could do one.
        able = [link for link in generations if link.worker_id not in avoid] if contexts else generations
        # Before a context worker is picked: it would be a turn in which that worker gets nothing.
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
