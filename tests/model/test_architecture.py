"""Sizes and their limits, and how a checkpoint's configuration is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import (
    AdapterArchitecture,
    Architecture,
    EncoderArchitecture,
    ExpertsArchitecture,
    LanguageArchitecture,
)
from megatron_cord.model.families import load_architecture
from tests.model.reference import build

ENCODER = EncoderArchitecture(
    num_mels=8, hidden_size=24, num_layers=2, num_heads=2, ffn_hidden_size=20, max_positions=24
)
LANGUAGE = LanguageArchitecture(
    hidden_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    ffn_hidden_size=40,
    vocab_size=101,
    max_positions=64,
    rope_theta=500.0,
    norm_epsilon=1e-5,
    qkv_bias=True,
    tied_embeddings=False,
)
ARCHITECTURE = Architecture("qwen2_audio", ENCODER, LANGUAGE, 100, AdapterArchitecture("linear"))


def written(directory: Path, text: str) -> Path:
    (directory / "config.json").write_text(text)
    return directory


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_read(tmp_path: Path, tied: bool) -> None:
    """Catches a size that is taken from the wrong field or from a default."""
    build(tied).config.save_pretrained(tmp_path)
    assert load_architecture(tmp_path) == replace(ARCHITECTURE, language=replace(LANGUAGE, tied_embeddings=tied))


def test_tokens_are_counted_as_in_transformers() -> None:
    """Catches a rounding of odd lengths that differs, for single clips and for tensors of them."""
    encoder = Qwen2AudioEncoder(
        Qwen2AudioEncoderConfig(d_model=4, encoder_layers=0, encoder_attention_heads=1, num_mel_bins=2)
    )
    frames = torch.arange(1, 3001)
    positions, tokens = encoder._get_feat_extract_output_lengths(frames)
    assert [ENCODER.frames_after_convolutions(int(n)) for n in frames] == positions.tolist()
    assert [ARCHITECTURE.num_audio_tokens(int(n)) for n in frames] == tokens.tolist()


def test_vocabulary_is_padded_for_all_ranks() -> None:
    """Catches a padded vocabulary that some rank's share does not divide, or a needless row where it fits."""
    assert [LANGUAGE.padded_vocab_size(tp) for tp in (1, 2, 3)] == [128, 128, 192]
    assert replace(LANGUAGE, vocab_size=128).padded_vocab_size(2) == 128


@pytest.mark.parametrize(
    ("arch", "tp", "pp", "words"),
    [
        (
            ARCHITECTURE,
            4,
            1,
            "parallel.tp=4 does not divide the language model's attention heads (6); choose a tp that does, e.g. 3",
        ),
        (ARCHITECTURE, 3, 1, "the language model's key-value heads (2); choose a tp that does, e.g. 2"),
        (
            replace(ARCHITECTURE, language=replace(LANGUAGE, ffn_hidden_size=41)),
            2,
            1,
            "the language model's ffn size (41)",
        ),
        (replace(ARCHITECTURE, encoder=replace(ENCODER, num_heads=3)), 2, 1, "the audio encoder's attention heads (3)"),
        (
            replace(ARCHITECTURE, encoder=replace(ENCODER, ffn_hidden_size=21)),
            2,
            1,
            "the audio encoder's ffn size (21)",
        ),
        (
            ARCHITECTURE,
            1,
            3,
            "parallel.pp=3 does not divide the language model's layers (2); choose a pp that does, e.g. 2",
        ),
    ],
)
def test_layouts_that_do_not_divide(arch: Architecture, tp: int, pp: int, words: str) -> None:
    """Catches a layout that Megatron refuses later with an assertion, and a message without the size and a cure."""
    with pytest.raises(CordError) as caught:
        arch.check_divisible(tp, pp)
    assert words in str(caught.value)


