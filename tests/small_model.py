"""A random Llama with a tokenizer and a chat template, in a folder: for clusters whose answers matter, not their sense.

A step of it takes a few milliseconds on a core, one of the demo model ten times that.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.fakes.proxy_cluster import TEMPLATE, byte_level_tokenizer

SMALL_MODEL = "small-random-llama"
VOCAB_SIZE = 300
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 6, 3, 16
KV_BYTES_PER_TOKEN = NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * 4


def write_small_model(parent: Path) -> Path:
    """The folder `SMALL_MODEL` in `parent`; its tokens never end an answer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = parent / SMALL_MODEL
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=6,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        initializer_range=0.35,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder
