"""Small reference models of odd sizes for the families beside Qwen2-Audio.

FAMILY+TEXT is a family with another text model than its published one. Text models, Audio Flamingo 3 and Voxtral are
transformers' own. Step-Audio 2 and Ultravox exist as remote code only: the plain models that the local engine generates
with are written from the published description and file names, one clip at a time, and share no layer with Megatron's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5OmniConfig,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen3OmniMoeConfig,
    VoxtralConfig,
    VoxtralEncoderConfig,
    VoxtralForConditionalGeneration,
)

from examples.quickstart.checkpoint import CHAT_TEMPLATE, SPECIAL_TOKENS, published_name
from megatron_cord.convert.plain.fused_experts import published_parts
from megatron_cord.model.families.plain_thinker import PlainThinker
from megatron_cord.model.families.qwen2_5_omni.plain_model import Thinker as Qwen25Thinker
from megatron_cord.model.families.qwen3_omni_moe.plain_model import Thinker as Qwen3Thinker
from megatron_cord.model.families.step_audio_2.audio import StepAudio2Config
from megatron_cord.model.families.step_audio_2.plain_model import StepAudio2
from megatron_cord.model.families.ultravox.configuration import UltravoxConfig
from megatron_cord.model.families.ultravox.plain_model import Ultravox
from tests.model.ranks import AUDIO_ID, MELS, TOKENS, VOCAB_SIZE, WINDOW, Batch, make_batches
from tests.model.reference import Expected, one_step, randomise
from tests.model.reference import logits_of as qwen2_audio_logits

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
#: What each text model has of its own; the scalings are short, so that the few positions here are rotated otherwise.
TEXT: dict[str, dict[str, Any]] = {
    "llama": {
        "head_dim": 10,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 48,
        },
    },
    "mistral": {
        "head_dim": 10, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 48,
            "beta_fast": 8.0,
        },
    },
    "qwen2": {},
    "qwen3": {"head_dim": 10, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 28,
    },
    "qwen3_moe": {
        "head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "norm_topk_prob": False,
    },
}  # fmt: skip
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


def text_config(kind: str, *, tied: bool) -> dict[str, Any]:
    """Return config.json of a text model."""
    return DECODER | {"model_type": kind, "tie_word_embeddings": tied, "dtype": "float32"} | TEXT[kind]


def ultravox_config(kind: str, *, tied: bool) -> dict[str, Any]:
    """Return config.json of an Ultravox around a text model."""
    return {
        "model_type": "ultravox", "architectures": ["UltravoxModel"], "audio_token_index": AUDIO_ID,
        "audio_config": {
            "model_type": "whisper", "num_mel_bins": MELS, "d_model": 24, "encoder_layers": 2,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 20, "max_source_positions": WINDOW // 2,
        },
        "text_config": text_config(kind, tied=tied),
        "stack_factor": 5, "hidden_size": 14, "projector_ln_mid": True, "dtype": "float32",
    }  # fmt: skip


def qwen3_omni_config(*, tied: bool) -> dict[str, Any]:
    """Return what a small Qwen3-Omni's configuration has in the place of transformers' defaults, as published."""
    text = DECODER | TEXT["qwen3_moe"] | {
        "norm_topk_prob": True, "max_position_embeddings": 128, "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 2, 1], "interleaved": True,
        },
    }  # fmt: skip
    return {
        "thinker_config": {
            "audio_config": {
                "num_mel_bins": MELS, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2,
                "encoder_ffn_dim": 20, "downsample_hidden_size": 6, "n_window": 50, "n_window_infer": 200,
                "output_dim": 48,
            },
            "text_config": text,
            "vision_config": {
                "depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 48,
                "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1], "patch_size": 4,
            },
            "audio_token_id": AUDIO_ID, "image_token_id": VOCAB_SIZE, "video_token_id": VOCAB_SIZE + 1,
            "vision_start_token_id": VOCAB_SIZE + 2, "tie_word_embeddings": tied,
        },
        "talker_config": {
            "text_config": {
                "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4,
                "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8,
            },
            "code_predictor_config": {
                "vocab_size": 16, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_code_groups": 4,
            },
            "thinker_hidden_size": 48, "num_code_groups": 4, "spatial_merge_size": 2,
        },
        "code2wav_config": {
            "codebook_size": 16, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
            "intermediate_size": 20, "num_hidden_layers": 1, "num_quantizers": 4, "decoder_dim": 192,
        },
    }  # fmt: skip


def qwen2_5_omni_config(*, tied: bool) -> dict[str, Any]:
    """Return what a small Qwen2.5-Omni's configuration has in the place of transformers' defaults, as published.

    A chunk has five positions after the convolutions, so that neighbours of two chunks are averaged.
    """
    rope = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 2, 1]}
    text = DECODER | {"model_type": "qwen2_5_omni_text", "rope_parameters": rope, "tie_word_embeddings": not tied}
    talker = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "embedding_size": 48, "rope_parameters": rope,
    }  # fmt: skip
    dit = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "emb_dim": 8,
        "num_embeds": 12, "mel_dim": 4, "enc_emb_dim": 4, "enc_dim": 4, "enc_channels": [8, 8, 8, 8, 24],
        "enc_attention_channels": 4, "enc_se_channels": 4, "enc_res2net_scale": 2, "look_ahead_layers": [0],
        "look_backward_layers": [0],
    }  # fmt: skip
    bigvgan = {
        "mel_dim": 4, "upsample_initial_channel": 8, "resblock_kernel_sizes": [3], "upsample_rates": [2],
        "resblock_dilation_sizes": [[1, 1, 1]], "upsample_kernel_sizes": [4],
    }  # fmt: skip
    return {
        "thinker_config": {
            "audio_config": {
                "num_mel_bins": MELS, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2,
                "encoder_ffn_dim": 20, "max_source_positions": WINDOW, "n_window": 5, "output_dim": 48,
            },
            "text_config": text,
            "vision_config": {
                "depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 48,
                "patch_size": 4, "fullatt_block_indexes": [0],
            },
            "audio_token_index": AUDIO_ID, "image_token_index": VOCAB_SIZE, "video_token_index": VOCAB_SIZE + 1,
            "vision_start_token_id": VOCAB_SIZE + 2, "vision_end_token_id": VOCAB_SIZE + 3,
            "audio_start_token_id": VOCAB_SIZE + 4, "audio_end_token_id": VOCAB_SIZE + 5,
            "tie_word_embeddings": tied,
        },
        "talker_config": talker,
        "token2wav_config": {"dit_config": dit, "bigvgan_config": bigvgan},
    }  # fmt: skip


def _mask(batch: Batch) -> Tensor:
    return (torch.arange(batch.input.token_ids.shape[1])[None] < torch.tensor(batch.lengths)[:, None]).long()


def build(family: str, tied: bool) -> Any:
    """Build a random model of the family."""
    torch.manual_seed(1)
    flamingo: Any = AudioFlamingo3ForConditionalGeneration
    voxtral: Any = VoxtralForConditionalGeneration
    qwen2_audio: Any = Qwen2AudioForConditionalGeneration
    model: Any
    family, _, kind = family.partition("+")
    if family in TEXT:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text_config(family, tied=tied)))
    elif family == "qwen2_audio":
        encoder = Qwen2AudioEncoderConfig(
            num_mel_bins=MELS,
            d_model=24,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=20,
            max_source_positions=WINDOW // 2,
        )
        config = Qwen2AudioConfig(
            audio_config=encoder, text_config=text_config(kind, tied=False), audio_token_index=AUDIO_ID
        )
        config._attn_implementation = "eager"
        model = qwen2_audio(config)
    elif family == "audioflamingo3":
        windows = AudioFlamingo3EncoderConfig(
            num_mel_bins=MELS,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_source_positions=WINDOW // 2,
        )
        qwen2 = Qwen2Config(**DECODER, tie_word_embeddings=False)
        model = flamingo(AudioFlamingo3Config(audio_config=windows, text_config=qwen2, audio_token_id=AUDIO_ID))
    elif family == "voxtral":
        audio = VoxtralEncoderConfig(
            num_mel_bins=MELS,
            hidden_size=24,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_source_positions=WINDOW // 2,
        )
        text = LlamaConfig(**DECODER, head_dim=10, tie_word_embeddings=False)
        model = voxtral(VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO_ID))
    elif family == "ultravox":
        model = Ultravox(UltravoxConfig(**ultravox_config(kind or "qwen2", tied=tied)))
    elif family == "qwen2_5_omni":
        model = Qwen25Thinker(Qwen2_5OmniConfig(**qwen2_5_omni_config(tied=tied)).thinker_config)
    elif family == "qwen3_omni_moe":
        model = Qwen3Thinker(Qwen3OmniMoeConfig(**qwen3_omni_config(tied=tied)).thinker_config)
    else:
        model = StepAudio2(
            StepAudio2Config(audio_encoder_config=STEP_ENCODER, text_config=DECODER, audio_token_id=AUDIO_ID)
        )
    randomise(model)
    return model


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Return logits [B, S, V]; those of padding are meaningless."""
    if isinstance(model, Qwen2AudioForConditionalGeneration):
        return qwen2_audio_logits(model, batch)
    if isinstance(model, PlainThinker):
        return _thinker_logits(model, batch)
    inputs = {"input_ids": batch.input.token_ids, "attention_mask": _mask(batch)}
    if batch.input.features is not None:
        inputs["input_features"] = batch.input.features
    if batch.input.num_frames is not None and not isinstance(model, VoxtralForConditionalGeneration):
        masks_features = isinstance(model, AudioFlamingo3ForConditionalGeneration)
        name = "input_features_mask" if masks_features else "feature_attention_mask"
        inputs[name] = (torch.arange(WINDOW) < torch.tensor(batch.input.num_frames)[:, None]).long()
    if not isinstance(model, StepAudio2 | Ultravox):
        return torch.as_tensor(model(**inputs).logits)
    return torch.as_tensor(model.get_output_embeddings()(model.hidden(**inputs).last_hidden_state))


