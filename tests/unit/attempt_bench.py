"""Workers, a fleet and a clock for tests of one choice's attempts: nothing happens unless the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

from pdserve.config import ProxyConfig
from pdserve.errors import NotReady, PdserveError
from pdserve.protocol import Finished, GenerateRequest, Key, Sampling, TokenDelta, Usage
from proxy.fleet.fleet import Placement
from proxy.generation import Generation, GenerationSpec
from proxy.metrics import Metrics

PROMPT = [7, 8, 9]
MAX_TOKENS = 8
DEADLINE_S = 1000.0
METRICS = Metrics()


def limits(max_retries: int = 2, max_worker_losses: int = 5) -> ProxyConfig:
    return ProxyConfig(max_retries=max_retries, max_worker_losses=max_worker_losses)


def token(index: int) -> int:
    """Output token `index`, whoever computes it."""
    return 1000 + index


class StillLoop(asyncio.SelectorEventLoop):
    """A loop whose clock goes on by `pass_time` alone."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__()

    def time(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        """Timers that are due run in their order; time stands still from one to the next."""
        end = self.now + seconds
        while due := [at for at in self.timers() if at <= end]:
            self.now = max(self.now, min(due))
            self.run_until_complete(asyncio.sleep(0))
        self.now = end

    def do(self, call: Callable[[], object]) -> None:
        """Call it where the loop runs, as sockets do."""

        async def run() -> None:
            call()

        self.run_until_complete(run())

    def timers(self) -> list[float]:
        """When each timer is due that is neither cancelled nor over."""
        return [handle.when() for handle in self._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]


class Worker:
    """What an attempt sees as a `WorkerLink`. `open` are the requests that it has neither ended nor been told to."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.info = SimpleNamespace(kv=None)
        self.open: dict[Key, tuple[GenerateRequest, Any]] = {}
        self.received: list[GenerateRequest] = []
        self.aborted: list[Key] = []

    def submit(self, request: GenerateRequest, listener: Any) -> None:
        assert request.key not in self.open
        self.open[request.key] = request, listener
        self.received.append(request)

    def abort(self, key: Key) -> None:
        if self.open.pop(key, None) is not None:
            self.aborted.append(key)

    @property
    def request(self) -> GenerateRequest:
        """The one that is open."""
        ((request, _),) = self.open.values()
        return request

    def say(self, *indices: int) -> None:
        """Tell these tokens, one after the other."""
        ((request, listener),) = self.open.values()
        listener.on_delta(self, TokenDelta(request.key, indices[0], [token(index) for index in indices]), 1.0)

    def end(self, reason: Any = "error", error: PdserveError | None = None) -> None:
        """Finish the request that is open."""
        ((request, listener),) = self.open.values()
        del self.open[request.key]
        info = None if error is None else error.to_info()
        listener.on_finished(self, Finished(request.key, reason, Usage(cached_tokens=2), error=info))

    def die(self) -> None:
        """Its socket breaks; it is there again at once."""
        lost, self.open = self.open, {}
        for _, listener in lost.values():
            listener.on_lost(self)


class Workers:
    """What a choice sees as its fleet: context and generation workers, the first of each that need not be avoided."""

    def __init__(self, contexts: int = 2, generations: int = 2) -> None:
        self.contexts = [Worker(f"context-{number}") for number in range(contexts)]
        self.generations = [Worker(f"generation-{number}") for number in range(generations)]
        self.away = False
        self.waiters: list[Callable[[], None]] = []

    @property
    def all(self) -> list[Worker]:
        return [*self.contexts, *self.generations]

    @property
    def busy(self) -> list[Worker]:
        return [worker for worker in self.all if worker.open]

    def place(self, num_tokens: int, needs_generation: bool, avoid: Collection[str] = ()) -> Placement:
        if self.away:
            raise NotReady("everybody is away")

        def first(workers: list[Worker]) -> Any:
            return min(workers, key=lambda worker: worker.worker_id in avoid) if workers else None

        context = first(self.contexts)
        return Placement(context, first(self.generations) if needs_generation or context is None else None)

    def call_on_change(self, callback: Callable[[], None]) -> None:
        self.waiters.append(callback)

    def cancel_call(self, callback: Callable[[], None]) -> None:
        self.waiters = [waiter for waiter in self.waiters if waiter != callback]

    def return_(self) -> None:
        """Everybody is there again."""
        self.away = False
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter()


class Bench:
    """One choice over `workers`, started, in a loop that stands still. `ends` are what its owner found when it was
    woken for the end."""

    def __init__(self, loop: StillLoop, workers: Workers, config: ProxyConfig | None = None, **spec: Any) -> None:
        self.loop = loop
        self.workers = workers
        self.ends: list[tuple[str | None, PdserveError | None]] = []
        sampling = Sampling(seed=1, max_tokens=MAX_TOKENS)
        self.spec = GenerationSpec("r", PROMPT, sampling, loop.time() + DEADLINE_S, **spec)
        self.do = loop.do
        self.do(lambda: self._start(config or limits()))

    def _start(self, config: ProxyConfig) -> None:
        self.generation = Generation(self.spec, self.workers, METRICS, config, self._wake)  # type: ignore[arg-type]
        self.generation.start()

    def _wake(self) -> None:
        if self.generation.done:
            self.ends.append((self.generation.reason, self.generation.error))

    def assert_at_rest(self) -> None:
        """The choice has ended, and left nothing behind."""
        assert self.generation.done
        assert len(set(self.ends)) == 1
        assert not self.workers.busy
        assert not self.workers.waiters
        assert not self.loop.timers()
