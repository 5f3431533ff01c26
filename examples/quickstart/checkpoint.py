"""The quickstart's audio language model: a tiny, valid Qwen2-Audio checkpoint with random weights.

The directory holds all that ``from_pretrained`` needs: weights, configuration, a word-level tokenizer with a chat
template, the feature extractor and the generation settings. Simplification: one word is one token, and words outside
the vocabulary do not exist.

Two things make so small a model learn within a minute. Weights start at a scale of 1/sqrt(fan-in), not at 0.02; and the
encoder's sinusoids, a stored tensor in this family, are scaled down, as at amplitude 1 they drown the audio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen3MoeConfig,
    WhisperFeatureExtractor,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

from megatron_cord.convert.plain.fused_experts import published_parts
from megatron_cord.errors import CordError

PAD, UNKNOWN, TURN_START, TURN_END = "<|endoftext|>", "<|unknown|>", "<|im_start|>", "<|im_end|>"
AUDIO_START, AUDIO, AUDIO_END = "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"
SPECIAL_TOKENS = (PAD, UNKNOWN, TURN_START, TURN_END, AUDIO_START, AUDIO, AUDIO_END)
ROLES = ("user", "assistant")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@dataclass(frozen=True)
class TinyModelConfig:
    """Sizes of the tiny model: 0.95 million parameters by default, which two tensor-parallel ranks can share."""

    mel_bins: int = 64  # bands of the log-mel spectrogram
    hop_length: int = 320  # samples between two frames; 20 ms
    window_seconds: int = 3  # longest clip; whole seconds, for transformers' feature extractor
    encoder_hidden_size: int = 96
    encoder_layers: int = 2
    encoder_heads: int = 4
    encoder_ffn_size: int = 384
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2  # fewer than heads: grouped-query attention
    ffn_size: int = 384
    experts: int = 0  # of each layer, ffn_size wide, two for a token, with Qwen3's layers around; 0: an MLP, and Qwen2
    max_positions: int = 512  # prompt and response together
    vocabulary_multiple: int = 8  # rows of the embedding are rounded up to it, so that ranks share them evenly
    sinusoid_scale: float = 0.3  # amplitude of the encoder's position embeddings


def create_checkpoint(directory: str | Path, config: TinyModelConfig, vocabulary: Sequence[str], seed: int) -> None:
    """Write a Qwen2-Audio checkpoint with random fp32 weights.

    Args:
        directory: created if missing; files of an earlier checkpoint in it are overwritten.
        config: sizes.
        vocabulary: every word of questions and answers; specials and the chat roles are added here.
        seed: of the weights; the same seed gives the same file.

    Raises:
        CordError: a word that the word-level tokenizer could not keep whole.
    """
    tokenizer = build_tokenizer(vocabulary)
    extractor = WhisperFeatureExtractor(
        feature_size=config.mel_bins,
        hop_length=config.hop_length,
        chunk_length=config.window_seconds,
        return_attention_mask=True,
    )
    processor = Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2AudioForConditionalGeneration(model_config(config, tokenizer, extractor.nb_max_frames))
        initialize(model, config.sinusoid_scale)
    eos = tokenizer.convert_tokens_to_ids(TURN_END)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    save_checkpoint(directory, model, processor)


def save_checkpoint(
    directory: str | Path, model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor
) -> None:
    """Write model and processor under the tensor names of the published Qwen2-Audio files.

    For a model that was not loaded from a file, ``save_pretrained`` of transformers 5.12 writes
    ``language_model.model.model.*``, which it reads again, but inference servers do not.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = ((published_name(name), tensor.detach()) for name, tensor in model.state_dict().items())
    tensors = {name: part.contiguous() for whole in named for name, part in published_parts(*whole)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    processor.save_pretrained(directory)


def published_name(module_name: str) -> str:
    """Return the published file's name for a parameter of transformers' module."""
    if module_name.startswith("lm_head."):
        return f"language_model.{module_name}"
    name = module_name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name


def build_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer: specials first, then the chat roles, then the words in the order given.

    Raises:
        CordError: an empty word, or one with white space in it.
    """
    for word in vocabulary:
        if word.split() != [word]:
            raise CordError(f"vocabulary: {word!r} is not one word; give words without white space")
    words = list(dict.fromkeys([*SPECIAL_TOKENS, *ROLES, *vocabulary]))
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        additional_special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS[2:]],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=10**6,
    )


def model_config(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast, frames: int) -> Qwen2AudioConfig:
    """Return Qwen2-Audio's configuration at these sizes; ``frames`` log-mel frames fill the encoder's window."""
    ids = tokenizer.get_vocab()
    language: dict[str, Any] = {
        "vocab_size": math.ceil(len(tokenizer) / config.vocabulary_multiple) * config.vocabulary_multiple,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
        "pad_token_id": ids[PAD],
        "dtype": "float32",
    }
    mixture: dict[str, Any] = {
        "num_experts": config.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": config.ffn_size,
        "norm_topk_prob": True,
        "head_dim": config.hidden_size // config.heads,
    }
    text: Any = Qwen3MoeConfig(**language, **mixture) if config.experts else Qwen2Config(**language)
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=config.mel_bins,
        d_model=config.encoder_hidden_size,
        encoder_layers=config.encoder_layers,
        encoder_attention_heads=config.encoder_heads,
        encoder_ffn_dim=config.encoder_ffn_size,
        max_source_positions=frames // 2,  # the second convolution has stride 2
        dtype="float32",
    )
    whole = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=ids[AUDIO], dtype="float32")
    whole.tie_word_embeddings = False
    return whole


@torch.no_grad()
def initialize(model: Qwen2AudioForConditionalGeneration, sinusoid_scale: float) -> None:
    """Set random weights, and sinusoids of amplitude ``sinusoid_scale``, in place."""
    draw_weights(model, (Qwen3MoeExperts, Qwen3MoeTopKRouter))
    positions = model.model.audio_tower.embed_positions.weight
    positions.copy_(sinusoid_scale * sinusoids(*positions.shape))


@torch.no_grad()
def draw_weights(model: nn.Module, experts: tuple[type[nn.Module], ...]) -> None:
    """Set normal weights of variance 1/fan-in and zero biases, in place; of experts and routers all are weights.

    Args:
        model: whose norms stay as they are.
        experts: classes of its experts and routers.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, experts):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


def sinusoids(positions: int, channels: int) -> Tensor:
    """Return Whisper's position embeddings, float32 [positions, channels]: sines, then cosines along the channels."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half))
    angles = torch.arange(positions)[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
