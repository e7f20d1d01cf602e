"""`pdserve bench kv`: how fast KV goes from one running worker to another, whatever else they do.

Both workers hand scratch blocks over, as they hand over a request's (`worker.kv_bench`), and tell what their
transceivers have measured; no HTTP and no computing is in the figures. A handoff is ready when it is offered, accepted
and computed: then comes packing, sending and unpacking, or reading, and the receiver's word that it is done. A size
that the workers have no room for, beside what they serve, is skipped.
"""

from __future__ import annotations

import asyncio
import statistics
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import msgspec

from pdserve.addresses import http_url
from pdserve.cluster_api import WorkerInfo
from pdserve.cluster_client import ClusterClient
from pdserve.config import ClusterConfig
from pdserve.errors import (
    ErrorInfo,
    MalformedMessage,
    NotReady,
    PdserveError,
    RequestError,
    TransferError,
    UnknownWorker,
    from_info,
)
from pdserve.plain_copy import PlainCopy, between
from pdserve.protocol import decode
from pdserve.worker.kv_bench import KvBenchReply, KvBenchRequest

MB = 10**6
SIZES_MB = (1, 4, 16, 64, 256, 1024, 4096)

_TIMEOUT_S = 120.0
_LAST_WORDS_S = 0.5
"""How long the end that was only told to stop waits for the one that knows why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One size: `asked_bytes`, and the `nbytes` of the whole blocks that travelled.

    `seconds` are those of each handoff from its offer to its end, `moving_s` those of packing, sending and unpacking
    (from its first pack to the receiver's Done), `busy_s` those with payload under way, by the context worker's
    transceiver; all empty if it was `skipped`, which says why.
    """

    asked_bytes: int
    num_tokens: int
    nbytes: int = 0
    seconds: tuple[float, ...] = ()
    moving_s: tuple[float, ...] = ()
    busy_s: tuple[float, ...] = ()
    plain_gb_per_s: float | None = None
    skipped: str | None = None

    @property
    def gb_per_s(self) -> float | None:
        """10^9 bytes a second of the median handoff."""
        return self._rate(self.seconds)

    @property
    def moving_gb_per_s(self) -> float | None:
        """The same of packing, sending and unpacking."""
        return self._rate(self.moving_s)

    @property
    def busy_gb_per_s(self) -> float | None:
        """The same of the time with payload under way."""
        return self._rate(self.busy_s)

    @property
    def share(self) -> float | None:
        """The part of a plain copy's speed that packing, sending and unpacking reach."""
        if self.plain_gb_per_s is None or self.moving_gb_per_s is None:
            return None
        return self.moving_gb_per_s / self.plain_gb_per_s

    def as_dict(self) -> dict[str, Any]:
        derived = ("gb_per_s", "moving_gb_per_s", "busy_gb_per_s", "share")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def _rate(self, durations_s: tuple[float, ...]) -> float | None:
        return self.nbytes / statistics.median(durations_s) / 1e9 if durations_s else None


@dataclass(frozen=True, slots=True)
class Report:
    source: str
    target: str
    plain_copy: str
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        rows = [row.as_dict() for row in self.rows]
        return {"from": self.source, "to": self.target, "plain_copy": self.plain_copy, "rows": rows}


