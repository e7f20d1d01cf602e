"""How several ranks run the same steps: rank 0 sends each to its followers before it runs it itself.

What a step needs of all ranks follows from the step alone, so that all make the same collective calls: the forward
pass, the logits of what is sampled and of each scored piece, and at last the sampled tokens, which rank 0 gives to all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdserve.engine.models.decoder import Decoder
from pdserve.engine.parallel.group import Group
from pdserve.engine.run.host_step import ChunkLimits, HostStep
from pdserve.engine.run.ranks.messages import Capture, CopyBlocks, MakeHostBlocks, Prepare, run_command
from pdserve.engine.run.ranks.ranks import Followers
from pdserve.engine.run.step_executor import StepExecutor, StepOutput
from pdserve.engine.schedule.batch import BlockCopy


class LeadingExecutor(StepExecutor):
    """Rank 0's: every call is made on all ranks."""

    def __init__(self, decoder: Decoder, pool: Tensor, max_batch_size: int, group: Group, followers: Followers) -> None:
        super().__init__(decoder, pool, max_batch_size)
        self._group = group
        self._followers = followers

    def prepare(self, max_tokens: int, max_seq_len: int) -> None:
        self._followers.send(Prepare(max_tokens, max_seq_len))
        super().prepare(max_tokens, max_seq_len)

    def capture(self, sizes: list[int], max_blocks: int, limits: ChunkLimits | None) -> None:
        self._followers.send(Capture(sizes, max_blocks, limits))
        super().capture(sizes, max_blocks, limits)

    def make_host_blocks(self, num_blocks: int) -> None:
        self._followers.send(MakeHostBlocks(num_blocks))
        super().make_host_blocks(num_blocks)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        self._followers.send(CopyBlocks(list(copies)))
        super().copy_blocks(copies)

    def run(self, step: HostStep) -> StepOutput:
        self._followers.send(run_command(step))
        return super().run(step)

    def keep(self, tokens: Tensor) -> None:
        if len(tokens):
            self._group.broadcast(tokens)
        super().keep(tokens)


def follow(executor: StepExecutor, group: Group, step: HostStep) -> None:
    """Run `step` on a follower."""
    output = executor.run(step)
    for _ in executor.score(step, output):
        pass
    tokens = torch.empty(len(step.sampled_items), dtype=torch.int64, device=executor.device)
    if len(tokens):
        group.broadcast(tokens)
    executor.keep(tokens)
