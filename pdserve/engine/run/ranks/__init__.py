"""One model over several GPUs of one host: tensor and pipeline parallelism."""
