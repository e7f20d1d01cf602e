"""What a peer says in numbers: whatever it is, the handoff that it is about ends by name, and only that one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, TypeVar

import msgspec
import pytest
import torch

from generation_worker import link as import_link
from kv_transfer.layout import Span
from kv_transfer.networks.base import Link
from kv_transfer.networks.loopback import LoopbackNetwork
from kv_transfer.peer_memory import publish
from kv_transfer.pieces import Piece
from kv_transfer.routes import NOTHING, Share, held_by
from kv_transfer.wire import (
    Abort,
    Accept,
    Complete,
    Data,
    Done,
    Grant,
    Kept,
    LinkAnswer,
    Message,
    Offer,
    OpenLink,
    Ping,
    Pong,
    Readable,
    Ready,
    Sent,
    decode,
    encode,
)
from pdserve.handoff import ExportFailed, ImportFailed, ImportOffered
from pdserve.protocol import Key, KvAddress
from tests.transfer.harness import POISON, Node, accept_into, layout, pool_tensor

KEY = Key("r", 0)
TOKENS, BLOCKS = 16, 4
LAYERS = Span(0, 3)
BLOCK_BYTES = 480
HUGE = 2**63 - 1
NAN, INF = math.nan, math.inf
WAIT_S = 10.0
STALL_S = 0.4

Got = TypeVar("Got", bound=Message)


def piece(first: int, end: int, layers: Span = LAYERS) -> Piece:
    return Piece(layers, Span(first, end))


class Liar:
    """One end of a link, that says what a test wants, and that it lives. Other frames are kept in order."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._frames: asyncio.Queue[Message] = asyncio.Queue()
        link.attach(self._take, lambda cause: None)

    def say(self, *messages: Message) -> None:
        for message in messages:
            self._link.send_control(encode(message))

    def send(self, tag: int, nbytes: int) -> None:
        self._link.send_payload(tag, torch.zeros(nbytes, dtype=torch.uint8))

    async def hear(self, kind: type[Got]) -> Got:
        """The next message of that kind; those before it are dropped."""
        async with asyncio.timeout(WAIT_S):
            while not isinstance(message := await self._frames.get(), kind):
                pass
            return message

    def _take(self, frame: bytes) -> None:
        message = decode(frame)
        if isinstance(message, Ping):
            self.say(Pong())
        elif not isinstance(message, Pong):
            self._frames.put_nowait(message)


async def within(node: Node, kind: type[Any], key: Key = KEY) -> Any:
    """As `Node.wait`, in a loop that goes on meanwhile."""
    return await asyncio.to_thread(node.wait, kind, key, WAIT_S)


@asynccontextmanager
async def lying_sender(reads: bool) -> AsyncIterator[tuple[Liar, Node]]:
    """It has offered 16 tokens, and heard that they are accepted."""
    gen = Node(
        pool_tensor(8, None),
        "generation-0",
        role="generation",
        on_offer=accept_into(lambda key: range(BLOCKS)),
        backend="LOOPBACK",
        direct_reads=True,
        checksum=False,
        stall_timeout_s=STALL_S,
    )
    network, own = LoopbackNetwork(), pool_tensor(8, 1)
    try:
        link = await network.connect("127.0.0.1", gen.address.port, gen.address.instance)
        liar = Liar(link)
        pools = (publish(own),) if reads else ()
        liar.say(OpenLink("liar", gen.address.instance, layout(), held_by(layout()), 1 << 20, pools))
        assert (await liar.hear(LinkAnswer)).reads == reads
        liar.say(Offer(1, KEY, TOKENS, (tuple(range(BLOCKS)),) if reads else ()))
        await liar.hear(Accept)
        yield liar, gen
    finally:
        await network.close()
        gen.close()


async def refused(liar: Liar, gen: Node) -> None:
    assert (await liar.hear(Abort)).reason == "protocol"
    assert (await within(gen, ImportFailed)).error.reason == "protocol"
    gen.assert_staging_free()
    assert bool((gen.tensor[BLOCKS:].view(torch.uint8) == POISON).all())


def readable(index: int, of: Piece, until_s: float = 1e9) -> Readable:
    return Readable(1, index, of, until_s)