def _thinker_logits(model: Any, batch: Batch) -> Tensor:
    """Return the same of transformers' own forward pass of each sample by itself."""
    frames, start, rows = batch.input.num_frames or (), 0, []
    family = "qwen3_omni_moe" if isinstance(model, Qwen3Thinker) else "qwen2_5_omni"
    for ids, length in zip(batch.input.token_ids, batch.lengths, strict=True):
        inputs: dict[str, Any] = {"input_ids": ids[None, :length], "attention_mask": torch.ones(1, length).long()}
        left, end = int((ids == AUDIO_ID).sum()), start
        while left:
            left -= TOKENS[family](frames[end])
            end += 1
        if end > start:
            clips = torch.as_tensor(batch.input.features)[start:end]
            inputs["input_features"] = clips
            inputs["feature_attention_mask"] = (
                torch.arange(clips.shape[-1]) < torch.tensor(frames[start:end])[:, None]
            ).long()
        logits = model(**inputs).logits[0]
        rows.append(torch.nn.functional.pad(logits, (0, 0, 0, len(ids) - length)))
        start = end
    return torch.stack(rows)


#: Families whose parts have the names of Qwen2-Audio's in published files, and in transformers' module.
AS_QWEN2_AUDIO = ("audioflamingo3", "qwen2_audio", "voxtral")


