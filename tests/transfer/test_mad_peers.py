"""Peers of the right version that say what makes no sense: it costs them their connection, and nobody else anything."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from kv_transfer import wire
from kv_transfer.layout import KvLayout, Span
from kv_transfer.networks.base import Link
from kv_transfer.networks.loopback import LoopbackNetwork
from kv_transfer.peer_memory import PoolName
from kv_transfer.pieces import Piece
from kv_transfer.routes import Share
from pdserve.errors import ErrorInfo
from pdserve.handoff import ExportDone, ExportFailed, ImportDone
from pdserve.protocol import Key, KvAddress
from tests.frames import NO_MESSAGES
from tests.transfer.harness import MakeNode, Node, accept_into, context, generation, layout, nodes
from tests.transfer.test_networks import until

make_node = pytest.fixture(params=["LOOPBACK", "LOOPBACK, direct"])(nodes)

NUMBERS = (0, 1, -1, 2, 3, 4, 16, 64, 1 << 31, -(1 << 63), (1 << 63) - 1, (1 << 64) - 1)
TEXTS = ("", "r0", "context-0", "float16", "no\nsuch", "\0", "é" * 100)
FLOATS = (0.0, -1.0, 1e300, float("inf"), float("nan"))
WHOLE = Piece(Span(0, 3), Span(0, 16))


class Dice(random.Random):
    """Throws messages that decode, and mean anything at all."""

    @property
    def number(self) -> int:
        return self.choice(NUMBERS)

    @property
    def text(self) -> str:
        return self.choice(TEXTS)

    @property
    def piece(self) -> Piece:
        spans = Span(self.number, self.number), Span(self.number, self.number)
        return self.choice((WHOLE, Piece(*spans), Piece(*spans, self.number), WHOLE._replace(group=self.number)))

    @property
    def layout(self) -> KvLayout:
        return self.choice(
            (layout(), layout(dtype=self.text), layout(num_kv_heads=7), layout(tokens_per_block=1 << 40))
        )

    def from_sender(self, instance: str) -> wire.Message:
        handoff = self.choice((1, 2, self.number))
        pool = PoolName("host", "process", self.text, "cpu", self.number, b"x" * self.choice((0, 64)), self.number)
        share = self.choice((Share(Span(0, 3), Span(0, 2)), Share(self.piece.layers, self.piece.tokens)))
        blocks = tuple(self.number for _ in range(self.choice((0, 4))))
        shares, tables = (share,) * self.choice((1, 1, 0, 2)), (blocks,) * self.choice((1, 1, 0, 2))
        pools = (pool,) * self.choice((1, 1, 0, 2))
        return self.choice(
            (
                wire.OpenLink("mad", self.choice((instance, self.text)), self.layout, shares, self.number, pools),
                wire.Offer(handoff, Key(self.text, self.number), self.choice((16, self.number)), tables),
                wire.Ready(handoff, self.number),
                wire.Data(handoff, self.number, self.number, self.piece, self.number),
                wire.Sent(handoff, self.number),
                wire.Readable(handoff, self.number, self.piece, self.choice(FLOATS), self.number),
                wire.Complete(handoff, self.number, self.number, self.choice(FLOATS)),
                wire.Abort(handoff, self.text, self.text),
                wire.Grant(handoff, self.number),
            )
        )

    def from_receiver(self) -> wire.Message:
        handoff = self.choice((1, 2, self.number))
        error = self.choice((None, None, ErrorInfo(self.text, self.text)))
        return self.choice(
            (
                wire.LinkAnswer("mad", self.layout, self.number, error, self.choice((True, False))),
                wire.Accept(handoff, self.choice((0, 4, self.number))),
                wire.Grant(handoff, self.number),
                wire.Done(handoff, self.choice(FLOATS)),
                wire.Abort(handoff, self.text, self.text),
                wire.Offer(handoff, Key("r", 0), 16),
            )
        )


class Mad:
    """An end of a link, which says anything."""

    def __init__(self, link: Link) -> None:
        self.lost: list[str] = []
        self._link = link
        self._heard: list[wire.Message] = []
        link.attach(lambda frame: self._heard.append(wire.decode(frame)), self.lost.append)

    def say(self, *messages: wire.Message) -> None:
        for message in messages:
            self._link.send_control(wire.encode(message))

    def say_frame(self, frame: bytes) -> None:
        self._link.send_control(frame)

    async def be_heard(self) -> None:
        """Until all that was said is dealt with, or the other end has hung up."""
        self._heard.clear()
        self.say(wire.Ping())
        await until(lambda: bool(self.lost) or wire.Pong() in self._heard)

    def close(self) -> None:
        self._link.close()


async def mad_sender(gen: Node, network: LoopbackNetwork) -> Mad:
    return Mad(await network.connect("", gen.address.port, gen.address.instance))


def assert_unharmed(ctx: Node, gen: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Both still work, and have logged no traceback."""
    key = Key("afterwards", 0)
    ctx.exporter.offer(key, gen.address, 16, range(4))
    ctx.exporter.finish(key, 1)
    gen.wait(ImportDone, key)
    ctx.wait(ExportDone, key)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def pair(make_node: MakeNode) -> tuple[Node, Node]:
    return context(make_node), generation(make_node, on_offer=accept_into(lambda key: range(4)))


async def test_no_frame_of_a_sender_harms_a_receiver(make_node: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    ctx, gen = pair(make_node)
    network = LoopbackNetwork()
    for frame in NO_MESSAGES:
        mad = await mad_sender(gen, network)
        mad.say_frame(frame)
        await until(lambda mad=mad: bool(mad.lost))  # type: ignore[misc]
        mad.close()
    assert_unharmed(ctx, gen, caplog)


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_that_a_sender_says_harms_a_receiver(
    make_node: MakeNode, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    dice, (ctx, gen) = Dice(seed), pair(make_node)
    network = LoopbackNetwork()
    for turn in range(60):
        mad = await mad_sender(gen, network)
        if turn % 6:
            mad.say(wire.OpenLink("mad", gen.address.instance, layout(), (Share(Span(0, 3), Span(0, 2)),), 4096))
            mad.say(wire.Offer(1, Key(f"mad-{turn}", 0), 16))
        mad.say(*(dice.from_sender(gen.address.instance) for _ in range(8)))
        await mad.be_heard()
        mad.close()
    assert_unharmed(ctx, gen, caplog)


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_that_a_receiver_says_harms_a_sender(
    make_node: MakeNode, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    dice, (ctx, gen) = Dice(seed), pair(make_node)
    network, links = LoopbackNetwork(), list[Link]()
    port = await network.listen("", 0, "mad", links.append)
    say_well: Callable[[], wire.Message] = lambda: wire.LinkAnswer("mad", layout(), 4096)  # noqa: E731
    for turn in range(60):
        key = Key(f"mad-{turn}", 0)
        ctx.exporter.offer(key, KvAddress("mad", f"mad-{turn}", "", port, ""), 16, range(4))
        ctx.exporter.finish(key, 1)
        await until(lambda: bool(links))
        mad = Mad(links.pop())
        if turn % 6:
            mad.say(say_well(), wire.Accept(1, 0))
        mad.say(*(dice.from_receiver() for _ in range(8)))
        await mad.be_heard()
        mad.close()
        await asyncio.to_thread(ctx.wait_ending, key)
        assert isinstance(ctx.endings(key)[0], (ExportFailed, ExportDone))
    assert_unharmed(ctx, gen, caplog)
    await network.close()
