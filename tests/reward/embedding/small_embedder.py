"""An embedding model small enough for a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GraniteConfig, GraniteModel, PreTrainedTokenizerFast


def write_embedder(directory: Path, words: Sequence[str]) -> Path:
    """Write a model of random weights with a tokenizer of these words, the first of which pads and is any other."""
    config = GraniteConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    GraniteModel(config).save_pretrained(directory)
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=words[0]).save_pretrained(directory)
    return directory
