"""The server's side of its engine process: start, talk, notice its end, stop.

The engine runs in a process of its own so that HTTP and JSON never take its GIL. Frames of `pdserve.protocol`
travel over two ZMQ pipes in a private folder. Life cycle: `start` (returns once the engine is warm), then `send`
and `messages` until either side ends, then `stop`, which leaves no process behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator

import msgspec
import zmq
import zmq.asyncio

from pdserve.errors import EngineError, from_info
from pdserve.log_output import OutputPipe, standard_error
from pdserve.private_folder import PrivateFolder
from pdserve.process import child_environment
from pdserve.protocol import (
    EngineAlive,
    EngineFailed,
    EngineReady,
    EngineStats,
    OutputFrame,
    Role,
    Shutdown,
    ToEngine,
    decode,
    encode,
    from_engine_decoder,
)

log = logging.getLogger(__name__)

_STOP_GRACE_S = 5.0


def _threads_that_yield() -> dict[str, str]:
    """OpenMP's idle threads sleep instead of spinning, unless the environment says otherwise.

    Several engines share a host's cores here: with spinning threads and one other busy process on two cores, a decode
    step of the demo model took 1300 ms instead of 54 to 68 ms.
    """
    return {} if os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} else {"OMP_WAIT_POLICY": "passive"}


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine process is told, as JSON on its standard input. `args` is a dumped `LlmArgs`. Its transceiver
    listens at `kv_host`, where others reach it as `kv_dial_host`."""

    role: Role
    worker_id: str
    args: dict[str, object]
    to_engine: str
    from_engine: str
    kv_host: str
    kv_dial_host: str
    log_level: str = "info"


class EngineLink:
    """One engine process. `module` is run with `python -m`."""

    def __init__(
        self, module: str, role: Role, worker_id: str, args: dict[str, object], kv_host: str, kv_dial_host: str = ""
    ) -> None:
        self._module = module
        self._folder = PrivateFolder()
        self._spec = EngineSpec(
            role=role,
            worker_id=worker_id,
            args=args,
            to_engine=f"ipc://{self._folder.path}/to_engine",
            from_engine=f"ipc://{self._folder.path}/from_engine",
            kv_host=kv_host,
            kv_dial_host=kv_dial_host or kv_host,
            log_level=logging.getLevelName(logging.getLogger().level).lower(),
        )
        self._context = zmq.Context()
        self._to_engine = self._context.socket(zmq.PUSH)
        self._from_engine = zmq.asyncio.Context(self._context).socket(zmq.PULL)
        for pipe in (self._to_engine, self._from_engine):
            pipe.set_hwm(0)
            pipe.linger = 0
        self._to_engine.connect(self._spec.to_engine)  # what is sent before the engine listens waits for it
        self._from_engine.bind(self._spec.from_engine)
        self._process: asyncio.subprocess.Process | None = None
        self._output: OutputPipe | None = None

    async def start(self) -> EngineReady:
        """Start the process and wait until it is warm.

        Raises:
            PdserveError: the engine's own error; `ConfigError` if a key is at fault.
        """
        # Whatever the engine and its libraries write, they do not wait for this process's own output.
        self._output = output = await OutputPipe.open(standard_error().write)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module),
                stdin=asyncio.subprocess.PIPE,
                stdout=output.descriptor,
                stderr=output.descriptor,
                start_new_session=True,
                env=child_environment(**_threads_that_yield()),
            )
        finally:
            output.handed_over()
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._spec))
        self._process.stdin.close()
        async for message in self.messages():
            if isinstance(message, EngineReady):
                return message
        raise EngineError("the engine ended while starting")

    def send(self, message: ToEngine) -> None:
        """Queue `message`; never blocks. With the engine gone it is dropped: whoever reads `messages` is told."""
        self._to_engine.send(encode(message), zmq.NOBLOCK)

    async def messages(self) -> AsyncIterator[OutputFrame | EngineStats | EngineReady | EngineAlive]:
        """What the engine says, in order, until its process ends.

        Raises:
            PdserveError: the engine's last words, if it had some; `EngineError` if it died without;
                `MalformedMessage` if it says what makes no sense.
        """
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait())
        try:
            while True:
                frame = asyncio.ensure_future(self._from_engine.recv())
                await asyncio.wait({frame, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not frame.done():
                    frame.cancel()
                    raise EngineError(f"the engine process ended with status {ended.result()}")
                message = decode(from_engine_decoder, frame.result())
                if isinstance(message, EngineFailed):
                    raise from_info(message.error)
                yield message
        finally:
            ended.cancel()

    async def stop(self) -> None:
        """End the process: ask, then terminate, then kill; each step is bounded."""
        process = self._process
        if process is not None and process.returncode is None:
            self.send(Shutdown())
            for number in (None, signal.SIGTERM, signal.SIGKILL):
                if number is not None and process.returncode is None:
                    log.warning("the engine is still there; sending %s", number.name)
                    process.send_signal(number)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _STOP_GRACE_S)
                    break
        self._to_engine.close()
        self._from_engine.close()
        self._context.term()
        self._folder.close()
        if self._output is not None:
            await self._output.finish()
