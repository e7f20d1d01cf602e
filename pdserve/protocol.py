"""Messages between proxy, worker servers and engines.

Owns the shapes and their msgpack encoding, not the sockets. The same messages travel over a worker's WebSocket
(proxy and worker server) and over ZMQ (worker server and engine), so a worker server forwards frames without
translating them. The transceiver's own messages live in `kv_transfer.wire`.

Every message belongs to a request's `attempt`: a message of an older attempt is ignored, everywhere. Structs are
encoded as arrays, so fields are only ever appended, each with a default; a change that isn't an append raises
`PROTOCOL_VERSION`, which both ends of a socket compare in `Hello`. A kind of message may be added, too: who does not
know it leaves it alone (`unknown_kind`), so its sender must not depend on an answer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeVar

import msgspec

from pdserve.distribution import Distribution
from pdserve.errors import ErrorInfo, MalformedMessage

PROTOCOL_VERSION = 1

Role = Literal["context", "generation"]
Phase = Literal["context", "generation", "both"]
FinishReason = Literal["stop", "length", "handoff", "abort", "error"]
WorkerState = Literal["starting", "ready", "draining"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to pick tokens. Token `i` of the sequence (prompt included) is keyed by (`seed`, `i`) and nothing else.

    `max_tokens` and `min_tokens` count all output tokens of the request, those of earlier attempts included.
    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep every token. `logprobs` asks for the chosen token's
    log-probability and that many alternatives; `prompt_logprobs` the same for the prompt's tokens.
    """

    seed: int
    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def stop_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """The tokens that end the output, of a model that ends its own with `eos_token_ids`."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else eos_token_ids)


class KvRank(msgspec.Struct, frozen=True, array_like=True):
    """One rank's end of a worker's transceiver. Without a `host` it is at its worker's.

    `layout` says as JSON which part of the cache the rank holds; only transceivers read it.
    """

    instance: str
    host: str
    port: int
    layout: str


class KvAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a worker's transceiver listens. `instance` is new with every start, so a reused port is noticed.

    `ranks` lists every rank, the first with the same `instance` and `port`; a worker that names none has one rank.
    """

    worker_id: str
    instance: str
    host: str
    port: int
    layout_hash: str
    ranks: tuple[KvRank, ...] = ()


