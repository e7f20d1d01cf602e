"""Networks: `base` says what one must do, `ucx` and `nixl` are real ones, `loopback` joins threads of one process."""
