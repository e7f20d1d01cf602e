"""The Python API over a fake model, with a real tokenizer of 256 bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from pdserve import llm as llm_module
from pdserve.engine.schedule.batch import BatchItem
from pdserve.errors import ConfigError, EngineError, LimitExceeded, RequestError
from pdserve.generation_defaults import GenerationDefaults
from pdserve.llm import LLM, SamplingParams
from pdserve.protocol import Sampling
from pdserve.sampling_params import _ALLOWED
from pdserve.seeds import choice_seeds
from pdserve.text.stream import TextStream
from pdserve.text.tokenizer import Tokenizer
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner, expected_output, fake_logprob

LIMITS = msgspec.structs.replace(SMALL_LIMITS, vocab_size=256, eos_token_ids=())


def byte_tokenizer() -> Tokenizer:
    """A token a byte, so that characters are cut into several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = RustTokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Tokenizer(tokenizer)


TOKENIZER = byte_tokenizer()


class Bench:
    """What an `LLM` is made of here."""

    def __init__(self) -> None:
        self.runner = FakeRunner(LIMITS)
        self.defaults = GenerationDefaults()
        self.llms: list[LLM] = []

    def make(self, **args: Any) -> LLM:
        self.llms.append(LLM("fake", **args))
        return self.llms[-1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench()
    monkeypatch.setattr(llm_module, "_build_runner", lambda _: made.runner)
    monkeypatch.setattr(llm_module, "_load_tokenizer", lambda _: TOKENIZER)
    monkeypatch.setattr(llm_module, "_load_defaults", lambda _: made.defaults)
    yield made
    for each in made.llms:
        each.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name == "pdserve-engine"]


def greedy(max_tokens: int, seed: int = 0) -> Sampling:
    return Sampling(seed=seed, max_tokens=max_tokens)


def test_one_prompt_gives_one_output_and_many_give_many_in_order(bench: Bench) -> None:
    llm = bench.make()
    params = SamplingParams(max_tokens=5, seed=9)
    single = llm.generate("hello", params)
    ids = TOKENIZER.encode_now("hello")
    tokens = expected_output(ids, greedy(5, 9), LIMITS)[0]
    assert (single.prompt, single.prompt_token_ids, single.finished) == ("hello", ids, True)
    output = single.outputs[0]
    assert (output.token_ids, output.finish_reason) == (tokens, "length")
    assert output.text == TOKENIZER.decode(tokens)
    many = llm.generate(["hello", ids, "world"], [params, params, SamplingParams(max_tokens=2, seed=1)])
    assert [each.outputs[0].token_ids for each in many][:2] == [tokens, tokens]
    assert (many[1].prompt, many[1].prompt_token_ids) == (None, ids)
    assert len(many[2].outputs[0].token_ids) == 2
    assert llm.generate([]) == []
    assert llm.generate(ids, params).outputs[0].token_ids == tokens


def test_the_models_own_defaults_stand_in_for_what_is_left_out(bench: Bench) -> None:
    bench.defaults = GenerationDefaults(temperature=0.5, min_tokens=4, repetition_penalty=1.5)
    llm, launch, sampled = bench.make(), bench.runner.launch, list[Sampling]()

    def watched(items: Sequence[BatchItem], *rest: Any) -> Any:
        sampled.extend(item.sampling for item in items)
        return launch(items, *rest)

    bench.runner.launch = watched
    llm.generate([[5, 6]], SamplingParams(max_tokens=5, seed=9))
    llm.generate([[5, 6]], SamplingParams(max_tokens=5, seed=9, repetition_penalty=1.0, temperature=0.0))
    seen = list(dict.fromkeys((each.temperature, each.min_tokens, each.repetition_penalty) for each in sampled))
    assert seen == [(0.5, 4, 1.5), (0.0, 4, 1.0)]


def test_n_outputs_have_seeds_of_their_own(bench: Bench) -> None:
    output = bench.make().generate([5, 6, 7], SamplingParams(n=3, seed=10, temperature=1.0, max_tokens=4))
    assert [each.index for each in output.outputs] == [0, 1, 2]
    assert [each.token_ids for each in output.outputs] == [
        expected_output([5, 6, 7], greedy(4, seed), LIMITS)[0] for seed in choice_seeds(10, 3)
    ]


