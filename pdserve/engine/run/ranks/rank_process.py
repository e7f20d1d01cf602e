"""A follower's process: one rank after rank 0, which started it and tells it what to run.

Owns its rank's share of the model for as long as it lives, and knows nothing of requests, sampling or sockets. It ends
on `Stop`, with its parent, and by any error, which it reports first: `python -m pdserve.engine.run.ranks.rank_process`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import torch
import zmq

from pdserve.config import LlmArgs
from pdserve.engine.parallel.group import Group, RankGroup
from pdserve.engine.parallel.mapping import Mapping
from pdserve.engine.run.heartbeat import beating
from pdserve.engine.run.kv_pool import KvPool
from pdserve.engine.run.rank_model import RankModel
from pdserve.engine.run.ranks import messages
from pdserve.engine.run.ranks.messages import Alive, Failed, Joined, Loaded, MakePool, RankSpec, Report, Stop
from pdserve.engine.run.resources import choose_device
from pdserve.engine.run.step_executor import StepExecutor
from pdserve.errors import ConfigError, EngineError, PdserveError
from pdserve.process import configure_logging, die_with_parent

log = logging.getLogger(__name__)

_TICK_MS = 1000

Attach = Callable[[RankSpec, RankModel, list[KvPool], StepExecutor], Callable[[], None]]
"""Joins something of the host's to a rank whose pools have just been made; returns what takes it off again."""


def _nothing() -> None:
    pass


def attach_nothing(spec: RankSpec, model: RankModel, pools: list[KvPool], executor: StepExecutor) -> Callable[[], None]:
    return _nothing


class Follower:
    """One rank's life, from its `RankSpec` to its end."""

    def __init__(self, spec: RankSpec, attach: Attach) -> None:
        self._spec = spec
        self._attach = attach
        self._detach: Callable[[], None] = _nothing
        self._args = LlmArgs.model_validate(spec.args)
        self._mapping = Mapping.of(self._args, spec.rank)
        self._parent_pid = os.getppid()

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        with zmq.Context() as context, context.socket(zmq.PULL) as commands:
            commands.set_hwm(0)
            commands.linger = 0
            commands.bind(self._spec.commands)
            try:
                self._serve(commands)
            except PdserveError as error:
                self._report(Failed(self._of_this_rank(error).to_info()))
            except torch.OutOfMemoryError as error:
                self._report(Failed(self._of_this_rank(EngineError(str(error))).to_info()))
            except Exception as error:
                log.exception("rank %d ends", self._spec.rank)
                failure = EngineError(f"failed: {type(error).__name__}")
                self._report(Failed(self._of_this_rank(failure).to_info()))
            else:
                return 0
            finally:
                self._detach()
        return 1

    @torch.inference_mode()
    def _serve(self, commands: zmq.Socket[bytes]) -> None:
        if self._args.num_threads is not None:
            torch.set_num_threads(self._args.num_threads)
        device = choose_device(self._args, self._mapping)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._report(Joined())
        group = RankGroup(self._mapping, Path(self._spec.meeting_place), device)
        model = RankModel(self._args, Path(self._spec.model_folder), device, group)
        self._report(Loaded(model.num_blocks_that_fit))
        with beating(lambda: self._report(Alive())):
            self._follow(commands, group, model)

    def _follow(self, commands: zmq.Socket[bytes], group: Group, model: RankModel) -> None:
        """Do what rank 0 does, until told to stop."""
        executor: StepExecutor | None = None
        while True:
            command = self._next(commands)
            if isinstance(command, Stop):
                return
            if isinstance(command, MakePool):
                pools = model.make_pools(command.num_blocks)
                tensors = [pool.tensor for pool in pools]
                executor = StepExecutor(model.decoder, tensors, self._args.max_batch_size, group)
                self._detach = self._attach(self._spec, model, pools, executor)
            else:
                assert executor is not None, "the pool comes first"
                executor.obey(command)

    def _next(self, commands: zmq.Socket[bytes]) -> messages.Command:
        """The next command; `Stop` if rank 0 is gone, where the kernel does not say so."""
        while not commands.poll(_TICK_MS):
            if os.getppid() != self._parent_pid:
                return Stop()
        return messages.decode(commands.recv())

    def _report(self, report: Report) -> None:
        _report(self._spec, report)

    def _of_this_rank(self, error: PdserveError) -> PdserveError:
        return _of_rank(self._spec.rank, error)


def end_now(spec: RankSpec, error: PdserveError) -> NoReturn:
    """Report `error` to rank 0 and end this process, from any thread, whatever the main thread is at."""
    log.error("rank %d ends: %s", spec.rank, error)
    _report(spec, Failed(_of_rank(spec.rank, error).to_info()))
    os._exit(1)


def _report(spec: RankSpec, report: Report) -> None:
    # With rank 0 gone nobody listens.
    with contextlib.suppress(BrokenPipeError):
        os.write(spec.reports, msgspec.json.encode(report) + b"\n")


def _of_rank(rank: int, error: PdserveError) -> PdserveError:
    message = f"rank {rank}: {error.message}"
    return ConfigError(message, error.param) if isinstance(error, ConfigError) else EngineError(message)


def main(attach: Attach = attach_nothing) -> NoReturn:
    """Be a follower until the end of the process."""
    # SIGKILL: a rank that hangs in a collective would not notice anything milder, and keep the device.
    die_with_parent(signal.SIGKILL)
    # Ctrl-C is for rank 0, which ends its followers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=RankSpec)
    os.set_inheritable(spec.reports, False)
    configure_logging(spec.log_level)
    exit_status = Follower(spec, attach).run()
    logging.shutdown()
    # Not `sys.exit`: taking communicators and CUDA graphs apart can wait for other ranks. The kernel frees them all.
    os._exit(exit_status)


if __name__ == "__main__":
    main()
