"""Messages between this release and the first one, whose readers are kept in `tests.first_release`, and a later one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from pydantic import BaseModel, ValidationError

import pdserve.cluster_api as now
import pdserve.protocol as now_protocol
import tests.first_release.cluster_api as first
import tests.first_release.protocol as first_protocol
from cluster_manager.registry import StoredWorker
from pdserve.cluster_versions import _FIRST_FIELDS, FIRST_VERSION, to_json, version_of

RANKS = (
    {"instance": "i0", "host": "", "port": 7, "layout": "{}"},
    {"instance": "i1", "host": "h", "port": 8, "layout": "x"},
)
KV = {"worker_id": "w", "instance": "i", "host": "h", "port": 7, "layout_hash": "l", "ranks": RANKS}
INFO = {
    "worker_id": "w",
    "incarnation": "1",
    "role": "context",
    "url": "http://h:1",
    "model": "m",
    "max_seq_len": 9,
    "tokens_per_block": 4,
    "kv": KV,
    "pid": 3,
    "device": "d",
    "dtype": "f",
    "started_at": 1.5,
}
LOAD = {"running": 1, "waiting": 2, "blocks_available": 3, "blocks_total": 4}
RECORD = {"info": INFO, "state": "draining", "load": LOAD}
COUNT = {"ready": 1, "draining": 2, "required": 3}
MESSAGES: list[tuple[str, dict[str, Any]]] = [
    ("WorkerInfo", INFO),
    ("WorkerInfo", {**INFO, "kv": None}),
    ("WorkerRecord", RECORD),
    ("RegisterRequest", {"info": INFO}),
    ("RegisterReply", {"lease_id": "1", "ttl_s": 10.0, "heartbeat_interval_s": 2.0}),
    ("HeartbeatRequest", {"lease_id": "1", "incarnation": "1", "load": LOAD}),
    ("HeartbeatReply", {"state": "ready", "ttl_s": 10.0}),
    ("WorkerList", {"revision": 5, "workers": [RECORD, RECORD]}),
    ("WatchEvent", {"type": "snapshot", "revision": 5, "workers": [RECORD], "epoch": "e"}),
    ("WatchEvent", {"type": "put", "revision": 5, "worker_id": "w", "worker": RECORD}),
    ("WatchEvent", {"type": "delete", "revision": 5, "worker_id": "w"}),
    ("WatchEvent", {"type": "bookmark", "revision": 5, "epoch": "e"}),
    (
        "ClusterStatus",
        {"cluster_name": "c", "store": "etcd", "ready": True, "context_servers": COUNT, "generation_servers": COUNT},
    ),
    ("StoredWorker", {"lease_id": "1", "record": RECORD}),
]
NAMES = [f"{name}-{number}" for number, (name, _) in enumerate(MESSAGES)]


def now_class(name: str) -> type[BaseModel]:
    return StoredWorker if name == "StoredWorker" else getattr(now, name)


def with_a_field_more(value: Any) -> Any:
    """`value` as a later release may write it: every object has a field that nobody knows."""
    if isinstance(value, dict):
        return {**{key: with_a_field_more(inner) for key, inner in value.items()}, "colour": {"of": ["later"]}}
    return [with_a_field_more(inner) for inner in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(("name", "fields"), MESSAGES, ids=NAMES)
def test_a_message_of_the_first_release_is_read_and_said_to_it_unchanged(name: str, fields: dict[str, Any]) -> None:
    told = getattr(first, name).model_validate(fields)
    read = now_class(name).model_validate_json(told.model_dump_json())
    assert getattr(first, name).model_validate_json(to_json(read, FIRST_VERSION)) == told


@pytest.mark.parametrize(("name", "fields"), MESSAGES, ids=NAMES)
def test_fields_of_a_later_release_are_kept_and_not_said_to_the_first(name: str, fields: dict[str, Any]) -> None:
    told = with_a_field_more(fields)
    with pytest.raises(ValidationError):
        getattr(first, name).model_validate(told)
    read = now_class(name).model_validate(told)
    assert_contains(msgspec.json.decode(to_json(read)), msgspec.json.decode(msgspec.json.encode(told)))
    assert getattr(first, name).model_validate_json(to_json(read, FIRST_VERSION)) == getattr(first, name)(**fields)


def assert_contains(whole: Any, part: Any) -> None:
    """Whether all that `part` says is in `whole`, which may say more; what is None may be left out."""
    if isinstance(part, dict):
        for key, value in part.items():
            assert_contains(whole.get(key), value)
    elif isinstance(part, list):
        assert len(whole) == len(part)
        for each, value in zip(whole, part, strict=True):
            assert_contains(each, value)
    else:
        assert whole == part


def test_what_the_first_release_knew_is_written_down_right() -> None:
    known = {name: set(getattr(first, name).model_fields) for name in _FIRST_FIELDS}
    assert {name: set(fields) for name, fields in _FIRST_FIELDS.items()} == known


def test_what_this_release_adds_has_a_default_that_says_nothing() -> None:
    for name in _FIRST_FIELDS:
        added = now_class(name).model_fields.keys() - getattr(first, name).model_fields.keys()
        assert not [field for field in added if now_class(name).model_fields[field].is_required()], name


@pytest.mark.parametrize(
    ("told", "version"), [(None, 1), ("", 1), ("2", 2), ("17", 17), ("x", 1), ("-3", 1), ("9" * 50, 1)]
)
def test_a_peers_version(told: str | None, version: int) -> None:
    assert version_of({} if told is None else {"X-Pdserve-Api": told}) == version


def test_a_worker_of_a_kind_that_is_not_known_hides_no_other() -> None:
    odd = {**RECORD, "info": {**INFO, "role": "encoder", "worker_id": "odd"}}
    event = now.WatchEvent.model_validate({"type": "snapshot", "revision": 5, "workers": [odd, RECORD]})
    assert [record.info.worker_id for record in event.workers or []] == ["w"]


p = first_protocol
KEY = p.Key("r", 3)
LOGPROB = p.TokenLogprob(1, -0.5, [(2, -0.7)])
FRAMES: list[msgspec.Struct] = [
    p.Hello(version=p.PROTOCOL_VERSION, sender="s", incarnation="i"),
    p.GenerateRequest(
        key=KEY,
        token_ids=[1, 2],
        num_prompt_tokens=1,
        sampling=p.Sampling(
            seed=1,
            max_tokens=2,
            min_tokens=1,
            temperature=0.5,
            top_p=0.9,
            top_k=3,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.1,
            frequency_penalty=0.2,
            stop_token_ids=(7,),
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs=1,
        ),
        timeout_s=1.5,
        phase="context",
        peer=p.KvAddress("w", "i", "h", 1, "l", (p.KvRank("i", "h", 1, "{}"),)),
        cache_salt="c",
        kv_only=True,
        evict=True,
    ),
    p.AbortRequest(KEY),
    p.OutputFrame(
        [p.TokenDelta(KEY, 1, [2], [LOGPROB], [None, LOGPROB])],
        [p.Finished(KEY, "error", p.Usage(1, 2, 3), p.Timings(*[0.5] * 7), p.ErrorInfo("c", "m", "p", 502, True), 9)],
    ),
    p.LoadReport(state="ready", running=1, waiting=2, awaiting_kv=3, blocks=p.BlockCounts(10, 1, 2, 3, 4)),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_workers_socket_speaks_the_first_releases_language_both_ways(frame: msgspec.Struct) -> None:
    assert now_protocol.PROTOCOL_VERSION == p.PROTOCOL_VERSION
    to_worker = isinstance(frame, p.Hello | p.GenerateRequest | p.AbortRequest)
    now_reader = now_protocol.to_worker_decoder if to_worker else now_protocol.from_worker_decoder
    first_reader = p.to_worker_decoder if to_worker else p.from_worker_decoder
    read = now_reader.decode(p.encode(frame))
    assert first_reader.decode(now_protocol.encode(read)) == frame
    later = msgspec.msgpack.encode(with_a_field_more(msgspec.to_builtins(read)))
    assert now_reader.decode(later) == read


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (msgspec.msgpack.encode({"type": "pause", "for_s": 3}), "pause"),
        (msgspec.msgpack.encode({"type": "load", "state": "odd"}), None),
        (msgspec.msgpack.encode({"type": 7}), None),
        (msgspec.msgpack.encode([1, 2]), None),
        (b"\xc1garbage", None),
        (b"\x91" * 100_000, None),
        (b"\x81\xa4type\xa2\xff\xfe", None),
        (b"", None),
    ],
)
def test_a_message_of_a_kind_that_only_a_later_release_knows_is_told_from_none(frame: bytes, kind: str | None) -> None:
    assert now_protocol.unknown_kind(frame) == kind
