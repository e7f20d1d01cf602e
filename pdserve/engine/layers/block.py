"""The layer of most decoders: attention, then an MLP, each behind a norm and beside a residual."""

from __future__ import annotations

from torch import Tensor

from pdserve.engine.layers.attention import Attention
from pdserve.engine.layers.mlp import GatedMlp, Mlp
from pdserve.engine.layers.norm import LayerNorm, RMSNorm
from pdserve.engine.layers.step_context import StepContext


class Block:
    """residual += attention(norm(residual)); residual += mlp(norm(residual)). Other orders are subclasses.

    `step_width`: numbers that it keeps of a token at its widest point, beside hidden states.
    """

    def __init__(
        self, attention_norm: RMSNorm | LayerNorm, attention: Attention, mlp_norm: RMSNorm | LayerNorm,
        mlp: GatedMlp | Mlp,
    ) -> None:  # fmt: skip
        self._attention_norm, self._attention = attention_norm, attention
        self._mlp_norm, self._mlp = mlp_norm, mlp
        self.step_width = attention.step_width + mlp.step_width

    def __call__(self, update: Tensor | None, residual: Tensor, step: StepContext) -> tuple[Tensor | None, Tensor]:
        """Add `update` to `residual`, and return the block's own update beside the residual that it belongs to.

        That addition is left to the next norm, which is fused with it. Rows that the step does not want any more are
        left out of both; if it wants none, there is no update.

        Args:
            update: [num_tokens, hidden_size] of the block before; None for the first.
            residual: of the same shape; may be changed.
        """
        attended = self._attention(self._attention_norm.add(update, residual), step)
        if step.rows is not None:
            residual = residual.index_select(0, step.rows)
        if attended is None:
            return None, residual
        return self._mlp(self._mlp_norm.add(attended, residual)), residual
