"""The store that several managers share: etcd, over etcd3aio's services.

Owns one gRPC channel for each endpoint and uses one at a time: a call that finds it unreachable goes on to the next.
Channels are made here rather than by etcd3aio's client because that one takes no host names, only IP addresses.
Nothing is connected before the first call, so a store may be opened while etcd is down; every call is bounded by
`timeout_s`, and channels reconnect by themselves. Every call asks for a member that has a leader: one that is cut off
from the others refuses, or ends the watch, instead of telling old news as new.

Credentials are exchanged for a token before the first call, and again whenever etcd refuses the token (it forgets
tokens when it restarts).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]
from etcd3aio import EtcdConnectionError, EtcdError, EtcdUnauthenticatedError, prefix_range_end
from etcd3aio._protobuf import LeaseKeepAliveRequest, LeaseStub
from etcd3aio.auth import AuthService
from etcd3aio.kv import KVService
from etcd3aio.lease import LeaseService

from cluster_manager.store.base import Compacted, Confirmed, Entry, Event, Lease, LeaseLost, StoreError
from cluster_manager.store.etcd_watch import WatchEnded, WatchStream, metadata, why

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # an idle watch is watched over, too
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # gRPC's own default waits up to two minutes after etcd is back
    ("grpc.enable_http_proxy", 0),
]
_ATTEMPTS = 2
_SWEEP_INTERVAL_S = 0.25


class _Led:
    """Of etcd3aio's services: has a member without a leader refuse the call (etcd's "hasleader")."""

    def set_token(self, token: str | None) -> None:
        self._metadata = metadata(token)


class _KV(_Led, KVService):  # type: ignore[misc]
    pass


class _Lease(_Led, LeaseService):  # type: ignore[misc]
    pass


class _Endpoint:
    """The services of one etcd member."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(f"dns:///{address}", options=_CHANNEL_OPTIONS)
        self.kv = _KV(self.channel, max_attempts=_ATTEMPTS)
        self.lease = _Lease(self.channel, max_attempts=_ATTEMPTS)
        self.auth = AuthService(self.channel, max_attempts=_ATTEMPTS)

    def set_token(self, token: str | None) -> None:
        for service in (self.kv, self.lease):
            service.set_token(token)


