"""The messages on a worker's socket."""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL_VERSION = 1


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    code: str
    message: str
    param: str | None = None
    status: int = 500
    retryable: bool = False


Role = Literal["context", "generation"]
Phase = Literal["context", "generation", "both"]
FinishReason = Literal["stop", "length", "handoff", "abort", "error"]
WorkerState = Literal["starting", "ready", "draining"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
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


class KvRank(msgspec.Struct, frozen=True, array_like=True):
    instance: str
    host: str
    port: int
    layout: str


class KvAddress(msgspec.Struct, frozen=True, array_like=True):
    worker_id: str
    instance: str
    host: str
    port: int
    layout_hash: str
    ranks: tuple[KvRank, ...] = ()


class Key(msgspec.Struct, frozen=True, array_like=True, order=True):
    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
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
    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
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
    queue_s: float = 0.0
    prefill_s: float = 0.0
    handoff_s: float = 0.0
    decode_s: float = 0.0
    transfer_s: float = 0.0
    exposed_s: float = 0.0
    moving_s: float = 0.0


class Finished(msgspec.Struct, frozen=True, array_like=True):
    key: Key
    reason: FinishReason
    usage: Usage = Usage()
    timings: Timings = Timings()
    error: ErrorInfo | None = None
    kv_bytes: int = 0


class OutputFrame(msgspec.Struct, frozen=True, tag="output"):
    deltas: list[TokenDelta]
    finished: list[Finished]


class BlockCounts(msgspec.Struct, frozen=True, array_like=True):
    total: int = 0
    free: int = 0
    cached: int = 0
    used: int = 0
    reserved: int = 0

    @property
    def available(self) -> int:
        return self.free + self.cached


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    version: int
    sender: str
    incarnation: str = ""


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    state: WorkerState
    running: int
    waiting: int
    awaiting_kv: int
    blocks: BlockCounts


ToWorker = Hello | GenerateRequest | AbortRequest
FromWorker = Hello | OutputFrame | LoadReport

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """`message` as one msgpack frame."""
    return _encoder.encode(message)


to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
from_worker_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
