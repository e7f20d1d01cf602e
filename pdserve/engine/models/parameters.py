"""The decoder's parameters, fused for speed, and where each of a checkpoint's tensors goes in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """One layer. Queries, keys and values are one matrix, gate and up projection another; None: the family has none."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_attention_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Parameters:
    """The whole model. With tied embeddings `lm_head` is `embedding`."""

    embedding: Tensor
    layers: list[LayerParameters]
    final_norm: Tensor
    lm_head: Tensor


def allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Parameters of `config`'s shapes, not filled in."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def layer() -> LayerParameters:
        hidden, intermediate = config.hidden_size, config.intermediate_size
        qkv_size = config.q_size + 2 * config.kv_size
        return LayerParameters(
            input_norm=empty(hidden),
            qkv=empty(qkv_size, hidden),
            qkv_bias=empty(qkv_size) if config.qkv_bias else None,
            q_norm=empty(config.head_dim) if config.qk_norm else None,
            k_norm=empty(config.head_dim) if config.qk_norm else None,
            o=empty(hidden, config.q_size),
            o_bias=empty(hidden) if config.o_bias else None,
            post_attention_norm=empty(hidden),
            gate_up=empty(2 * intermediate, hidden),
            gate_up_bias=empty(2 * intermediate) if config.mlp_bias else None,
            down=empty(hidden, intermediate),
            down_bias=empty(hidden) if config.mlp_bias else None,
        )

    embedding = empty(config.vocab_size, config.hidden_size)
    return Parameters(
        embedding=embedding,
        layers=[layer() for _ in range(config.num_layers)],
        final_norm=empty(config.hidden_size),
        lm_head=embedding if config.tie_word_embeddings else empty(config.vocab_size, config.hidden_size),
    )


def checkpoint_slots(config: ModelConfig, parameters: Parameters) -> dict[str, Tensor]:
    """Every tensor a Hugging Face checkpoint must hold, by name, as the part of `parameters` it fills."""
    slots = {"model.embed_tokens.weight": parameters.embedding, "model.norm.weight": parameters.final_norm}
    if parameters.lm_head is not parameters.embedding:
        slots["lm_head.weight"] = parameters.lm_head
    for index, layer in enumerate(parameters.layers):
        slots |= {f"model.layers.{index}.{name}": slot for name, slot in _layer_slots(config, layer).items()}
    return slots


def _layer_slots(config: ModelConfig, layer: LayerParameters) -> dict[str, Tensor]:
    optional = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_attention_norm,
        "self_attn.q_norm.weight": layer.q_norm,
        "self_attn.k_norm.weight": layer.k_norm,
        "self_attn.o_proj.weight": layer.o,
        "self_attn.o_proj.bias": layer.o_bias,
        "mlp.down_proj.weight": layer.down,
        "mlp.down_proj.bias": layer.down_bias,
    }
    slots = {name: tensor for name, tensor in optional.items() if tensor is not None}
    for kind, qkv, gate_up in (("weight", layer.qkv, layer.gate_up), ("bias", layer.qkv_bias, layer.gate_up_bias)):
        if qkv is not None:
            parts = torch.tensor_split(qkv, (config.q_size, config.q_size + config.kv_size))
            slots |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        if gate_up is not None:
            gate, up = gate_up.chunk(2)
            slots |= {f"mlp.gate_proj.{kind}": gate, f"mlp.up_proj.{kind}": up}
    return slots