class EtcdStore:
    """A `Store` in etcd.

    Args:
        endpoints: `host:port` of each member.
        timeout_s: the limit for one call.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        user: str | None = None,
        password: str | None = None,
        timeout_s: float = 2.0,
    ) -> None:
        self._addresses = tuple(endpoints)
        self._credentials = None if user is None else (user, password or "")
        self._timeout_s = timeout_s
        self._endpoints: dict[str, _Endpoint] = {}
        self._current = 0
        self._token: str | None = None
        self._raised: dict[Lease, tuple[float, int]] = {}  # (wanted, granted) TTL in seconds, where etcd gave more
        self._sweeper: asyncio.Task[None] | None = None

    async def grant(self, ttl_s: float) -> Lease:
        reply = await self._call("grant", lambda e: e.lease.grant(math.ceil(ttl_s), timeout=self._timeout_s))
        lease = str(reply.ID)
        if reply.TTL - ttl_s >= 1:
            self._raised[lease] = (ttl_s, reply.TTL)
            if self._sweeper is None or self._sweeper.done():
                self._sweeper = asyncio.create_task(self._sweep(), name="etcd-lease-sweeper")
        return lease

    async def keepalive(self, lease: Lease) -> None:
        if await self._call("keepalive", lambda e: self._keepalive(e, _lease_number(lease))) <= 0:
            raise LeaseLost(lease)

    async def revoke(self, lease: Lease) -> None:
        self._raised.pop(lease, None)
        with contextlib.suppress(LeaseLost):
            await self._call("revoke", lambda e: e.lease.revoke(_lease_number(lease), timeout=self._timeout_s))

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        number = _lease_number(lease)
        reply = await self._call("put", lambda e: e.kv.put(key, value, number, timeout=self._timeout_s))
        return int(reply.header.revision)

    async def put_if(
        self, key: str, value: bytes, expected_mod_revision: int, lease: Lease | None = None
    ) -> int | None:
        compare = KVService.txn_compare_version(key, 0)  # etcd3aio has no maker for this kind
        compare.target, compare.mod_revision = type(compare).MOD, expected_mod_revision
        put = KVService.txn_op_put(key, value, lease=_lease_number(lease))
        reply = await self._call("put_if", lambda e: e.kv.txn([compare], [put], timeout=self._timeout_s))
        return int(reply.header.revision) if reply.succeeded else None

    async def delete(self, key: str) -> bool:
        reply = await self._call("delete", lambda e: e.kv.delete(key, timeout=self._timeout_s))
        return bool(reply.deleted)

    async def get(self, key: str) -> Entry | None:
        reply = await self._call("get", lambda e: e.kv.get(key, timeout=self._timeout_s))
        return _entry(reply.kvs[0]) if reply.kvs else None

    async def scan(self, prefix: str) -> tuple[list[Entry], int]:
        end = prefix_range_end(prefix)
        reply = await self._call("scan", lambda e: e.kv.get(prefix, end, timeout=self._timeout_s))
        return [_entry(item) for item in reply.kvs], int(reply.header.revision)

    async def watch(
        self, prefix: str, from_revision: int, confirm_interval_s: float
    ) -> AsyncGenerator[Event | Confirmed, None]:
        endpoint = await self._call("watch", _itself)
        stream = WatchStream(endpoint.channel, self._token, self._timeout_s)
        reached = from_revision - 1
        try:
            created = await stream.create(prefix, from_revision)
            self._check(created)
            if created.header.revision < from_revision - 1:
                raise Compacted(f"etcd is at revision {created.header.revision}, before {from_revision}")
            while True:
                answer = await stream.next(confirm_interval_s)
                self._check(answer)
                for event in map(_event, answer.events):
                    reached = event.revision
                    yield event
                if not answer.events:
                    yield Confirmed(reached)
        except WatchEnded as error:
            self._give_up(endpoint)
            raise StoreError(f"etcd at {endpoint.address}: the watch broke: {error}") from None
        finally:
            await stream.close()

    async def compact(self, revision: int) -> None:
        await self._call("compact", lambda e: self._compact(e, revision))

    async def _compact(self, endpoint: _Endpoint, revision: int) -> None:
        try:
            await endpoint.kv.compact(revision, timeout=self._timeout_s)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.OUT_OF_RANGE:  # somebody else has compacted, as far at least
                raise

    async def close(self) -> None:
        if self._sweeper:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        for endpoint in self._endpoints.values():
            await endpoint.channel.close()

    async def _call(self, name: str, operation: Callable[[_Endpoint], Awaitable[Result]]) -> Result:
        """Run one operation: on the next endpoint when this one is unreachable, with a new token when it is refused."""
        attempts = len(self._addresses) + (self._credentials is not None)
        reason: BaseException | None = None
        for _ in range(attempts):
            endpoint = self._endpoint()
            try:
                return await operation(await self._authenticated())
            except EtcdConnectionError as error:
                reason = error
                self._give_up(endpoint)
            except (EtcdUnauthenticatedError, grpc.RpcError) as error:
                if isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.NOT_FOUND:
                    raise LeaseLost(why(error)) from None
                reason = error
                self._token = None
            except (EtcdError, TimeoutError) as error:
                reason = error
                self._give_up(endpoint)
                break
        raise StoreError(f"etcd at {','.join(self._addresses)}: {name}: {why(reason)}") from None

    def _endpoint(self) -> _Endpoint:
        address = self._addresses[self._current]
        if address not in self._endpoints:
            self._endpoints[address] = _Endpoint(address)
        return self._endpoints[address]

    async def _authenticated(self) -> _Endpoint:
        endpoint = self._endpoint()
        if self._credentials and self._token is None:
            reply = await endpoint.auth.authenticate(*self._credentials, timeout=self._timeout_s)
            self._token = reply.token
        endpoint.set_token(self._token)
        return endpoint

    def _give_up(self, endpoint: _Endpoint) -> None:
        if self._addresses[self._current] == endpoint.address:
            self._current = (self._current + 1) % len(self._addresses)

    def _check(self, answer: Any) -> None:
        if answer.compact_revision:
            raise Compacted(f"etcd has compacted its history up to revision {answer.compact_revision}")
        if answer.canceled:
            self._token = None  # the usual reason is a token that etcd no longer knows
            raise StoreError(f"etcd cancelled the watch: {answer.cancel_reason}")

    async def _keepalive(self, endpoint: _Endpoint, lease: int) -> int:
        """The lease's remaining time in seconds, 0 if it is lost."""
        call = LeaseStub(endpoint.channel).LeaseKeepAlive(metadata=metadata(self._token))
        try:
            async with asyncio.timeout(self._timeout_s):
                await call.write(LeaseKeepAliveRequest(ID=lease))
                answer = await call.read()
        except asyncio.InvalidStateError:
            raise EtcdConnectionError("the keepalive stream ended") from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise EtcdConnectionError(why(error)) from None
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise EtcdUnauthenticatedError(why(error)) from None
            raise
        finally:
            call.cancel()
        if answer is grpc.aio.EOF:
            raise EtcdConnectionError("the keepalive stream ended without an answer")
        return int(answer.TTL)

    async def _sweep(self) -> None:
        """Revoke leases after the time that was asked for, where etcd granted more (its minimum is about 2 s).

        etcd tells whole seconds of remaining time, so this is up to a second late; if this manager is gone, the
        lease lapses at etcd's own time.
        """
        while self._raised:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            for lease, (wanted_s, granted_s) in list(self._raised.items()):
                with contextlib.suppress(StoreError):
                    remaining_s = await self._remaining_s(int(lease))
                    if remaining_s < 0:
                        self._raised.pop(lease, None)
                    elif granted_s - (remaining_s + 1) >= wanted_s:
                        await self.revoke(lease)

    async def _remaining_s(self, lease: int) -> int:
        reply = await self._call("ttl", lambda e: e.lease.time_to_live(lease, timeout=self._timeout_s))
        return int(reply.TTL)


async def _itself(endpoint: _Endpoint) -> _Endpoint:
    return endpoint


def _lease_number(lease: Lease | None) -> int:
    if lease is None:
        return 0
    if not lease.isdecimal() or not 0 < int(lease) < 1 << 63:
        raise LeaseLost(lease)
    return int(lease)


def _entry(item: Any) -> Entry:
    return Entry(item.key.decode(errors="replace"), item.value, int(item.mod_revision))


def _event(event: Any) -> Event:
    deleted = event.type == type(event).DELETE
    return Event(
        "delete" if deleted else "put",
        event.kv.key.decode(errors="replace"),
        event.kv.value,
        int(event.kv.mod_revision),
    )
