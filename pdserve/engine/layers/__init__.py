"""What models are made of, besides the fused operations of `pd_kernels`."""
