"""Token counts, as all endpoints report them."""

from __future__ import annotations

import msgspec


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class UsageInfo(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> UsageInfo:
    details = PromptTokensDetails(cached_tokens)
    return UsageInfo(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)
