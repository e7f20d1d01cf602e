"""A proxy in front of fake workers, all in this process, and small tokenizers to go with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from pdserve.cluster_api import WatchEvent
from pdserve.config import ClusterConfig
from pdserve.http import bind, start
from pdserve.text.tokenizer import Tokenizer
from proxy.chat_template import ChatTemplate
from proxy.endpoints import ENDPOINTS
from proxy.fleet.fleet import Fleet
from proxy.metrics import Metrics
from proxy.model import ServedModel
from proxy.routes.endpoint import Endpoint
from proxy.server import make_app
from proxy.service import Service
from tests.fakes.fake_worker import Behaviour, FakeWorker, Handoffs

CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, héllo wörld", "日本語のテキスト 🙂🙃 naïve"] * 20

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer() -> RustTokenizer:
    """Byte-level BPE with three special tokens, ids 0 to 2: <|end|>, <|im_start|>, <|im_end|>."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_tokenizer() -> RustTokenizer:
    """Like Llama 2's: `▁` for spaces, byte fallback, a leading space that decoding strips, and <s> in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for line in CORPUS[:2] for letter in line.replace(" ", "")} | {"▁"})
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *letters, "▁t", "he", "▁the"])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = RustTokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def served_model(**changes: Any) -> ServedModel:
    """The model `fake`, with the byte-level tokenizer and a ChatML template."""
    tokenizer = Tokenizer(byte_level_tokenizer())
    fields: dict[str, Any] = {
        "name": "fake",
        "tokenizer": tokenizer,
        "template": ChatTemplate(TEMPLATE, {}),
        "vocab_size": tokenizer.vocab_size,
        "eos_token_ids": frozenset({2}),
    }
    return ServedModel(**{**fields, **changes})


class ProxyCluster:
    """The proxy under test. `contexts` and `generations` are its workers."""

    def __init__(
        self, config: ClusterConfig, model: ServedModel, endpoints: Sequence[Endpoint[Any]] = ENDPOINTS
    ) -> None:
        self.config = config
        self.model = model
        self.endpoints = endpoints
        self.handoffs = Handoffs()
        self.contexts = [self._worker("context", i) for i in range(config.context_servers.num_instances)]
        self.generations = [self._worker("generation", i) for i in range(config.generation_servers.num_instances)]
        self._revision = 0

    @property
    def workers(self) -> list[FakeWorker]:
        return [*self.contexts, *self.generations]

    def _worker(self, role: Any, index: int) -> FakeWorker:
        worker = FakeWorker(f"{role}-{index}", role, self.handoffs)
        worker.behaviour = Behaviour(vocab_size=self.model.vocab_size or 300)
        return worker

    async def start(self) -> None:
        self.worker_session = aiohttp.ClientSession()
        self.fleet = Fleet(self.config, self.worker_session, "proxy-test", self.model.fingerprint)
        self.service = Service(self.config, self.model, self.fleet, Metrics())
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.runner = await start(make_app(self.service, self.endpoints), listener)
        self.session = aiohttp.ClientSession(self.url)
        for worker in self.workers:
            await worker.start()

    async def connect(self) -> None:
        """Tell the proxy of all workers and wait until it has sockets to them."""
        self.apply("snapshot", workers=[worker.record() for worker in self.workers])
        await until(lambda: all(link.connected for link in self.fleet.members.links))

    def apply(self, kind: Any, **fields: Any) -> None:
        """An event of the manager."""
        self._revision += 1
        self.fleet.members.apply(WatchEvent(type=kind, revision=self._revision, **fields))

    async def stop(self) -> None:
        await self.session.close()
        await self.fleet.members.close()
        await self.worker_session.close()
        for worker in self.workers:
            await worker.stop()
        self.service.close()
        await self.runner.cleanup()

    async def post(self, route: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """POST to /v1/`route`; status and JSON."""
        async with self.session.post(f"/v1/{route}", json={"model": "fake", **body}) as response:
            return response.status, await response.json()

    async def nothing_open(self) -> None:
        """Wait until no worker works on anything."""
        await until(lambda: not any(worker.open_keys for worker in self.workers))


@contextlib.asynccontextmanager
async def proxy_cluster(
    contexts: int = 1,
    generations: int = 1,
    model: ServedModel | None = None,
    connect: bool = True,
    conditional: dict[str, int] | None = None,
    endpoints: Sequence[Endpoint[Any]] = ENDPOINTS,
    **proxy: Any,
) -> AsyncIterator[ProxyCluster]:
    """A running proxy; `proxy` are keys of its section of the configuration, `conditional` of the one for prompts that
    generation workers compute."""
    config = ClusterConfig.model_validate(
        {
            "model": "fake",
            "proxy": proxy,
            "conditional_disagg_config": conditional or {},
            "context_servers": {"num_instances": contexts},
            "generation_servers": {"num_instances": generations},
        }
    )
    cluster = ProxyCluster(config, served_model() if model is None else model, endpoints)
    await cluster.start()
    try:
        if connect:
            await cluster.connect()
        yield cluster
    finally:
        await cluster.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for `condition`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - any state of any object, none of which knows it is watched
            await asyncio.sleep(0.002)
