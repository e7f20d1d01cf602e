"""Between any two workers each rank gets each of its layers and heads once, and bit for bit what was computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.copies import BlockCopier
from kv_transfer.layout import KvLayout, KvPoolView, Span
from kv_transfer.pieces import Cursor, Piece, Wanted, num_blocks
from kv_transfer.routes import Packing, Share, held_by, packing, routes
from pdserve.errors import LayoutMismatch
from tests.transfer.harness import only
from tests.transfer.shards import assert_holds, empty_pool, fill, pairs_of_workers, whole_cache, worker

MODEL = {"model": "m", "num_layers": 6, "kv_factor": 2, "num_kv_heads": 3, "head_dim": 2, "dtype": "bfloat16"}


def scattered(tokens: int, tokens_per_block: int, seed: int) -> list[int]:
    count = num_blocks(tokens, tokens_per_block)
    return torch.randperm(count + 2, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def changed(of: KvLayout, **changes: Any) -> KvLayout:
    return msgspec.structs.replace(of, groups=(msgspec.structs.replace(only(of), **changes),))


def pack(sender: KvLayout, receiver: KvLayout, share: Share) -> Packing:
    return packing(only(sender), only(receiver), share)


@settings(deadline=None, max_examples=400)
@given(workers=pairs_of_workers(), data=st.data())
def test_any_cache_arrives_bit_for_bit(workers: tuple[list[KvLayout], list[KvLayout]], data: st.DataObject) -> None:
    senders, receivers = workers
    num_tokens = data.draw(st.integers(1, 25))
    cache = whole_cache(senders[0], num_tokens)
    source = scattered(num_tokens, only(senders[0]).tokens_per_block, 1)
    target = scattered(num_tokens, only(receivers[0]).tokens_per_block, 2)
    cached = (
        data.draw(st.integers(0, num_tokens // only(receivers[0]).tokens_per_block))
        * only(receivers[0]).tokens_per_block
    )
    from_pools = [empty_pool(each, len(source) + 2) for each in senders]
    for pool, each in zip(from_pools, senders, strict=True):
        fill(pool, each, source, cache)
    to_pools = [empty_pool(each, len(target) + 2) for each in receivers]

    def copiers(pools: list[torch.Tensor], layouts: list[KvLayout]) -> list[BlockCopier]:
        return [BlockCopier(KvPoolView((pool,), each)) for pool, each in zip(pools, layouts, strict=True)]

    packers, unpackers = copiers(from_pools, senders), copiers(to_pools, receivers)
    tables = packers[0].block_table(source), unpackers[0].block_table(target)
    whole = set()
    for sender, receiver, (share,) in routes(senders, receivers):
        packed = pack(senders[sender], receivers[receiver], share)
        whole.add(packed.whole_blocks)
        max_units = data.draw(st.sampled_from([1, 2, 5, 1000]))
        wanted = Piece(share.layers, Span(cached, num_tokens))
        cursor = Cursor([Wanted(wanted, packed.unit_tokens, max_units)])
        cursor.advance(num_tokens, share.layers)
        while cursor.has_next:
            piece = cursor.take()
            payload = torch.empty(packed.nbytes(piece), dtype=torch.uint8)
            packers[sender].pack(tables[0], piece, packed, payload)
            unpackers[receiver].unpack(payload, tables[1], piece, packed, None)
    for pool, each in zip(to_pools, receivers, strict=True):
        assert_holds(pool, each, target, cache, cached, exact_tail=True not in whole)


@given(workers=pairs_of_workers())
def test_replicas_take_turns(workers: tuple[list[KvLayout], list[KvLayout]]) -> None:
    """Among ranks that hold the same, none sends to two more receivers (of one stage) than another."""
    senders, receivers = workers
    found = routes(senders, receivers)
    for held in {held_by(each) for each in senders}:
        twins = [rank for rank, each in enumerate(senders) if held_by(each) == held]
        for heads in {only(each).kv_heads for each in receivers}:
            load = Counter(dict.fromkeys(twins, 0))
            load.update(r.sender for r in found if r.sender in twins and only(receivers[r.receiver]).kv_heads == heads)
            stages = len({only(each).layers for each in receivers})
            assert max(load.values()) - min(load.values()) <= stages


def test_equal_workers_exchange_rank_by_rank_in_whole_blocks() -> None:
    ranks = worker(8, [4, 2], tokens_per_block=4, **MODEL)
    found = routes(ranks, ranks)
    assert [(route.sender, route.receiver) for route in found] == [(rank, rank) for rank in range(16)]
    assert all(pack(ranks[r.sender], ranks[r.receiver], r.shares[0]).whole_blocks for r in found)


def test_another_partition_of_layers_still_moves_whole_pieces_of_blocks() -> None:
    senders, receivers = (worker(1, sizes, tokens_per_block=4, **MODEL) for sizes in ([1, 5], [3, 3]))
    found = routes(senders, receivers)
    assert [(route.sender, route.receiver, tuple(route.shares[0].layers)) for route in found] == [
        (0, 0, (0, 1)),
        (1, 0, (1, 3)),
        (1, 1, (3, 6)),
    ]
    assert all(pack(senders[r.sender], receivers[r.receiver], r.shares[0]).whole_blocks for r in found)


def test_the_smaller_type_travels() -> None:
    for sender, receiver, on_the_way in (
        ("bfloat16", "float8_e4m3fn", "float8_e4m3fn"),
        ("float8_e4m3fn", "float32", "float8_e4m3fn"),
        ("float16", "bfloat16", "bfloat16"),
    ):
        one, other = (worker(1, [6], tokens_per_block=4, **MODEL | {"dtype": d})[0] for d in (sender, receiver))
        packed = pack(one, other, Share(Span(0, 6), Span(0, 3)))
        assert packed.dtype == on_the_way
        assert packed.cell_bytes == 2 * 3 * 2 * getattr(torch, on_the_way).itemsize


def test_what_nobody_holds_or_two_hold_in_part_is_refused_by_the_field() -> None:
    whole = worker(1, [6], tokens_per_block=4, **MODEL)
    stages = worker(1, [2, 4], tokens_per_block=4, **MODEL)
    ranks = worker(3, [6], tokens_per_block=4, **MODEL)
    overlapping = [*ranks[:2], changed(ranks[2], kv_heads=Span(1, 3))]
    for senders, field in ((stages[:1], "layers"), (ranks[1:], "kv_heads"), (overlapping, "kv_heads")):
        with pytest.raises(LayoutMismatch) as caught:
            routes(senders, whole)
        assert caught.value.param == field
    with pytest.raises(LayoutMismatch) as caught:
        routes([changed(whole[0], head_dim=3)], whole)
    assert caught.value.param == "head_dim"
    with pytest.raises(LayoutMismatch) as caught:
        pack(ranks[0], whole[0], Share(Span(0, 6), Span(0, 2)))
    assert caught.value.param == "kv_heads"
