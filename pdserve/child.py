"""One process of `pdserve up`, over all its restarts.

Owns the process, its output (which is always read, so that the process never waits for a log) and the decision whether
it is started again. A process whose status says that its configuration or its address is at fault would say so again:
it ends the cluster, unless it has been ready before with that same configuration. One that was drained stays away.
Whatever else ends a process, or keeps it from being started, may be better next time: after a pause it starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

from pdserve.log_output import OutputPipe, standard_output
from pdserve.process import EXIT_ADDRESS, EXIT_CONFIG, EXIT_DRAINED, INSTANCE_VARIABLE, new_instance

_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_HEALTHY_AFTER_S = 60.0


class Child:
    """One process under supervision.

    Args:
        name: as the log shows it, padded to `width`.
        configuration: what it reads on its standard input.
        backoff_s: pauses before the first restart, the second, and so on.
    """

    def __init__(
        self,
        name: str,
        argv: list[str],
        environment: dict[str, str],
        configuration: bytes,
        width: int,
        backoff_s: tuple[float, ...] = _BACKOFF_S,
    ) -> None:
        self.name = name
        self.instance = ""  # of the present start; its /health says it
        self.was_ready = False
        self.fatal_status: int | None = None
        self._argv = argv
        self._environment = environment
        self._configuration = configuration
        self._prefix = f"{name:<{width}} | "
        self._backoff_s = backoff_s
        self._process: asyncio.subprocess.Process | None = None
        self._signal: signal.Signals | None = None
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Keep the process running until `signal`, or until its status is one that another start would not change:
        then `fatal_status` is set."""
        failures = 0
        while not self._stopped.is_set():
            started_s = time.monotonic()
            try:
                status = await self._run_once()
                what = _describe(status)
            except OSError as error:
                status, what = None, f"could not be started: {error}"
            if self._stopped.is_set():
                return
            if status in (EXIT_CONFIG, EXIT_ADDRESS) and not self.was_ready:
                self.fatal_status = status
                return
            if status == EXIT_DRAINED:
                self.say("was drained; it stays away until the cluster is started again")
                await self._stopped.wait()
                return
            failures = 1 if time.monotonic() - started_s > _HEALTHY_AFTER_S else failures + 1
            pause_s = self._backoff_s[min(failures, len(self._backoff_s)) - 1]
            self.say(f"{what}; restarting in {pause_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), pause_s)

    async def _run_once(self) -> int:
        """One start; returns the status. Raises OSError if the system lacks what a process needs."""
        output = await OutputPipe.open(self.say)
        self.instance = new_instance()
        try:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._argv,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=output.descriptor,
                    stderr=output.descriptor,
                    start_new_session=True,
                    env={**self._environment, INSTANCE_VARIABLE: self.instance},
                )
            finally:
                output.handed_over()
            self._process = process
            self.say(f"started, pid {process.pid}")
            assert process.stdin is not None
            process.stdin.write(self._configuration)
            process.stdin.close()
            if self._signal is not None:  # it came while the process was being started
                self.signal(self._signal)
            return await process.wait()
        finally:
            await output.finish()

    def say(self, text: str) -> None:
        """A line of the common log."""
        standard_output().write(f"{self._prefix}{text}")

    def signal(self, number: signal.Signals) -> None:
        """Tell the process to end (SIGKILL: its whole process group's leader at once), and do not restart it."""
        self._stopped.set()
        self._signal = number
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _describe(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