async def measure(
    config: ClusterConfig,
    source_id: str,
    target_id: str,
    sizes_bytes: Sequence[int],
    repeats: int,
    evict: bool,
    say: Callable[[str], None],
) -> Report:
    """Measure each size, `repeats` handoffs after one that does not count.

    Args:
        say: is given a table for people, line by line, each as soon as it is known.

    Raises:
        UnknownWorker: no such worker is registered.
        RequestError: the first is no context worker, or the second no generation worker.
        PdserveError: a worker can't be reached, or has failed.
    """
    async with ClusterClient(http_url(config.manager.hostname, config.manager.port)) as client:
        workers = {record.info.worker_id: record.info for record in (await client.workers()).workers}
    source, target = (_find(workers, *what) for what in ((source_id, "context"), (target_id, "generation")))
    token_bytes, plain = _token_bytes(source), between(source, target)
    for line in _header(source_id, target_id, plain.what):
        say(line)
    rows = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S + 10)) as session:
        for nbytes in sizes_bytes:
            num_tokens = max(1, nbytes // token_bytes)
            rows.append(await _row(_Pair(session, source, target, repeats, evict), nbytes, num_tokens, plain))
            say(as_line(rows[-1]))
    report = Report(source_id, target_id, plain.what, tuple(rows))
    for line in footnotes(report.rows):
        say(line)
    return report


# What is measured in which width: handoffs by their parts, from the whole to the copy that they are held against.
_COLUMNS = (
    ("SIZE", 11),
    ("TOKENS", 9),
    ("OFFER TO DONE", 15),
    ("READY TO DONE", 15),
    ("MOVING", 9),
    ("PLAIN COPY", 12),
)
_NOISE = "*"


def _header(source: str, target: str, plain_copy: str) -> list[str]:
    return [
        f"{source} to {target}; speeds in GB/s, 1 GB = 1000 MB = 10^9 bytes; plain copy: {plain_copy}",
        "".join(f"{name:>{width}}" for name, width in _COLUMNS) + f"{'SHARE':>8}",
    ]


def as_line(row: Row) -> str:
    """`row` of the table for people."""
    start = f"{(row.nbytes or row.asked_bytes) / MB:>8.1f} MB{row.num_tokens:>9}"
    if row.skipped is not None:
        return f"{start}  skipped: {row.skipped}"
    speeds = (row.gb_per_s, row.moving_gb_per_s, row.busy_gb_per_s, row.plain_gb_per_s)
    cells = "".join(f"{_speed(speed):>{width}}" for speed, (_, width) in zip(speeds, _COLUMNS[2:], strict=True))
    share = "-" if row.share is None else f"{row.share:.0%}"
    return f"{start}{cells}{share:>8}{_NOISE if _is_noise(row) else ''}"


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What must be known to read the table of `rows`."""
    if not any(_is_noise(row) for row in rows):
        return []
    return [
        f"{_NOISE} above 100% is noise: handoffs and plain copies are measured one after the other, and on this host "
        "they vary by more than what lies between them"
    ]


def _is_noise(row: Row) -> bool:
    """Whether the share is printed as more than everything."""
    return row.share is not None and round(100 * row.share) > 100


def _speed(gb_per_s: float | None) -> str:
    return "-" if gb_per_s is None else f"{gb_per_s:.2f}"


@dataclass(frozen=True, slots=True)
class _Pair:
    session: aiohttp.ClientSession
    source: WorkerInfo
    target: WorkerInfo
    repeats: int
    evict: bool

    async def hand_over(self, num_tokens: int) -> KvBenchReply:
        """What the context worker says of its handoffs. Raises the error of the worker that knows why they failed."""
        name = uuid.uuid4().hex
        # The generation worker first: it expects all of them, so that no offer waits for a request.
        asked = [
            asyncio.create_task(self._ask(self.target, self.source, name, num_tokens)),
            asyncio.create_task(self._ask(self.source, self.target, name, num_tokens)),
        ]
        try:
            done, others = await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION)
            if others and any(isinstance(each.exception(), TransferError) for each in done):
                await asyncio.wait(others, timeout=_LAST_WORDS_S)
        finally:
            for each in asked:
                each.cancel()
            results = await asyncio.gather(*asked, return_exceptions=True)
        errors = [result for result in results if isinstance(result, Exception)]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, TransferError))
        reply = results[1]
        assert isinstance(reply, KvBenchReply)
        return reply

    async def _ask(self, worker: WorkerInfo, peer: WorkerInfo, name: str, num_tokens: int) -> KvBenchReply:
        assert peer.kv is not None
        body = KvBenchRequest(
            name=name,
            peer=peer.kv,
            num_tokens=num_tokens,
            repeats=1 + self.repeats,
            timeout_s=_TIMEOUT_S,
            evict=self.evict,
        )
        headers = {"Content-Type": "application/json"}
        try:
            async with self.session.post(
                f"{worker.url}/v1/bench/kv", data=body.model_dump_json(), headers=headers
            ) as response:
                status, raw = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise NotReady(f"{worker.worker_id} can't be reached: {error or type(error).__name__}") from None
        if status >= 400:
            raise _error(worker.worker_id, status, raw)
        return KvBenchReply.model_validate_json(raw)


async def _row(pair: _Pair, asked_bytes: int, num_tokens: int, plain: PlainCopy) -> Row:
    try:
        handoffs = (await pair.hand_over(num_tokens)).handoffs[1:]
    except NotReady:
        raise
    except PdserveError as error:
        return Row(asked_bytes, num_tokens, skipped=error.message)
    nbytes = handoffs[0].nbytes
    plain_gb_per_s = await asyncio.to_thread(plain.gb_per_s, nbytes, pair.repeats)
    return Row(
        asked_bytes,
        num_tokens,
        nbytes,
        tuple(each.seconds for each in handoffs),
        tuple(each.moving_s for each in handoffs),
        tuple(each.busy_s for each in handoffs),
        plain_gb_per_s,
    )


def _find(workers: dict[str, WorkerInfo], worker_id: str, role: str) -> WorkerInfo:
    worker = workers.get(worker_id)
    if worker is None:
        known = ", ".join(sorted(workers)) or "none"
        raise UnknownWorker(f"no worker {worker_id} is registered; there are: {known}", "worker_id")
    if worker.role != role or worker.kv is None:
        message = f"{worker_id} is a {worker.role} worker; KV goes from a context worker to a generation worker"
        raise RequestError(message, "worker_id")
    return worker


def _token_bytes(worker: WorkerInfo) -> int:
    """KV bytes of a token on all ranks, as the worker's address describes its cache."""
    import torch

    from kv_transfer.layout import KvLayout

    assert worker.kv is not None
    layout = decode(msgspec.json.Decoder(KvLayout), worker.kv.ranks[0].layout.encode())
    found = 0
    for group in layout.groups:
        itemsize: int = getattr(torch, group.dtype).itemsize
        found += group.num_layers * group.kv_factor * group.num_kv_heads * group.head_dim * itemsize
    return found


def _error(worker_id: str, status: int, raw: bytes) -> PdserveError:
    try:
        fields = decode(msgspec.json.Decoder(), raw)["error"]
        info = ErrorInfo(str(fields["code"]), f"{worker_id}: {fields['message']}", fields["param"], status)
    except (MalformedMessage, KeyError, TypeError):
        return PdserveError(f"{worker_id} answered with status {status}")
    return from_info(info)
