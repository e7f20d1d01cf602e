"""One watch on one etcd member: its stream of answers.

etcd3aio's own watch reconnects in silence, from the revision in the last answer's header. That may be beyond the last
event it delivered, so events would be lost; it skips over compacted history without a word; it can't ask etcd whether
the watch is alive; and what it leaves behind when it is abandoned is destroyed while it runs. This stream ends with
its connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc  # type: ignore[import-untyped]
from etcd3aio import prefix_range_end
from etcd3aio._protobuf import WatchCreateRequest, WatchRequest, WatchStub, rpc_pb2


class WatchEnded(Exception):
    """The stream is over, and why."""


class WatchStream:
    """Life: `create`, then `next` over and over until either raises, then `close`.

    Args:
        timeout_s: how long etcd may take to answer when it is asked.
    """

    def __init__(self, channel: grpc.aio.Channel, token: str | None, timeout_s: float) -> None:
        self._call = WatchStub(channel).Watch(metadata=metadata(token))
        self._timeout_s = timeout_s
        self._reading: asyncio.Task[Any] | None = None

    async def create(self, prefix: str, from_revision: int) -> Any:
        """Start to watch; etcd's first answer. Raises `WatchEnded`."""
        wanted = WatchCreateRequest(
            key=prefix.encode(), range_end=prefix_range_end(prefix), start_revision=from_revision
        )
        return await self._ask(WatchRequest(create_request=wanted))

    async def next(self, silence_s: float) -> Any:
        """The next answer; after `silence_s` without one etcd is asked, and answers without events if there are none.

        Raises:
            WatchEnded: the connection is lost, or etcd does not answer.
        """
        if await self._arrives_within(silence_s):
            return self._take()
        return await self._ask(WatchRequest(progress_request=rpc_pb2.WatchProgressRequest()))

    async def close(self) -> None:
        """End the watch; returns when nothing of it runs any more."""
        self._call.cancel()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _ask(self, request: WatchRequest) -> Any:
        writing = asyncio.ensure_future(self._call.write(request))
        try:
            async with asyncio.timeout(self._timeout_s):
                await writing
        except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as error:
            raise WatchEnded(why(error)) from None
        if not await self._arrives_within(self._timeout_s):
            raise WatchEnded(f"no answer in {self._timeout_s} s")
        return self._take()

    async def _arrives_within(self, limit_s: float) -> bool:
        # A read that is cancelled ends the stream, so one that is not over goes on and is looked at again later.
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        return bool((await asyncio.wait({self._reading}, timeout=limit_s))[0])

    def _take(self) -> Any:
        assert self._reading is not None
        reading, self._reading = self._reading, None
        try:
            answer = reading.result()
        except (grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError) as error:
            raise WatchEnded(why(error)) from None
        if answer is grpc.aio.EOF:
            raise WatchEnded("etcd ended it")
        return answer


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call: a member that has lost its leader must refuse it, or end the stream."""
    led = (("hasleader", "true"),)
    return led if token is None else (("token", token), *led)


def why(error: BaseException | None) -> str:
    """A reason in one line."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
