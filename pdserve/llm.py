"""The Python API: `LLM` runs a model in this process, with the names TensorRT-LLM's users know.

    with LLM(model="smollm2-135m-instruct") as llm:
        for output in llm.generate(["Hello", "The sea is"], SamplingParams(max_tokens=16)):
            print(output.outputs[0].text)

Owns the tokenizer, the engine's thread and the outputs in the making. Life: the constructor returns when the model is
warm; `shutdown` (or leaving the `with`) ends what is open and frees the thread.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import reprlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from pdserve.config import LlmArgs, validated
from pdserve.engine.hosts.background import BackgroundEngine
from pdserve.engine.schedule.batch import Runner
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.errors import RequestError
from pdserve.generation import CompletionOutput, Generation, Logprob, RequestOutput
from pdserve.generation_defaults import GenerationDefaults
from pdserve.model_store import load_generation_defaults, resolve_model, tokenizer_folder
from pdserve.prompts import ParsedPrompt, Prompt, TextPrompt, TokensPrompt, is_one_prompt, parse_prompt
from pdserve.protocol import GenerateRequest, Key, Sampling
from pdserve.sampling_params import SamplingParams
from pdserve.seeds import new_seed
from pdserve.text.stream import TextStream
from pdserve.text.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "Generation", "Logprob", "RequestOutput", "SamplingParams"]

# Every request has a deadline; this one only ends requests whose result is never asked for.
_REQUEST_TIMEOUT_S = 24 * 3600.0


class LLM:
    """A model, ready to generate.

    Args:
        model: a Hugging Face folder, a `.gguf` file, or the packaged model's name.
        llm_args: any other field of `LlmArgs`.

    Raises:
        ConfigError: an argument is unknown or not allowed, or the model can't be served; `param` names the key.
    """

    def __init__(self, model: str | Path, **llm_args: Any) -> None:
        self.args = _parse_args(str(model), llm_args)
        self.tokenizer = None if self.args.skip_tokenizer_init else _load_tokenizer(self.args)
        self._defaults = _load_defaults(self.args)
        self._runner: Runner | None = None
        self._engine = BackgroundEngine(self._build)
        self.limits = self._engine.limits
        self._numbers = itertools.count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self,
        inputs: str | list[int] | TextPrompt | TokensPrompt,
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = False,
    ) -> RequestOutput: ...
    @overload
    def generate(
        self,
        inputs: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]: ...
    def generate(
        self,
        inputs: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> RequestOutput | list[RequestOutput]:
        """Generate for one prompt or for many; returns when all are finished.

        A prompt is text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": token ids}`.

        Args:
            sampling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar, with the `tqdm` package.

        Raises:
            RequestError: an input has no such form, or the engine refuses a prompt; nothing is left running.
            PdserveError: the engine failed.
        """
        if is_one_prompt(inputs):
            params = _one_for_each(sampling_params, 1)
            return self._generate_many([self._parse(inputs, params[0])], params, use_tqdm)[0]
        params = _one_for_each(sampling_params, len(inputs))
        prompts = [
            self._parse(each, its, f"inputs[{at}]") for at, (each, its) in enumerate(zip(inputs, params, strict=True))
        ]
        return self._generate_many(prompts, params, use_tqdm)

    def generate_async(self, inputs: Prompt, sampling_params: SamplingParams | None = None) -> Generation:
        """Start one prompt and return at once.

        The result can be iterated over with `async for` (a growing `RequestOutput` each time), awaited, or waited for
        with `result()`. Raises RequestError if `inputs` is no prompt.
        """
        (params,) = _one_for_each(sampling_params, 1)
        return self._submit(self._parse(inputs, params), params)

    def shutdown(self) -> None:
        """End what is open, the engine's thread, and the processes of other ranks. May be called twice."""
        self._engine.close()
        if self._runner is not None:
            self._runner.close()

    def _build(self, wake: Callable[[], None]) -> Engine:
        self._runner = _build_runner(self.args)
        return Engine(self._runner, EngineOptions.from_args(self.args), wake=wake)

    def _generate_many(
        self, prompts: Sequence[ParsedPrompt], params: Sequence[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        pending: deque[Generation] = deque()
        num_open = 0
        with _progress_bar(len(prompts), use_tqdm) as advance:
            try:
                for prompt, each in zip(prompts, params, strict=True):
                    # The engine refuses when its queue is full; here the caller can be held back instead.
                    while pending and num_open + each.n > self.args.max_queue_size:
                        outputs.append(pending[0].result())
                        num_open -= pending.popleft().n
                        advance()
                    pending.append(self._submit(prompt, each))
                    num_open += each.n
                while pending:
                    outputs.append(pending[0].result())
                    pending.popleft()
                    advance()
            finally:
                for generation in pending:
                    generation.abort()
        return outputs

    def _parse(self, prompt: Any, params: SamplingParams, where: str = "inputs") -> ParsedPrompt:
        """`prompt`, if it can be tokenized and its output be read. Raises RequestError."""
        parsed = parse_prompt(prompt, where)
        if self.tokenizer is None and parsed.token_ids is None:
            raise RequestError(f"{where}: text needs a tokenizer, and skip_tokenizer_init is on; pass token ids", where)
        if self.tokenizer is None and params.stop_strings:
            raise RequestError("stop strings need a tokenizer, and skip_tokenizer_init is on", "stop")
        return parsed

    def _submit(self, prompt: ParsedPrompt, params: SamplingParams) -> Generation:
        token_ids = prompt.token_ids
        if token_ids is None:
            assert self.tokenizer is not None
            assert prompt.text is not None
            token_ids = self.tokenizer.encode_now(prompt.text)
        number, seed = next(self._numbers), new_seed()
        keys = [Key(f"llm-{number}-{index}", 0) for index in range(params.n)]
        samplings = [params.to_sampling(seed, index, self._defaults) for index in range(params.n)]
        make_text = self._text_maker(params, token_ids, samplings[0])
        generation = Generation(prompt.text, token_ids, keys, self._engine.abort, make_text)
        for index, (key, sampling) in enumerate(zip(keys, samplings, strict=True)):
            request = GenerateRequest(
                key=key,
                token_ids=token_ids,
                num_prompt_tokens=len(token_ids),
                sampling=sampling,
                timeout_s=_REQUEST_TIMEOUT_S,
                phase="both",
            )
            self._engine.submit(request, generation.listener(index))
        return generation

    def _text_maker(
        self, params: SamplingParams, context: Sequence[int], sampling: Sampling
    ) -> Callable[[], TextStream]:
        return functools.partial(
            TextStream,
            self.tokenizer,
            context=context,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop_strings,
            stop_ids=sampling.stop_ids(self.limits.eos_token_ids),
            include_stop=params.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )


def _parse_args(model: str, llm_args: dict[str, Any]) -> LlmArgs:
    return validated(LlmArgs, {"model": model, **llm_args})


def _load_tokenizer(args: LlmArgs) -> Tokenizer | None:
    return Tokenizer.load(tokenizer_folder(resolve_model(args.tokenizer or args.model)))


def _load_defaults(args: LlmArgs) -> GenerationDefaults:
    return load_generation_defaults(resolve_model(args.model))


def _build_runner(args: LlmArgs) -> Runner:
    # Imported here: torch takes seconds, and errors in the arguments should not.
    from pdserve.engine.run.model_runner import ModelRunner

    runner = ModelRunner(args)
    runner.warmup()
    return runner


def _one_for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not (isinstance(params, Sequence) and all(isinstance(each, SamplingParams) for each in params)):
        message = f"sampling_params: expected SamplingParams, or one for each prompt, got {reprlib.repr(params)}"
        raise RequestError(message, "sampling_params")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts", "sampling_params")
    return params


@contextlib.contextmanager
def _progress_bar(total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """Yields what to call for each finished prompt."""
    if not wanted:
        yield lambda: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total) as bar:
        yield bar.update
