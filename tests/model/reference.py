"""A small Qwen2-Audio of odd sizes from transformers, one training step of it, and the same step on four ranks.

Results are computed once for all test modules.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration, Qwen2Config

from examples.quickstart.checkpoint import published_name
from megatron_cord.convert.plain.fused_experts import published_parts
from megatron_cord.parallel.layout import ParallelConfig
from tests.gloo import run_ranks
from tests.model.ranks import (
    AUDIO_ID,
    MELS,
    OPTIMIZER,
    VOCAB_SIZE,
    WINDOW,
    Batch,
    Case,
    Outcome,
    make_batches,
    run_cases,
)

FOUR_RANKS = {
    "dp4": Case(ParallelConfig()),
    "tp2": Case(ParallelConfig(tp=2)),
    "tp2-tied": Case(ParallelConfig(tp=2), tied=True, distributed_optimizer=True),
    "tp2-sp": Case(ParallelConfig(tp=2, sequence_parallel=True)),
    "pp2": Case(ParallelConfig(pp=2), distributed_optimizer=True),
    "pp2-tied": Case(ParallelConfig(pp=2), tied=True),
    "tp2-pp2": Case(ParallelConfig(tp=2, pp=2)),
    "tp2-pp2-sp-tied": Case(ParallelConfig(tp=2, pp=2, sequence_parallel=True), tied=True),
    "tp2-pp2-recompute": Case(ParallelConfig(tp=2, pp=2), recompute=("audio_encoder", "language_model")),
}


@dataclass(frozen=True, eq=False)
class Expected:
    """One step of transformers' model, by published name; logits of each batch [B, S, V]."""

    logits: list[Tensor]
    gradients: dict[str, Tensor]
    gradient_norm: float
    updated: dict[str, Tensor]
    updated_logits: list[Tensor]


def build(tied: bool) -> Qwen2AudioForConditionalGeneration:
    """Build six heads on two key-value heads, a head size that is not hidden / heads, two layers, random tensors."""
    text = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        dtype="float32",
    )
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=MELS,
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=20,
        max_source_positions=WINDOW // 2,
        dtype="float32",
    )
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO_ID, dtype="float32")
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = Qwen2AudioForConditionalGeneration(config)
    if tied:  # transformers' class does not tie by itself
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Every tensor random, biases and norms too, at a scale that keeps activations near one."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            inputs = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
            parameter.normal_(std=inputs**-0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def published_tensors(model: Qwen2AudioForConditionalGeneration) -> dict[str, Tensor]:
    """Return the model's tensors under published names, a tied head once."""
    return {published_name(name): parameter.detach().clone() for name, parameter in model.named_parameters()}


def save(directory: Path, model: Qwen2AudioForConditionalGeneration) -> None:
    """Write configuration and weights as published checkpoints have them."""
    model.config.save_pretrained(directory)
    save_file(published_tensors(model), directory / "model.safetensors")


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Return logits [B, S, V]; those of padding are meaningless."""
    mask = torch.arange(batch.input.token_ids.shape[1])[None] < torch.tensor(batch.lengths)[:, None]
    inputs = {"input_ids": batch.input.token_ids, "attention_mask": mask.long()}
    if batch.input.features is not None and batch.input.num_frames is not None:
        inputs["input_features"] = batch.input.features
        inputs["feature_attention_mask"] = (torch.arange(WINDOW) < torch.tensor(batch.input.num_frames)[:, None]).long()
    logits: Tensor = model(**inputs).logits
    return logits


@cache
def expected(tied: bool) -> Expected:
    """One step of transformers' model with torch's AdamW."""
    return one_step(build(tied), make_batches(), logits_of, published_name)


def one_step(
    model: Any, batches: list[Batch], logits_of: Callable[[Any, Batch], Tensor], published_name: Callable[[str], str]
) -> Expected:
    """One step of a reference model with torch's AdamW; its parameters' names are published under other ones."""
    logits = [logits_of(model, batch) for batch in batches]
    sum(batch.loss(values) for batch, values in zip(batches, logits, strict=True)).backward()  # type: ignore[union-attr]
    made = ((published_name(n), p.grad) for n, p in model.named_parameters() if p.grad is not None)
    gradients = {name: part.clone() for whole in made for name, part in published_parts(*whole)}
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_norm"]))
    torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZER["learning_rate"], betas=(0.9, 0.95), eps=OPTIMIZER["epsilon"], weight_decay=0.0
    ).step()
    with torch.no_grad():
        updated_logits = [logits_of(model, batch) for batch in batches]
    after = ((published_name(n), p.detach()) for n, p in model.named_parameters())
    updated = {name: part.clone() for whole in after for name, part in published_parts(*whole)}
    return Expected([values.detach() for values in logits], gradients, norm, updated, updated_logits)


@cache
def on_four_ranks() -> dict[str, list[Outcome]]:
    """Return the outcome of each case on each of four ranks."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = {}
        for tied in (False, True):
            path = Path(directory) / f"tied-{tied}"
            save(path, build(tied))
            checkpoints["qwen2_audio", tied] = str(path)
        by_rank = run_ranks(run_cases, 4, FOUR_RANKS, checkpoints)
    return {name: [outcomes[name] for outcomes in by_rank] for name in FOUR_RANKS}
