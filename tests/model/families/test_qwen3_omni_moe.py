"""Qwen3-Omni's thinker in several layouts against transformers' own forward pass of each sample by itself."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.convert import import_tensors, read_tensors
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from tests.model.families.steps import check_gradients, check_logits, check_tensors, check_update, on_four_ranks
from tests.model.family_reference import build, save
from tests.model.ranks import MELS, TOKENS, VOCAB_SIZE, Case, Outcome, make_batches

FAMILY = "qwen3_omni_moe"
QUICK = {"tp2-sp-ep2": Case(ParallelConfig(tp=2, sequence_parallel=True, ep=2), family=FAMILY)}
SLOW = {
    "dp": Case(ParallelConfig(), family=FAMILY),
    "ep4-recompute": Case(ParallelConfig(ep=4), family=FAMILY, recompute=("audio_encoder", "language_model")),
    "pp2-ep2": Case(ParallelConfig(pp=2, ep=2), family=FAMILY),
    "pp2-tp2-sp-ep2": Case(ParallelConfig(tp=2, pp=2, sequence_parallel=True, ep=2), family=FAMILY),
    "cp2": Case(ParallelConfig(cp=2), family=FAMILY),
    "cp2-ep4": Case(ParallelConfig(cp=2, ep=4), family=FAMILY),
    "cp2-pp2-ep2-tied": Case(ParallelConfig(cp=2, pp=2, ep=2), family=FAMILY, tied=True),
}
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@cache
def _outcomes(*, slow: bool) -> dict[str, list[Outcome]]:
    return on_four_ranks(SLOW if slow else QUICK)


def outcomes(name: str) -> list[Outcome]:
    """Return the outcome of a case on each rank."""
    return _outcomes(slow=name in SLOW)[name]


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_transformers(name: str) -> None:
    """Catches a chunk, window, bias or norm that is computed otherwise, a tensor lost in conversion or between ranks.

    Clips span several chunks and attention windows, and end within a chunk; noise follows them.
    """
    found, case = outcomes(name), (QUICK | SLOW)[name]
    check_tensors(found)
    check_logits(found, case)
    check_gradients(found, case, noise="k_proj.bias")  # which does not change the attention
    check_update(found, case)


def test_a_clip_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    """Catches convolutions that read past a clip or a chunk: transformers gets each alone, the model all at once.

    Also a count of tokens that is off where lengths do not divide.
    """
    save(tmp_path, FAMILY, tied=False)
    layout = initialize(ParallelConfig(), seed=0)
    arch, reference = load_architecture(tmp_path), build(FAMILY, tied=False)
    model = LALM(arch, layout, torch.float32)
    import_tensors(model, read_tensors(tmp_path))
    lengths = (*range(1, 18), *range(90, 118), 199, 200, 201, 233, 399, 400, 401, 777)
    assert [arch.num_audio_tokens(n) for n in range(1, 900)] == [TOKENS[FAMILY](n) for n in range(1, 900)]
    clips = torch.randn(len(lengths), MELS, 800, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = model.encode_audio(clips, lengths)
        alone = [
            reference.get_audio_features(clip[None], torch.arange(800)[None].lt(frames).long()).last_hidden_state
            for clip, frames in zip(clips, lengths, strict=True)
        ]
    torch.testing.assert_close(given, torch.cat(alone), rtol=0, atol=1e-5)
    finalize()


def test_text_and_audio_turn_alike_on_all_axes() -> None:
    """Catches rotary axes that differ without images, which would make the ordinary rotation another one."""
    model: Any = build(FAMILY, tied=False)
    ids = make_batches(FAMILY)[3].input.token_ids
    positions, _ = model.get_rope_index(ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(positions, torch.arange(ids.shape[1]).expand_as(positions))
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    turned = positions[0][..., None] * model.model.rotary_emb.inv_freq.repeat(2)
    torch.testing.assert_close((cos, sin), (turned.cos(), turned.sin()))


def test_images_are_refused(tmp_path: Path) -> None:
    """Catches a placeholder of an image that is embedded as a word."""
    save(tmp_path, FAMILY, tied=False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["thinker_config"]["image_token_id"] = VOCAB_SIZE - 4
    path.write_text(json.dumps(config))
    model = LALM(load_architecture(tmp_path), initialize(ParallelConfig(), seed=0), torch.float32)
    with pytest.raises(CordError, match=f"samples a: token {VOCAB_SIZE - 4} stands for an image"):
        model(ModelInput(torch.tensor([[1, VOCAB_SIZE - 4, 2]]), None, None, ("a",)))
    finalize()


@pytest.mark.parametrize(
    ("part", "setting", "words"),
    [
        ("audio_config", {"n_window": 100}, "thinker_config.audio_config.n_window is 100, but only 50"),
        ("audio_config", {"n_window_infer": 150}, "n_window_infer by 100 is 50"),
        ("audio_config", {"output_dim": 40}, "thinker_config.audio_config.output_dim is 40"),
        ("text_config", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8"),
        ("text_config", {"decoder_sparse_step": 2}, "thinker_config.text_config.decoder_sparse_step is 2"),
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
    with pytest.raises(CordError, match=r"config\.json") as caught:
        load_architecture(tmp_path)
    assert words in str(caught.value)
