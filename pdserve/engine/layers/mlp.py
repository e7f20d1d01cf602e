"""The part of a layer that treats each token by itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pd_kernels.silu_and_mul import silu_and_mul
from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.linear import FusedLinear, Outputs, SummedLinear


class GatedMlp:
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)). Ranks share out the `size` intermediate columns.

    Args:
        gate, up, down: the names of the matrices.
    """

    def __init__(
        self, build: Builder, hidden_size: int, size: int, *, gate: str, up: str, down: str, bias: bool = False
    ) -> None:
        columns = build.mapping.columns(size)
        outputs = [Outputs(name, size, (columns,)) for name in (gate, up)]
        self._gate_up = FusedLinear(build, outputs, hidden_size, bias=bias)
        self._down = SummedLinear(build, down, hidden_size, size, columns, bias=bias)
        self.step_width = 3 * len(columns)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden_size] for `hidden` of that shape."""
        return self._down(silu_and_mul(self._gate_up(hidden)))


class Mlp:
    """down(activation(up(x))). Ranks share out the `size` intermediate columns.

    Args:
        up, down: the names of the matrices; `transposed`: whether the checkpoint stores [num_inputs, num_outputs].
    """

    def __init__(
        self, build: Builder, hidden_size: int, size: int, activation: Callable[[Tensor], Tensor], *,
        up: str, down: str, bias: bool = True, transposed: bool = False,
    ) -> None:  # fmt: skip
        columns = build.mapping.columns(size)
        outputs = [Outputs(up, size, (columns,))]
        self._up = FusedLinear(build, outputs, hidden_size, bias=bias, transposed=transposed)
        self._down = SummedLinear(build, down, hidden_size, size, columns, bias=bias, transposed=transposed)
        self._activation = activation
        self.step_width = 2 * len(columns)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden_size] for `hidden` of that shape."""
        return self._down(self._activation(self._up(hidden)))
