"""Draws tokens from logits: temperature, top-k, top-p, min-p, then the inverse of the cumulative distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from pd_kernels.sampling import reference


def sample(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    number: Tensor | None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A token id for each row, [n] int64.

    Filters follow Hugging Face's logits processors, in the order of the parameters, except that top-p also keeps tokens
    tied with the last one it keeps. Equal rows with equal parameters give equal tokens, whatever the other rows are.
    On a GPU nothing waits for the device, and a CUDA graph may capture it; a parameter that is None there costs no
    launches, one that asks for nothing in some rows costs these nothing but the launch.

    Args:
        logits: [n, vocab_size] float32, bfloat16 or float16, left as they are; on a GPU, rows must begin at multiples
            of 16 bytes if one row is a multiple of 16 bytes long. Raises ValueError otherwise.
        temperature: [n], any type of number, as all parameters; 0 or less takes the largest logit, the first of equals.
            None: all rows do.
        top_k: [n]; 0, or vocab_size and more, keeps every token. None: all rows do.
        top_p: [n]; 1 keeps every token. None: all rows do.
        min_p: [n]; 0 keeps every token. None: all rows do.
        number: [n] in [0, 1), where the draw inverts the cumulative distribution in vocabulary order. None only if
            temperature is.
        out: where to write.
    """
    if logits.is_cuda:
        from pd_kernels.sampling import triton_kernel

        if out is None:
            out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        return triton_kernel.sample(logits, temperature, top_k, top_p, min_p, number, out)
    tokens = reference.sample(logits, temperature, top_k, top_p, min_p, number)
    return tokens if out is None else out.copy_(tokens)


__all__ = ["sample"]
