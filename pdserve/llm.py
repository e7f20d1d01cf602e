"""The Python API: `LLM` runs a model in this process, with the names TensorRT-LLM's users know.

    with LLM(model="smollm2-135m-instruct") as llm:
        for output in llm.generate(["Hello", "The sea is"], SamplingParams(max_tokens=16)):
            print(output.outputs[0].text)

Owns the tokenizer, the engine's thread and the outputs in the making. Life: the constructor returns when the model is
warm; `shutdown` (or leaving the `with`) ends what is open and frees the thread.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

from pdserve.config import LlmArgs, validated
from pdserve.engine.background import BackgroundEngine
from pdserve.engine.batch import Runner
from pdserve.engine.engine import Engine
from pdserve.engine.options import EngineOptions
from pdserve.errors import RequestError
from pdserve.generation import CompletionOutput, Generation, Logprob, RequestOutput
from pdserve.generation_defaults import GenerationDefaults
from pdserve.model_store import load_generation_defaults, resolve_model, tokenizer_folder
from pdserve.protocol import GenerateRequest, Key
from pdserve.sampling_params import SamplingParams
from pdserve.seeds import new_seed
from pdserve.text.stream import TextStream
from pdserve.text.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "Generation", "Logprob", "RequestOutput", "SamplingParams"]

Prompt = str | Sequence[int]

# No wait is without a deadline; this one only ends what nobody will ever ask for.
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
        self, inputs: str | list[int], sampling_params: SamplingParams | None = None, use_tqdm: bool = False
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
        """Generate for one prompt (text or token ids) or for many; returns when all are finished.

        Args:
            sampling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar, with the `tqdm` package.

        Raises:
            RequestError: the engine or the tokenizer refuses a prompt; nothing is left running.
            PdserveError: the engine failed.
        """
        if isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], int)):
            params = _one_for_each(sampling_params, 1)
            return self._generate_many([cast("Prompt", inputs)], params, use_tqdm)[0]
        prompts = cast("Sequence[Prompt]", inputs)
        return self._generate_many(prompts, _one_for_each(sampling_params, len(prompts)), use_tqdm)

    def generate_async(self, inputs: Prompt, sampling_params: SamplingParams | None = None) -> Generation:
        """Start one prompt and return at once.

        The result can be iterated over with `async for` (a growing `RequestOutput` each time), awaited, or waited for
        with `result()`. Raises RequestError if the prompt can't be tokenized.
        """
        return self._submit(inputs, sampling_params or SamplingParams())

    def shutdown(self) -> None:
        """End what is open, the engine's thread, and the processes of other ranks. May be called twice."""
        self._engine.close()
        if self._runner is not None:
            self._runner.close()

    def _build(self, wake: Callable[[], None]) -> Engine:
        self._runner = _build_runner(self.args)
        return Engine(self._runner, EngineOptions.from_args(self.args), wake=wake)

    def _generate_many(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], use_tqdm: bool
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

    def _submit(self, prompt: Prompt, params: SamplingParams) -> Generation:
        token_ids = self._tokenize(prompt)
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and skip_tokenizer_init is on", "stop")
        number, seed = next(self._numbers), new_seed()
        keys = [Key(f"llm-{number}-{index}", 0) for index in range(params.n)]
        samplings = [params.to_sampling(seed, index, self._defaults) for index in range(params.n)]
        text = prompt if isinstance(prompt, str) else None
        streams = self._text_stream(params, token_ids, samplings[0].min_tokens)
        generation = Generation(text, token_ids, keys, self._engine.abort, streams)
        for index, (key, sampling) in enumerate(zip(keys, samplings, strict=True)):
            request = GenerateRequest(
                key=key,
                token_ids=token_ids,
                num_prompt_tokens=len(token_ids),
                sampling=sampling,
                timeout_s=_REQUEST_TIMEOUT_S,
                phase="both",
            )
            self._engine.submit(request, generation.sink(index))
        return generation

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise RequestError("text needs a tokenizer, and skip_tokenizer_init is on; pass token ids", "inputs")
        return self.tokenizer.encode_now(prompt)

    def _text_stream(
        self, params: SamplingParams, context: Sequence[int], min_tokens: int
    ) -> Callable[[], TextStream | None]:
        def make() -> TextStream | None:
            if self.tokenizer is None:
                return None
            return TextStream(
                self.tokenizer,
                context=context,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop_strings,
                include_stop=params.include_stop_str_in_output,
                min_tokens=min_tokens,
            )

        return make


def _parse_args(model: str, llm_args: dict[str, Any]) -> LlmArgs:
    return validated(LlmArgs, {"model": model, **llm_args})


def _load_tokenizer(args: LlmArgs) -> Tokenizer | None:
    return Tokenizer.load(tokenizer_folder(resolve_model(args.tokenizer or args.model)))


def _load_defaults(args: LlmArgs) -> GenerationDefaults:
    return load_generation_defaults(resolve_model(args.model))


def _build_runner(args: LlmArgs) -> Runner:
    # Imported here: torch takes seconds, and errors in the arguments should not.
    from pdserve.engine.model_runner import ModelRunner

    runner = ModelRunner(args)
    runner.warmup()
    return runner


def _one_for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
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
