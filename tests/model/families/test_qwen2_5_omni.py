"""Qwen2.5-Omni's thinker in several layouts against transformers' own forward pass of each sample by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_multimodal_rotary_pos_emb

from megatron_cord.convert import read_into
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from tests.model.families.steps import check_gradients, check_logits, check_tensors, check_update, on_four_ranks
from tests.model.family_reference import qwen2_5_omni_config, save
from tests.model.ranks import TOKENS, WINDOW, Case, Outcome, make_batches

FAMILY = "qwen2_5_omni"
QUICK = {"tp2-sp": Case(ParallelConfig(tp=2, sequence_parallel=True), family=FAMILY)}
SLOW = {
    "dp": Case(ParallelConfig(), family=FAMILY),
    "dp-recompute": Case(ParallelConfig(), family=FAMILY, recompute=("audio_encoder", "language_model")),
    "tp2-tied": Case(ParallelConfig(tp=2), family=FAMILY, tied=True),
    "pp2": Case(ParallelConfig(pp=2), family=FAMILY),
    "tp2-pp2-sp-tied": Case(ParallelConfig(tp=2, pp=2, sequence_parallel=True), family=FAMILY, tied=True),
    "cp2": Case(ParallelConfig(cp=2), family=FAMILY),
    "cp2-tp2-sp": Case(ParallelConfig(cp=2, tp=2, sequence_parallel=True), family=FAMILY),
    "cp2-pp2-tied": Case(ParallelConfig(cp=2, pp=2), family=FAMILY, tied=True),
}
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@cache
def _outcomes(*, slow: bool) -> dict[str, list[Outcome]]:
    return on_four_ranks(SLOW if slow else QUICK)


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_transformers(name: str) -> None:
    """Catches a chunk that sees its neighbour, pooling that stops at a chunk, and a tensor lost in conversion.

    Clips span several chunks of five positions each, and end within one; noise follows them.
    """
    found, case = _outcomes(slow=name in SLOW)[name], (QUICK | SLOW)[name]
    check_tensors(found)
    check_logits(found, case)
    check_gradients(found, case)
    check_update(found, case)


def test_tokens_are_counted(tmp_path: Path) -> None:
    """Catches a count that begins anew with each chunk."""
    save(tmp_path, FAMILY, tied=False)
    arch = load_architecture(tmp_path)
    assert [arch.num_audio_tokens(n) for n in range(1, WINDOW)] == [TOKENS[FAMILY](n) for n in range(1, WINDOW)]


def test_three_equal_axes_are_the_ordinary_rotation() -> None:
    """Catches a family that should turn by axes.

    transformers gives text and audio three equal numbers, and these turn queries bit for bit as one number does,
    whatever the sections are.
    """
    config: Any = Qwen2_5OmniConfig(**qwen2_5_omni_config(tied=False)).thinker_config
    thinker: Any = Qwen2_5OmniThinkerForConditionalGeneration
    with torch.device("meta"):
        model = thinker(config)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    ids = torch.tensor([[1, config.audio_start_token_id, *[config.audio_token_id] * 2, 5, 6, 0]])
    positions, _ = model.get_rope_index(ids, None, None, mask)
    assert torch.equal(positions[:, 0, :6], torch.arange(6).expand(3, 6))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 6, 7, 8, generator=generator)
    angles = torch.randn(7, 4, generator=generator).repeat(1, 2)
    cos, sin = (part.expand(3, 1, 7, 8) for part in (angles.cos(), angles.sin()))
    turned = [apply_multimodal_rotary_pos_emb(query, key, cos, sin, sections) for sections in ([1, 2, 1], [4, 0, 0])]
    assert all(torch.equal(one, other) for one, other in zip(*turned, strict=True))


@pytest.mark.parametrize(("setting", "what"), [("image_token_index", "an image"), ("video_token_index", "a video")])
def test_vision_is_refused(tmp_path: Path, setting: str, what: str) -> None:
    """Catches an image's placeholder that is read as a word."""
    save(tmp_path, FAMILY, tied=False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["thinker_config"][setting] = 7
    path.write_text(json.dumps(config))
    model = LALM(load_architecture(tmp_path), initialize(ParallelConfig(), seed=0), torch.float32)
    sample = ModelInput(torch.tensor([[1, 7, 2]]), None, None, ("seen",))
    with pytest.raises(CordError, match=f"samples seen: token 7 stands for {what}"):
        model(sample)
    finalize()


@pytest.mark.parametrize(
    ("part", "setting", "words"),
    [
        ("audio_config", {"activation_function": "relu"}, "thinker_config.audio_config.activation_function is 'relu'"),
        ("audio_config", {"scale_embedding": True}, "thinker_config.audio_config.scale_embedding is True"),
        ("audio_config", {"output_dim": 47}, "thinker_config.audio_config.output_dim is 47, but only 48"),
        ("text_config", {"hidden_act": "gelu"}, "thinker_config.text_config.hidden_act is 'gelu'"),
    ],
)
def test_settings_that_would_compute_something_else(
    part: str, setting: dict[str, object], words: str, tmp_path: Path
) -> None:
    """Catches a checkpoint that loads and silently gives other logits."""
    save(tmp_path, FAMILY, tied=False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["thinker_config"][part] |= setting
    path.write_text(json.dumps(config))
    with pytest.raises(CordError) as caught:
        load_architecture(tmp_path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_packed_sequences_give_the_same(tmp_path: Path) -> None:
    """Catches clips that go to another sample's placeholders, and chunks mixed up, where sequences are packed."""
    save(tmp_path, FAMILY, tied=False)
    model = LALM(load_architecture(tmp_path), initialize(ParallelConfig(), seed=0), torch.float32)
    read_into(model, tmp_path)
    for batch in make_batches(FAMILY):
        padded, lengths = batch.input, batch.lengths
        rows = torch.cat([ids[:length] for ids, length in zip(padded.token_ids, lengths, strict=True)])[None]
        packed = replace(padded, token_ids=rows, cu_seqlens=tuple(accumulate(lengths, initial=0)))
        outcomes = []
        for given in (padded, packed):
            model.zero_grad()
            hidden = model(given)  # [S, B, H], or [T, 1, H]
            whole = hidden[:, 0] if given is packed else torch.cat([hidden[:n, i] for i, n in enumerate(lengths)])
            whole.square().sum().backward()
            outcomes.append((whole.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        (one, gradients), (other, others) = outcomes
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            assert float((others[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, name
    finalize()
