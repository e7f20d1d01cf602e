"""Fused operations, one folder each: `reference` (torch, the oracle), `triton_kernel`, and dispatch in `__init__`."""
