"""Products of a few rows: the kernels against torch in double precision, and which shapes get which."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor

from pd_kernels.few_row_matmul import Tiling, few_row_matmul, prepare, tiling_for, triton_kernel
from pd_kernels.few_row_matmul.tiling import MAX_ROWS, choose

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
H200_PROCESSORS = 132
# num_rows, num_outputs, num_inputs, tiling
CASES = [
    (1, 37, 800, Tiling(1, 4, 256, 1, 4, 1)),
    (1, 16, 512, Tiling(1, 4, 256, 1, 4, 1)),
    (1, 33, 512, Tiling(1, 16, 256, 1, 4, 4)),
    (2, 64, 128, Tiling(16, 64, 32, 1, 4, 4)),
    (5, 100, 256, Tiling(16, 64, 32, 3, 4, 4)),
    (16, 65, 64, Tiling(16, 64, 64, 1, 4, 6)),
    (17, 70, 256, Tiling(32, 32, 64, 4, 4, 4)),
    (3, 40, 160, Tiling(16, 32, 32, 4, 4, 4)),  # the last program has nothing left to add
]


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are given to write to holds NaN."""
    full = torch.full
    monkeypatch.setattr(triton_kernel.torch, "empty", lambda shape, **of: full(shape, float("nan"), **of))


def inputs(num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    wide = torch.randn(num_rows, num_inputs + 8, device=device).to(dtype)
    weight = torch.randn(num_outputs, num_inputs, device=device).to(dtype)
    return [wide[:, :num_inputs], weight, torch.randn(num_outputs, device=device).to(dtype)]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs", "tiling"), CASES)
def test_products(
    num_rows: int, num_outputs: int, num_inputs: int, tiling: Tiling, dtype: torch.dtype, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if num_rows > 1 and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as if they held integers")
    x, weight, bias = inputs(num_rows, num_outputs, num_inputs, dtype, device)
    expected = x.double() @ weight.double().T
    poisoned(monkeypatch)
    for added in (None, bias):
        product = triton_kernel.few_row_matmul(x, weight, added, tiling)
        wanted = expected if added is None else expected + added.double()
        assert product.dtype == dtype
        assert float((product - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]
        again = triton_kernel.few_row_matmul(x, weight, added, tiling)
        assert torch.equal(again, product), "the counters are back at 0, and the order of sums is fixed"


def test_rows_do_not_depend_on_each_other(device: torch.device) -> None:
    x, weight, _ = inputs(16, 48, 256, torch.float16, device)
    tiling = Tiling(16, 32, 32, 2, 4, 4)
    together = triton_kernel.few_row_matmul(x, weight, None, tiling)
    assert torch.equal(triton_kernel.few_row_matmul(x[5:8], weight, None, tiling), together[5:8])


def test_strided_inputs_are_refused(device: torch.device) -> None:
    x, weight, _ = inputs(8, 8, 8, torch.float16, device)
    with pytest.raises(ValueError, match="dense"):
        triton_kernel.few_row_matmul(x.T, weight, None, Tiling(16, 64, 128, 1, 4, 4))
    with pytest.raises(ValueError, match="dense"):
        triton_kernel.few_row_matmul(x, weight.T, None, Tiling(16, 64, 128, 1, 4, 4))


def test_one_row_is_never_left_to_torch() -> None:
    assert choose(1, 4096, 4096, H200_PROCESSORS) == Tiling(1, 4, 2048, 1, 4, 1)
    assert choose(1, 4608, 3584, H200_PROCESSORS) == Tiling(1, 16, 256, 1, 4, 4)
    assert choose(1, 4608, 3583, H200_PROCESSORS) is None, "rows that are not on 16 bytes"


def test_several_rows_are_multiplied_where_programs_fill_the_processors() -> None:
    for num_rows, tile_rows in ((2, 16), (16, 16), (17, 32), (MAX_ROWS, 32)):
        assert choose(num_rows, 6144, 4096, H200_PROCESSORS) == Tiling(tile_rows, 64, 128, 1, 4, 6)
        assert choose(num_rows, 4096, 14336, H200_PROCESSORS) == Tiling(tile_rows, 64, 128, 2, 4, 6)
        assert choose(num_rows, 28672, 4096, H200_PROCESSORS) == Tiling(tile_rows, 64, 128, 1, 4, 4)
    assert choose(MAX_ROWS + 1, 4096, 14336, H200_PROCESSORS) is None
    assert choose(0, 4096, 14336, H200_PROCESSORS) is None


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"),
    [
        (4608, 3584),  # 72 programs of 132 processors
        (9216, 4096),  # 144 programs: two rounds for some processors, one for most
        (4096, 2048),  # sums too short to be shared
        (6144, 4032),  # inputs that tiles don't divide
    ],
)
def test_other_products_of_several_rows_are_left_to_torch(num_outputs: int, num_inputs: int) -> None:
    assert choose(2, num_outputs, num_inputs, H200_PROCESSORS) is None
    assert choose(MAX_ROWS, num_outputs, num_inputs, H200_PROCESSORS) is None


def test_the_number_of_rows_changes_only_the_height_of_tiles() -> None:
    """So that a sequence's numbers don't change with the batch it is in."""
    for num_outputs, num_inputs in ((6144, 4096), (4096, 4096), (4096, 14336), (2048, 8192), (128256, 4096)):
        plans = [choose(num_rows, num_outputs, num_inputs, H200_PROCESSORS) for num_rows in range(2, MAX_ROWS + 1)]
        kinds = {(tiling.block_n, tiling.block_k, tiling.num_splits) for tiling in plans if tiling is not None}
        assert None not in plans
        assert len(kinds) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 16, 24, 32])
def test_shared_sums_in_a_graph_are_always_the_same(num_rows: int) -> None:
    device = torch.device("cuda")
    x, weight, bias = inputs(num_rows, 4096, 14336, torch.bfloat16, device)
    tiling = choose(num_rows, 4096, 14336, H200_PROCESSORS)
    assert tiling is not None
    expected = triton_kernel.few_row_matmul(x, weight, bias, tiling)
    exact = x.double() @ weight.double().T + bias.double()
    assert float((expected - exact).norm() / exact.norm()) < TOLERANCE[torch.bfloat16]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products = [triton_kernel.few_row_matmul(x, weight, bias, tiling) for _ in range(20)]
    for _ in range(20):
        for product in products:
            product.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(product, expected) for product in products)


@pytest.mark.gpu
def test_preparing_compiles_for_all_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    _, weight, bias = inputs(1, 4096, 8192, torch.bfloat16, device)
    prepare(weight, bias)
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda *_, **about: compiled.append(about["repr"])
    )
    for num_rows in range(1, MAX_ROWS + 1):
        assert tiling_for(num_rows, weight) is not None
        few_row_matmul(torch.randn(num_rows, 8192, device=device).bfloat16(), weight, bias)
    assert not compiled
