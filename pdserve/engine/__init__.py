"""The model executor: scheduler, block manager, model runner, sampler, models. It knows no network."""