def test_stages_that_do_not_fit() -> None:
    """Catches interleaved stages without layers, and layers of stages that are not the model's."""
    with pytest.raises(CordError, match=r"virtual_pp=2 does not divide a stage's layers \(2 / parallel.pp=2 = 1\)"):
        ARCHITECTURE.check_divisible(1, 2, 2)
    with pytest.raises(CordError, match=r"pipeline_layers=\[1, 2\] are 3 layers, .* qwen2_audio has 2"):
        ARCHITECTURE.check_divisible(1, 2, 1, (1, 2))


@pytest.mark.parametrize(
    ("tp", "ep", "words"),
    [
        (1, 3, "parallel.ep=3 does not divide the language model's experts (8); choose an ep that does, e.g. 2"),
        (
            2,
            1,
            "parallel.ep=1 is no multiple of parallel.tp=2: experts are dealt to the tensor-parallel ranks, not cut",
        ),
    ],
)
def test_layouts_that_do_not_deal_experts(tp: int, ep: int, words: str) -> None:
    """Catches experts that no rank has, and some that tensor-parallel ranks would each have with other gradients."""
    mixture = replace(ARCHITECTURE, language=replace(LANGUAGE, experts=ExpertsArchitecture(8, 2, normalized=True)))
    with pytest.raises(CordError) as caught:
        mixture.check_divisible(tp, 1, ep=ep)
    assert words in str(caught.value)
    mixture.check_divisible(2, 1, ep=4)


def test_layouts_that_divide() -> None:
    """Catches a check that refuses what works, a text model without an encoder included."""
    ARCHITECTURE.check_divisible(2, 2)
    three = replace(ARCHITECTURE, language=replace(LANGUAGE, num_layers=3))
    three.check_divisible(1, 2, 1, (1, 2))
    replace(ARCHITECTURE, encoder=None).check_divisible(2, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not a model configuration"),
        ("[]", "is not a model configuration"),
        (
            "{}",
            "model_type None is not supported; supported: audioflamingo3, llama, mistral, qwen2, qwen2_5_omni, "
            "qwen2_audio, qwen2_moe, qwen3, qwen3_moe, qwen3_omni_moe, step_audio_2, ultravox, voxtral",
        ),
        (
            '{"model_type": "granite_speech"}',
            "model_type 'granite_speech' is not supported (it needs a Conformer encoder, a Q-Former and LoRA",
        ),
        ('{"model_type": "llava"}', "model_type 'llava' is not supported"),
        ('{"model_type": ["qwen2_audio"]}', "is not supported"),
        ('{"model_type": "qwen2_audio", "text_config": 5}', "is damaged"),
        ('{"model_type": "qwen2_audio", "text_config": {"hidden_size": "wide"}}', "hidden_size"),
        ('{"model_type": "qwen2_audio", "text_config": {"num_attention_heads": 0}}', "is damaged"),
        ('{"model_type": "qwen2_audio", "text_config": {"model_type": "nothing"}}', "is damaged"),
    ],
)
def test_damaged_configurations(tmp_path: Path, text: str, words: str) -> None:
    """Catches tracebacks of JSON or of transformers where the user needs a file's name."""
    with pytest.raises(CordError) as caught:
        load_architecture(written(tmp_path, text))
    message = str(caught.value)
    assert words in message and str(tmp_path / "config.json") in message and "\n" not in message


def test_no_configuration(tmp_path: Path) -> None:
    """Catches a missing directory that is reported as anything else."""
    with pytest.raises(CordError, match=r"nowhere does not exist; give a Hugging Face checkpoint directory"):
        load_architecture(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("text_config", {"model_type": "gemma"}),
        ("text_config", {"hidden_act": "gelu"}),
        ("text_config", {"use_sliding_window": True}),
        ("text_config", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("audio_config", {"activation_function": "relu"}),
    ],
)
def test_settings_that_would_compute_something_else(tmp_path: Path, part: str, settings: dict[str, Any]) -> None:
    """Catches a checkpoint that loads and silently gives other logits than transformers."""
    (name,) = settings
    with pytest.raises(CordError, match=f"{part}.{name}.* is supported; use another checkpoint"):
        load_architecture(written(tmp_path, json.dumps({"model_type": "qwen2_audio", part: settings})))
