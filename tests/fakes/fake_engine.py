"""A process that speaks an engine's side of the pipes: run with `python -m tests.fakes.fake_engine`.

It answers each request with its token ids plus one, one a step, then "length"; one that only moves KV with "handoff",
or, over 100 tokens, with Overloaded, or, over 1000, never. Token 666 in a prompt ends the process abruptly; `model`
"broken" fails the start with a ConfigError; "slow" never becomes ready. While a request with `HINDERED` in its prompt
is open, it says that it can reach no peer; such a request ends when it is aborted.
"""

from __future__ import annotations

import os
import sys
import time

import msgspec
import zmq

from pdserve.engine.run.heartbeat import beating
from pdserve.errors import ConfigError, Overloaded
from pdserve.process import die_with_parent
from pdserve.protocol import (
    AbortRequest,
    BlockCounts,
    EngineAlive,
    EngineFailed,
    EngineLimits,
    EngineReady,
    EngineStats,
    Finished,
    GenerateRequest,
    Key,
    OutputFrame,
    Shutdown,
    Timings,
    TokenDelta,
    encode,
    to_engine_decoder,
)
from pdserve.worker.engine_link import EngineSpec

HINDERED = 777

_LIMITS = EngineLimits(
    max_seq_len=128, max_batch_size=4, max_num_tokens=64, vocab_size=1000, num_blocks=8, tokens_per_block=4
)


def main() -> None:
    die_with_parent()
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineSpec)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.bind(spec.to_engine)
    outbox.connect(spec.from_engine)
    if spec.args["model"] == "broken":
        outbox.send(encode(EngineFailed(ConfigError("dtype: not on this planet", "dtype").to_info())))
        outbox.close(linger=1000)
        sys.exit(2)
    if spec.args["model"] == "slow":
        time.sleep(3600)
    outbox.send(encode(EngineReady(limits=_LIMITS, dtype="float32", device="cpu", pid=os.getpid())))
    heart = context.socket(zmq.PUSH)
    heart.linger = 0
    heart.connect(spec.from_engine)
    with beating(lambda: heart.send(encode(EngineAlive()))):
        serve(inbox, outbox)


def serve(inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
    running: dict[Key, tuple[GenerateRequest, int]] = {}
    while True:
        if not running or inbox.poll(10):
            message = to_engine_decoder.decode(inbox.recv())
            if isinstance(message, Shutdown):
                return
            if isinstance(message, AbortRequest):
                if running.pop(message.key, None):
                    outbox.send(encode(OutputFrame([], [Finished(message.key, "abort")])))
                    outbox.send(encode(EngineStats()))
                continue
            if 666 in message.token_ids:
                os._exit(7)
            if message.kv_only:
                outbox.send(encode(OutputFrame([], move(message))))
                continue
            if HINDERED in message.token_ids:
                outbox.send(encode(EngineStats(kv_hindrance="Too many open files")))
            running[message.key] = (message, 0)
        step(running, outbox)


def move(request: GenerateRequest) -> list[Finished]:
    num_tokens = len(request.token_ids)
    if num_tokens > 1000:
        return []
    if num_tokens > 100:
        return [Finished(request.key, "error", error=Overloaded("no blocks", "num_tokens").to_info())]
    timings = Timings(handoff_s=num_tokens / 1000, moving_s=3 * num_tokens / 4000, transfer_s=num_tokens / 2000)
    return [Finished(request.key, "handoff", timings=timings, kv_bytes=64 * num_tokens)]


def step(running: dict[Key, tuple[GenerateRequest, int]], outbox: zmq.Socket[bytes]) -> None:
    frame = OutputFrame([], [])
    for key, (request, position) in list(running.items()):
        if HINDERED in request.token_ids:
            return
        frame.deltas.append(TokenDelta(key, position, [request.token_ids[position % len(request.token_ids)] + 1]))
        running[key] = (request, position + 1)
        if position + 1 == request.sampling.max_tokens:
            frame.finished.append(Finished(key, "length"))
            del running[key]
    # First, so that whoever has heard of an end finds it in the metrics.
    outbox.send(encode(EngineStats(running=len(running), blocks=BlockCounts(8, 8 - len(running), 0, len(running), 0))))
    outbox.send(encode(frame))


if __name__ == "__main__":
    main()
