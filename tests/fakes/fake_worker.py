"""A worker server without an engine: speaks the socket protocol and makes tokens up, deterministically.

Token `p` of a sequence (prompt included) depends on the request's seed and `p` alone, like a real engine's sampling,
so a retried request must continue exactly. A generation worker waits for its context worker's handoff, through
`Handoffs`, unless it is told to run ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aiohttp import WSMsgType, web

from pdserve.addresses import http_url
from pdserve.cluster_api import KvEndpoint, WorkerInfo, WorkerRecord
from pdserve.errors import ErrorInfo
from pdserve.http import bind, start
from pdserve.protocol import (
    PROTOCOL_VERSION,
    AbortRequest,
    BlockCounts,
    Finished,
    GenerateRequest,
    Hello,
    Key,
    LoadReport,
    OutputFrame,
    Role,
    TokenDelta,
    TokenLogprob,
    Usage,
    WorkerState,
    encode,
    to_worker_decoder,
)


def token_at(seed: int, position: int, vocab_size: int) -> int:
    """The made-up token: from 3 on, so that the first few ids may be special."""
    mixed = (seed ^ (position * 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    return 3 + (mixed >> 33) % (vocab_size - 3)


@dataclass
class Behaviour:
    """What a fake does otherwise than at once and well.

    `script` are the output tokens, whatever the seed; after the last one comes "stop". `chunks` are the sizes of the
    deltas, in turn. `die_at` closes the socket before output token `die_at`, `refuse` ends requests with an error,
    both `times` times. After `give_up_after` tokens of an attempt a worker ends it with `gives_up`, or closes its
    socket if that is None. `ahead` lets a generation worker not wait for the handoff.
    """

    script: Sequence[int] | None = None
    vocab_size: int = 300
    chunks: Sequence[int] = (1,)
    first_token_delay_s: float = 0.0
    token_delay_s: float = 0.0
    die_at: int | None = None
    refuse: ErrorInfo | None = None
    times: int = 1
    give_up_after: int | None = None
    gives_up: ErrorInfo | None = None
    ahead: bool = False
    shuffle: Callable[[list[TokenDelta]], list[TokenDelta]] | None = None
    cached_tokens: int = 0
    hang: bool = False
    omit_handoff: bool = False


class Handoffs:
    """Which attempts' KV has arrived; shared by all workers of a test."""

    def __init__(self) -> None:
        self._events: dict[Key, asyncio.Event] = {}

    def event(self, key: Key) -> asyncio.Event:
        return self._events.setdefault(key, asyncio.Event())


