"""What the decoder is made of besides the fused operations of `pd_kernels`."""
