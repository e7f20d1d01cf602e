"""Rank 0's followers: one process for each other rank, started, watched and ended here.

Owns the processes, the pipes to and from them, and the news of their end. A thread for each follower starts it, takes
its reports and waits for its end: the kernel's parent-death signal follows the thread that started a process, so that
thread lives as long as the follower should. Life: `Followers(...)` starts them; `send` gives all of them a command;
once one of them is lost nothing is left to do but `close`. A model of one rank has no followers, and this does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from pdserve.config import LlmArgs
from pdserve.engine.parallel.mapping import Mapping
from pdserve.engine.run.ranks import messages
from pdserve.engine.run.ranks.messages import Alive, Command, Failed, Joined, Loaded, MakePool, RankSpec, Report, Stop
from pdserve.engine.schedule.batch import RunnerLost
from pdserve.errors import ConfigError, MalformedMessage, PdserveError, from_info
from pdserve.private_folder import PrivateFolder
from pdserve.process import child_environment

log = logging.getLogger(__name__)

# Reading a large model from a slow disk takes many minutes; a follower that ends is noticed at once.
_START_TIMEOUT_S = 3600.0
_STOP_GRACE_S = 5.0
# How long an error of rank 0's own, or a follower's complaint, waits for the news of a death that explains it.
_EXPLANATION_S = 2.0
_COMPLAINT_S = 0.5
# So many heartbeats of rank 0's in a row may come without one of a follower's.
_MISSED_BEATS = 4


class FollowerProgram(NamedTuple):
    """What a follower runs: a module that calls `rank_process.main`, and what that wants to know beside its rank."""

    module: str
    attachment: str


BARE_FOLLOWER = FollowerProgram("pdserve.engine.run.ranks.rank_process", "")


class Followers:
    """The ranks after rank 0.

    Args:
        folder: the resolved model.
        program: what each of them runs.
        on_loss: called once, from any thread, with the error when a follower is lost. It must end whatever waits for
            that follower; it need not return.
    """

    def __init__(
        self, args: LlmArgs, folder: Path, program: FollowerProgram, on_loss: Callable[[PdserveError], None]
    ) -> None:
        self.num_ranks = Mapping.of(args).world_size
        self.folder: Path | None = None
        self._news = threading.Condition()
        self._loss: PdserveError | None = None
        self._closing = False
        self._reports: dict[type[Report], dict[int, Report]] = {Joined: {}, Loaded: {}}
        self._unheard = dict.fromkeys(range(1, self.num_ranks), 0)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._pipes: list[zmq.Socket[bytes]] = []
        self._threads: list[threading.Thread] = []
        if self.num_ranks == 1:
            return
        self._on_loss = on_loss
        self._program = program
        self._place = PrivateFolder()
        self.folder = self._place.path
        self.meeting_place = self.folder / "meeting"
        self._context = zmq.Context()
        for rank in range(1, self.num_ranks):
            self._start(rank, args, folder)

    def wait_until_joined(self) -> None:
        """Return when all followers are about to meet. Raises the error of one that does not get there."""
        self._wait_for(Joined)

    def agree_on_blocks(self, num_blocks: int) -> int:
        """The number of blocks that all ranks have room for, rank 0 `num_blocks`; every follower is told.

        Raises:
            PdserveError: a follower's error while loading.
        """
        self._wait_for(Loaded)
        loaded = [each.num_blocks for each in self._reports[Loaded].values() if isinstance(each, Loaded)]
        agreed = min([num_blocks, *loaded])
        self.send(MakePool(agreed))
        return agreed

    def send(self, command: Command) -> None:
        """Queue `command` for every follower; never blocks. Raises `RunnerLost` if one is lost."""
        self.check()
        if self._pipes:
            self._queue(command)

    def check(self) -> None:
        """Raise `RunnerLost` if a follower is lost."""
        if self._loss is not None:
            raise RunnerLost(self._loss.message)

    def are_alive(self) -> bool:
        """Whether every follower has said so lately. To be asked once a heartbeat: silence is counted in these calls,
        so that time in which this process was frozen itself counts against nobody."""
        for rank in self._unheard:
            self._unheard[rank] += 1
        return all(beats <= _MISSED_BEATS for beats in self._unheard.values())

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """What rank 0 does together with its followers: if it fails, they no longer match, and it is `RunnerLost`.

        A follower's `ConfigError` is raised as it is.
        """
        try:
            yield
        except Exception as error:
            explained = self._explain(error)
            if explained is error:
                raise
            raise explained from error

    def close(self) -> None:
        """End all followers; one that does not end by itself is killed. May be called twice."""
        with self._news:
            at_once = self._loss is not None or not self._reports[Loaded]
            self._closing = True
        if not self._threads:
            return
        if not at_once:
            self._queue(Stop())
        deadline_s = time.monotonic() + (0.0 if at_once else _STOP_GRACE_S)
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        for process in self._processes.values():
            process.kill()
        for thread in self._threads:
            thread.join(_STOP_GRACE_S)
            if thread.is_alive():
                log.warning("%s was killed and has not ended", thread.name.removeprefix("pdserve-"))
        self._threads.clear()
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self._context.term()
        self._place.close()

    def _explain(self, error: Exception) -> Exception:
        if not self._threads or isinstance(error, RunnerLost | ConfigError):
            return error
        with self._news:
            self._news.wait_for(lambda: self._loss is not None, _EXPLANATION_S)
        if self._loss is None:
            log.error("rank 0 failed", exc_info=error)
            self._lose(RunnerLost(f"rank 0 failed, and the others can't go on without it: {type(error).__name__}"))
        return self._loss if isinstance(self._loss, ConfigError) else RunnerLost(str(self._loss))

    def _queue(self, command: Command) -> None:
        frame = messages.encode(command)
        for pipe in self._pipes:
            pipe.send(frame, zmq.NOBLOCK)

    def _start(self, rank: int, args: LlmArgs, folder: Path) -> None:
        address = f"ipc://{self._place.path}/rank{rank}"
        pipe = self._context.socket(zmq.PUSH)
        pipe.set_hwm(0)
        pipe.linger = 0
        pipe.connect(address)  # what is sent before the follower listens waits for it
        self._pipes.append(pipe)
        reports, theirs = os.pipe()
        spec = RankSpec(
            rank=rank,
            args=args.model_dump(mode="json", include=set(LlmArgs.model_fields)),
            model_folder=str(folder),
            meeting_place=str(self.meeting_place),
            commands=address,
            reports=theirs,
            log_level=logging.getLevelName(logging.getLogger().level).lower(),
            attachment=self._program.attachment,
        )
        thread = threading.Thread(target=self._attend, args=(spec, reports), name=f"pdserve-rank-{rank}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _attend(self, spec: RankSpec, reports: int) -> None:
        """Start a follower and listen to it until it ends."""
        with self._news:
            process = None if self._closing else _spawn(self._program.module, spec)
            if process is not None:
                self._processes[spec.rank] = process
        os.close(spec.reports)
        with os.fdopen(reports, "rb") as lines:
            for line in lines:
                try:
                    report = messages.decode_report(line)
                except MalformedMessage as error:
                    self._lose(RunnerLost(f"rank {spec.rank} makes no sense: {error}"))
                    break
                self._take(spec.rank, report)
        if process is not None:
            status = process.wait()
            self._lose(RunnerLost(f"rank {spec.rank} (pid {process.pid}) {_describe(status)}"))

    def _take(self, rank: int, report: Report) -> None:
        if isinstance(report, Alive):
            self._unheard[rank] = 0
            return
        if isinstance(report, Failed):
            error = from_info(report.error)
            if not isinstance(error, ConfigError):
                # Perhaps it only misses another rank, whose death says more.
                with self._news:
                    self._news.wait_for(lambda: self._loss is not None, _COMPLAINT_S)
            self._lose(error)
            return
        with self._news:
            self._reports[type(report)][rank] = report
            self._news.notify_all()

    def _lose(self, error: PdserveError) -> None:
        with self._news:
            if self._closing or self._loss is not None:
                return
            self._loss = error
            self._news.notify_all()
        log.error("%s", error)
        # The others can't go on without it; their end frees whoever waits for them.
        for process in list(self._processes.values()):
            process.kill()
        # Now, because the host may end at once.
        self._place.close()
        self._on_loss(error)

    def _wait_for(self, kind: type[Report]) -> None:
        heard = self._reports[kind]
        with self._news:
            self._news.wait_for(lambda: self._loss is not None or len(heard) == len(self._threads), _START_TIMEOUT_S)
            if self._loss is not None:
                raise self._loss
            if len(heard) < len(self._threads):
                missing = sorted(set(range(1, len(self._threads) + 1)) - heard.keys())
                raise RunnerLost(f"ranks {missing} did not start within {_START_TIMEOUT_S:g} s")


def _spawn(module: str, spec: RankSpec) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        pass_fds=(spec.reports,),
        start_new_session=True,
        env=child_environment(),
    )
    assert process.stdin is not None
    # A follower that is dead already will say more by its status.
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(msgspec.json.encode(spec))
    return process


def _describe(status: int) -> str:
    return f"ended with {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
