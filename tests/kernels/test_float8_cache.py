"""A cache of float8_e4m3fn: what is written to it, and attention over it, against dense attention in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from pd_kernels.paged_attention import plan as make_plan
from pd_kernels.paged_attention.reference import TorchPlan
from pd_kernels.paged_attention.triton_kernel import TritonPlan
from pd_kernels.rope_cache import reference as rope_reference
from pd_kernels.rope_cache import triton_kernel as rope_triton
from tests.kernels.attention_case import DECODES, LAYER, PREFILLS, SHAPES, AnyPlan, Case

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(params=[TorchPlan, TritonPlan], ids=["torch", "triton"])
def plan(request: pytest.FixtureRequest) -> AnyPlan:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_and_decode_in_one_batch(plan: AnyPlan, shape: tuple[int, int, int], device: torch.device) -> None:
    """Fresh prompts attend over their exact keys, all others over rounded ones: `Case` expects just that."""
    Case(DECODES + PREFILLS, shape, torch.float32, device, cache_dtype=FLOAT8).check(plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decodes_in_half_precision(plan: AnyPlan, dtype: torch.dtype, device: torch.device) -> None:
    Case(DECODES, (9, 3, 64), dtype, device, cache_dtype=FLOAT8).check(plan)


def test_prefills_in_float16(plan: AnyPlan, device: torch.device) -> None:
    Case(PREFILLS, (9, 3, 64), torch.float16, device, cache_dtype=FLOAT8).check(plan)


def test_queries_beyond_float16_do_not_overflow(device: torch.device) -> None:
    """Decodes compute in float16 over a float8 cache, also for bfloat16 queries."""
    case = Case([(1, 20)], (2, 1, 16), torch.bfloat16, device, cache_dtype=FLOAT8)
    case.qkv[:, : 2 * 16] *= 1e6
    assert case.run(TritonPlan).isfinite().all()


def test_an_8_bit_pool_is_computed_over_in_bfloat16_unless_said_otherwise(device: torch.device) -> None:
    case = Case([(1, 20), (3, 0), (2, 9)], (2, 1, 16), torch.bfloat16, device, cache_dtype=FLOAT8)
    out = make_plan(case.batch, case.pool, case.spec, "torch").run(case.qkv, LAYER)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, case.expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("implementation", [rope_reference, rope_triton], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_beyond_the_range_is_written_as_the_largest(
    implementation: ModuleType, dtype: torch.dtype, device: torch.device
) -> None:
    num_tokens, num_kv_heads, head_dim = 6, 2, 24
    qkv = torch.randn(num_tokens, (3 + 2 * num_kv_heads) * head_dim, device=device)
    qkv *= torch.tensor([1e-4, 0.01, 1.0, 100.0, 440.0, 6e4], device=device)[:, None]
    if implementation is rope_triton and device.type == "cpu":
        # Triton's interpreter does not round to the nearest float8.
        qkv = qkv.clamp(-448, 448).to(FLOAT8).float() * torch.where(qkv.abs() > 200, 4, 1)
    qkv = qkv.clamp(-6e4, 6e4).to(dtype)
    angles = torch.zeros(num_tokens, head_dim // 2, device=device)
    pool = torch.zeros(3, 2, 2, num_kv_heads, 4, head_dim, device=device).to(FLOAT8)
    slots = torch.tensor([3, 9, 0, 7, 11, 4], device=device)
    exact = qkv.clone()
    implementation.rope_and_cache(qkv, angles.cos(), angles.sin(), slots, pool, 1, 3)
    assert torch.equal(qkv, exact)
    new = exact[:, 3 * head_dim :].float().view(num_tokens, 2, num_kv_heads, head_dim)
    written = pool[:, 1][slots // 4, :, :, slots % 4].float()
    assert torch.equal(written, new.clamp(-448, 448).to(FLOAT8).float())
    assert new.abs().max() > 448 == written.abs().max()
    assert not pool[:, 0].float().any()