@dataclass
class FakeWorker:
    """One worker. `received` and `aborted` are what proxies sent, `connections` how often they came."""

    worker_id: str
    role: Role
    handoffs: Handoffs = field(default_factory=Handoffs)
    behaviour: Behaviour = field(default_factory=Behaviour)
    max_seq_len: int = 2048
    incarnation: str = "1"
    fingerprint: str = ""
    received: list[GenerateRequest] = field(default_factory=list)
    aborted: list[Key] = field(default_factory=list)
    finished: list[Key] = field(default_factory=list)
    connections: int = 0
    host: str = "127.0.0.1"
    health: dict[str, object] = field(default_factory=dict)

    async def start(self, port: int = 0) -> None:
        """Listen; a port given again restarts the worker at its old address."""
        listener = bind(self.host, port)
        self.port: int = listener.getsockname()[1]
        self._sockets: set[web.WebSocketResponse] = set()
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._started_at = time.time()
        app = web.Application()
        app.router.add_get("/v1/stream", self._stream)
        app.router.add_get("/health", self._health)
        self._runner = await start(app, listener)

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response(self.health)

    async def stop(self) -> None:
        await self.drop_sockets()
        await self._runner.cleanup()

    async def drop_sockets(self) -> None:
        """End every connection, as a dying process does."""
        for task in list(self._tasks.values()):
            task.cancel()
        for socket in list(self._sockets):
            with contextlib.suppress(ConnectionError):
                await socket.close()

    def record(self, state: WorkerState = "ready") -> WorkerRecord:
        kv = KvEndpoint(worker_id=self.worker_id, instance=self.incarnation, host=self.host, port=1, layout_hash="h")
        info = WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=self.role,
            url=http_url(self.host, self.port),
            model="fake",
            max_seq_len=self.max_seq_len,
            tokens_per_block=32,
            kv=kv,
            model_fingerprint=self.fingerprint,
            started_at=self._started_at,
        )
        return WorkerRecord(info=info, state=state)

    async def report(self, state: WorkerState = "ready", running: int = 0, waiting: int = 0) -> None:
        """Send a load report to every proxy."""
        report = LoadReport(state=state, running=running, waiting=waiting, awaiting_kv=0, blocks=BlockCounts())
        await self.say(encode(report))

    async def say(self, frame: bytes) -> None:
        """Send `frame` to every proxy, whatever it is."""
        for socket in list(self._sockets):
            await socket.send_bytes(frame)

    @property
    def open_keys(self) -> set[Key]:
        return set(self._tasks)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        await socket.send_bytes(
            encode(Hello(version=PROTOCOL_VERSION, sender=self.worker_id, incarnation=self.incarnation))
        )
        self._sockets.add(socket)
        self.connections += 1
        own: set[Key] = set()
        try:
            async for frame in socket:
                if frame.type is not WSMsgType.BINARY:
                    break
                self._take(to_worker_decoder.decode(frame.data), socket, own)
        finally:
            self._sockets.discard(socket)
            for key in own & self._tasks.keys():
                self._tasks[key].cancel()
        return socket

    def _take(
        self, message: Hello | GenerateRequest | AbortRequest, socket: web.WebSocketResponse, own: set[Key]
    ) -> None:
        if isinstance(message, GenerateRequest):
            self.received.append(message)
            own.add(message.key)
            task = asyncio.create_task(self._serve(message, socket))
            self._tasks[message.key] = task
            task.add_done_callback(lambda _: self._tasks.pop(message.key, None))
        elif isinstance(message, AbortRequest):
            self.aborted.append(message.key)
            if message.key in self._tasks:
                self._tasks[message.key].cancel()

    async def _serve(self, request: GenerateRequest, socket: web.WebSocketResponse) -> None:
        behaviour = self.behaviour
        try:
            if behaviour.refuse is not None and behaviour.times > 0:
                behaviour.times -= 1
                await self._end(socket, Finished(request.key, "error", error=behaviour.refuse))
            elif behaviour.hang:
                await asyncio.Event().wait()
            else:
                await self._generate(request, socket)
        except ConnectionError:
            return

    async def _generate(self, request: GenerateRequest, socket: web.WebSocketResponse) -> None:
        first = len(request.token_ids) - request.num_prompt_tokens
        if request.phase != "generation":
            await asyncio.sleep(self.behaviour.first_token_delay_s)
            ended = await self._emit(request, socket, first, first + 1)
            if ended or request.phase == "context":
                self.handoffs.event(request.key).set()
                if not (self.behaviour.omit_handoff and not ended):
                    await self._finish(request, socket, ended or "handoff")
                return
        elif not self.behaviour.ahead:
            await self.handoffs.event(request.key).wait()
        ended = await self._emit(request, socket, first + 1, request.sampling.max_tokens)
        await self._finish(request, socket, ended or "length")

    async def _emit(self, request: GenerateRequest, socket: web.WebSocketResponse, index: int, end: int) -> str | None:
        """Send output tokens `index` to `end`; why they ended early or, at the last one, "length"."""
        behaviour, held, first = self.behaviour, [], index
        turn = 0
        reason: str | None = None
        while index < end and reason is None:
            size = min(behaviour.chunks[turn % len(behaviour.chunks)], end - index)
            turn += 1
            if behaviour.die_at is not None and index + size > behaviour.die_at and behaviour.times > 0:
                behaviour.times -= 1
                await socket.close()
                raise ConnectionResetError
            if behaviour.give_up_after is not None and index - first >= behaviour.give_up_after:
                if behaviour.gives_up is None:
                    await socket.close()
                else:
                    await self._end(socket, Finished(request.key, "error", error=behaviour.gives_up))
                raise ConnectionResetError
            tokens, reason = self._tokens(request, index, size)
            delta = TokenDelta(
                request.key, index, tokens, self._logprobs(request, tokens), self._prompt(request, index)
            )
            index += len(tokens)
            if behaviour.shuffle is not None:
                held.append(delta)
            else:
                await socket.send_bytes(encode(OutputFrame([delta], [])))
            if behaviour.token_delay_s:
                await asyncio.sleep(behaviour.token_delay_s)
        if behaviour.shuffle is not None:
            for delta in behaviour.shuffle(held):
                await socket.send_bytes(encode(OutputFrame([delta], [])))
        return reason or ("length" if index >= request.sampling.max_tokens else None)

    def _tokens(self, request: GenerateRequest, index: int, size: int) -> tuple[list[int], str | None]:
        script = self.behaviour.script
        if script is not None:
            tokens = list(script[index : index + size])
            return tokens, "stop" if index + size >= len(script) else None
        tokens = []
        for position in range(request.num_prompt_tokens + index, request.num_prompt_tokens + index + size):
            tokens.append(token_at(request.sampling.seed, position, self.behaviour.vocab_size))
            if tokens[-1] in request.sampling.stop_token_ids:
                return tokens, "stop"
        return tokens, None

    def _logprobs(self, request: GenerateRequest, tokens: Sequence[int]) -> list[TokenLogprob] | None:
        wanted = request.sampling.logprobs
        return None if wanted is None else [_scored(token, wanted) for token in tokens]

    def _prompt(self, request: GenerateRequest, index: int) -> list[TokenLogprob | None] | None:
        wanted = request.sampling.prompt_logprobs
        if (
            wanted is None
            or request.phase == "generation"
            or index != len(request.token_ids) - request.num_prompt_tokens
        ):
            return None
        return [None, *(_scored(token, wanted) for token in request.token_ids[1 : request.num_prompt_tokens])]

    async def _finish(self, request: GenerateRequest, socket: web.WebSocketResponse, reason: str) -> None:
        usage = Usage(request.num_prompt_tokens, 0, self.behaviour.cached_tokens)
        await self._end(socket, Finished(request.key, reason, usage))  # type: ignore[arg-type]

    async def _end(self, socket: web.WebSocketResponse, finished: Finished) -> None:
        self.finished.append(finished.key)
        await socket.send_bytes(encode(OutputFrame([], [finished])))


def _scored(token: int, alternatives: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, [(token + i, -0.5 - i) for i in range(alternatives)])
