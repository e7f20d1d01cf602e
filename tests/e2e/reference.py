"""What `transformers.generate` says: the truth for whole-cluster tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "List three colours:",
    "The quick brown fox",
    "In 1969, the first human",
    "E = mc^2 means that",
    "import numpy as np\n\n",
    "Dear Sir or Madam,",
    "¿Cuál es la capital de España?",
    "Das Wetter ist heute",
    "🙂 means",
    "A haiku about autumn:\n",
    "SELECT name FROM users WHERE",
    "The three laws of robotics are: 1.",
    "To be, or not to be,",
    "Q: What is 7 times 8?\nA:",
    "<html><body><h1>",
    "Photosynthesis is the process by which green plants " * 6,
)
NEW_TOKENS = 24


class Reference:
    """The demo model in transformers, float32, greedy. Answers are computed once and kept."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def greedy(
        self, prompt: str | list[int], new_tokens: int = NEW_TOKENS, guess: list[int] | None = None
    ) -> list[int]:
        """Tokens after `prompt`, up to and without the end-of-sequence token.

        A right `guess` saves most of the time: one step of the model tells that each of its tokens is the likeliest.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        key = (tuple(ids), new_tokens)
        if key not in self._known:
            right = guess is not None and self._is_greedy(ids, guess, new_tokens)
            self._known[key] = guess if guess is not None and right else self._generate(ids, new_tokens)
        return self._known[key]

    def text(self, prompt: str, new_tokens: int = NEW_TOKENS, guess: list[int] | None = None) -> str:
        return str(self.tokenizer.decode(self.greedy(prompt, new_tokens, guess), skip_special_tokens=True))

    def _is_greedy(self, ids: list[int], guess: list[int], new_tokens: int) -> bool:
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([[*ids, *guess]])).logits[0, len(ids) - 1 :]
        *likeliest, follower = logits.argmax(-1).tolist()
        return guess == likeliest and (len(guess) == new_tokens or follower in self._ends())

    def _generate(self, ids: list[int], new_tokens: int) -> list[int]:
        inputs = self._torch.tensor([ids])
        with self._torch.inference_mode():
            out = self._model.generate(
                inputs,
                attention_mask=self._torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        ends = self._ends()
        return [token for token in out[0, len(ids) :].tolist() if token not in ends]

    def _ends(self) -> set[int]:
        eos = self._model.generation_config.eos_token_id
        return set(eos) if isinstance(eos, list) else {eos}
