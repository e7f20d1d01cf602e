"""An engine with a fake model, and a client that fails on gaps in a stream and on words after its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.protocol import Finished, GenerateRequest, Key, OutputFrame, Phase, Sampling, TokenDelta
from tests.fakes.fake_link import PEER
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner

PROMPT = [5, 6, 7, 8, 9]


_overlap = False


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "overlapped"])
def overlap_of_steps(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every engine that `make` builds runs its steps in turn, then overlapped."""
    global _overlap
    _overlap = request.param
    yield
    _overlap = False


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def request(
    name: str = "r",
    token_ids: list[int] | None = None,
    *,
    attempt: int = 0,
    phase: Phase = "both",
    num_prompt_tokens: int | None = None,
    timeout_s: float = 60.0,
    salt: str = "",
    **sampling: Any,
) -> GenerateRequest:
    token_ids = PROMPT if token_ids is None else token_ids
    return GenerateRequest(
        key=Key(name, attempt),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        sampling=Sampling(**{"seed": 1, "max_tokens": 6, "ignore_eos": True, **sampling}),
        timeout_s=timeout_s,
        phase=phase,
        peer=PEER if phase != "both" else None,
        cache_salt=salt,
    )


class Client:
    """Collects what an engine says; fails on gaps in a stream or on words after the end."""

    def __init__(self) -> None:
        self.deltas: dict[Key, list[TokenDelta]] = {}
        self.finished: dict[Key, Finished] = {}

    def take(self, frame: OutputFrame) -> None:
        for delta in frame.deltas:
            assert delta.key not in self.finished
            before = self.deltas.setdefault(delta.key, [])
            assert not before or delta.start == before[-1].start + len(before[-1].token_ids)
            before.append(delta)
        for finished in frame.finished:
            assert finished.key not in self.finished, "a second end"
            self.finished[finished.key] = finished

    def tokens(self, name: str = "r", attempt: int = 0) -> list[int]:
        return [token for delta in self.deltas.get(Key(name, attempt), []) for token in delta.token_ids]

    def end(self, name: str = "r", attempt: int = 0) -> Finished:
        return self.finished[Key(name, attempt)]


def run(engine: Engine, client: Client | None = None) -> Client:
    client = client or Client()
    for _ in range(1000):
        if not engine.has_work:
            return client
        client.take(engine.step())
    raise AssertionError("the engine never came to rest")


def make(**settings: Any) -> tuple[Engine, FakeRunner]:
    """An engine; `settings` are fields of its limits, of its options, or arguments of its own."""
    limits = {key: settings.pop(key) for key in list(settings) if key in SMALL_LIMITS.__struct_fields__}
    runner = FakeRunner(msgspec.structs.replace(SMALL_LIMITS, **limits), num_host_blocks=settings.pop("host_blocks", 0))
    options = {key: settings.pop(key) for key in list(settings) if key in EngineOptions.__dataclass_fields__}
    return Engine(runner, EngineOptions(**{"overlap": _overlap, **options}), **settings), runner


def error_of(engine: Engine, bad: GenerateRequest) -> tuple[str, str | None]:
    engine.submit(bad)
    end = run(engine).finished[bad.key]
    assert end.reason == "error"
    assert end.error is not None
    engine.check()
    assert engine.is_idle
    return end.error.code, end.error.param
