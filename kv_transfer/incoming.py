"""One handoff on its way in: grants slots for blocks that are ready, and puts what comes into its blocks.

Life of an `Import`: offered → accepted into blocks → messages granted, received into staging, unpacked → all blocks
landed and the first token known, or ended early by an abort, the deadline, or the loss of the connection. Its one event
is posted when no unpack writes to its blocks any more. What comes afterwards lands in staging and goes no further: a
slot is held until its payload has come, or the connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kv_transfer import plan
from kv_transfer.environment import Environment
from kv_transfer.inbound import Inbound
from kv_transfer.mover import Mark, checksum
from kv_transfer.staging import Slot, Staging
from kv_transfer.wire import Abort, Data, Done, Grant, Offer
from pdserve.errors import TransferError
from pdserve.handoff import HandoffEvent, ImportDone, ImportFailed

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Receipt:
    """A message on its way into `slot`. It is complete when both its payload and its Data have come."""

    blocks: plan.BlockRange
    slot: Slot
    nbytes: int
    ticket: int
    received_bytes: int | None = None
    data: Data | None = None


class Import:
    """One offered handoff. `on_end` is called as soon as it is over; the event may follow a moment later."""

    def __init__(
        self,
        env: Environment,
        staging: Staging,
        inbound: Inbound,
        offer: Offer,
        on_end: Callable[[Import], None],
    ) -> None:
        self.key = offer.key
        self.number = offer.handoff
        self.accepted = False
        self.ended_at_s: float | None = None
        self._env = env
        self._staging = staging
        self._inbound = inbound
        self._on_end = on_end
        self._num_tokens = offer.num_tokens
        self._block_ids: Tensor | None = None
        self._mark: Mark = None
        self._cursor: plan.Cursor | None = None
        self._ready_blocks = 0
        self._missing_blocks = 0
        self._first_token: int | None = None
        self._receipts: dict[int, _Receipt] = {}
        self._unpacking = 0
        self._event: HandoffEvent | None = None
        inbound.counter.handoff_started()
        expired = TransferError(f"the handoff took longer than {env.timeout_s} s", "timeout")
        self._deadline = asyncio.get_running_loop().call_later(env.timeout_s, self.end, expired)

    def accept(self, block_ids: Sequence[int], num_cached_tokens: int, mark: Mark) -> None:
        """Blocks to write to; `mark` is where the engine's stream stood, for it may still be reading them."""
        if self.accepted:
            return
        self.accepted = True
        tokens_per_block = self._env.pool.layout.tokens_per_block
        num_blocks = plan.num_blocks(self._num_tokens, tokens_per_block)
        if len(block_ids) < num_blocks or num_cached_tokens % tokens_per_block or num_cached_tokens > self._num_tokens:
            what = f"{len(block_ids)} blocks, {num_cached_tokens} tokens cached"
            self.end(TransferError(f"{self._num_tokens} tokens can't be accepted into {what}", "protocol"))
            return
        self._block_ids, self._mark = self._env.mover.block_ids(block_ids), mark
        first = num_cached_tokens // tokens_per_block
        self._missing_blocks = num_blocks - first
        self._cursor = plan.Cursor(first, num_blocks)
        self.on_ready(self._ready_blocks)
        self._finish_if_complete()

    def on_ready(self, num_blocks: int) -> None:
        self._ready_blocks = max(self._ready_blocks, num_blocks)
        if self._cursor is not None:
            self._cursor.advance(self._ready_blocks)
            if self.wants_slot:
                self._staging.request(self)

    def on_complete(self, first_token: int) -> None:
        self._first_token = first_token
        self._finish_if_complete()

    def on_data(self, data: Data) -> None:
        receipt = self._receipts.get(data.tag)
        if receipt is not None:
            receipt.data = data
            self._settle(data.tag, receipt)

    @property
    def wants_slot(self) -> bool:
        in_flight = len(self._receipts) + self._unpacking
        ready = self._cursor is not None and self._cursor.has_next
        return ready and self.ended_at_s is None and in_flight < plan.MAX_IN_FLIGHT

    def take(self, slot: Slot) -> None:
        """Post a receive into `slot`, then tell the sender its tag."""
        assert self._cursor is not None, "blocks are named before slots are asked for"
        blocks = self._cursor.take(min(self._staging.slot_blocks, self._inbound.max_message_blocks))
        nbytes = blocks.size * self._env.pool.block_bytes
        tag = self._inbound.next_tag()
        self._receipts[tag] = _Receipt(blocks, slot, nbytes, self._inbound.connection.expect(self))
        future = self._inbound.connection.recv_payload(tag, slot.memory[:nbytes])
        future.add_done_callback(lambda future: self._on_received(tag, future))
        self._inbound.connection.send(Grant(self.number, tag, blocks.first, blocks.size))

    def end(self, error: TransferError | None, tell_peer: bool = True, silent: bool = False) -> None:
        """End in success, or for `error`; the event (none if `silent`) follows once no unpack writes to the blocks."""
        if self.ended_at_s is not None:
            return
        self.ended_at_s = asyncio.get_running_loop().time()
        self._deadline.cancel()
        self._staging.withdraw(self)
        self._inbound.counter.handoff_ended(error.reason if error else None)
        if error is not None and tell_peer:
            self._inbound.connection.send(Abort(self.number, error.reason, error.message))
        self._inbound.remove(self)
        self._on_end(self)
        if error is not None and not silent:
            self._event = ImportFailed(self.key, error)
        elif error is None:
            assert self._first_token is not None, "a handoff is complete with its first token"
            self._event = ImportDone(self.key, self._first_token)
        for tag, receipt in list(self._receipts.items()):
            self._settle(tag, receipt)
        self._post_if_quiet()

    def _on_received(self, tag: int, future: asyncio.Future[int]) -> None:
        receipt = self._receipts[tag]
        if future.exception() is not None:
            self._close(tag, receipt)
            self._staging.release(receipt.slot)
            return
        receipt.received_bytes = future.result()
        self._settle(tag, receipt)

    def _settle(self, tag: int, receipt: _Receipt) -> None:
        """Deal with a message whose payload has come: unpack it, or let its slot go."""
        ended = self.ended_at_s is not None
        if receipt.received_bytes is None or (receipt.data is None and not ended):
            return
        self._close(tag, receipt)
        if ended or receipt.data is None:
            self._staging.release(receipt.slot)
        elif receipt.data.nbytes != receipt.nbytes or receipt.received_bytes != receipt.nbytes:
            self._staging.release(receipt.slot)
            came = min(receipt.data.nbytes, receipt.received_bytes)
            self.end(TransferError(f"a message of {receipt.nbytes} bytes came as {came}", "protocol"))
        else:
            self._unpacking += 1
            self._env.spawn(self._land(receipt, receipt.data))

    def _close(self, tag: int, receipt: _Receipt) -> None:
        del self._receipts[tag]
        self._inbound.connection.settle(receipt.ticket)

    async def _land(self, receipt: _Receipt, data: Data) -> None:
        assert self._block_ids is not None, "blocks are named before anything is granted"
        payload = receipt.slot.memory[: receipt.nbytes]
        block_ids = self._block_ids[receipt.blocks.first : receipt.blocks.first + receipt.blocks.size]
        try:
            if data.crc32 is not None and checksum(payload) != data.crc32:
                raise TransferError(f"the checksum of blocks {receipt.blocks} does not match", "checksum")
            await self._env.mover.unpack(payload, block_ids, self._mark)
        except TransferError as error:
            self.end(error)
        except Exception as error:
            log.exception("%s: writing blocks failed", self.key)
            self.end(TransferError(f"the blocks could not be written: {error}", "aborted"))
        else:
            self._missing_blocks -= receipt.blocks.size
            self._inbound.counter.moved(receipt.nbytes, self._inbound.connection.transport)
        finally:
            self._unpacking -= 1
            self._staging.release(receipt.slot)
            if self.wants_slot:
                self._staging.request(self)
            self._finish_if_complete()
            self._post_if_quiet()

    def _finish_if_complete(self) -> None:
        if self.accepted and self._missing_blocks == 0 and self._first_token is not None and self.ended_at_s is None:
            self._inbound.connection.send(Done(self.number))
            self.end(None)

    def _post_if_quiet(self) -> None:
        if self._event is not None and self._unpacking == 0:
            event, self._event = self._event, None
            self._env.post(event)
