"""Workers cut up in every way, the KV of a sequence as a whole, and what each rank's pool then holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kv_transfer.layout import KvLayout, Span, split
from pd_kernels.kv_pack import pool_with_margins
from pd_kernels.kv_pack.reference import bits, convert
from tests.transfer.harness import POISON, one_group, only

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")


def worker(tp_size: int, partition: Sequence[int], **fields: Any) -> list[KvLayout]:
    """The layouts of all ranks, stage by stage; `partition` says how many layers each stage has."""
    ranks, first = [], 0
    for size in partition:
        for tp_rank in range(tp_size):
            heads = split(fields["num_kv_heads"], tp_size, tp_rank)
            ranks.append(one_group(layers=Span(first, first + size), kv_heads=heads, **fields))
        first += size
    return ranks


@st.composite
def partitions(draw: st.DrawFn, num_layers: int) -> list[int]:
    """Layers of one to three stages, each at least one."""
    stages = draw(st.integers(1, min(3, num_layers)))
    cuts = sorted(draw(st.permutations(range(1, num_layers)))[: stages - 1])
    return [end - first for first, end in zip([0, *cuts], [*cuts, num_layers], strict=True)]


@st.composite
def pairs_of_workers(draw: st.DrawFn) -> tuple[list[KvLayout], list[KvLayout]]:
    """A sender and a receiver of one model, each cut up, typed and blocked as it likes."""
    model = {
        "model": "m",
        "num_layers": draw(st.integers(1, 6)),
        "kv_factor": draw(st.sampled_from([2, 1])),
        "num_kv_heads": draw(st.integers(1, 8)),
        "head_dim": draw(st.integers(1, 4)),
    }
    sides = []
    for _ in range(2):
        own = {"tokens_per_block": draw(st.sampled_from([1, 3, 4, 8])), "dtype": draw(st.sampled_from(DTYPES))}
        partition = draw(partitions(model["num_layers"]))  # type: ignore[arg-type]
        sides.append(worker(draw(st.sampled_from([1, 2, 3, 4, 8])), partition, **model, **own))
    return sides[0], sides[1]


def whole_cache(of: KvLayout, num_tokens: int, seed: int = 0) -> Tensor:
    """KV of one sequence, `[num_layers, kv_factor, num_kv_heads, num_tokens, head_dim]`, in `of`'s type.

    All magnitudes and infinities, and no NaN, which may change its bits when it is converted.
    """
    generator = torch.Generator().manual_seed(seed)
    group = only(of)
    shape = (group.num_layers, group.kv_factor, group.num_kv_heads, num_tokens, group.head_dim)
    values = torch.randn(shape, generator=generator) * (torch.randn(shape, generator=generator) * 9).exp2()
    values.view(-1)[::31] = float("inf")
    return convert(values, getattr(torch, group.dtype))


def empty_pool(of: KvLayout, num_blocks: int) -> Tensor:
    group = only(of)
    pool = pool_with_margins((num_blocks, *group.block_shape), getattr(torch, group.dtype))
    pool.view(torch.uint8).fill_(POISON)
    return pool


def fill(pool: Tensor, of: KvLayout, block_ids: Sequence[int], cache: Tensor) -> None:
    """Put a rank's part of `cache` into its blocks, as an engine would."""
    own = bits(cache)[slice(*only(of).layers), :, slice(*only(of).kv_heads)]
    blocks, slots = _places(of, block_ids, range(cache.shape[3]))
    bits(pool)[blocks, :, :, :, slots] = own.permute(3, 0, 1, 2, 4)


def held(pool: Tensor, of: KvLayout, block_ids: Sequence[int], tokens: range) -> Tensor:
    """What a rank's blocks hold of those tokens, as bits: `[tokens, layers, kv_factor, kv_heads, head_dim]`."""
    blocks, slots = _places(of, block_ids, tokens)
    return bits(pool)[blocks, :, :, :, slots]


def _places(of: KvLayout, block_ids: Sequence[int], tokens: range) -> tuple[Tensor, Tensor]:
    width = only(of).tokens_per_block
    blocks = torch.tensor([block_ids[token // width] for token in tokens], dtype=torch.int64)
    return blocks, torch.tensor([token % width for token in tokens], dtype=torch.int64)


def assert_holds(
    pool: Tensor, of: KvLayout, block_ids: Sequence[int], cache: Tensor, first_token: int, exact_tail: bool
) -> None:
    """`pool` holds its part of `cache` from `first_token` on, converted to its type, and is untouched elsewhere. With
    `exact_tail` also after the last token, within its block."""
    expected = empty_pool(of, pool.shape[0])
    skipped = bits(expected).clone()
    fill(expected, of, block_ids, convert(cache, pool.dtype))
    width = only(of).tokens_per_block
    for token in range(first_token):
        block, slot = block_ids[token // width], token % width
        bits(expected)[block, :, :, :, slot] = skipped[block, :, :, :, slot]
    used = cache.shape[3] % width
    actual = bits(pool).clone()
    if not exact_tail and used and first_token < cache.shape[3]:
        last = block_ids[(cache.shape[3] - 1) // width]
        actual[last, :, :, :, used:] = bits(expected)[last, :, :, :, used:]
    assert torch.equal(actual, bits(expected))
