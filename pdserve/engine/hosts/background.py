"""An engine in a thread of this process, for the Python API.

`LLM` uses it. Owns the thread and the listeners of open requests. Only the thread touches the engine, and it also
builds it, because some libraries keep what they prepare for each thread apart. Life: `BackgroundEngine(...)` starts the
thread and waits until the engine is built; `close` finishes open requests with an error and ends the thread. If the
engine fails for good, every listener is told, and later requests are refused.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from pdserve.engine.hosts.idle_check import IdleCheck
from pdserve.engine.schedule.engine import Engine
from pdserve.errors import EngineError, PdserveError
from pdserve.protocol import AbortRequest, Finished, GenerateRequest, Key, OutputFrame, TokenDelta

log = logging.getLogger(__name__)

# Called with what one step says of one request: new tokens, its end, or both. The `Finished` comes once. If a listener
# raises, its request is aborted, and it is called once more, with a `Finished` that has an error; other requests go on.
Listener = Callable[[TokenDelta | None, Finished | None], None]


class BackgroundEngine:
    """See the module.

    Args:
        build: makes the engine, in the thread. It gets the `wake` that the engine needs. What it raises, the
            constructor raises.
    """

    def __init__(self, build: Callable[[Callable[[], None]], Engine]) -> None:
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._inbox: deque[GenerateRequest | AbortRequest] = deque()
        self._listeners: dict[Key, Listener] = {}
        self._ended: PdserveError | None = None
        self._closing = False
        built: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name="pdserve-engine", daemon=True)
        # A daemon thread that still computes while the interpreter goes down would crash it.
        atexit.register(self.close)
        self._thread.start()
        try:
            self.limits = built.result().limits
        except BaseException:
            self.close()
            raise

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """Run `request`; `listener` is called in the engine's thread until it gets the request's one `Finished`."""
        with self._lock:
            ended = self._ended
            if ended is None:
                self._listeners[request.key] = listener
                self._inbox.append(request)
        if ended is not None:
            listener(None, Finished(request.key, "error", error=ended.to_info()))
        self._wake.set()

    def abort(self, key: Key) -> None:
        """End a request early; one that has ended is ignored."""
        with self._lock:
            self._inbox.append(AbortRequest(key))
        self._wake.set()

    def close(self) -> None:
        """Finish what is open with an error and end the thread."""
        atexit.unregister(self.close)
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self, build: Callable[[Callable[[], None]], Engine], built: Future[Engine]) -> None:
        try:
            engine = build(self._wake.set)
        except BaseException as failure:  # noqa: BLE001 - the constructor raises it
            built.set_exception(failure)
            return
        built.set_result(engine)
        error = EngineError("the engine was shut down")
        try:
            self._loop(engine)
        except EngineError as failure:
            error = failure
        except Exception:
            log.exception("the engine failed")
            error = EngineError("the engine failed")
        with self._lock:
            self._ended = error
            open_listeners, self._listeners = self._listeners, {}
        for key, listener in open_listeners.items():
            _end(listener, key, error)

    def _loop(self, engine: Engine) -> None:
        check = IdleCheck(engine)
        while not self._closing:
            self._take_messages(engine)
            if engine.has_work:
                check.note_work()
                self._deliver(engine.step())
                if engine.failure is not None:
                    raise engine.failure
                continue
            waits_s = [wait_s for wait_s in (engine.seconds_to_deadline(), check.run_slice()) if wait_s is not None]
            self._wake.wait(min(waits_s, default=None))
            self._wake.clear()

    def _take_messages(self, engine: Engine) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, AbortRequest):
                engine.abort(message.key)
            else:
                engine.submit(message)

    def _deliver(self, frame: OutputFrame) -> None:
        finished = {each.key: each for each in frame.finished}
        for delta in frame.deltas:
            self._tell(delta.key, delta, finished.pop(delta.key, None))
        for key, last in finished.items():
            self._tell(key, None, last)

    def _tell(self, key: Key, delta: TokenDelta | None, finished: Finished | None) -> None:
        listener = self._listeners.get(key)
        if listener is None:
            return  # it has raised
        if finished is not None:
            with self._lock:
                del self._listeners[key]
        try:
            listener(delta, finished)
        except Exception:
            log.exception("%s ends: who should take its output raised", key)
            with self._lock:
                self._listeners.pop(key, None)
            self.abort(key)
            _end(listener, key, EngineError("what was to take the output failed"))


def _end(listener: Listener, key: Key, error: PdserveError) -> None:
    """The last word to a listener that may raise again."""
    with contextlib.suppress(Exception):
        listener(None, Finished(key, "error", error=error.to_info()))
