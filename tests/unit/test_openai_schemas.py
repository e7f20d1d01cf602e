"""The request models: what is accepted, what is refused, and by which name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pdserve.errors import RequestError
from pdserve.generation_defaults import GenerationDefaults
from pdserve.sampling_params import SamplingParams
from pdserve.seeds import choice_seeds
from proxy.sampling import to_sampling
from proxy.schemas.chat import ChatCompletionRequest
from proxy.schemas.completions import CompletionRequest

USER = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "p", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": USER, **fields})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_all_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [None, [], {}, 3, [True], [1, "a"], ["a", [1]], [[1.0]], [-1], [[1], -1]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(prompt=prompt)
    assert caught.value.errors()[0]["loc"] == ("prompt",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 5.0),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("top_p", 1.01),
        ("top_p", float("inf")),
        ("n", 0),
        ("n", 1000),
        ("seed", 2**63),
        ("logprobs", 6),
        ("logprobs", True),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", 3),
        ("stop_token_ids", [True]),
        ("stream", 1),
        ("echo", "yes"),
        ("suffix", "x"),
        ("logit_bias", {"1": 5}),
        ("no_such_field", None),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("top_k", -2),
        ("min_p", 1.1),
    ],
)
def test_a_bad_value_is_refused_by_the_fields_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("functions", [{}]),
        ("modalities", ["audio"]),
        ("reasoning_effort", "low"),
        ("messages", []),
        ("messages", "hi"),
        ("top_logprobs", 21),
        ("max_completion_tokens", 0),
    ],
)
def test_chat_refuses_what_it_cannot_do(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    "message",
    [
        {"role": "robot", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": 3},
        {"role": "user", "content": "x", "mood": "good"},
        {"role": "assistant", "tool_calls": [{}]},
    ],
)
def test_bad_messages_are_refused_with_their_place(message: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(messages=[*USER, message])
    assert caught.value.errors()[0]["loc"][:2] == ("messages", 1)


def test_what_asks_for_nothing_is_accepted() -> None:
    everything = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "logit_bias": {}}
    assert (
        chat(**everything, tools=[], tool_choice="none", response_format={"type": "text"}, n=None, stop=None).stop == ()
    )
    assert completion(**everything, suffix="", best_of=1, stop="x").stop == ("x",)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].for_template()["content"] == "a\nb"


def test_fields_that_must_agree_are_named() -> None:
    with pytest.raises(RequestError) as caught:
        completion(best_of=3, n=2)
    assert caught.value.param == "best_of"
    with pytest.raises(RequestError) as caught:
        chat(top_logprobs=2)
    assert caught.value.param == "top_logprobs"


def test_seeds_are_63_bits_distinct_and_repeatable() -> None:
    assert choice_seeds(7, 4) == choice_seeds(7, 4)
    assert choice_seeds(7, 4)[0] == 7
    assert len(set(choice_seeds(7, 128))) == 128
    assert choice_seeds(7, 2) == choice_seeds(7, 4)[:2]
    assert all(0 <= seed < 2**63 for seed in [*choice_seeds(-5, 3), *choice_seeds(None, 3)])
    assert choice_seeds(None, 1) != choice_seeds(None, 1)
    assert not set(choice_seeds(7, 8)) & set(choice_seeds(8, 8))
    params = SamplingParams(seed=7, n=4)
    assert [params.to_sampling(0, choice).seed for choice in range(4)] == choice_seeds(7, 4), "one rule for both fronts"


def test_the_models_defaults_stand_in_for_what_is_left_out() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=40)
    left_out = to_sampling(completion(), defaults, 1, 10)
    assert (left_out.temperature, left_out.top_p, left_out.top_k) == (0.6, 0.9, 40)
    given = to_sampling(completion(temperature=0, top_p=1, top_k=-1), defaults, 1, 10)
    assert (given.temperature, given.top_p, given.top_k) == (0.0, 1.0, 0)
    plain = to_sampling(completion(), GenerationDefaults(), 1, 10)
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)


def test_an_empty_nucleus_is_greedy() -> None:
    sampling = to_sampling(completion(top_p=0), GenerationDefaults(), 1, 10)
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)
