"""Which messages of a round are spoiled, and the network that does it.

A `Strike` names a message by who sends it to whom, its type and its number among those of that type. Faults are thus
the same in every run of a seed, as far as the messages are; one whose message never comes is not injected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kv_transfer.networks.base import Link
from kv_transfer.networks.loopback import LoopbackNetwork
from kv_transfer.wire import OpenLink, decode
from tests.transfer.faults import Fault, FaultyLink

HARMLESS = ("dup", "late", "pause")
"""What a handoff must get over."""

FROM_CONTEXT = (
    "OpenLink",
    "Offer",
    "Ready",
    "Data",
    "Sent",
    "Readable",
    "Kept",
    "Complete",
    "payload",
    "Abort",
    "Ping",
    "Pong",
)
FROM_GENERATION = ("LinkAnswer", "Accept", "Grant", "Done", "Abort", "Ping", "Pong")


@dataclass(eq=False)
class Strike:
    """`fault` happens to the message number `left` of its name that `sender` sends to `target` from now on."""

    sender: str
    target: str
    message: str
    fault: Fault
    left: int
    fired: bool = False

    @property
    def name(self) -> str:
        return f"{self.fault} {'payload' if self.message == 'payload' else 'control'}"

    @property
    def hits_one_handoff(self) -> bool:
        """Whether no more than one handoff may suffer."""
        return self.message == "payload" and self.fault in ("truncate", "corrupt")

    @property
    def breaks(self) -> bool:
        """Whether every handoff between the two workers may suffer."""
        return not (self.fault in HARMLESS or self.hits_one_handoff)


class Script:
    """The strikes of a round. `workers` maps ports to the ids of the workers that listen there."""

    def __init__(self) -> None:
        self.workers: dict[int, str] = {}
        self._strikes: list[Strike] = []
        self._lock = threading.Lock()

    def begin(self, strikes: Sequence[Strike]) -> None:
        with self._lock:
            self._strikes = list(strikes)

    def decide(self, sender: str, target: str, message: str) -> Fault | None:
        """What happens to this message; each is asked about once."""
        with self._lock:
            for strike in self._strikes:
                if (strike.sender, strike.target, strike.message) == (sender, target, message) and not strike.fired:
                    strike.left -= 1
                    strike.fired = strike.left == 0
                    if strike.fired:
                        return strike.fault
            return None


class ScriptedNetwork(LoopbackNetwork):
    """Loopback for a rank of worker `me`, under `script`."""

    def __init__(self, me: str, script: Script) -> None:
        super().__init__()
        self._me = me
        self._script = script
        self._scripted: list[ScriptedLink] = []

    async def listen(self, host: str, port: int, instance: str, on_link: Callable[[Link], None]) -> int:
        return await super().listen(host, port, instance, lambda link: on_link(self._wrap(link, "")))

    async def connect(self, host: str, port: int, instance: str) -> Link:
        return self._wrap(await super().connect(host, port, instance), self._script.workers.get(port, ""))

    def sever(self) -> None:
        """Lose every link without a word, as the death of a process does. In the transport's loop."""
        for link in self._scripted:
            link.cut()

    def _wrap(self, link: Link, target: str) -> ScriptedLink:
        wrapped = ScriptedLink(link, self._me, target, self._script)
        self._scripted = [each for each in self._scripted if not each.closed] + [wrapped]
        return wrapped


class ScriptedLink(FaultyLink):
    """A receiver's end learns whom it talks to from OpenLink, before which it says nothing."""

    def __init__(self, inner: Link, me: str, target: str, script: Script) -> None:
        super().__init__(inner, lambda message: script.decide(me, self._target, message))
        self._target = target
        self.closed = False

    def attach(self, on_control: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        if self._target:
            super().attach(on_control, on_lost)
            return

        def introduced(frame: bytes) -> None:
            if not self._target:
                self._target = _worker_of(frame)
            on_control(frame)

        super().attach(introduced, on_lost)

    def close(self) -> None:
        self.closed = True
        super().close()


def _worker_of(frame: bytes) -> str:
    try:
        hello = decode(frame)
    except Exception:
        return ""
    return hello.worker_id if isinstance(hello, OpenLink) else ""
