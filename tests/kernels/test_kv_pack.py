"""Pack and unpack move exactly what is named, for every shape, alignment and type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pd_kernels.kv_pack import (
    MARGIN_BYTES,
    ForeignPool,
    KvSlice,
    block_reader,
    margins,
    pack_blocks,
    pack_slice,
    pool_with_margins,
    read_margins,
    reference,
    triton_kernel,
    unpack_blocks,
    unpack_slice,
)
from pd_kernels.kv_pack.reference import bits, convert

POISON = 0xA5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def blocks(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.view(torch.uint8).fill_(POISON)
    return tensor


def values(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> torch.Tensor:
    """All magnitudes that `dtype` has, infinities and NaN among them."""
    exponents = torch.randn(shape) * 8
    drawn = convert(torch.randn(shape) * exponents.exp2(), dtype)
    flat = drawn.view(-1)
    for i, odd in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
        flat[i::97] = torch.tensor(odd).to(dtype)
    return drawn.to(device)


def check_round_trip(
    block_shape: tuple[int, ...], dtype: torch.dtype, ids: list[int], device: str, layers: tuple[int, int] | None = None
) -> None:
    num_blocks = 11
    first, count = layers or (0, block_shape[0])
    part = slice(first, first + count)
    pool = torch.empty((num_blocks, *block_shape), dtype=dtype, device=device)
    blocks(pool).copy_(torch.randint(0, 256, blocks(pool).shape, dtype=torch.uint8))
    block_ids = torch.tensor(ids, dtype=torch.int64, device=device)
    wanted = pool[ids, part].contiguous()
    packed = torch.full((wanted.numel() * pool.element_size(),), POISON, dtype=torch.uint8, device=device)
    pack_blocks(pool, block_ids, packed, first, count)
    assert torch.equal(packed, wanted.view(-1).view(torch.uint8))

    target = poisoned(pool.shape, dtype, device)
    expected = target.clone()
    bits_of = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[pool.element_size()]
    expected.view(bits_of)[ids, part] = wanted.view(bits_of)
    unpack_blocks(packed, block_ids, target, first, count)
    assert torch.equal(blocks(target), blocks(expected))


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    ids=st.permutations(range(11)),
    count=st.integers(0, 11),
    data=st.data(),
)
def test_any_blocks_on_the_host(
    shape: tuple[int, ...], dtype: torch.dtype, ids: list[int], count: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, shape[0] - 1))
    layers = (first, data.draw(st.integers(1, shape[0] - first)))
    check_round_trip(shape, dtype, list(ids)[:count], "cpu", layers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (3, 2, 5, 4, 8), (32, 2, 2, 16, 33)])
def test_blocks_of_odd_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check_round_trip(shape, dtype, [8, 0, 3, 10], device)
    if shape[0] > 2:
        check_round_trip(shape, dtype, [8, 0, 3, 10], device, layers=(1, 2))


def test_packed_memory_may_start_anywhere() -> None:
    pool = torch.arange(6 * 8, dtype=torch.uint8).view(6, 8)
    memory = torch.full((3 + 16,), POISON, dtype=torch.uint8)
    pack_blocks(pool, torch.tensor([5, 1]), memory[3:])
    assert memory[:3].tolist() == [POISON] * 3
    assert memory[3:].tolist() == [*range(40, 48), *range(8, 16)]


def test_the_row_kernel_copies_parts_of_rows(device: torch.device) -> None:
    """In the interpreter here: the dispatch above takes the reference for pools of the host."""
    pool = torch.randint(0, 1 << 30, (9, 5, 700), dtype=torch.int32, device=device)
    ids = torch.tensor([7, 2, 4], device=device)
    rows = pool.view(9, -1)
    packed = torch.zeros(3, 2100, dtype=torch.int32, device=device)
    for _ in range(2):  # the second launch finds what the first has compiled
        packed.zero_()
        triton_kernel.copy_rows(pool, packed, ids, 350, 1050, torch.int64, scatter=False)
        assert torch.equal(packed, rows[ids, 700:2800])
    triton_kernel.copy_rows(pool, packed[:2], ids[1:], 350, 1050, torch.int64, scatter=False)
    assert torch.equal(packed[:2], rows[ids[1:], 700:2800])
    triton_kernel.copy_rows(pool, packed, ids, 701, 2100, torch.int32, scatter=False)
    assert torch.equal(packed, rows[ids, 701:2801])
    target = torch.zeros_like(pool)
    triton_kernel.copy_rows(target, packed, ids, 701, 2100, torch.int32, scatter=True)
    assert torch.equal(target.view(9, -1)[ids, 701:2801], packed)
    assert int(target.count_nonzero()) == int(packed.count_nonzero())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (3, 2, 5, 4, 8), (32, 2, 2, 16, 33)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_blocks_of_another_pool(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Whose blocks have more layers, elsewhere."""
    source = torch.empty((13, shape[0] + 2, *shape[1:]), dtype=dtype, device=device)
    blocks(source).copy_(torch.randint(0, 256, blocks(source).shape, dtype=torch.uint8))
    foreign = ForeignPool(source.data_ptr(), 13, shape[0] + 2)
    source_ids, ids = [12, 0, 5, 5], [8, 0, 3, 10]
    for first, count in {(0, shape[0]), (shape[0] - 1, 1)}:
        pool = poisoned((11, *shape), dtype, device)
        expected = pool.clone()
        expected[ids, first : first + count] = source[source_ids, first + 2 : first + 2 + count]
        theirs, ours = (torch.tensor(each, device=device) for each in (source_ids, ids))
        reader = block_reader(foreign, pool)
        for _ in range(2):  # the second launch finds what the first has compiled
            blocks(pool).fill_(POISON)
            reader.read(theirs, first + 2, ours, first, count)
            assert torch.equal(blocks(pool), blocks(expected))
        reader.read(theirs[:0], 0, ours[:0], 0, shape[0])
        assert torch.equal(blocks(pool), blocks(expected))