def test_more_prompts_than_the_queue_holds_are_not_refused(bench: Bench) -> None:
    llm = bench.make(max_queue_size=3)
    outputs = llm.generate([[index + 1, 2] for index in range(20)], SamplingParams(max_tokens=3))
    assert [len(each.outputs[0].token_ids) for each in outputs] == [3] * 20


@pytest.mark.parametrize("stream_interval", [1, 7])
def test_a_stop_string_ends_the_output_where_it_begins(bench: Bench, stream_interval: int) -> None:
    llm = bench.make(stream_interval=stream_interval)
    whole = llm.generate("abc", SamplingParams(max_tokens=30, seed=4)).outputs[0]
    stop = next(whole.text[at : at + 2] for at in range(8, 20) if "\ufffd" not in whole.text[at : at + 2])
    at = whole.text.index(stop)
    cut = llm.generate("abc", SamplingParams(max_tokens=30, seed=4, stop=["nowhere", stop])).outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[:at], "stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(whole.token_ids)
    params = SamplingParams(max_tokens=30, seed=4, stop=stop, include_stop_str_in_output=True)
    assert llm.generate("abc", params).outputs[0].text == whole.text[: at + 2]


@pytest.mark.parametrize("stream_interval", [1, 4])
def test_a_stop_token_is_among_the_tokens_but_not_in_the_text(bench: Bench, stream_interval: int) -> None:
    llm = bench.make(stream_interval=stream_interval)
    tokens = expected_output([5, 6], greedy(20, 4), LIMITS)[0]
    stop = tokens[6]
    end = tokens.index(stop)
    params = SamplingParams(max_tokens=20, seed=4, stop_token_ids=[stop])
    output = llm.generate([5, 6], params).outputs[0]
    assert (output.token_ids, output.finish_reason) == (tokens[: end + 1], "stop")
    assert output.text == TOKENIZER.decode(tokens[:end])


def test_no_stop_string_ends_the_output_within_min_tokens(bench: Bench) -> None:
    llm = bench.make()
    whole = llm.generate("abc", SamplingParams(max_tokens=30, seed=4)).outputs[0]
    # Wherever it stands: the first letter of every token's text may end the output, but not of the first 20.
    stop = list(dict.fromkeys(whole.text))
    cut = llm.generate("abc", SamplingParams(max_tokens=30, seed=4, stop=stop, min_tokens=20)).outputs[0]
    assert len(cut.token_ids) == 21
    assert whole.text.startswith(cut.text)
    assert cut.finish_reason == "stop"


def test_logprobs_come_by_token(bench: Bench) -> None:
    params = SamplingParams(max_tokens=3, seed=4, logprobs=1, prompt_logprobs=1)
    output = bench.make().generate([5, 6], params).outputs[0]
    assert output.logprobs is not None
    assert [list(each) for each in output.logprobs] == [[token] for token in output.token_ids]
    expected = [fake_logprob(token).logprob for token in output.token_ids]
    assert [each[token].logprob for each, token in zip(output.logprobs, output.token_ids, strict=True)] == expected
    assert output.cumulative_logprob == pytest.approx(sum(expected))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert list(output.prompt_logprobs[1] or {}) == [6]


async def test_streaming_grows_and_ends_with_the_same_output(bench: Bench) -> None:
    llm = bench.make()
    params = SamplingParams(max_tokens=20, seed=4)
    seen = [each async for each in llm.generate_async("abc", params)]
    assert [each.finished for each in seen] == [False] * (len(seen) - 1) + [True]
    for before, after in pairwise(seen):
        assert after.outputs[0].token_ids[: len(before.outputs[0].token_ids)] == before.outputs[0].token_ids
        assert after.outputs[0].text.startswith(before.outputs[0].text)
    assert seen[-1] == await llm.generate_async("abc", params) == llm.generate("abc", params)


async def test_leaving_a_stream_early_aborts_the_request(bench: Bench) -> None:
    llm = bench.make()
    generation = llm.generate_async([5, 6], SamplingParams(max_tokens=50))
    stream = generation.__aiter__()
    await anext(stream)
    await stream.aclose()
    output = await asyncio.to_thread(generation.result, 5.0)
    assert output.outputs[0].finish_reason in ("abort", "length")


