"""What the arguments ask of the hardware: device, number type, lengths, attention backend, memory of a step."""

from __future__ import annotations

import importlib.util
import platform

import torch

from pd_kernels import paged_attention
from pdserve.config import LlmArgs
from pdserve.engine.model_config import ModelConfig
from pdserve.errors import ConfigError


def choose_device(args: LlmArgs) -> torch.device:
    """The device that `args.device` names; auto is the first GPU if there is one. Raises ConfigError."""
    if args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device: cuda asked for, but torch finds no CUDA GPU; allowed here: cpu", "device")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(args: LlmArgs, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type of weights, activations and KV.

    Auto is the checkpoint's, with two exceptions: a float32 checkpoint runs in bfloat16 on a GPU, and on a CPU a
    16-bit type is taken only if the processor computes in it.
    """
    if args.dtype != "auto":
        return _dtype(args.dtype)
    saved = _dtype(config.checkpoint_dtype)
    if device.type == "cuda":
        return torch.bfloat16 if saved == torch.float32 else saved
    return saved if _computes_in(saved) else torch.float32


def choose_max_seq_len(args: LlmArgs, config: ModelConfig) -> int:
    """`max_seq_len`, by default what the model was made for. Raises ConfigError if it is more than that."""
    max_seq_len = args.max_seq_len or config.max_position_embeddings
    if max_seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_seq_len: the model was made for at most {config.max_position_embeddings}, got {max_seq_len}",
            "max_seq_len",
        )
    if config.sliding_window is not None and max_seq_len > config.sliding_window:
        raise ConfigError(
            f"max_seq_len: the model attends over a sliding_window of {config.sliding_window} tokens, and longer "
            f"sequences are not supported; allowed: up to {config.sliding_window}, got {max_seq_len}",
            "max_seq_len",
        )
    return max_seq_len


def choose_attention(args: LlmArgs, device: torch.device) -> paged_attention.Backend:
    """The attention implementation; AUTO is Triton on a GPU and torch elsewhere. Raises ConfigError."""
    if args.attn_backend == "TORCH" or (args.attn_backend == "AUTO" and device.type == "cpu"):
        return "torch"
    if device.type == "cpu":
        raise ConfigError("attn_backend: TRITON needs a GPU; allowed on a CPU: AUTO, TORCH", "attn_backend")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("attn_backend: TRITON needs the triton package, which is not installed", "attn_backend")
    return "triton"


def activation_bytes(args: LlmArgs, config: ModelConfig, dtype: torch.dtype) -> int:
    """Upper bound of what one step allocates besides weights and KV.

    Counts the tensors alive at the widest point of a layer, and the sampler's copies of the logits (float32, with a
    float64 sum and a sort); doubled for the allocator's rounding and the kernels' workspaces.
    """
    per_token = 4 * config.hidden_size + 3 * config.intermediate_size + 2 * (config.q_size + config.kv_size)
    layer_bytes = args.max_num_tokens * (per_token * dtype.itemsize + 2 * 4 * config.head_dim)
    logits_bytes = args.max_batch_size * config.vocab_size * 32
    return 2 * (layer_bytes + logits_bytes)


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _computes_in(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for `dtype`; emulated ones are slower than float32."""
    if dtype == torch.float32:
        return True
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16 and platform.machine() in ("x86_64", "AMD64"):
        # oneDNN says yes already where it only emulates.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
