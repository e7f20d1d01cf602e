"""Matrix products with weights that never change."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pd_kernels import few_row_matmul
from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.weight import Cut, Weight

# oneDNN chooses the layout for about this many rows; the same layout serves one row and a thousand within a few
# per cent, and choosing none costs half the speed of float32 decoding.
_PACKED_FOR_ROWS = 8


class Linear:
    """y = x W^T + b. On an x86 CPU the weight is repacked into oneDNN's blocked layout once it is filled.

    With the plain layout oneDNN would repack at each call: for SmolLM2-135M on two cores (torch 2.13), 8 rows times
    a [3072, 576] matrix take 208 us plain and 89 us packed in bfloat16, 565 and 213 us in float32. On a GPU a few rows,
    as a decode step has, are multiplied by a kernel of our own where it is faster.

    Args:
        weight: [num_outputs, num_inputs], declared; not kept if it is repacked.
        bias: [num_outputs].
        add_up: sums the products of all ranks; None: they stay apart.
    """

    def __init__(
        self, build: Builder, weight: Tensor, bias: Tensor | None, add_up: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._weight, self._bias, self._add_up = weight, bias, add_up
        self._is_packed = self._takes_few_rows = False
        build.on_finish(self._prepare)

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, num_outputs] for `x` [num_tokens, num_inputs]."""
        product: Tensor
        if self._is_packed:
            product = _packed_product(x, self._weight, self._bias, "none", [], "")
        elif self._takes_few_rows:
            product = few_row_matmul.few_row_matmul(x, self._weight, self._bias)
        else:
            product = functional.linear(x, self._weight, self._bias)
        return product if self._add_up is None else self._add_up(product)

    def _prepare(self) -> None:
        self._is_packed = _can_pack(self._weight)
        if self._is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, _PACKED_FOR_ROWS)
        self._takes_few_rows = few_row_matmul.is_supported(self._weight)
        if self._takes_few_rows:
            few_row_matmul.prepare(self._weight, self._bias)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Rows of a `FusedLinear`: a matrix of `size` rows in the checkpoint, of which this rank holds `parts`."""

    name: str
    size: int
    parts: tuple[range, ...]


class FusedLinear(Linear):
    """The matrices of `outputs`, one below the other, as one. Ranks share out the rows.

    Args:
        outputs: the names lack ".weight" and ".bias".
        transposed: whether the checkpoint stores [num_inputs, num_outputs].
    """

    def __init__(
        self, build: Builder, outputs: Sequence[Outputs], num_inputs: int, *, bias: bool, transposed: bool = False
    ) -> None:
        num_rows = [sum(map(len, each.parts)) for each in outputs]
        weight = build.empty(sum(num_rows), num_inputs)
        biases = build.empty(sum(num_rows)) if bias else None
        for each, rows in zip(outputs, torch.split(weight, num_rows), strict=True):
            build.declare(_matrix(each.name, (each.size, num_inputs), Cut(0, each.parts), transposed), rows)
        if biases is not None:
            for each, part in zip(outputs, torch.split(biases, num_rows), strict=True):
                build.declare(Weight(f"{each.name}.bias", (each.size,), Cut(0, each.parts), fill="zeros"), part)
        super().__init__(build, weight, biases)


class SummedLinear(Linear):
    """A product whose inputs ranks share out: this rank has `part` of `num_inputs`, and every rank gets the sum.

    The bias is in the first rank's product.
    """

    def __init__(
        self, build: Builder, name: str, num_outputs: int, num_inputs: int, part: range, *, bias: bool,
        transposed: bool = False,
    ) -> None:  # fmt: skip
        weight = build.empty(num_outputs, len(part))
        build.declare(_matrix(name, (num_outputs, num_inputs), Cut(1, (part,)), transposed), weight)
        added = build.empty(num_outputs) if bias and build.mapping.tp_rank == 0 else None
        if bias:
            build.declare(Weight(f"{name}.bias", (num_outputs,), fill="zeros"), added)
        super().__init__(build, weight, added, build.group.all_reduce if build.mapping.tp_size > 1 else None)


def _matrix(name: str, shape: tuple[int, int], cut: Cut, transposed: bool) -> Weight:
    if not transposed:
        return Weight(f"{name}.weight", shape, cut)
    return Weight(f"{name}.weight", shape[::-1], Cut(1 - cut.dim, cut.parts), torch.t)


_packed_product = torch.ops.mkldnn._linear_pointwise


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