class Key(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One attempt at one request: what every table of the system is keyed by."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """One attempt at one request, as the proxy submits it to each worker that takes part.

    `token_ids` is the prompt followed by the tokens that earlier attempts already produced; `num_prompt_tokens`
    says where the prompt ends. `timeout_s` counts from receipt (clocks of two hosts are never compared).
    With phase "context", `peer` is where to push the KV; with "generation", whom to expect it from; a context
    request without a peer ends after its first token. With `kv_only` nothing is computed: scratch blocks for
    `token_ids` go from one worker to the other, to be measured, and both ends finish with "handoff"; cached prefixes
    make room for them only if `evict` says so.
    """

    key: Key
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    timeout_s: float
    phase: Phase
    peer: KvAddress | None = None
    cache_salt: str = ""
    kv_only: bool = False
    evict: bool = False


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    key: Key


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of `token_id` under the model (temperature 1, before penalties), and the best alternatives."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """Output tokens of one step. `start` is the index of the first within the request's output, from 0.

    `prompt_logprobs` comes once, with the first delta: one entry a prompt token, None for the first.
    """

    key: Key
    start: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class Usage(msgspec.Struct, frozen=True, array_like=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Timings(msgspec.Struct, frozen=True, array_like=True):
    """Where a request's time went in one worker, in seconds. `handoff_s` is the time from the first token (context)
    or from the offer (generation) until the last KV byte was in place; of a handoff, `transfer_s` is the time in which
    payload was under way, `moving_s` that from its first pack to its end, and `exposed_s` what hid behind nothing
    (`pdserve.handoff.HandoffCost`)."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    handoff_s: float = 0.0
    decode_s: float = 0.0
    transfer_s: float = 0.0
    exposed_s: float = 0.0
    moving_s: float = 0.0


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """The one end of an attempt in one worker. "handoff": the context worker delivered everything. `kv_bytes` of KV
    came for it or went away."""

    key: Key
    reason: FinishReason
    usage: Usage = Usage()
    timings: Timings = Timings()
    error: ErrorInfo | None = None
    kv_bytes: int = 0


class OutputFrame(msgspec.Struct, frozen=True, tag="output"):
    """All that one engine step has to say."""

    deltas: list[TokenDelta]
    finished: list[Finished]


class BlockCounts(msgspec.Struct, frozen=True, array_like=True):
    """KV blocks by state; the four add up to `total`. `cached` blocks hold reusable prefixes and may be taken."""

    total: int = 0
    free: int = 0
    cached: int = 0
    used: int = 0
    reserved: int = 0

    @property
    def available(self) -> int:
        return self.free + self.cached


class TransferCounts(msgspec.Struct, frozen=True, array_like=True):
    """What the transceiver has done with one peer since it started. `failures` is by reason; the distributions are of
    completed handoffs, one value each."""

    peer: str
    direction: Literal["sent", "received"]
    backend: str
    transport: str = ""
    bytes: int = 0
    seconds: float = 0.0
    transfers: int = 0
    in_flight: int = 0
    failures: dict[str, int] = {}
    bandwidth_gb_s: Distribution = Distribution()
    exposed_s: Distribution = Distribution()
    block_wait_s: Distribution = Distribution()


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """The engine's gauges and counters, sent when they change, at most every `stats interval`. `kv_hindrance` says why
    its transceiver can join no peer for the moment, and is empty when it can."""

    running: int = 0
    waiting: int = 0
    awaiting_kv: int = 0
    blocks: BlockCounts = BlockCounts()
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    step_seconds: float = 0.0
    staging_bytes: int = 0
    staging_in_use_bytes: int = 0
    transfers: list[TransferCounts] = []
    host_blocks: int = 0
    host_blocks_used: int = 0
    offloaded_blocks: int = 0
    onboarded_blocks: int = 0
    partially_reused_blocks: int = 0
    kv_hindrance: str = ""


class CacheGroupLimits(msgspec.Struct, frozen=True):
    """How many blocks a cache group has (`pdserve.engine.cache_spec`), and its window in tokens, None without one."""

    num_blocks: int
    window: int | None = None


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine refuses requests by, and what its peers must know.

    `cache_groups` has an entry for each of a sequence's block tables, by default one without a window. `num_blocks` is
    the first group's.
    """

    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    vocab_size: int
    num_blocks: int
    tokens_per_block: int
    eos_token_ids: tuple[int, ...] = ()
    cache_groups: tuple[CacheGroupLimits, ...] = ()

    def __post_init__(self) -> None:
        first, *others = self.cache_groups or (CacheGroupLimits(self.num_blocks),)
        groups = (CacheGroupLimits(self.num_blocks, first.window), *others)
        msgspec.structs.force_setattr(self, "cache_groups", groups)


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine's first message: it is warm. `kv` is None when the role has no transceiver."""

    limits: EngineLimits
    dtype: str
    device: str
    kv: KvAddress | None = None
    pid: int = 0
    model_fingerprint: str = ""


class EngineAlive(msgspec.Struct, frozen=True, tag="alive"):
    """The engine's process runs, however long its current step takes; said twice a second."""


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine's last message when it can't start or go on."""

    error: ErrorInfo


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Server to engine: finish the step and end the process."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First frame of either side on a worker's socket."""

    version: int
    sender: str
    incarnation: str = ""


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """A worker's load, pushed to every proxy when it changes, at most every 100 ms. `state` is "starting" also while a
    worker that was ready can take no requests for the moment."""

    state: WorkerState
    running: int
    waiting: int
    awaiting_kv: int
    blocks: BlockCounts


def is_another_model(ours: str, theirs: str) -> bool:
    """Whether two `model_fingerprint`s are of different models, as far as they tell.

    "" tells nothing, nor do two of different makes (what stands before the dash): so versions can work together.
    """
    return bool(ours and theirs) and ours != theirs and ours.partition("-")[0] == theirs.partition("-")[0]


ToWorker = Hello | GenerateRequest | AbortRequest
FromWorker = Hello | OutputFrame | LoadReport
ToEngine = GenerateRequest | AbortRequest | Shutdown
FromEngine = OutputFrame | EngineStats | EngineReady | EngineAlive | EngineFailed

Decoded = TypeVar("Decoded")


class _Kind(msgspec.Struct):
    type: str


_KINDS = frozenset(
    str(message.__struct_config__.tag) for message in (Hello, GenerateRequest, AbortRequest, OutputFrame, LoadReport)
)
_kind_decoder = msgspec.msgpack.Decoder(_Kind)

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """`message` as one msgpack frame."""
    return _encoder.encode(message)


def decode(
    decoder: msgspec.msgpack.Decoder[Decoded] | msgspec.json.Decoder[Decoded], frame: bytes | bytearray | memoryview
) -> Decoded:
    """The message in `frame`, which somebody else has sent: every socket and pipe is read through this.

    Raises:
        MalformedMessage: it is none, whatever is wrong with it (its shape, a text that is not UTF-8, nesting without
            end, a number out of range).
    """
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise MalformedMessage(f"{len(frame)} bytes are not a message: {error}") from None


to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
from_worker_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def unknown_kind(frame: bytes) -> str | None:
    """The kind of a message from a worker's socket that could not be decoded, if a later release may have sent it; None
    for a message of a known kind that is malformed, and for what is no message at all."""
    try:
        kind = decode(_kind_decoder, frame).type
    except MalformedMessage:
        return None
    return None if kind in _KINDS else kind
