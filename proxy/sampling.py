"""From the API's sampling fields to `protocol.Sampling`."""

from __future__ import annotations

from pdserve.generation_defaults import GenerationDefaults
from pdserve.protocol import Sampling
from proxy.schemas.fields import SamplingFields


def to_sampling(
    body: SamplingFields,
    defaults: GenerationDefaults,
    seed: int,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Sampling:
    """How to sample one choice. The model's defaults stand in for what the client left out, then OpenAI's do."""
    chosen = defaults.under(body, max_tokens)
    top_p = 1.0 if chosen.top_p is None else chosen.top_p
    return Sampling(
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=chosen.min_tokens or 0,
        temperature=1.0 if chosen.temperature is None else chosen.temperature,
        # A nucleus of nothing is its limit, the most likely token.
        top_p=top_p or 1.0,
        top_k=max(0, chosen.top_k or 0) if top_p else 1,
        min_p=chosen.min_p or 0.0,
        repetition_penalty=1.0 if chosen.repetition_penalty is None else chosen.repetition_penalty,
        presence_penalty=chosen.presence_penalty or 0.0,
        frequency_penalty=chosen.frequency_penalty or 0.0,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
