"""Windows, softcaps, sinks and slopes: torch and Triton against dense attention in double precision.

The cases of `test_any_spec` also run in bfloat16 where kernels are compiled.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pd_kernels.paged_attention import AttentionSpec, PagedBatch, PrefillRoom, cudnn, declines, prefill
from pd_kernels.paged_attention.captured_prefill import CapturedPrefill
from pd_kernels.paged_attention.decode_kernel import DecodeAttention, choose_block_n
from pd_kernels.paged_attention.reference import TorchPlan
from pd_kernels.paged_attention.triton_kernel import TritonPlan
from tests.kernels.attention_case import LAYER, NUM_LAYERS, TOLERANCE, AnyPlan, Case
from tests.kernels.test_captured_prefill import attend as attend_captured

# A tile of padding in a captured step divides nothing by nothing, and stores none of it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")

CPU = torch.device("cpu")
SEQS = [(1, 40), (1, 16), (1, 4), (1, 0), (7, 0), (18, 15), (2, 30), (33, 5)]
NUM_DECODES = 4


def extras(num_heads: int, device: torch.device) -> dict[str, Any]:
    """Of each extra a value that matters to scores of unit size."""
    return {
        "window": 19,
        "softcap": 1.5,
        "sinks": torch.randn(NUM_LAYERS, num_heads, device=device),
        "alibi": 2.0 ** -torch.arange(1, num_heads + 1, device=device),
        "scale": 0.7,
    }


@pytest.fixture(params=[TorchPlan, TritonPlan], ids=["torch", "triton"])
def plan(request: pytest.FixtureRequest) -> AnyPlan:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", ["scale", "window", "softcap", "sinks", "alibi", "window softcap sinks alibi"])
def test_any_spec(plan: AnyPlan, names: str, dtype: torch.dtype, device: torch.device) -> None:
    if plan is TritonPlan and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as if they held integers")
    changes = {name: value for name, value in extras(6, device).items() if name in names.split()}
    case = Case(SEQS, (6, 2, 24), dtype, device, **changes)
    case.free()
    case.check(plan)


@pytest.mark.parametrize("tokens_per_block", [3, 16])
@pytest.mark.parametrize("window", [1, 2, 16, 17, 40, 1000])
def test_any_window(plan: AnyPlan, window: int, tokens_per_block: int, device: torch.device) -> None:
    """Smaller than a block, as large, longer than some sequences, longer than all."""
    case = Case(SEQS, (4, 2, 16), torch.float32, device, tokens_per_block, window=window)
    case.free()
    case.check(plan)


@pytest.mark.parametrize("window", [1, 3, 20, 65])
def test_a_tile_of_which_some_tokens_see_no_key(window: int, device: torch.device) -> None:
    """64 tokens a tile, over tiles of 16 keys."""
    case = Case([(70, 0), (40, 30)], (1, 1, 256), torch.float32, device, window=window)
    case.free()
    case.check(TritonPlan)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("num_splits", [1, 8])
def test_splits_share_the_window(num_splits: int, with_sinks: bool, device: torch.device) -> None:
    """Windows of a few tiles, from before, at and in a tile; poisoned results show that each is written."""
    tile = choose_block_n(64, 4)
    window = 3 * tile - 5
    lengths = [6 * tile + 1, 3 * tile - 4, 3 * tile - 5, 3 * tile - 6, tile, 1]
    changes = {"sinks": extras(6, device)["sinks"]} if with_sinks else {}
    case = Case([(1, length - 1) for length in lengths], (6, 2, 64), torch.float32, device, window=window, **changes)
    case.free()
    out = torch.full_like(case.expected, float("nan"))
    case.decode(num_splits).run(case.qkv, LAYER, out)
    torch.testing.assert_close(out, case.expected, rtol=1e-5, atol=1e-5)


def test_a_window_bounds_the_splits(device: torch.device) -> None:
    """No program is launched, and no memory taken, for what no share is left for."""
    tile = choose_block_n(16, 4)
    for window, num_splits in ((1, 1), (tile, 1), (3 * tile, 4), (1000 * tile, 64)):
        case = Case([(1, 40)], (2, 1, 16), torch.float32, device, window=window)
        batch, spec = case.batch, case.spec
        planned = DecodeAttention(batch.seq_lens_tensor, batch.block_tables, case.pool, 1, spec, min_tiles=1)
        assert planned._partial.shape[2] == num_splits


@pytest.mark.parametrize("window", [5, 200])
def test_captured_prefills(window: int, device: torch.device) -> None:
    case = Case(SEQS, (6, 2, 16), torch.float32, device, **(extras(6, device) | {"window": window}))
    case.free()
    out = attend_captured(case, NUM_DECODES)
    torch.testing.assert_close(out, case.expected, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype])


def test_captured_prefills_lay_out_what_is_seen_and_no_more(device: torch.device) -> None:
    """The block before token 16 is gone. An empty place between two sequences has no part in it."""
    spans = torch.tensor([[0, 4, 28], [0, 0, 99], [4, 70, 3]], device=device)
    room = PrefillRoom(spans, torch.zeros(3, 9, dtype=torch.int64, device=device), 80, 256)
    pool = torch.zeros(1, 1, 2, 1, 16, 8, device=device)
    spec = AttentionSpec(1, 1, 8, 8, 1.0, window=13)
    laid_out = CapturedPrefill(room, pool, spec, torch.float32)._gathered
    assert laid_out.tolist() == [[0, 16, 32, 0], [2, 0, 73, 0], [2, 64, 73, 0], [0, 0, 0, 0]]


def test_chunks_of_a_prompt_give_what_the_whole_gives(plan: AnyPlan, device: torch.device) -> None:
    """Between chunks, the engine frees the blocks that have left the window."""
    whole = Case([(60, 0)], (4, 2, 16), torch.float32, device, tokens_per_block=8, window=20)
    table = whole.batch.block_tables
    outputs = []
    for start, stop in ((0, 17), (17, 34), (34, 35), (35, 60)):
        table[:, : whole.spec.first_key(start) // 8] = -1
        starts, lengths = (torch.tensor(values, device=device) for values in ([0, stop - start], [stop]))
        batch = PagedBatch([stop - start], [stop], starts, lengths, table)
        outputs.append(plan(batch, whole.pool, whole.spec, torch.float32).run(whole.qkv[start:stop], LAYER))
    torch.testing.assert_close(torch.cat(outputs), whole.expected, rtol=1e-5, atol=1e-5)


def test_a_padding_row_sees_nothing_whatever_its_table(plan: AnyPlan, device: torch.device) -> None:
    case = Case([(1, 40), (1, 7)], (6, 2, 16), torch.float32, device, **extras(6, device))
    case.batch.block_tables[1] = -1
    lengths = torch.tensor([41, 0], device=device)
    batch = PagedBatch([1, 1], [41, 0], case.batch.q_starts, lengths, case.batch.block_tables)
    out = plan(batch, case.pool, case.spec, torch.float32).run(case.qkv, LAYER)
    assert not out[1].any()
    torch.testing.assert_close(out[0], case.expected[0], rtol=1e-5, atol=1e-5)


def test_a_window_bounds_what_a_prefill_lays_out() -> None:
    full = AttentionSpec.plain(8, 2, 32)
    windowed = AttentionSpec(8, 2, 32, 32, 1.0, window=100)
    case = Case([(10, 500)], (8, 2, 32), torch.float32, CPU, window=100)
    planned = TritonPlan(case.batch, case.pool, case.spec, torch.float32)
    assert isinstance(planned._prefills, prefill.PrefillAttention)
    assert planned._prefills._kv.rows.shape[0] == 128
    taken, bound = (prefill.workspace_bytes(spec, torch.float32, 10, 510) for spec in (windowed, full))
    assert planned._prefills._kv.rows.numel() * 4 < taken < bound


def test_a_backend_honours_all_that_the_cache_can_hold() -> None:
    gpu, dtype = torch.device("cuda"), torch.bfloat16
    everything = AttentionSpec(6, 2, 64, 64, **extras(6, CPU))
    assert declines(everything, "triton", dtype, gpu) is None
    assert declines(everything, "torch", dtype, CPU) is None
    assert "GPU" in str(declines(everything, "triton", dtype, CPU))
    for backend in ("torch", "triton"):
        assert "192" in str(declines(AttentionSpec(8, 2, 192, 128, 0.1), backend, dtype, gpu))


@pytest.mark.parametrize("name", ["window", "softcap", "sinks", "alibi"])
def test_cudnn_declines_what_it_does_not_know(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    spec = AttentionSpec(6, 2, 64, 64, 0.1, **{name: extras(6, CPU)[name]})
    assert name in str(cudnn.declines(spec, torch.bfloat16, torch.device("cuda")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "multiple of num_kv_heads"),
        ({"window": 0}, "window"),
        ({"softcap": 0.0}, "softcap"),
        ({"sinks": torch.zeros(2, 5)}, "sinks"),
        ({"sinks": torch.zeros(6)}, "sinks"),
        ({"alibi": torch.zeros(4)}, "alibi"),
    ],
)
def test_a_spec_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 2, "qk_dim": 8, "v_dim": 8, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**(fields | changes))
