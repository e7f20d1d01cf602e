"""Pack and unpack move exactly the named blocks, for every shape and alignment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pd_kernels.kv_pack import pack_blocks, unpack_blocks

POISON = 0xA5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def blocks(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


def check_round_trip(block_shape: tuple[int, ...], dtype: torch.dtype, ids: list[int], device: str) -> None:
    num_blocks = 11
    pool = torch.empty((num_blocks, *block_shape), dtype=dtype, device=device)
    blocks(pool).copy_(torch.randint(0, 256, blocks(pool).shape, dtype=torch.uint8))
    block_ids = torch.tensor(ids, dtype=torch.int64, device=device)
    packed = torch.full((len(ids) * blocks(pool).shape[1],), POISON, dtype=torch.uint8, device=device)
    pack_blocks(pool, block_ids, packed)
    assert torch.equal(packed, blocks(pool)[ids].flatten())

    target = torch.empty_like(pool)
    blocks(target).fill_(POISON)
    unpack_blocks(packed, block_ids, target)
    others = [i for i in range(num_blocks) if i not in ids]
    assert torch.equal(blocks(target)[ids], blocks(pool)[ids])
    assert bool((blocks(target)[others] == POISON).all())


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    ids=st.permutations(range(11)),
    count=st.integers(0, 11),
)
def test_any_shape_on_the_host(shape: tuple[int, ...], dtype: torch.dtype, ids: list[int], count: int) -> None:
    check_round_trip(shape, dtype, list(ids)[:count], "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (3, 2, 5, 4, 8), (32, 2, 2, 16, 33)])
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check_round_trip(shape, dtype, [8, 0, 3, 10], device)


def test_packed_memory_may_start_anywhere() -> None:
    pool = torch.arange(6 * 8, dtype=torch.uint8).view(6, 8)
    memory = torch.full((3 + 16,), POISON, dtype=torch.uint8)
    pack_blocks(pool, torch.tensor([5, 1]), memory[3:])
    assert memory[:3].tolist() == [POISON] * 3
    assert memory[3:].tolist() == [*range(40, 48), *range(8, 16)]
