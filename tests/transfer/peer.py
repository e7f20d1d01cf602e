"""A rank's transceiver in a process of its own, which a test can freeze or kill."""

from __future__ import annotations

import copyreg
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

from kv_transfer.ranks.place import place
from pdserve.errors import TransferError
from pdserve.handoff import HandoffEvent
from pdserve.protocol import Key, KvAddress
from tests.transfer.harness import Node, accept_into

_processes = mp.get_context("forkserver")
_processes.set_forkserver_preload(["tests.transfer.harness"])

START_S = 60.0

copyreg.pickle(TransferError, lambda error: (TransferError, (error.message, error.reason, error.param)))


class Peer:
    """The parent's handle. The pool is shared memory: the parent reads what the child has written."""

    def __init__(self, process: Any, pipe: Connection, tensor: torch.Tensor) -> None:
        self._process = process
        self._pipe = pipe
        self._address: KvAddress | None = None
        self.tensor = tensor

    @property
    def address(self) -> KvAddress:
        """Where it listens; waits until it does."""
        if self._address is None:
            self._address = self._answer()
        return self._address

    def offer(self, key: Key, to: KvAddress, num_tokens: int, blocks: range, computed: int) -> None:
        """As a context worker, hand over `computed` of `num_tokens` tokens; all of them finish it."""
        self.offer_all([(key, to, num_tokens, blocks, computed)])

    def offer_all(self, handoffs: list[tuple[Key, KvAddress, int, range, int]]) -> None:
        """As `offer`, several at once. It returns before the first begins: the peer may be struck at any moment."""
        self._ask("offer", handoffs)

    def events(self) -> list[HandoffEvent]:
        return self._ask("events")

    def staging_in_use_bytes(self) -> int:
        return self._ask("staging_in_use_bytes")

    def freeze(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()

    def _ask(self, command: str, *arguments: Any) -> Any:
        assert self.address, "the address comes first"
        self._pipe.send((command, arguments))
        return self._answer()

    def _answer(self) -> Any:
        assert self._pipe.poll(START_S), "the peer process does not answer"
        return self._pipe.recv()


@contextmanager
def peer(tensor: torch.Tensor, worker_id: str, **options: Any) -> Iterator[Peer]:
    """A process with a transceiver over `tensor`. It accepts a handoff of request "n" into blocks from number n on.

    `quiet` keeps it from logging; the other options are `Node`'s, or `place`'s arguments.
    """
    ours, theirs = _processes.Pipe()
    tensor.share_memory_()
    process = _processes.Process(target=_serve, args=(theirs, tensor, worker_id, options), daemon=True)
    process.start()
    theirs.close()
    try:
        started = Peer(process, ours, tensor)
        if "place" not in options:  # rank 0 waits for its followers, which the caller starts as well
            assert started.address
        yield started
    finally:
        process.kill()
        process.join(10)
        ours.close()


def blocks_from(key: Key) -> range:
    """Where a peer puts the handoff of a request that is named by its first block."""
    first = int(key.request_id)
    return range(first, first + 1000)


def _serve(pipe: Connection, tensor: torch.Tensor, worker_id: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if options.pop("quiet", False):
        logging.disable(logging.CRITICAL)
    if "place" in options:
        options["ranks"] = place(*options.pop("place"))
    node = Node(tensor, worker_id, on_offer=accept_into(blocks_from), **options)
    pipe.send(node.address)
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        if command == "offer":
            pipe.send(None)
            for key, to, num_tokens, blocks, computed in arguments[0]:
                node.exporter.offer(key, to, num_tokens, blocks)
                node.exporter.computed(key, computed)
                if computed == num_tokens:
                    node.exporter.finish(key, 1)
        elif command == "events":
            pipe.send(list(node.events))
        else:
            pipe.send(getattr(node.transceiver, command))
