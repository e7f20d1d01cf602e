"""The Gaussian error linear unit, exact or by the hyperbolic tangent (arXiv 1606.08415).

torch's own kernel is one pass over memory on every device, so there is no other.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional


def gelu(x: Tensor, approximate: Literal["none", "tanh"]) -> Tensor:
    """x * Phi(x) of each element, Phi the normal distribution's; "tanh" takes 0.5 * (1 + tanh(...)) for it."""
    return functional.gelu(x, approximate=approximate)


__all__ = ["gelu"]
