"""Guests: workers that register, serve for a while, and are drained or killed."""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.soak.nursery import Birth, ask_for

REGISTER_TIMEOUT_S = 60.0
END_TIMEOUT_S = 40.0


@dataclass
class Churn:
    """Lets guests come and go until there have been `wanted`.

    `places` are the (role, index) pairs that guests take in turn, so that names come again, with new incarnations.
    """

    nursery: str
    config: Path
    manager_url: str
    wanted: int
    places: list[tuple[str, int]]
    seed: int
    registered: int = 0
    drained: int = 0
    killed: int = 0
    failures: list[str] = field(default_factory=list)
    _begun: int = 0

    async def run(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
            await asyncio.gather(*(self._fill(session, *place) for place in self.places))

    async def _fill(self, session: aiohttp.ClientSession, role: str, index: int) -> None:
        dice = random.Random(f"{self.seed}/{role}/{index}")
        while self._begun < self.wanted and not self.failures:
            self._begun += 1
            await self._one_life(session, role, index, dice)

    async def _one_life(self, session: aiohttp.ClientSession, role: str, index: int, dice: random.Random) -> None:
        name = f"{role}-{index}"
        before = await self._incarnation(session, name)
        log = self.config.with_name(f"{name}.log")
        line = ask_for(self.nursery, Birth(role, index, str(self.config)), log)
        line.setblocking(False)
        try:
            if not await self._appears(session, name, before):
                self.failures.append(f"{name} has not registered within {REGISTER_TIMEOUT_S:g} s")
                return
            self.registered += 1
            await asyncio.sleep(dice.uniform(0.2, 1.5))
            if dice.random() < 0.5:
                self.killed += 1
                return
            self.drained += 1
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(line, bytes([signal.SIGTERM]))
            status = await asyncio.wait_for(loop.sock_recv(line, 1), END_TIMEOUT_S)
            if status != b"\0":
                self.failures.append(f"{name} ended with status {status!r} after SIGTERM")
        except TimeoutError:
            self.failures.append(f"{name} has not ended within {END_TIMEOUT_S:g} s of SIGTERM")
        finally:
            line.close()

    async def _appears(self, session: aiohttp.ClientSession, name: str, before: str) -> bool:
        try:
            async with asyncio.timeout(REGISTER_TIMEOUT_S):
                seen = before
                while seen in ("", before):
                    await asyncio.sleep(0.1)
                    seen = await self._incarnation(session, name)
        except TimeoutError:
            return False
        return True

    async def _incarnation(self, session: aiohttp.ClientSession, name: str) -> str:
        async with session.get(f"{self.manager_url}/v1/workers") as response:
            workers = (await response.json())["workers"]
        found = [each["info"]["incarnation"] for each in workers if each["info"]["worker_id"].partition(".")[0] == name]
        return found[0] if found else ""
