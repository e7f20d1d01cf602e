"""Fused operations, one folder each: `reference` (torch, the oracle), `triton_kernel`, and dispatch in `__init__`."""

DISTRIBUTION = "pdserve"
"""What `pdserve.own_packages` knows the package by."""