def test_the_read_kernel_takes_any_row(device: torch.device) -> None:
    """In the interpreter here: more tiles than programs, and a last tile that is cut."""
    source = torch.randint(0, 1 << 30, (9, 5, 7000), dtype=torch.int32, device=device)
    pool = torch.zeros(6, 4, 7000, dtype=torch.int32, device=device)
    theirs, ours = torch.tensor([8, 0, 3], device=device), torch.tensor([5, 1, 2], device=device)
    reader = triton_kernel.LayerReader(source.data_ptr(), 5, pool, 3500, torch.int64)
    for _ in range(2):
        pool.zero_()
        reader.read(theirs, 2, ours, 1, 3)
        assert torch.equal(pool[ours, 1:], source[theirs, 2:])
    assert int(pool[[0, 3, 4]].count_nonzero()) + int(pool[:, 0].count_nonzero()) == 0


@pytest.mark.parametrize("shape", [(5, 3, 7), (4, 2, 8)])
def test_margins_are_read_as_blocks_are(device: torch.device, shape: tuple[int, ...]) -> None:
    pool = pool_with_margins(shape, torch.bfloat16, device)
    assert pool.shape == shape
    assert pool.is_contiguous()
    assert pool.data_ptr() % 512 == 0 or not pool.is_cuda
    found = margins(pool)
    assert found is not None
    for margin in found:
        margin.random_(0, 256)
    assert not pool.count_nonzero(), "the margins are no part of it"
    pool.fill_(1.0)
    expected = torch.stack(found)
    assert torch.equal(read_margins(pool.data_ptr(), pool.nbytes, device), expected)
    target = torch.zeros(1, 1, MARGIN_BYTES, dtype=torch.uint8, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    triton_kernel.LayerReader(pool.data_ptr() - MARGIN_BYTES, 1, target, 64, torch.int64).read(row, 0, row, 0, 1)
    assert torch.equal(target.view(-1), expected[0])


@pytest.mark.parametrize("pool", [torch.zeros(4, 8), torch.zeros(2048)[200:300], torch.zeros(2048)[1800:1960]])
def test_other_pools_have_no_margins(pool: torch.Tensor) -> None:
    assert margins(pool) is None


# Shape of a block, tokens of the sequence, and the slice.
SLICES = [
    ((3, 2, 2, 4, 5), 14, KvSlice(1, 2, 0, 1, 3, 10)),
    ((2, 1, 3, 1, 16), 9, KvSlice(0, 1, 1, 2, 0, 9)),
    ((4, 2, 1, 16, 8), 40, KvSlice(3, 1, 0, 1, 15, 2)),
    ((1, 2, 5, 32, 24), 70, KvSlice(0, 1, 2, 3, 1, 69)),
]


def slow_pack(pool: torch.Tensor, table: list[int], part: KvSlice) -> torch.Tensor:
    """The slice by its definition, token by token."""
    size = pool.shape[4]
    out = []
    for token in range(part.token, part.token + part.num_tokens):
        block, slot = table[token // size], token % size
        layers = slice(part.layer, part.layer + part.num_layers)
        out.append(bits(pool)[block, layers, :, part.head : part.head + part.num_heads, slot])
    return torch.stack(out, dim=3).contiguous().view(pool.dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, but for which NaN a NaN has become."""
    nans = expected.float().isnan()
    equal = (bits(actual) == bits(expected)) | (actual.float().isnan() & nans)
    return bool(equal.all())


def tame_values(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> torch.Tensor:
    """Values that every type holds exactly, and one that 8 bits don't hold: Triton's interpreter truncates where
    compiled kernels round, and knows no NaN and no subnormals of 8-bit types."""
    drawn = torch.randint(8, 16, shape) * torch.randint(-3, 4, shape).double().exp2() * torch.randint(-1, 2, shape)
    drawn.view(-1)[::89] = -16384.0
    return convert(drawn.float(), dtype).to(device)


def slice_ops(name: str) -> tuple[object, object]:
    if name == "reference":
        return reference.pack_slice, reference.unpack_slice
    if name == "dispatch":
        return pack_slice, unpack_slice
    return (
        lambda pool, table, part, packed: triton_kernel.copy_slice(pool, table, part, packed, scatter=False),
        lambda packed, table, part, pool: triton_kernel.copy_slice(pool, table, part, packed, scatter=True),
    )


def check_slice(
    name: str,
    shape: tuple[int, ...],
    num_tokens: int,
    part: KvSlice,
    types: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    source_type, packed_type, target_type = types
    interpreted = name == "triton" and device.type == "cpu" and len(set(types)) > 1
    pack, unpack = slice_ops(name)
    table = torch.randperm(17)[: -(-num_tokens // shape[3])].tolist()
    on_device = torch.tensor(table, device=device)
    pool = (tame_values if interpreted else values)((17, *shape), source_type, device)
    packed = poisoned((part.num_layers, shape[1], part.num_heads, part.num_tokens, shape[4]), packed_type, device)
    pack(pool, on_device, part, packed)  # type: ignore[operator]
    wanted = slow_pack(pool.cpu(), table, part)
    assert same(packed.cpu(), convert(wanted, packed_type))

    target = poisoned((17, *shape), target_type, device)
    untouched = bits(target).clone()
    unpack(packed, on_device, part, target)  # type: ignore[operator]
    assert same(slow_pack(target.cpu(), table, part), convert(packed.cpu(), target_type))
    heads = slice(part.head, part.head + part.num_heads)
    for token in range(part.token, part.token + part.num_tokens):
        place = table[token // shape[3]], slice(part.layer, part.layer + part.num_layers), slice(None), heads
        bits(target)[(*place, token % shape[3])] = untouched[(*place, token % shape[3])]
    assert torch.equal(bits(target), untouched)


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize(("shape", "num_tokens", "part"), SLICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_slices_are_copied_as_they_are(
    name: str, shape: tuple[int, ...], num_tokens: int, part: KvSlice, dtype: torch.dtype, device: torch.device
) -> None:
    check_slice(name, shape, num_tokens, part, (dtype, dtype, dtype), device)


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_any_type_becomes_any_other(name: str, source: torch.dtype, target: torch.dtype, device: torch.device) -> None:
    packed = min(target, source, key=lambda dtype: dtype.itemsize)
    check_slice(name, *SLICES[0], (source, packed, target), device)


@pytest.mark.gpu
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_slices_on_the_gpu(source: torch.dtype, target: torch.dtype) -> None:
    packed = min(target, source, key=lambda dtype: dtype.itemsize)
    for case in (*SLICES, ((5, 2, 8, 32, 128), 400, KvSlice(1, 3, 2, 5, 32, 368))):
        check_slice("dispatch", *case, (source, packed, target), torch.device("cuda"))


@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_conversion_saturates(target: torch.dtype) -> None:
    limit = torch.finfo(target).max
    large = torch.tensor([3.3e38, -3.3e38, float("inf"), 3.4028e38, 1.0, float("nan")])
    narrow = convert(large, target).float()
    assert narrow[2].item() == narrow[3].item() == limit
    assert narrow[:2].abs().max().item() <= limit
    assert narrow[4].item() == 1.0
    assert narrow[5].isnan()


@pytest.mark.parametrize("name", ["reference", "triton"])
@given(data=st.data())
def test_any_slice(name: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, most)) for most in (4, 2, 3, 5, 6))
    num_tokens = data.draw(st.integers(1, 17 * shape[3]))
    layer, head, token = (data.draw(st.integers(0, n - 1)) for n in (shape[0], shape[2], num_tokens))
    layers, heads = data.draw(st.integers(1, shape[0] - layer)), data.draw(st.integers(1, shape[2] - head))
    part = KvSlice(layer, layers, head, heads, token, data.draw(st.integers(1, min(6, num_tokens - token))))
    dtype = data.draw(st.sampled_from(FLOATS))
    check_slice(name, shape, num_tokens, part, (dtype, dtype, dtype), torch.device("cpu"))
