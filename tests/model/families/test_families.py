"""The families beside Qwen2-Audio in several layouts against their reference: tensors, logits, gradients, a step."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_cord.convert import import_tensors, read_tensors
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from tests.model.families.steps import check_gradients, check_logits, check_tensors, check_update, on_four_ranks
from tests.model.family_reference import build, save
from tests.model.ranks import AUDIO_ID, MELS, TOKENS, WINDOW, Case, Outcome

CASES = {
    "flamingo-tp2-pp2": Case(ParallelConfig(tp=2, pp=2), family="audioflamingo3"),
    "audio-llama-tp2-pp2": Case(ParallelConfig(tp=2, pp=2), family="qwen2_audio+llama"),
    "audio-qwen3-tp2-sp": Case(ParallelConfig(tp=2, sequence_parallel=True), family="qwen2_audio+qwen3"),
    "audio-moe-pp2-ep2": Case(ParallelConfig(pp=2, ep=2), family="qwen2_audio+qwen3_moe"),
    "moe-shared-tp2-sp-ep4": Case(ParallelConfig(tp=2, sequence_parallel=True, ep=4), family="qwen2_moe"),
    "moe-ep2-tied": Case(ParallelConfig(ep=2), family="qwen3_moe", tied=True),
    "moe-ep4": Case(ParallelConfig(ep=4), family="qwen3_moe"),
    "moe-tp2-sp-ep4": Case(ParallelConfig(tp=2, sequence_parallel=True, ep=4), family="qwen3_moe"),
    "mistral-tp2": Case(ParallelConfig(tp=2), family="mistral"),
    "qwen2-pp2-tied": Case(ParallelConfig(pp=2), family="qwen2", tied=True),
    "llama-tp2-pp2": Case(ParallelConfig(tp=2, pp=2), family="llama"),
    "qwen3-tp2": Case(ParallelConfig(tp=2), family="qwen3"),
    "qwen3-tp2-pp2-sp-tied": Case(ParallelConfig(tp=2, pp=2, sequence_parallel=True), family="qwen3", tied=True),
    "step-tp2-sp": Case(ParallelConfig(tp=2, sequence_parallel=True), family="step_audio_2"),
    "step-tp2-pp2": Case(ParallelConfig(tp=2, pp=2), family="step_audio_2", recompute=("audio_encoder",)),
    "ultravox-dp": Case(ParallelConfig(), family="ultravox"),
    "ultravox-tp2-sp-tied": Case(ParallelConfig(tp=2, sequence_parallel=True), family="ultravox", tied=True),
    "ultravox-tp2-pp2-tied": Case(ParallelConfig(tp=2, pp=2), family="ultravox", tied=True),
    "ultravox-qwen3-tp2": Case(ParallelConfig(tp=2), family="ultravox+qwen3"),
    "voxtral-tp2-sp": Case(ParallelConfig(tp=2, sequence_parallel=True), family="voxtral"),
    "voxtral-tp2-pp2": Case(ParallelConfig(tp=2, pp=2), family="voxtral"),
}
SLOW = {
    "audio-mistral-dp": Case(ParallelConfig(), family="qwen2_audio+mistral"),
    "moe-dp": Case(ParallelConfig(), family="qwen3_moe"),
    "moe-tp2-sp-ep2": Case(ParallelConfig(tp=2, sequence_parallel=True, ep=2), family="qwen3_moe"),
    "qwen2-dp": Case(ParallelConfig(), family="qwen2"),
    "qwen2-tp2": Case(ParallelConfig(tp=2), family="qwen2"),
    "llama-dp": Case(ParallelConfig(), family="llama"),
    "llama-tp2-tied": Case(ParallelConfig(tp=2), family="llama", tied=True),
    "llama-pp2": Case(ParallelConfig(pp=2), family="llama"),
    "step-dp": Case(ParallelConfig(), family="step_audio_2"),
    "step-tp2": Case(ParallelConfig(tp=2), family="step_audio_2"),
    "step-pp2": Case(ParallelConfig(pp=2), family="step_audio_2"),
    "voxtral-dp": Case(ParallelConfig(), family="voxtral"),
    "voxtral-pp2": Case(ParallelConfig(pp=2), family="voxtral"),
    "flamingo-dp-recompute": Case(
        ParallelConfig(), family="audioflamingo3", recompute=("audio_encoder", "language_model")
    ),
    "flamingo-tp2-sp": Case(ParallelConfig(tp=2, sequence_parallel=True), family="audioflamingo3"),
    "flamingo-pp2": Case(ParallelConfig(pp=2), family="audioflamingo3"),
    "flamingo-cp2": Case(ParallelConfig(cp=2), family="audioflamingo3"),
    "flamingo-cp2-tp2-sp": Case(ParallelConfig(cp=2, tp=2, sequence_parallel=True), family="audioflamingo3"),
}
NAMES = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def case_of(name: str) -> Case:
    """Return a case by its name."""
    return (CASES | SLOW)[name]


def outcomes(name: str) -> list[Outcome]:
    """Of a case on each of four ranks."""
    return _outcomes(slow=name in SLOW)[name]


@cache
def _outcomes(*, slow: bool) -> dict[str, list[Outcome]]:
    return on_four_ranks(SLOW if slow else CASES)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_come_back(name: str) -> None:
    """Catches a name or a layout in a family's table that loses or changes a tensor."""
    check_tensors(outcomes(name))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_references(name: str) -> None:
    """Catches a wrong activation, norm, mask, stacking, stride or bias, and a clip that depends on its padding."""
    check_logits(outcomes(name), case_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_references(name: str) -> None:
    """Catches a part without a gradient, a gradient lost between ranks, and recomputed layers that give another one."""
    check_gradients(outcomes(name), case_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_equals_adamw(name: str) -> None:
    """Catches weights that the optimizer forgets, and a key bias that is learned though the checkpoint has none."""
    check_update(outcomes(name), case_of(name))


@pytest.mark.parametrize("family", ["audioflamingo3", "step_audio_2", "ultravox", "voxtral"])
def test_tokens_are_counted(family: str, tmp_path: Path) -> None:
    """Catches a count that is off where lengths do not divide."""
    save(tmp_path, family, tied=False)
    arch = load_architecture(tmp_path)
    assert [arch.num_audio_tokens(n) for n in range(1, WINDOW)] == [TOKENS[family](n) for n in range(1, WINDOW)]


def test_a_clip_does_not_depend_on_its_padding(tmp_path: Path) -> None:
    """Catches Step-Audio 2's convolutions reading past a clip: the reference gets it alone, the model before noise."""
    save(tmp_path, "step_audio_2", tied=False)
    layout = initialize(ParallelConfig(), seed=0)
    model, reference = LALM(load_architecture(tmp_path), layout, torch.float32), build("step_audio_2", tied=False)
    import_tensors(model, read_tensors(tmp_path))
    clips = torch.randn(WINDOW - 2, MELS, WINDOW, generator=torch.Generator().manual_seed(0))
    lengths = tuple(range(3, WINDOW - 1))
    with torch.no_grad():
        given = model.encode_audio(clips[: len(lengths)], lengths)
        alone = [
            reference.encode_audio(clip[:, : frames + 2], frames) for clip, frames in zip(clips, lengths, strict=False)
        ]
    torch.testing.assert_close(given, torch.cat(alone), rtol=0, atol=1e-5)
    finalize()


def test_a_text_model_refuses_audio(tmp_path: Path) -> None:
    """Catches audio that is dropped without a word."""
    save(tmp_path, "llama", tied=False)
    model = LALM(load_architecture(tmp_path), initialize(ParallelConfig(), seed=0), torch.float32)
    audio = ModelInput(torch.tensor([[1, AUDIO_ID]]), torch.zeros(1, MELS, WINDOW), (4,), ("a",))
    with pytest.raises(CordError, match="samples a: audio for a llama model, which takes text alone"):
        model(audio)
    finalize()


@pytest.mark.parametrize(
    ("family", "setting", "words"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters.rope_type is 'dynamic', but only 'default, linear, llama3 or yarn' is supported",
        ),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("mistral", {"sliding_window": 32}, "sliding_window is 32"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is {'sliding_attention'}"),
        ("audioflamingo3", {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ("audioflamingo3", {"text_config": {"model_type": "llama"}}, "text_config.model_type is 'llama'"),
        (
            "audioflamingo3",
            {"text_config": {"model_type": "qwen2", "tie_word_embeddings": True}},
            "text_config.tie_word_embeddings is True",
        ),
        ("voxtral", {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ("step_audio_2", {"audio_encoder_config": {"n_mels": 8}}, "is damaged"),
        ("ultravox", {"text_model_id": "meta-llama/Llama-3.2-1B-Instruct"}, "text_model_id is 'meta-llama"),
        ("ultravox", {"projector_ln_mid": False}, "projector_ln_mid is False"),
        ("ultravox", {"hidden_size": 15}, "the remainder of hidden_size by 2 is 1"),
        ("ultravox", {"text_config": {"model_type": "gemma"}}, "text_config.model_type is 'gemma'"),
    ],
)
def test_settings_that_would_compute_something_else(
    family: str, setting: dict[str, object], words: str, tmp_path: Path
) -> None:
    """Catches a checkpoint that loads and silently gives other logits."""
    save(tmp_path, family, tied=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(CordError) as caught:
        load_architecture(tmp_path)
    assert words in str(caught.value) and str(path) in str(caught.value)
