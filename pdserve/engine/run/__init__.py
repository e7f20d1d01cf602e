"""How a step runs: the model runner, packed steps, CUDA graphs, sampling, and the ranks that share a model."""
