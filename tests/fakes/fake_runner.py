"""A runner without a model: its tokens are hashes of the whole history, its KV a dictionary that it checks.

The shadow KV maps (block, offset) to (position, chain), where the chain is a hash of all tokens up to that position;
there is one map a cache group. Before it computes anything, the runner verifies that KV of every earlier position, or
of those in the window, stands in the blocks it is given and belongs to this very history, so any mistake in block
management ends in `WrongKv`. The host's blocks are one more map; copies are made when their step runs, and not at all
when it fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from pdserve.engine.schedule.batch import BatchItem, BatchResult, BlockCopy
from pdserve.handoff import KvExporter
from pdserve.protocol import EngineLimits, Sampling, TokenLogprob

SMALL_LIMITS = EngineLimits(
    max_seq_len=64,
    max_batch_size=8,
    max_num_tokens=32,
    vocab_size=50,
    num_blocks=64,
    tokens_per_block=4,
    eos_token_ids=(1,),
)

_ROOT = 0

Kv = dict[tuple[int, int], tuple[int, int]]


class WrongKv(AssertionError):
    """A sequence was given blocks that don't hold its KV."""


def extend_chain(chain: int, token_id: int) -> int:
    return hash((chain, token_id))


def chains_of(token_ids: Sequence[int]) -> list[int]:
    """The chain after each token."""
    chains, chain = [], _ROOT
    for token_id in token_ids:
        chain = extend_chain(chain, token_id)
        chains.append(chain)
    return chains


def pick_token(chain: int, num_output_tokens: int, sampling: Sampling, limits: EngineLimits) -> int:
    """The token that follows a history; no stop token while `min_tokens` is not reached."""
    token_id = hash((chain, sampling.seed)) % limits.vocab_size
    if num_output_tokens + 1 < sampling.min_tokens:
        while token_id in limits.eos_token_ids or token_id in sampling.stop_token_ids:
            token_id = (token_id + 1) % limits.vocab_size
    return token_id


def expected_output(prompt: Sequence[int], sampling: Sampling, limits: EngineLimits) -> tuple[list[int], str]:
    """What an engine must answer to `prompt`: all output tokens, and the finish reason."""
    chain = chains_of(prompt)[-1]
    stop_ids = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else limits.eos_token_ids)}
    longest = min(sampling.max_tokens, limits.max_seq_len - len(prompt))
    output: list[int] = []
    while True:
        output.append(pick_token(chain, len(output), sampling, limits))
        if output[-1] in stop_ids and len(output) >= sampling.min_tokens:
            return output, "stop"
        if len(output) >= longest:
            return output, "length"
        chain = extend_chain(chain, output[-1])


def fake_logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -1.0 - token_id, [(token_id, -1.0 - token_id)])


class _FakeStep:
    """A launched step, which runs when a result is asked for that comes after it: as late as a device could."""

    def __init__(
        self,
        runner: FakeRunner,
        items: Sequence[BatchItem],
        copies: Sequence[BlockCopy],
        before: _FakeStep | None,
    ) -> None:
        # A device reads its inputs at launch: the engine's lists grow afterwards.
        self.items = [
            replace(
                item,
                tables=[list(table) for table in item.tables],
                prompt_ids=list(item.prompt_ids),
                output_ids=list(item.output_ids),
            )
            for item in items
        ]
        self.copies = copies
        self.before = before if before is not None and before.is_open else None
        self.failure: Exception | None = None
        self.answers: list[BatchResult] | None = None
        self._runner = runner

    @property
    def is_open(self) -> bool:
        """Whether nobody knows yet how it ends."""
        return self.answers is None and self.failure is None

    def results(self) -> list[BatchResult]:
        if self.is_open:
            self._runner.run_until(self)
        if self.failure is not None:
            raise self.failure
        assert self.answers is not None
        return self.answers


