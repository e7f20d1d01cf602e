"""Normalization of rows, alone or with the addition of a residual before it."""

from __future__ import annotations

from torch import Tensor

from pd_kernels.layer_norm import add_layer_norm, layer_norm
from pd_kernels.rms_norm import add_rms_norm, rms_norm
from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.weight import Weight


class RMSNorm:
    """arXiv 1910.07467, over the last dimension of `size`."""

    def __init__(self, build: Builder, name: str, size: int, eps: float) -> None:
        self._weight = build.tensor(Weight(f"{name}.weight", (size,), fill="ones"))
        self._eps = eps

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`x` [num_tokens, size] or [num_tokens, num_heads, size], normalized; in `out`, which may be `x`, if given."""
        return rms_norm(x, self._weight, self._eps, out)

    def add(self, update: Tensor | None, residual: Tensor) -> Tensor:
        """Add `update` to `residual` in place, if there is one, and return the sum's norm."""
        if update is None:
            return rms_norm(residual, self._weight, self._eps)
        return add_rms_norm(update, residual, self._weight, self._eps)


class LayerNorm:
    """arXiv 1607.06450, with a bias, over the last dimension of `size`."""

    def __init__(self, build: Builder, name: str, size: int, eps: float) -> None:
        self._weight = build.tensor(Weight(f"{name}.weight", (size,), fill="ones"))
        self._bias = build.tensor(Weight(f"{name}.bias", (size,), fill="zeros"))
        self._eps = eps

    def add(self, update: Tensor | None, residual: Tensor) -> Tensor:
        """As `RMSNorm.add`."""
        if update is None:
            return layer_norm(residual, self._weight, self._bias, self._eps)
        return add_layer_norm(update, residual, self._weight, self._bias, self._eps)
