"""What the ranks of one model say to each other while they compute: sums, hidden states, logits, tokens.

Owns the communicators: NCCL's between GPUs, gloo's between CPUs. They are private to the object, so several models may
live in one process, and torch's own default group is left to whoever wants it. Life: `RankGroup(...)` returns when all
ranks have called it; every rank then makes the same calls in the same order; `abort`, from any thread, ends calls that
wait for a rank that is gone, which then fail or return garbage.

Between GPUs every call only enqueues, on the current stream, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from pdserve.engine.parallel.mapping import Mapping

log = logging.getLogger(__name__)

# All ranks are about to meet when one starts to wait for the others.
_MEETING_TIMEOUT = timedelta(minutes=1)
# How long taking a communicator apart may keep anybody waiting.
_ABORT_S = 5.0
# A rank that is alive and answers nobody for this long is taken for stuck; one that ends is noticed at once, elsewhere.
_TIMEOUT = timedelta(minutes=10)


class Group(Protocol):
    """The collectives that a decoder needs. Tensors are dense; what comes back may be the argument, changed."""

    mapping: Mapping

    def all_reduce(self, summand: Tensor) -> Tensor:
        """The sum of the stage's summands, in place."""
        ...

    def send(self, hidden: Tensor) -> None:
        """Pass `hidden` on to the next stage, where `receive` returns it."""
        ...

    def receive(self, hidden: Tensor) -> Tensor:
        """Fill `hidden` with what the stage before sends."""
        ...

    def gather(self, part: Tensor) -> list[Tensor]:
        """On rank 0 the `part` of each rank of the last stage, in their order; elsewhere nothing. Equal shapes."""
        ...

    def broadcast(self, tensor: Tensor) -> None:
        """Fill `tensor` with rank 0's."""
        ...

    def abort(self) -> None:
        """End what waits for others; nothing else may be called afterwards."""
        ...


class SingleRank:
    """The group of a model that one rank holds whole: nobody to talk to, and no cost."""

    mapping = Mapping()

    def all_reduce(self, summand: Tensor) -> Tensor:
        return summand

    def send(self, hidden: Tensor) -> None:
        raise AssertionError("there is one stage")

    def receive(self, hidden: Tensor) -> Tensor:
        raise AssertionError("there is one stage")

    def gather(self, part: Tensor) -> list[Tensor]:
        return [part]

    def broadcast(self, tensor: Tensor) -> None:
        pass

    def abort(self) -> None:
        pass


SINGLE_RANK = SingleRank()


class RankGroup:
    """Several ranks.

    Args:
        meeting_place: a file that does not exist yet, in a folder that only these ranks know.
        device: this rank's; all ranks' are of one type.

    Raises:
        RuntimeError: the others did not come.
    """

    def __init__(self, mapping: Mapping, meeting_place: Path, device: torch.device) -> None:
        self.mapping = mapping
        self._device = device
        self._store = dist.FileStore(str(meeting_place), mapping.world_size)  # type: ignore[attr-defined,unused-ignore]
        self._store.set_timeout(_MEETING_TIMEOUT)
        self._all: list[Any] = []
        self._lock = threading.Lock()
        self._aborts: list[threading.Thread] = []
        rank, width, world = mapping.rank, mapping.tp_size, range(mapping.world_size)
        with _loopback():
            # The order matters: it is the order in which all ranks join them.
            self._world = self._join("world", world)
            stage = mapping.stage_ranks
            self._stage = self._join(f"stage-{stage[0]}", stage) if mapping.pp_size > 1 else self._world
            outputs = sorted({0, *mapping.last_stage_ranks})
            self._outputs = self._join("outputs", outputs) if mapping.pp_size > 1 else self._world
            self._num_idle_outputs = len(outputs) - width
            links = [self._join(f"link-{sender}", (sender, sender + width)) for sender in world[:-width]]
        self._to_next = links[rank] if rank < len(links) else None
        self._from_previous = links[rank - width] if rank >= width else None
        self._sum, self._from_root, self._to_root = _sum(), _broadcast(), _gather()

    def all_reduce(self, summand: Tensor) -> Tensor:
        if self.mapping.tp_size > 1:
            _wait(self._stage.allreduce([summand], self._sum))
        return summand

    def send(self, hidden: Tensor) -> None:
        # A broadcast between two is a send, and runs on the current stream like every other collective.
        _wait(_present(self._to_next).broadcast([hidden], self._from_root))

    def receive(self, hidden: Tensor) -> Tensor:
        _wait(_present(self._from_previous).broadcast([hidden], self._from_root))
        return hidden

    def gather(self, part: Tensor) -> list[Tensor]:
        if self._outputs is None:
            return []
        parts = [torch.empty_like(part) for _ in range(self._outputs.size())] if self.mapping.rank == 0 else []
        _wait(self._outputs.gather([parts] if parts else [], [part], self._to_root))
        return parts[self._num_idle_outputs :]

    def broadcast(self, tensor: Tensor) -> None:
        _wait(self._world.broadcast([tensor], self._from_root))

    def abort(self) -> None:
        # All at once and never in the caller's thread: NCCL may wait for kernels of other communicators, which end only
        # when those are aborted too, and for CUDA graphs that use the communicator.
        with self._lock:
            if not self._aborts:
                self._aborts = [threading.Thread(target=_abort, args=(group,), daemon=True) for group in self._all]
                for thread in self._aborts:
                    thread.start()
        deadline_s = time.monotonic() + _ABORT_S
        for thread in self._aborts:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        if any(thread.is_alive() for thread in self._aborts):
            log.warning("a communicator was not freed within %g s", _ABORT_S)

    def _join(self, name: str, ranks: Sequence[int]) -> Any:
        """The communicator of `ranks`, made by all of them together; None on any other rank."""
        if self.mapping.rank not in ranks:
            return None
        store, at = PrefixStore(name, self._store), list(ranks).index(self.mapping.rank)
        if self._device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _TIMEOUT
            group: Any = dist.ProcessGroupNCCL(store, at, len(ranks), options)
            # Now, not at the first collective: its memory must be taken before the KV pool is sized.
            group.eager_connect_single_device(self._device)
        else:
            group = dist.ProcessGroupGloo(store, at, len(ranks), _MEETING_TIMEOUT)
            group._set_default_timeout(_TIMEOUT)
        self._all.append(group)
        return group


def _abort(group: Any) -> None:
    # An error says that there is nothing left to abort.
    with contextlib.suppress(RuntimeError):
        group.abort()


def _present(link: Any) -> Any:
    assert link is not None, "the pipeline ends here"
    return link


def _wait(work: Any) -> None:
    """Between CPUs until it is done. A GPU's work is enqueued already; there this only passes an error on."""
    if work is not None:
        work.wait()


def _sum() -> dist.AllreduceOptions:
    options = dist.AllreduceOptions()
    options.asyncOp = False
    return options


def _broadcast() -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.asyncOp = 0, False
    return options


def _gather() -> dist.GatherOptions:
    options = dist.GatherOptions()
    options.rootRank, options.asyncOp = 0, False
    return options


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Have gloo and NCCL listen at the loopback interface, unless the environment names another: all ranks are on this
    host, and nobody from elsewhere has anything to say to them."""
    names = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ]
    if not sys.platform.startswith("linux"):
        names.clear()
    os.environ.update(dict.fromkeys(names, "lo"))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
