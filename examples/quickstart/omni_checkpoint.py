"""A tiny Qwen3-Omni with experts, with random weights, in the published layout; with a vision tower and no talker.

Its words, chat template and scales of weights are those of the tiny Qwen2-Audio. The encoder's sinusoids are computed
in this family, at amplitude 1, and would drown the audio: so what the convolutions lead to is scaled up instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerTextExperts,
    Qwen3OmniMoeThinkerTextTopKRouter,
)

from examples.quickstart.checkpoint import AUDIO, PAD, TURN_END, build_tokenizer, draw_weights
from megatron_cord.convert.plain.fused_experts import published_parts
from megatron_cord.model.families.qwen3_omni_moe.plain_model import Thinker

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TinyOmniConfig:
    """Sizes of the tiny mixture: 1.4 million parameters by default, of which a token passes 1.0."""

    mel_bins: int = 64  # bands of the log-mel spectrogram
    channels: int = 24  # of the encoder's convolutions
    encoder_hidden_size: int = 96
    encoder_layers: int = 2
    encoder_heads: int = 4
    encoder_ffn_size: int = 384
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    experts: int = 4  # of each layer, two for a token
    expert_size: int = 192
    vision_layers: int = 1  # of the vision tower, which has no input here; SGLang takes the published number alone, 3
    max_positions: int = 512  # prompt and response together
    vocabulary_multiple: int = 8  # rows of the embedding are rounded up to it, so that ranks share them evenly
    sinusoid_scale: float = 0.3  # amplitude of the position embeddings against what the convolutions lead to


def create_omni_checkpoint(directory: str | Path, config: TinyOmniConfig, vocabulary: Sequence[str], seed: int) -> None:
    """Write a Qwen3-Omni checkpoint with random fp32 weights.

    Args:
        directory: created if missing; files of an earlier checkpoint in it are overwritten.
        config: sizes.
        vocabulary: every word of questions and answers; specials and the chat roles are added here.
        seed: of the weights; the same seed gives the same file.

    Raises:
        CordError: a word that the word-level tokenizer could not keep whole.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocabulary)
    ids = tokenizer.get_vocab()
    rows = math.ceil(len(tokenizer) / config.vocabulary_multiple) * config.vocabulary_multiple
    whole: Any = Qwen3OmniMoeConfig(
        thinker_config=_thinker_config(config, rows, ids), enable_audio_output=False, dtype="float32"
    )
    whole.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    make: Any = Qwen3OmniMoeForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(whole)
        draw_weights(model.thinker, (Qwen3OmniMoeThinkerTextExperts, Qwen3OmniMoeThinkerTextTopKRouter))
        model.thinker.audio_tower.conv_out.weight.data.div_(config.sinusoid_scale)
    named = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    tensors = {name: part.contiguous() for each in named for name, part in published_parts(*each)}
    save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    whole.save_pretrained(directory)
    GenerationConfig(do_sample=False, eos_token_id=ids[TURN_END], pad_token_id=ids[PAD]).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=config.mel_bins, return_attention_mask=True).save_pretrained(directory)


def load_thinker(directory: Path) -> Any:
    """Load the part that listens and writes, as transformers has it."""
    return Thinker.from_pretrained(directory, dtype=torch.float32)


def save_weights(directory: Path, thinker: nn.Module) -> None:
    """Write a thinker's weights into a directory of its checkpoint, beside those of its other parts."""
    path = directory / _WEIGHTS
    with safe_open(path, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    named = ((f"thinker.{name}", parameter.detach()) for name, parameter in thinker.named_parameters())
    tensors |= {name: part.contiguous() for each in named for name, part in published_parts(*each)}
    save_file(tensors, path, metadata={"format": "pt"})


def _thinker_config(config: TinyOmniConfig, rows: int, ids: dict[str, int]) -> dict[str, Any]:
    """Return the thinker's configuration; rows of the embedding that no word has stand for images and videos."""
    head = config.hidden_size // config.heads
    return {
        "audio_config": {
            "num_mel_bins": config.mel_bins, "d_model": config.encoder_hidden_size,
            "encoder_layers": config.encoder_layers, "encoder_attention_heads": config.encoder_heads,
            "encoder_ffn_dim": config.encoder_ffn_size, "downsample_hidden_size": config.channels,
            "output_dim": config.hidden_size, "n_window": 50, "n_window_infer": 800,
        },
        "text_config": {
            "vocab_size": rows, "hidden_size": config.hidden_size, "intermediate_size": config.expert_size,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads, "head_dim": head, "num_experts": config.experts,
            "num_experts_per_tok": 2, "moe_intermediate_size": config.expert_size, "norm_topk_prob": True,
            "max_position_embeddings": config.max_positions, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "interleaved": True,
                "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6],
            },
        },
        "vision_config": {
            "depth": config.vision_layers, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": config.hidden_size, "num_position_embeddings": 16,
            "deepstack_visual_indexes": list(range(config.vision_layers)),
        },
        "audio_token_id": ids[AUDIO], "image_token_id": rows, "video_token_id": rows + 1,
        "tie_word_embeddings": False,
    }  # fmt: skip
