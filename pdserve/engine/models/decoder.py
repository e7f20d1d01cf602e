"""The decoder: Llama, Mistral, Qwen2, Qwen3 and their kin, over packed tokens and a paged KV cache.

Owns the parameters and the order of operations. One code path for every device; what differs between them is inside
`pd_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pd_kernels import paged_attention
from pd_kernels.rms_norm import add_rms_norm, rms_norm
from pd_kernels.rope_cache import rope_and_cache
from pd_kernels.silu_and_mul import silu_and_mul
from pdserve.engine.layers.rope import RotaryEmbedding
from pdserve.engine.layers.step_input import StepInput
from pdserve.engine.model_config import ModelConfig
from pdserve.engine.models.parameters import LayerParameters, Parameters


class Decoder:
    """A model with its parameters; the KV pool is lent to each call."""

    def __init__(self, config: ModelConfig, parameters: Parameters, attention: paged_attention.Backend) -> None:
        self.config = config
        self.parameters = parameters
        self._attention: paged_attention.Backend = attention
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, parameters.embedding.device)

    def forward(self, step: StepInput, pool: Tensor) -> Tensor:
        """Hidden states after the final norm, [num_tokens, hidden_size]; writes the step's KV into `pool`."""
        eps, layers = self.config.rms_norm_eps, self.parameters.layers
        plan = paged_attention.plan(step.batch, pool, self.config.num_heads, self._attention)
        cos, sin = self._rotary(step.positions)
        residual = functional.embedding(step.token_ids, self.parameters.embedding)
        hidden = rms_norm(residual, layers[0].input_norm, eps)
        next_norms = [layer.input_norm for layer in layers[1:]] + [self.parameters.final_norm]
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            qkv = self._project(hidden, layer)
            rope_and_cache(qkv, cos, sin, step.slots, pool, index, self.config.num_heads)
            attended = functional.linear(plan.run(qkv, index), layer.o, layer.o_bias)
            hidden = add_rms_norm(attended, residual, layer.post_attention_norm, eps)
            activated = silu_and_mul(functional.linear(hidden, layer.gate_up, layer.gate_up_bias))
            hidden = add_rms_norm(functional.linear(activated, layer.down, layer.down_bias), residual, next_norm, eps)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab_size] in float32 of rows of `forward`'s result."""
        return functional.linear(hidden, self.parameters.lm_head).to(torch.float32)

    def _project(self, hidden: Tensor, layer: LayerParameters) -> Tensor:
        """Queries, keys and values, with the families' norms over each head of the first two."""
        qkv = functional.linear(hidden, layer.qkv, layer.qkv_bias)
        if layer.q_norm is not None and layer.k_norm is not None:
            heads = qkv.view(qkv.shape[0], -1, self.config.head_dim)
            first_value = self.config.num_heads + self.config.num_kv_heads
            queries, keys = heads[:, : self.config.num_heads], heads[:, self.config.num_heads : first_value]
            rms_norm(queries, layer.q_norm, self.config.rms_norm_eps, out=queries)
            rms_norm(keys, layer.k_norm, self.config.rms_norm_eps, out=keys)
        return qkv
