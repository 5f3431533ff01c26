"""Small reference models of odd sizes for the families beside Qwen2-Audio.

Qwen2, Llama and Voxtral are transformers' own. Step-Audio 2 exists as remote code only: its encoder and adapter are written here from the
published description and file names, on transformers' Qwen2, one clip at a time, unpadded but for the two frames of silence that end it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    VoxtralConfig,
    VoxtralEncoderConfig,
    VoxtralForConditionalGeneration,
)

from examples.quickstart.checkpoint import published_name
from tests.model.ranks import AUDIO_ID, MELS, VOCAB_SIZE, WINDOW, Batch, make_batches
from tests.model.reference import Expected, one_step, randomise

DECODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
STEP_ENCODER = {
    "n_mels": MELS,
    "n_audio_ctx": WINDOW // 2,
    "n_audio_state": 24,
    "n_audio_head": 2,
    "n_audio_layer": 2,
    "llm_dim": 48,
    "kernel_size": 3,
    "adapter_stride": 2,
}


class StepAudio2(nn.Module):
    """Step-Audio 2 under the published names: encoder, adapter, and Qwen2 as model and lm_head."""

    def __init__(self) -> None:
        super().__init__()
        width = 24
        self.encoder = nn.Module()
        self.encoder.conv1 = nn.Conv1d(MELS, width, 3, padding=1)
        self.encoder.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.encoder.positional_embedding = nn.Embedding(WINDOW // 2, width).requires_grad_(False)
        self.encoder.blocks = nn.ModuleList([_step_block(width) for _ in range(2)])
        self.encoder.after_norm = nn.LayerNorm(width)
        self.adapter = nn.Module()
        self.adapter.conv = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.adapter.linear1 = nn.Linear(width, 2048)
        self.adapter.linear2 = nn.Linear(2048, 48)
        language = Qwen2ForCausalLM(Qwen2Config(**DECODER, dtype="float32"))
        self.model, self.lm_head = language.model, language.lm_head

    def hear(self, clip: Tensor, frames: int) -> Tensor:
        """[mels, frames + 2] to [tokens, H]: only the first `frames` are attended to."""
        gelu = torch.nn.functional.gelu
        encoder: Any = self.encoder
        x = gelu(encoder.conv2(gelu(encoder.conv1(clip[None]))))[0].T  # [T, width]
        x = x + encoder.positional_embedding.weight[: len(x)]
        mask = torch.zeros(len(x)).masked_fill(torch.arange(len(x)) >= (frames + 1) // 2, -torch.inf)
        for block in encoder.blocks:
            normed = block.attn_ln(x)
            q, k, v = (getattr(block.attn, part)(normed).view(len(x), 2, -1).transpose(0, 1) for part in ("query", "key", "value"))
            weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
            x = x + block.attn.out((weights @ v).transpose(0, 1).reshape(len(x), -1))
            x = x + block.mlp(block.mlp_ln(x))
        x = encoder.after_norm(x[: len(x) // 2 * 2].view(len(x) // 2, 2, -1).mean(1))
        features = (frames + 1) // 2 // 2
        adapter: Any = self.adapter
        x = adapter.linear2(adapter.linear1(gelu(adapter.conv(x.T[None]))[0].T).relu())
        return x[: (features - 1) // 2 + 1]

    def logits(self, batch: Batch) -> Tensor:
        """[B, S, V]."""
        embedded = self.model.embed_tokens(batch.input.token_ids)
        if batch.input.features is not None and batch.input.num_frames is not None:
            frames = batch.input.num_frames.tolist()
            heard = torch.cat([self.hear(clip[:, : n + 2], n) for clip, n in zip(batch.input.features, frames, strict=True)])
            embedded = embedded.masked_scatter((batch.input.token_ids == AUDIO_ID)[..., None], heard)
        return self.lm_head(self.model(inputs_embeds=embedded, attention_mask=_mask(batch)).last_hidden_state)


def _step_block(width: int) -> nn.Module:
    block: Any = nn.Module()
    block.attn = nn.Module()
    for part in ("query", "key", "value", "out"):
        setattr(block.attn, part, nn.Linear(width, width, bias=part != "key"))
    block.attn_ln, block.mlp_ln = nn.LayerNorm(width), nn.LayerNorm(width)
    block.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    return block


def _mask(batch: Batch) -> Tensor:
    return (torch.arange(batch.input.token_ids.shape[1])[None] < torch.tensor(batch.lengths)[:, None]).long()


def build(family: str, tied: bool) -> Any:
    """A random model of the family."""
    torch.manual_seed(1)
    model: Any
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=tied, dtype="float32"))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**DECODER, head_dim=10, tie_word_embeddings=tied, dtype="float32"))  # type: ignore[call-arg]
    elif family == "voxtral":
        audio = VoxtralEncoderConfig(
            num_mel_bins=MELS,
            hidden_size=24,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_source_positions=WINDOW // 2,
        )
        text = LlamaConfig(**DECODER, head_dim=10, tie_word_embeddings=False)  # type: ignore[call-arg]
        model = VoxtralForConditionalGeneration(VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO_ID))
    else:
        model = StepAudio2()
    randomise(model)
    return model


def logits_of(model: Any, batch: Batch) -> Tensor:
    """[B, S, V]; what stands in the padding means nothing."""
    if isinstance(model, StepAudio2):
        return model.logits(batch)
    inputs = {"input_ids": batch.input.token_ids, "attention_mask": _mask(batch)}
    if batch.input.features is not None:
        inputs["input_features"] = batch.input.features
    return model(**inputs).logits


def published(family: str, name: str) -> str:
    """The name in a checkpoint's files of a parameter of the reference."""
    return published_name(name) if family == "voxtral" else name


def save(directory: Path, family: str, tied: bool) -> None:
    """Writes configuration and weights as published checkpoints have them."""
    model = build(family, tied)
    save_file({published(family, name): p.detach().clone() for name, p in model.named_parameters()}, directory / "model.safetensors")
    if family == "step_audio_2":
        config = {"model_type": family, "audio_token_id": AUDIO_ID, "audio_encoder_config": STEP_ENCODER, "text_config": DECODER}
        (directory / "config.json").write_text(json.dumps(config))
    else:
        model.config.save_pretrained(directory)


@cache
def expected(family: str, tied: bool) -> Expected:
    """One step of the reference."""
    return one_step(build(family, tied), make_batches(family), logits_of, lambda name: published(family, name))
