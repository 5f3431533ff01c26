"""Scaled rotary frequencies against those of transformers, for the settings of published checkpoints."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_cord.model.families.decoder import decoder_architecture
from megatron_cord.model.layers.rotary import inverse_frequencies, softmax_scale

SETTINGS: dict[str, dict[str, Any]] = {
    "Llama 3.1": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "Llama 3.2": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "Qwen2.5": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0},
    "mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
        "mscale": 1.0, "mscale_all_dim": 0.707,
    },
    "not truncated": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 150000.0,
        "truncate": False, "attention_factor": 1.25, "beta_fast": 24.0, "beta_slow": 2.0,
    },
    "Vicuna": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
}  # fmt: skip


@pytest.mark.parametrize("name", list(SETTINGS))
def test_frequencies_are_those_of_transformers(name: str) -> None:
    """Catches a formula, a default or a bound that departs, over the dimensions of a published head."""
    config: Any = LlamaConfig(
        hidden_size=1024, num_attention_heads=8, max_position_embeddings=131072, rope_parameters=dict(SETTINGS[name])
    )
    language = decoder_architecture(config)
    wanted, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    torch.testing.assert_close(inverse_frequencies(language), wanted, rtol=1e-6, atol=0)
    assert (softmax_scale(language) or 1 / math.sqrt(128)) == pytest.approx(factor**2 / math.sqrt(128))
