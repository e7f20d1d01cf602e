"""Requests at the pace of the guests: greedy, so that every answer to a prompt must be the first one again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from tests.soak.model import VOCAB_SIZE

CLIENTS = 8
PROMPTS = 64


@dataclass
class Load:
    """`total` requests to `url`. `may_send` holds them back to the pace of what else happens: it is told the share
    that was sent, and says whether the next may follow."""

    url: str
    model: str
    total: int
    seed: int
    may_send: Callable[[float], bool]
    sent: int = 0
    answered: int = 0
    cancelled: int = 0
    wrong: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    _answers: dict[int, list[int]] = field(default_factory=dict)

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=120.0)
        async with aiohttp.ClientSession(self.url, timeout=timeout) as session:
            await asyncio.gather(*(self._client(session, random.Random(f"{self.seed}/{n}")) for n in range(CLIENTS)))

    async def _client(self, session: aiohttp.ClientSession, dice: random.Random) -> None:
        while self.sent < self.total:
            if not self.may_send(self.sent / self.total):
                await asyncio.sleep(0.02)
                continue
            self.sent += 1
            which = dice.randrange(PROMPTS)
            asked = asyncio.create_task(self._ask(session, which))
            if dice.random() < 0.05:
                await asyncio.wait({asked}, timeout=dice.uniform(0.0, 0.05))
                if asked.cancel():
                    self.cancelled += 1
            await asyncio.gather(asked, return_exceptions=True)

    async def _ask(self, session: aiohttp.ClientSession, which: int) -> None:
        words = random.Random(which)
        prompt = [words.randrange(VOCAB_SIZE) for _ in range(words.randrange(4, 60))]
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": words.randrange(1, 12),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        try:
            async with session.post("/v1/completions", json=body) as response:
                if response.status != 200:
                    self._refuse(f"{response.status}: {(await response.text())[:150]}")
                    return
                tokens = (await response.json())["choices"][0]["token_ids"]
        except (aiohttp.ClientError, TimeoutError) as error:
            self._refuse(repr(error)[:150])
            return
        self.answered += 1
        self.wrong += tokens != self._answers.setdefault(which, tokens)

    def _refuse(self, why: str) -> None:
        self.refused[why] = self.refused.get(why, 0) + 1