class FakeRunner:
    """Implements `Runner`.

    `failures` are raised, one for each coming step, at its launch; `late_failures` when its results are asked for.
    Each step fails that has an item for which `is_bad` is true, late if `fails_late`; once it `is_dead`, each step and
    the probe.
    `batches` counts the steps that ran. What the engine did wrong is raised and also kept in `mistakes`, because the
    engine survives a step that fails.
    """

    def __init__(self, limits: EngineLimits = SMALL_LIMITS, verify: bool = True, num_host_blocks: int = 0) -> None:
        self.limits = limits
        self.is_asynchronous = True
        self.exporter: KvExporter | None = None
        self.num_host_blocks = num_host_blocks
        self.pools: list[Kv] = [{} for _ in limits.cache_groups]
        self.host_kv: Kv = {}
        self.failures: list[Exception] = []
        self.late_failures: list[Exception] = []
        self.is_bad: Callable[[BatchItem], bool] = lambda _: False
        self.fails_late = self.is_dead = False
        self.mistakes: list[AssertionError] = []
        self.batches = self.probes = 0
        self.history: list[list[tuple[int, int]]] = []
        self._verify = verify
        self._launched: deque[_FakeStep] = deque()
        self._newest: _FakeStep | None = None

    def warmup(self) -> None:
        """Nothing to warm."""

    def close(self) -> None:
        """Nothing to end."""

    def launch(self, items: Sequence[BatchItem], copies: Sequence[BlockCopy] = ()) -> _FakeStep:
        assert items or copies
        if self.is_dead:
            raise RuntimeError("a dead device")
        if self.failures:
            raise self.failures.pop(0)
        if not self.fails_late and any(map(self.is_bad, items)):
            raise RuntimeError("a bad item")
        self._newest = _FakeStep(self, items, copies, self._newest)
        self._launched.append(self._newest)
        return self._newest

    def probe(self) -> None:
        self.probes += 1
        while self._launched:
            self.run_until(self._launched[0])
        if self.is_dead:
            raise RuntimeError("a dead device")

    def run_until(self, last: _FakeStep) -> None:
        """Run what was launched, in order, up to `last`."""
        step = None
        while step is not last:
            step = self._launched.popleft()
            try:
                step.answers = self._execute(step)
            except AssertionError as mistake:
                self.mistakes.append(mistake)
                step.failure = mistake
            except RuntimeError as failure:
                step.failure = failure
            step.before = None

    def _execute(self, step: _FakeStep) -> list[BatchResult]:
        if self.late_failures:
            raise self.late_failures.pop(0)
        self.batches += 1
        for copy in step.copies:
            self._copy(copy)
        if not step.items:
            return []
        items = [self._with_token(item, step.before) for item in step.items]
        if not self._verify:
            return [self._guess(item) for item in items]
        self._check_step(items)
        self.history.append([(item.start, len(item.token_ids)) for item in items])
        try:
            results = [self._run(item) for item in items]
            if self.fails_late and any(map(self.is_bad, items)):
                raise RuntimeError("a bad item")
            return results
        except WrongKv as error:
            if step.before is not None and step.before.failure is not None:
                raise RuntimeError("the step before, which should have computed KV for this one, has failed") from error
            raise

    def _with_token(self, item: BatchItem, before: _FakeStep | None) -> BatchItem:
        """`item` with the token that the step before has sampled for it."""
        if item.previous is None:
            return item
        assert before is not None
        assert len(item.token_ids) == 1
        if before.answers is None:
            raise RuntimeError("the step before, which should have sampled a token for this one, has failed")
        assert before.items[item.previous].num_sampled == 1, "nobody knows which of several draws is the last"
        (token_id,) = before.answers[item.previous].token_ids
        return replace(item, token_ids=[token_id], output_ids=[*item.output_ids, token_id])

    def slot(self, block_ids: Sequence[int], position: int) -> tuple[int, int]:
        width = self.limits.tokens_per_block
        return block_ids[position // width], position % width

    def visible(self, group: int, num_tokens: int) -> range:
        """Positions to which a token attends that comes after `num_tokens` others."""
        window = self.limits.cache_groups[group].window
        return range(0 if window is None else max(0, num_tokens - window + 1), num_tokens)

    def verify_kv(self, token_ids: Sequence[int], tables: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Raises `WrongKv` unless KV of the first `num_tokens` of `token_ids` stands in `tables`, if visible."""
        chains = chains_of(token_ids[:num_tokens])
        for group, (pool, table) in enumerate(zip(self.pools, tables, strict=True)):
            for position in self.visible(group, num_tokens):
                found = pool.get(self.slot(table, position))
                if found != (position, chains[position]):
                    raise WrongKv(
                        f"position {position} of {list(token_ids)}: {found} in blocks {list(table)} of {group}"
                    )

    def _copy(self, copy: BlockCopy) -> None:
        pool = self.pools[copy.group]
        source = self.host_kv if copy.kind == "onboard" else pool
        target = self.host_kv if copy.kind == "offload" else pool
        in_pool = self.limits.cache_groups[copy.group].num_blocks
        assert 0 <= copy.target < (self.num_host_blocks if copy.kind == "offload" else in_pool)
        for offset in range(self.limits.tokens_per_block):
            # What stood there is gone, also where the source is empty.
            target[copy.target, offset] = source.get((copy.source, offset), (-1, -1))

    def _check_step(self, items: Sequence[BatchItem]) -> None:
        assert 0 < len(items) <= self.limits.max_batch_size
        assert sum(len(item.token_ids) for item in items) <= self.limits.max_num_tokens
        for item in items:
            assert len(item.token_ids) > 0
        for group in range(len(self.pools)):
            tables = [item.tables[group] for item in items]
            written = [
                self.slot(table, item.start + index)
                for table, item in zip(tables, items, strict=True)
                for index in range(len(item.token_ids))
            ]
            assert len(set(written)) == len(written), "two sequences write to one place"
            assert all(block_id >= 0 for block_id, _ in written), "a sequence writes to a block that it gave back"
            read = {
                self.slot(table, position)
                for table, item in zip(tables, items, strict=True)
                for position in self.visible(group, item.start)
            }
            assert not read.intersection(written), "a sequence writes to what another reads"
            for table in tables:
                held = [block_id for block_id in table if block_id >= 0]
                assert len(set(held)) == len(held), "a block stands twice in a table"

    def _run(self, item: BatchItem) -> BatchResult:
        history = [*item.prompt_ids, *item.output_ids]
        num_drafts = max(0, item.num_sampled - 1)
        end = item.start + len(item.token_ids) - num_drafts
        assert history[item.start : end] == list(item.token_ids[: end - item.start])
        assert bool(item.num_sampled) == (end == len(history))
        self.verify_kv(history, item.tables, item.start)
        history, end = [*history[:end], *item.token_ids[end - item.start :]], end + num_drafts
        chains = chains_of(history)
        for pool, table in zip(self.pools, item.tables, strict=True):
            for position in range(item.start, end):
                pool[self.slot(table, position)] = (position, chains[position])
        if item.export_key is not None and self.exporter is not None:
            self.exporter.computed(item.export_key, end)
        prompt_logprobs = None
        if item.want_prompt_logprobs:
            following = [*item.token_ids, *([] if item.next_prompt_token is None else [item.next_prompt_token])]
            assert item.next_prompt_token in (None, *item.prompt_ids)
            prompt_logprobs = [fake_logprob(token_id) for _, token_id in pairwise(following)]
        if not item.num_sampled:
            return BatchResult(prompt_logprobs=prompt_logprobs)
        token_ids: list[int] = []
        for at in range(end - num_drafts - 1, end):
            token_ids.append(pick_token(chains[at], at + 1 - len(item.prompt_ids), item.sampling, self.limits))
            if [token_ids[-1]] != history[at + 1 : at + 2]:
                break
        logprobs = () if item.sampling.logprobs is None else tuple(map(fake_logprob, token_ids))
        return BatchResult(token_ids, logprobs, prompt_logprobs)

    def _guess(self, item: BatchItem) -> BatchResult:
        return BatchResult(item.token_ids[-1:] if item.num_sampled else ())
