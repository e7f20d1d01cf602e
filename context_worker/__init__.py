"""The prefill role: its engine computes prompts, samples the first token and pushes the KV to a generation worker."""
