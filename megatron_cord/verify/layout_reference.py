"""The reference of ``verify layout``: a training step in float64 of a small model from transformers, loss written out.

Nothing of the trainer's arithmetic is used here. Legend: T response tokens, V vocabulary, C clips.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_cord.convert.plain.fused_experts import published_parts
from megatron_cord.data.samples import AudioClip, Prompt
from megatron_cord.errors import CordError
from megatron_cord.losses import TokenWeightsConfig
from megatron_cord.rollout.chosen_experts import ChosenExperts
from megatron_cord.rollout.types import Rollout, ScoredRollout
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from megatron_cord.verify.lora_reference import LoraReference, published_name

MELS, WINDOW = 8, 48
PARTS = {"audio_encoder": "audio_tower", "adapter": "multi_modal_projector", "language_model": "language_model"}


@dataclass(frozen=True)
class Sizes:
    """Of the small model; heads, key-value heads and layers limit the layouts that fit."""

    layers: int = 4  #: of the language model; parallel.pp × parallel.virtual_pp divides them
    heads: int = 8  #: of the language model
    kv_heads: int = 4  #: of the language model; parallel.tp divides them
    hidden: int = 32  #: of the language model
    encoder_layers: int = 2  #: of the audio encoder
    encoder_heads: int = 4  #: parallel.tp divides them
    experts: int = 0  #: of each layer of the language model, which is then Qwen3-MoE; 0: Qwen2
    experts_per_token: int = 2  #: that a router chooses
    router_replay: bool = False  #: the student follows experts that were drawn, as if an engine had chosen them
    vocabulary: int = 61  #: no tensor-parallel size divides it
    tied_embeddings: bool = False  #: word embedding and output layer are one matrix
    sequences: int = 6  #: responses of the step, two thirds of them scored token by token
    longest: int = 24  #: tokens of the longest response

    def __post_init__(self) -> None:
        if (
            min(self.layers, self.heads, self.kv_heads, self.encoder_layers, self.encoder_heads) < 1
            or self.longest < 2
            or self.sequences < 3
        ):
            raise CordError("sizes must be at least 1; sizes.longest at least 2, sizes.sequences at least 3")
        if self.experts and not 0 < self.experts_per_token <= self.experts:
            raise CordError("sizes.experts_per_token must be at least 1, and not above sizes.experts")
        if self.router_replay and not self.experts:
            raise CordError("sizes.router_replay follows a choice of experts: set sizes.experts")
        if self.heads % self.kv_heads or self.hidden % 8 or self.vocabulary < 16:
            raise CordError(
                "sizes.kv_heads must divide sizes.heads, 8 sizes.hidden, and sizes.vocabulary must be at least 16"
            )


@dataclass(frozen=True, eq=False)
class Outcome:
    """One step; tensors by published name."""

    loss: float
    gradients: dict[str, Tensor]  #: of what is trained, before clipping
    weights: dict[str, Tensor]  #: after the step


def make_checkpoint(directory: Path, sizes: Sizes, seed: int) -> Qwen2AudioForConditionalGeneration:
    """Write a Qwen2-Audio checkpoint without tokenizer, with experts around Qwen3-MoE, and return its model.

    Every tensor is random, biases and norms too. A seed always gives the same file.
    """
    language: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "tie_word_embeddings": sizes.tied_embeddings,
        "dtype": "float32",
    }
    mixture: dict[str, Any] = {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.experts_per_token,
        "moe_intermediate_size": sizes.hidden,
        "norm_topk_prob": True,
    }
    text: Any = Qwen3MoeConfig(**language, **mixture) if sizes.experts else Qwen2Config(**language)
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=MELS,
        d_model=8 * sizes.encoder_heads,
        encoder_layers=sizes.encoder_layers,
        encoder_attention_heads=sizes.encoder_heads,
        encoder_ffn_dim=16 * sizes.encoder_heads,
        max_source_positions=WINDOW // 2,
        dtype="float32",
    )
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=sizes.vocabulary - 1, dtype="float32"
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the default one lacks float64
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config)
    if sizes.tied_embeddings:  # transformers' class does not tie by itself
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                inputs = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
                parameter.copy_(noise * inputs**-0.5)
            else:
                parameter.add_(0.1 * noise)
    model.config.save_pretrained(directory)
    tensors = {name: part.clone() for name, part in _parts((n, p.detach()) for n, p in model.named_parameters())}
    save_file(tensors, directory / "model.safetensors")
    return model


def make_sequences(sizes: Sizes, seed: int) -> list[TrainingSequence]:
    """Return prompts with one or two clips, and responses, of different lengths; a third has no teacher."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(0, sizes.vocabulary - 1, size=count))

    made = []
    for index in range(sizes.sequences):
        audio_prompt: tuple[int, ...] = words(2 + index % 3)
        clips = []
        for _ in range(1 + index % 2):
            frames = int(rng.integers(5, WINDOW + 1))
            features = torch.from_numpy(rng.normal(size=(MELS, WINDOW)).astype(np.float32))
            tokens = (frames + 1) // 2 // 2
            clips.append(AudioClip(np.zeros(0, dtype=np.float32), features, frames, tokens))
            audio_prompt += (sizes.vocabulary - 1,) * tokens + words(1 + index % 4)
        response = words(max(2, sizes.longest * (index + 1) // sizes.sequences))
        # An engine whose probabilities are larger or smaller than the trainer's.
        logprobs = tuple(float(value) for value in rng.uniform(-8, -2, size=len(response)))
        scored = index % 3 != 2
        experts = _draw_experts(sizes, len(audio_prompt) + len(response) - 1, index) if sizes.router_replay else None
        name = f"sample{index}"
        made.append(
            TrainingSequence(
                student=Prompt(name, audio_prompt, tuple(clips)),
                teacher=Prompt(name, words(4 + 3 * (index % 2))) if scored else None,
                response=ScoredRollout(
                    Rollout(name, response, logprobs, "stop", (), "", experts),
                    "shared" if scored else "policy",
                    advantage=0.5 if index % 2 else -0.25,
                ),
                index=index,
            )
        )
    return made


def _draw_experts(sizes: Sizes, rows: int, seed: int) -> ChosenExperts:
    """Return experts of each token and layer, none of them twice."""
    scores = torch.rand(rows, sizes.layers, sizes.experts, generator=torch.Generator().manual_seed(seed))
    return ChosenExperts.of(scores.topk(sizes.experts_per_token).indices)


def reference_step(
    model: Qwen2AudioForConditionalGeneration,
    sequences: list[TrainingSequence],
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    freeze: Collection[str],
    lora: LoraReference | None = None,
) -> Outcome:
    """Return one step in float64, one sequence after the other; a frozen teacher of the same weights, without LoRA."""
    model = model.double().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            "embed_positions" not in name and not any(PARTS[part] in name or _is_head(part, name) for part in freeze)
        )
    scored = sum(s.response.distilled for s in sequences)
    loss = torch.zeros((), dtype=torch.float64)
    balance = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        response = torch.tensor(sequence.rollout.token_ids)
        with _routing(model, sequence.rollout.experts) as routed:
            log_p = _log_probabilities(model, sequence.student, sequence.rollout)  # [T, V]
        balance = balance + sum(_unbalanced(*each) for each in routed) / len(sequences)
        log_p_t = log_p.gather(1, response[:, None])[:, 0]
        if sequence.teacher is not None:
            with torch.no_grad(), nullcontext() if lora is None else lora.disabled():
                log_q = _log_probabilities(model, sequence.teacher, sequence.rollout)
            divergence = (log_p.exp() * (log_p - log_q)).sum(1)
            loss = loss + (_weights(divergence.detach(), objective.token_weights) * divergence).sum() / scored
        ratio = (
            (log_p_t.detach() - torch.tensor(sequence.rollout.logprobs, dtype=torch.float64))
            .exp()
            .clamp(max=objective.policy_gradient.importance_cap)
        )
        loss = loss - objective.policy_gradient.weight * sequence.response.advantage * (ratio * log_p_t).sum() / len(
            sequences
        )
    (loss + objective.router_aux_loss * balance).backward()  # type: ignore[no-untyped-call]
    factors = {} if lora is None else lora.factors
    trained = {published_name(n): p for n, p in model.named_parameters() if p.requires_grad} | factors
    made = ((name, parameter.grad) for name, parameter in trained.items() if parameter.grad is not None)
    gradients = {name: part.clone() for whole in made for name, part in published_parts(*whole)}
    torch.nn.utils.clip_grad_norm_(trained.values(), optimizer.clip_norm)
    betas = (optimizer.beta1, optimizer.beta2)
    torch.optim.AdamW(
        trained.values(), lr=optimizer.learning_rate, betas=betas, eps=optimizer.epsilon, weight_decay=0.0
    ).step()
    weights = dict(_parts((n, p.detach()) for n, p in model.named_parameters()))
    merged = {} if lora is None else lora.merged()
    return Outcome(loss.item(), gradients, {n: p.detach().clone() for n, p in (weights | merged | factors).items()})


def _log_probabilities(model: Qwen2AudioForConditionalGeneration, prompt: Prompt, rollout: Rollout) -> Tensor:
    """Return [T, V], at the positions that predict the response."""
    inputs = {"input_ids": torch.tensor([prompt.token_ids + rollout.token_ids])}
    if prompt.clips:
        frames = torch.tensor([clip.num_frames for clip in prompt.clips])
        inputs["input_features"] = torch.stack([clip.features for clip in prompt.clips]).double()
        inputs["feature_attention_mask"] = (torch.arange(WINDOW)[None] < frames[:, None]).long()
    logits: Tensor = model(**inputs).logits
    return logits[0, len(prompt.token_ids) - 1 : -1].log_softmax(-1)


def _weights(divergence: Tensor, config: TokenWeightsConfig) -> Tensor:
    """Return CORD's w_t (arXiv 2601.16547): α at the K largest divergences, times a weight that falls from β to 1."""
    count = len(divergence)
    weights = torch.ones(count, dtype=torch.float64)
    weights[divergence.topk(min(config.top_k, count)).indices] = config.alpha
    return weights * torch.linspace(config.beta, 1.0, count, dtype=torch.float64)


@contextmanager
def _routing(model: torch.nn.Module, experts: ChosenExperts | None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the logits [T, E] of all routers of a sequence with the experts [T, k] that they choose, in float64.

    Args:
        model: of the reference.
        experts: that they shall choose for the first tokens; None: they choose all by themselves.
    """
    found: list[tuple[Tensor, Tensor]] = []
    given = None if experts is None else experts.tensor().long()

    def route(module: Qwen3MoeTopKRouter, _: Any, made: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, chosen = made
        if given is not None:
            chosen = torch.cat([given[:, len(found)], chosen[len(given) :]])
        found.append((logits, chosen))
        scores = logits.softmax(-1).gather(1, chosen)
        return logits, scores / scores.sum(-1, keepdim=True), chosen

    routers = [module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter)]
    hooks = [router.register_forward_hook(route) for router in routers]
    yield found
    for hook in hooks:
        hook.remove()


def _unbalanced(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return E Σ_e f_e P_e of one sequence and layer (arXiv 2412.19437, equations 17 to 20), of logits [T, E]."""
    scores = logits.softmax(-1)
    is_chosen = torch.zeros_like(scores).scatter(1, chosen, 1.0)
    return logits.shape[1] * (is_chosen.mean(0) / chosen.shape[1] * scores.mean(0)).sum()


def _parts(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors under the names and in the parts of published checkpoints."""
    for name, tensor in named:
        yield from published_parts(published_name(name), tensor)


def _is_head(part: str, name: str) -> bool:
    return part == "language_model" and "lm_head" in name