def test_errors_name_what_is_wrong_and_leave_nothing_running(bench: Bench) -> None:
    llm = bench.make()
    with pytest.raises(LimitExceeded, match="max_seq_len"):
        llm.generate([[5, 6], [3] * 64])
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate([[256]])
    with pytest.raises(RequestError, match="2 sampling_params for 1"):
        llm.generate(["a"], [SamplingParams(), SamplingParams()])
    assert llm.generate([5], SamplingParams(max_tokens=1)).finished


def test_without_a_tokenizer_only_token_ids_are_taken(bench: Bench) -> None:
    llm = bench.make(skip_tokenizer_init=True)
    assert llm.generate([5], SamplingParams(max_tokens=2)).outputs[0].text == ""
    with pytest.raises(RequestError, match="tokenizer"):
        llm.generate("text")
    with pytest.raises(RequestError, match="stop strings"):
        llm.generate([5], SamplingParams(stop="x"))


def test_an_engine_that_fails_for_good_tells_everybody(bench: Bench) -> None:
    llm = bench.make()
    bench.runner.is_dead = True
    for _ in range(3):
        with pytest.raises(EngineError):
            llm.generate([5, 6])


def test_after_shutdown_requests_are_refused(bench: Bench) -> None:
    with bench.make() as llm:
        assert llm.generate([5]).finished
    llm.shutdown()
    with pytest.raises(EngineError, match="shut down"):
        llm.generate([5])


@pytest.mark.parametrize(
    ("args", "key"), [({"no_such_key": 1}, "no_such_key"), ({"kv_cache_config": {"max_tokens": 0}}, "max_tokens")]
)
def test_an_argument_at_fault_is_named(bench: Bench, args: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        bench.make(**args)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", None),
        ("max_tokens", True),
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 2),
        ("seed", -1),
        ("seed", 1 << 63),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 7),
        ("min_tokens", -1),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("logprobs", -1),
        ("prompt_logprobs", "1"),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
    ],
)
def test_a_sampling_parameter_at_fault_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert repr(value) in caught.value.message


def test_every_sampling_parameter_is_validated_and_defaults_are_greedy() -> None:
    assert {field.name for field in fields(SamplingParams)} == set(_ALLOWED)
    assert SamplingParams().to_sampling(7) == Sampling(seed=7, max_tokens=32, temperature=0.0)


@pytest.mark.parametrize(
    ("params", "temperature"),
    [
        ({"temperature": 0.5}, 0.5),
        ({"top_p": 0.9}, 1.0),
        ({"top_k": 0}, 1.0),
        ({"top_k": 1, "temperature": 2.0}, 0.0),
        ({"top_p": 0.0, "temperature": 2.0}, 0.0),
        ({"temperature": 0.0, "top_k": 40}, 0.0),
    ],
)
def test_what_makes_sampling_greedy(params: dict[str, Any], temperature: float) -> None:
    sampling = SamplingParams(**params).to_sampling(1)
    assert sampling.temperature == temperature
    assert 0 < sampling.top_p <= 1


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="aäß€😀 .", max_size=12), stop=st.lists(st.sampled_from(["a", "ß€", "😀.", "  "]), max_size=2)
)
def test_a_text_stream_says_what_decoding_all_at_once_does(text: str, stop: list[str]) -> None:
    stream = TextStream(TOKENIZER, stop=stop)
    shown = ""
    for token_id in TOKENIZER.encode_now(text):
        shown += stream.push([token_id])
        if stream.stopped_by is not None:
            break
        assert text.startswith(shown), "what was shown is never taken back"
    shown += stream.flush()
    ends = [at for each in stop if (at := text.find(each)) >= 0]
    assert shown == (text[: min(ends)] if ends else text)


def test_an_incomplete_character_is_held_back_until_the_end() -> None:
    stream = TextStream(TOKENIZER)
    first, second, *_ = TOKENIZER.encode_now("€")
    assert stream.push([first]) == ""
    assert stream.push([second]) == ""
    assert stream.flush() == "\ufffd"


def test_bytes_that_never_become_a_character_are_not_held_back_for_ever() -> None:
    stream = TextStream(TOKENIZER)
    tail = TOKENIZER.encode_now("€")[-1]
    text = "".join(stream.push([tail]) for _ in range(100))
    assert text.count("\ufffd") > 80
    assert text + stream.flush() == "\ufffd" * 100
