"""Networks: `base` says what one must do, `ucx` is the real one, `loopback` joins threads of one process."""