NO_PIECES = {
    "other layers": piece(0, 8, Span(1, 4)),
    "negative layers": piece(0, 8, Span(-1, 2)),
    "layers the wrong way round": piece(0, 8, Span(2, 1)),
    "huge layers": piece(0, 8, Span(0, HUGE)),
    "negative tokens": piece(-4, 4),
    "tokens the wrong way round": piece(8, 4),
    "no tokens": piece(4, 4),
    "tokens beyond the last": piece(12, 20),
    "huge tokens": piece(0, HUGE),
    "part of a block": piece(0, 6),
    "from within a block": piece(2, 8),
}
READABLE: dict[str, tuple[Message, ...]] = {
    **{name: (readable(0, wrong),) for name, wrong in NO_PIECES.items()},
    "a piece twice": (readable(0, piece(0, 8)), readable(1, piece(0, 8))),
    "an overlap": (readable(0, piece(0, 8)), readable(1, piece(4, 12))),
    "an overlap of layers": (readable(0, piece(0, 16, Span(0, 2))), readable(1, piece(0, 16, Span(1, 3)))),
    "a number left out": (readable(1, piece(0, 8)),),
    "a huge number": (readable(HUGE, piece(0, 8)),),
    "a negative number": (readable(-1, piece(0, 8)),),
    "until no time": (readable(0, piece(0, 8), NAN),),
    "for ever": (readable(0, piece(0, 8), INF),),
    "kept until no time": (readable(0, piece(0, 8)), Kept(1, NAN)),
    "kept for ever": (readable(0, piece(0, 8)), Kept(1, INF)),
    "complete after no time": (readable(0, piece(0, 16)), Complete(1, 1, 1, NAN)),
    "complete before it began": (readable(0, piece(0, 16)), Complete(1, 1, 1, -1.0)),
}


@pytest.mark.parametrize("said", READABLE.values(), ids=list(READABLE))
async def test_what_can_not_be_readable_is_refused(said: tuple[Message, ...]) -> None:
    async with lying_sender(reads=True) as (liar, gen):
        liar.say(*said)
        await refused(liar, gen)


@pytest.mark.parametrize("wrong", NO_PIECES.values(), ids=list(NO_PIECES))
@pytest.mark.parametrize("nbytes", [4 * BLOCK_BYTES, 0, -1, HUGE])
async def test_a_message_of_no_piece_is_refused(wrong: Piece, nbytes: int) -> None:
    async with lying_sender(reads=False) as (liar, gen):
        grant = await liar.hear(Grant)
        liar.say(Data(1, grant.tag, nbytes, wrong))
        liar.send(grant.tag, 4 * BLOCK_BYTES)
        liar.say(Sent(1, grant.tag))
        await refused(liar, gen)


OVERLAPS = {
    "twice": (piece(0, 8), piece(0, 8)),
    "half": (piece(0, 8), piece(4, 12)),
    "some layers": (piece(0, 16, Span(0, 2)), piece(0, 16, Span(1, 3))),
    "ahead": (piece(8, 16), piece(12, 16)),
    "around": (piece(4, 8, Span(1, 2)), piece(0, 16)),
}


@pytest.mark.parametrize("pieces", OVERLAPS.values(), ids=list(OVERLAPS))
async def test_what_has_come_before_is_not_counted_again(pieces: tuple[Piece, Piece]) -> None:
    """Else an import would be complete while some of its blocks hold nothing."""
    async with lying_sender(reads=False) as (liar, gen):
        liar.say(Ready(1, 2))
        for each in pieces:
            grant = await liar.hear(Grant)
            nbytes = each.tokens.size // 4 * each.layers.size * BLOCK_BYTES // 3
            liar.say(Data(1, grant.tag, nbytes, each))
            liar.send(grant.tag, nbytes)
            liar.say(Sent(1, grant.tag))
        await refused(liar, gen)


NONSENSE: dict[str, tuple[Message, ...]] = {
    "more messages than cells": (Ready(1, HUGE),),
    "complete with more messages than cells": (Complete(1, 1, 49),),
    "complete for ever": (Complete(1, 1, 1, INF),),
}


@pytest.mark.parametrize("said", NONSENSE.values(), ids=list(NONSENSE))
async def test_what_can_not_be_ready_is_refused(said: tuple[Message, ...]) -> None:
    async with lying_sender(reads=False) as (liar, gen):
        liar.say(*said)
        await refused(liar, gen)