def published(family: str, name: str) -> str:
    """Return the name in a checkpoint's files of a parameter of the reference."""
    if family in ("qwen2_5_omni", "qwen3_omni_moe"):
        return f"thinker.{name}"
    return published_name(name) if family.partition("+")[0] in AS_QWEN2_AUDIO else name


def save(directory: Path, family: str, tied: bool) -> None:
    """Write configuration and weights as published checkpoints have them."""
    model = build(family, tied)
    named = ((published(family, name), p.detach()) for name, p in model.named_parameters())
    parts = {name: part.clone() for whole in named for name, part in published_parts(*whole)}
    save_file(parts, directory / "model.safetensors")
    if family == "qwen2_5_omni":
        Qwen2_5OmniConfig(**qwen2_5_omni_config(tied=tied)).save_pretrained(directory)
    elif family == "qwen3_omni_moe":
        Qwen3OmniMoeConfig(**qwen3_omni_config(tied=tied)).save_pretrained(directory)
    elif family == "step_audio_2":
        config = {
            "model_type": family, "architectures": ["StepAudio2ForCausalLM"], "audio_token_id": AUDIO_ID,
            "audio_encoder_config": STEP_ENCODER, "text_config": DECODER,
            # As published; neither the trainer nor the rollout server runs it.
            "auto_map": {"AutoConfig": "configuration_step_audio_2.StepAudio2Config"},
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config))
    elif family.startswith("ultravox"):
        kind = family.partition("+")[2] or "qwen2"
        (directory / "config.json").write_text(json.dumps(ultravox_config(kind, tied=tied)))
    else:
        model.config.save_pretrained(directory)


def save_whole(directory: Path, family: str, words: Sequence[str], *, tied: bool = False) -> Path:
    """Write a checkpoint that can generate: weights, a tokenizer of words with a chat template.

    Where transformers has a processor for the family, the sizes of its feature extractor are there too. The
    placeholder is the last token of the vocabulary, whatever words there are.
    """
    directory.mkdir(parents=True)
    save(directory, family, tied)
    # transformers makes Qwen2's own class of these tokenizers, which spells by bytes
    spelt = family in ("qwen2", "qwen3", "qwen3_moe")
    known = [
        *SPECIAL_TOKENS[:5],
        SPECIAL_TOKENS[6],
        *(sorted(set("Ġ" + "".join(words))) if spelt else ["user", "assistant", *words]),
    ]
    known += [f"filler{i}" for i in range(AUDIO_ID - len(known))] + [SPECIAL_TOKENS[5]]
    ids = {word: index for index, word in enumerate(known)}
    core = Tokenizer(models.BPE(ids, []) if spelt else models.WordLevel(ids, unk_token=SPECIAL_TOKENS[1]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if spelt else pre_tokenizers.WhitespaceSplit()
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer = tokenizer_class(
        tokenizer_object=core,
        pad_token=SPECIAL_TOKENS[0],
        unk_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[3],
        additional_special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS[2:]],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(directory)
    if family.partition("+")[0] in (*AS_QWEN2_AUDIO, "qwen2_5_omni", "qwen3_omni_moe"):
        extractor = {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": MELS,
            "hop_length": 160,
            "n_samples": 160 * WINDOW,
        }
        (directory / "preprocessor_config.json").write_text(json.dumps(extractor))
    return directory


@cache
def expected(family: str, tied: bool) -> Expected:
    """Return one step of the reference."""
    return one_step(build(family, tied), make_batches(family), logits_of, lambda name: published(family, name))
