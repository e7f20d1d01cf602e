"""Norms, SwiGLU and cache writes: the Triton kernels agree with the torch oracles, and the oracles with maths."""

from __future__ import annotations

import pytest
import torch

from pd_kernels.layer_norm import reference as layer_norm_reference
from pd_kernels.layer_norm import triton_kernel as layer_norm_triton
from pd_kernels.rms_norm import reference as rms_reference
from pd_kernels.rms_norm import triton_kernel as rms_triton
from pd_kernels.rope_cache import reference as rope_reference
from pd_kernels.rope_cache import triton_kernel as rope_triton
from pd_kernels.silu_and_mul import reference as silu_reference
from pd_kernels.silu_and_mul import triton_kernel as silu_triton

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 576), (2, 1025)])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, weight = torch.randn(shape, device=device).to(dtype), torch.randn(shape[1], device=device).to(dtype)
    expected = (x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()).to(dtype)
    assert_close(rms_reference.rms_norm(x, weight, 1e-5), expected)
    assert_close(rms_triton.rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_in_place_touches_nothing_else(dtype: torch.dtype, device: torch.device) -> None:
    packed = torch.randn(4, 9 * 24, device=device).to(dtype)
    weight = torch.randn(24, device=device).to(dtype)
    results = []
    for implementation in (rms_reference, rms_triton):
        qkv = packed.clone()
        heads = qkv.view(4, 9, 24)[:, 3:6]
        implementation.rms_norm(heads, weight, 1e-6, out=heads)
        assert torch.equal(qkv[:, : 3 * 24], packed[:, : 3 * 24])
        assert torch.equal(qkv[:, 6 * 24 :], packed[:, 6 * 24 :])
        results.append(heads)
    assert_close(results[1], results[0])
    assert not torch.equal(results[0], packed.view(4, 9, 24)[:, 3:6])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_updates_the_residual(dtype: torch.dtype, device: torch.device) -> None:
    x, residual = torch.randn(2, 3, 100, device=device).to(dtype)
    weight = torch.randn(100, device=device).to(dtype)
    for implementation in (rms_reference, rms_triton):
        updated = residual.clone()
        normed = implementation.add_rms_norm(x, updated, weight, 1e-5)
        assert_close(updated, x + residual)
        assert_close(normed, rms_reference.rms_norm(x + residual, weight, 1e-5))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9), (3, 30), (2, 1025)])
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, with_bias: bool, device: torch.device) -> None:
    """Rows far from zero where the type can hold them, in a tensor that is wider than they are."""
    far, tolerance = {torch.float32: (5.0, 1e-5)}.get(dtype, (0.0, TOLERANCE[dtype]))
    wide = torch.full((shape[0], shape[1] + 3), float("nan"), device=device, dtype=dtype)
    x = wide[:, : shape[1]].copy_(3 * torch.randn(shape, device=device) + far)
    weight, bias = torch.randn(2, shape[1], device=device).to(dtype)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    expected = (normed + bias.double() if with_bias else normed).to(dtype)
    residual = torch.randn(shape, device=device).to(dtype)
    for implementation in (layer_norm_reference, layer_norm_triton):
        own_bias = bias if with_bias else None
        normed = implementation.layer_norm(x, weight, own_bias, 1e-5)
        torch.testing.assert_close(normed, expected, rtol=tolerance, atol=tolerance)
        updated = residual.clone()
        added = implementation.add_layer_norm(x, updated, weight, own_bias, 1e-5)
        assert_close(updated, x + residual)
        again = layer_norm_reference.layer_norm(x + residual, weight, own_bias, 1e-5)
        torch.testing.assert_close(added, again, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (2, 2 * 1500)])
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    wide = torch.full((shape[0], shape[1] + 3), float("nan"), device=device, dtype=dtype)
    x = wide[:, : shape[1]].copy_(torch.randn(shape, device=device))
    gate, up = x.double().chunk(2, -1)
    expected = (gate * gate.sigmoid() * up).to(dtype)
    assert_close(silu_reference.silu_and_mul(x), expected)
    assert_close(silu_triton.silu_and_mul(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 2), (6, 2, 24), (4, 4, 64), (3, 1, 256)])