OFFERS = {
    "no tokens": Offer(2, Key("s", 0), 0),
    "negative tokens": Offer(2, Key("s", 0), -1),
    "huge tokens": Offer(2, Key("s", 0), HUGE),
    "no blocks": Offer(2, Key("s", 0), TOKENS),
    "too few blocks": Offer(2, Key("s", 0), TOKENS, ((1, 2, 3),)),
    "a block twice": Offer(2, Key("s", 0), TOKENS, ((1, 2, 3, 1),)),
    "a negative block": Offer(2, Key("s", 0), TOKENS, ((1, 2, 3, -1),)),
    "a block beyond the last": Offer(2, Key("s", 0), TOKENS, ((1, 2, 3, 8),)),
    "two tables": Offer(2, Key("s", 0), TOKENS, ((1, 2, 3, 4), (1, 2, 3, 4))),
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=list(OFFERS))
async def test_an_offer_of_what_is_not_there_is_refused_and_no_engine_hears_of_it(offer: Offer) -> None:
    async with lying_sender(reads=True) as (liar, gen):
        liar.say(offer)
        answer = await liar.hear(Abort)
        assert (answer.handoff, answer.reason) == (2, "refused")
        assert [event.key for event in gen.events if isinstance(event, ImportOffered)] == [KEY]
        assert not gen.endings(KEY), "the handoff beside it goes on"


async def test_one_sender_can_not_have_any_number_of_handoffs_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_link, "MAX_OPEN", 2)
    async with lying_sender(reads=False) as (liar, _):
        liar.say(*(Offer(number, Key(f"s{number}", 0), TOKENS) for number in (2, 3)))
        answer = await liar.hear(Abort)
        assert (answer.handoff, answer.reason) == (3, "refused")
        liar.say(Abort(1, "aborted", ""), Offer(4, Key("s4", 0), TOKENS))
        while (await liar.hear(Accept)).handoff != 4:
            pass


OPENINGS: dict[str, dict[str, Any]] = {
    "messages of nothing": {"max_message_bytes": 0},
    "negative messages": {"max_message_bytes": -1},
    "layers that nobody has": {"shares": (Share(Span(0, 4), Span(0, 2)),)},
    "heads that nobody has": {"shares": (Share(Span(0, 3), Span(-1, 2)),)},
    "no layers": {"shares": (Share(Span(1, 1), Span(0, 2)),)},
    "nothing": {"shares": (NOTHING,)},
    "shares of no group": {"shares": ()},
    "shares of two groups": {"shares": (Share(Span(0, 3), Span(0, 2)), NOTHING)},
    "pools of two groups": {"pools": (None, None)},
}


@pytest.mark.parametrize("said", OPENINGS.values(), ids=list(OPENINGS))
async def test_an_opening_that_does_not_fit_is_answered_with_the_reason(said: dict[str, Any]) -> None:
    gen = Node(pool_tensor(8, None), "generation-0", role="generation", backend="LOOPBACK", direct_reads=True)
    network = LoopbackNetwork()
    try:
        liar = Liar(await network.connect("127.0.0.1", gen.address.port, gen.address.instance))
        opening = OpenLink("liar", gen.address.instance, layout(), held_by(layout()), 1 << 20)
        liar.say(msgspec.structs.replace(opening, **said))
        error = (await liar.hear(LinkAnswer)).error
        assert error is not None
        assert error.code in ("transfer_error.protocol", "transfer_error.layout")
    finally:
        await network.close()
        gen.close()


async def test_a_pool_that_is_larger_than_its_memory_is_refused() -> None:
    gen = Node(pool_tensor(8, None), "generation-0", role="generation", backend="LOOPBACK", direct_reads=True)
    network, own = LoopbackNetwork(), pool_tensor(8, 1)
    try:
        name = publish(own)
        assert name is not None
        liar = Liar(await network.connect("127.0.0.1", gen.address.port, gen.address.instance))
        larger = msgspec.structs.replace(name, num_blocks=9)
        liar.say(OpenLink("liar", gen.address.instance, layout(), held_by(layout()), 1 << 20, (larger,)))
        error = (await liar.hear(LinkAnswer)).error
        assert error is not None
        assert error.code == "transfer_error.protocol"
    finally:
        await network.close()
        gen.close()