def test_rope_and_cache(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    num_tokens, num_blocks, num_layers, tokens_per_block, layer = 5, 4, 3, 3, 1
    packed = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    angles = torch.rand(num_tokens, head_dim // 2, device=device) * 6
    slots = torch.randperm(num_blocks * tokens_per_block, device=device)[:num_tokens]
    shape = (num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim)
    heads = packed.double().view(num_tokens, -1, head_dim)
    x, y = heads.chunk(2, dim=-1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    rotated = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
    rotated[:, num_heads + num_kv_heads :] = heads[:, num_heads + num_kv_heads :]
    for implementation in (rope_reference, rope_triton):
        qkv, pool = packed.clone(), torch.full(shape, float("nan"), dtype=dtype, device=device)
        implementation.rope_and_cache(qkv, angles.cos(), angles.sin(), slots, pool, layer, num_heads)
        assert_close(qkv.view_as(heads), rotated.to(dtype))
        kv = qkv.view_as(heads)[:, num_heads:].view(num_tokens, 2, num_kv_heads, head_dim)
        for token, slot in enumerate(slots.tolist()):
            written = pool[slot // tokens_per_block, layer, :, :, slot % tokens_per_block]
            assert torch.equal(written, kv[token])
        assert int(pool.isnan().sum()) == pool.numel() - num_tokens * 2 * num_kv_heads * head_dim


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 2), (12, 12, 24), (5, 1, 256)])
def test_a_cache_is_written_without_rotation(
    num_heads: int, num_kv_heads: int, head_dim: int, cache_dtype: torch.dtype | None, device: torch.device
) -> None:
    packed = torch.randint(-8, 8, (4, (num_heads + 2 * num_kv_heads) * head_dim), device=device).float()
    slots = torch.tensor([7, -1, 0, 11], device=device)
    expected = packed.view(4, -1, head_dim)[:, num_heads:].view(4, 2, num_kv_heads, head_dim)
    for implementation in (rope_reference, rope_triton):
        qkv, pool = packed.clone(), torch.full((4, 3, 2, num_kv_heads, 3, head_dim), float("nan"), device=device)
        pool = pool.to(cache_dtype or torch.float32)
        implementation.write_cache(qkv, slots, pool, 1, num_heads)
        assert torch.equal(qkv, packed)
        written = pool.float()
        for token, (block, at) in {0: (2, 1), 2: (0, 0), 3: (3, 2)}.items():
            assert torch.equal(written[block, 1, :, :, at], expected[token])
        assert int(written.isnan().sum()) == written.numel() - 3 * 2 * num_kv_heads * head_dim


def test_a_padding_row_writes_nothing_to_the_cache(device: torch.device) -> None:
    qkv = torch.randn(3, 4 * 8, device=device)
    angles = torch.rand(3, 4, device=device)
    slots = torch.tensor([-1, 5, -7], device=device)
    for implementation in (rope_reference, rope_triton):
        pool = torch.full((4, 2, 2, 1, 3, 8), float("nan"), device=device)
        implementation.rope_and_cache(qkv.clone(), angles.cos(), angles.sin(), slots, pool, 1, 2)
        written = (~pool.isnan()).nonzero()
        assert len(written) == 2 * 8
        assert {tuple(at) for at in written[:, [0, 1, 4]].tolist()} == {(1, 1, 2)}


def test_nothing_to_do_is_fine(device: torch.device) -> None:
    empty = torch.empty(0, 8, device=device)
    assert rms_triton.rms_norm(empty, torch.ones(8, device=device), 1e-5).shape == (0, 8)
    assert silu_triton.silu_and_mul(empty).shape == (0, 4)
    assert layer_norm_triton.layer_norm(empty, torch.ones(8, device=device), None, 1e-5).shape == (0, 8)


def test_strided_rows_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="dense"):
        silu_triton.silu_and_mul(torch.randn(8, 4, device=device).T)
    with pytest.raises(ValueError, match="dense"):
        rms_triton.rms_norm(torch.randn(8, 4, device=device).T, torch.ones(8, device=device), 1e-5)
    with pytest.raises(ValueError, match="dense"):
        layer_norm_triton.layer_norm(torch.randn(8, 4, device=device).T, torch.ones(8, device=device), None, 1e-5)