@pytest.mark.parametrize("early", [Ready(1, 1), Complete(1, 1, 1)])
async def test_nothing_is_ready_before_it_is_accepted(early: Message) -> None:
    gen = Node(pool_tensor(8, None), "generation-0", role="generation", backend="LOOPBACK")
    network = LoopbackNetwork()
    try:
        liar = Liar(await network.connect("127.0.0.1", gen.address.port, gen.address.instance))
        liar.say(OpenLink("liar", gen.address.instance, layout(), held_by(layout()), 1 << 20))
        liar.say(Offer(1, KEY, TOKENS), early)
        assert (await liar.hear(Abort)).reason == "protocol"
        assert (await within(gen, ImportFailed)).error.reason == "protocol"
    finally:
        await network.close()
        gen.close()


@asynccontextmanager
async def lying_receiver(reads: bool, finished: bool = True) -> AsyncIterator[tuple[Liar, Node]]:
    """It has got an offer of 16 tokens, which are computed."""
    network, numbers = LoopbackNetwork(), count()
    liars: asyncio.Queue[Liar] = asyncio.Queue()
    port = await network.listen("127.0.0.1", 0, "liar", lambda link: liars.put_nowait(Liar(link)))
    options = {"backend": "LOOPBACK", "direct_reads": True, "checksum": False, "stall_timeout_s": STALL_S}
    ctx = Node(pool_tensor(8, 1), "context-0", role="context", **options)
    try:
        address = KvAddress("liar", f"liar-{next(numbers)}", "127.0.0.1", port, layout().hash())
        ctx.exporter.offer(KEY, address, TOKENS, range(BLOCKS))
        if finished:
            ctx.exporter.finish(KEY, 1)
        liar = await asyncio.wait_for(liars.get(), WAIT_S)
        await liar.hear(OpenLink)
        liar.say(LinkAnswer("liar", layout(), 1 << 20, reads=reads))
        assert (await liar.hear(Offer)).handoff == 1
        yield liar, ctx
    finally:
        await network.close()
        ctx.close()


ANSWERS: dict[str, tuple[Message, ...]] = {
    "a negative token": (Accept(1, -4),),
    "a token beyond the last": (Accept(1, TOKENS + 4),),
    "a huge token": (Accept(1, HUGE),),
    "part of a block": (Accept(1, 2),),
    "done at once": (Done(1),),
    "done before it is sent": (Accept(1, 0), Done(1)),
    "more grants than messages at a time": (Accept(1, TOKENS), *(Grant(1, tag) for tag in range(1, 20))),
}
ANSWERS_OF_A_READER: dict[str, tuple[Message, ...]] = {
    "read for no time": (Accept(1, 0), Done(1, NAN)),
    "read for ever": (Accept(1, 0), Done(1, INF)),
    "read for less than nothing": (Accept(1, 0), Done(1, -1.0)),
}


async def answer(reads: bool, said: tuple[Message, ...]) -> None:
    async with lying_receiver(reads) as (liar, ctx):
        liar.say(*said)
        assert (await liar.hear(Abort)).reason == "protocol"
        assert (await within(ctx, ExportFailed)).error.reason == "protocol"
        ctx.assert_staging_free()


@pytest.mark.parametrize("said", ANSWERS.values(), ids=list(ANSWERS))
async def test_what_no_receiver_answers_ends_the_handoff(said: tuple[Message, ...]) -> None:
    await answer(False, said)


@pytest.mark.parametrize("said", ANSWERS_OF_A_READER.values(), ids=list(ANSWERS_OF_A_READER))
async def test_what_no_reader_answers_ends_the_handoff(said: tuple[Message, ...]) -> None:
    await answer(True, said)


Unknown = Callable[[int], Message]


@pytest.mark.parametrize("unknown", [lambda number: Ping((number,)), lambda number: Accept(number, 0)])
async def test_a_sender_says_which_handoffs_it_does_not_know(unknown: Unknown) -> None:
    async with lying_receiver(reads=False, finished=False) as (liar, ctx):
        for number in (-1, 2, HUGE):
            liar.say(unknown(number))
            assert (await liar.hear(Abort)).handoff == number
        assert not ctx.endings(KEY)


async def test_a_receiver_says_which_handoffs_it_does_not_know_and_takes_them_no_more() -> None:
    async with lying_sender(reads=False) as (liar, gen):
        liar.say(Ping((1, 3)))
        assert (await liar.hear(Abort)).handoff == 3
        liar.say(Offer(3, Key("late", 0), TOKENS), Offer(4, Key("next", 0), TOKENS))
        assert (await liar.hear(Accept)).handoff == 4
        assert not any(event.key == Key("late", 0) for event in gen.events)
