"""Planned bytes against what optimizers and autograd hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import Layout
from megatron_cord.plan import make_work, memory, part_counts, published
from megatron_cord.plan.memory import activation_bytes, encoder_layer_width, language_layer_width, optimizer_bytes
from megatron_cord.plan.parameters import matrix_counts, rank_counts
from megatron_cord.trainer.step.optimizer.building import build_optimizer, wrap_model
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from tests.plan.small_model import configured, with_experts


def test_teachers_in_a_plan() -> None:
    """Catches a teacher's weights that are left out or counted twice, and the copy that one with audio needs."""
    arch, small = published("qwen2_audio_7b"), published("step_audio2_mini")
    named = ["objective.streams={a: {taught_by: x}, b: {taught_by: y}, c: {}}", "teachers.x.checkpoint=x"]
    one, several, shared, audio = (
        memory(config, arch, make_work(config, arch, 8, others=others)).teacher
        for config, others in (
            (configured("x"), ()),
            (configured("x", *named, "teachers.y.mode=live"), (("x", small),)),
            (configured("x", *named, "teachers.y.mode=frozen"), (("x", small),)),
            (configured("x", "model.freeze=[language_model]", "objective.teacher_view=hear"), ()),
        )
    )
    assert one == audio == pytest.approx(2 * part_counts(arch).total, rel=1e-3)  # the vocabulary is padded
    assert several == shared == pytest.approx(one + 2 * part_counts(small).total, rel=1e-3)
    frozen = configured("x", "model.freeze=[language_model]")
    assert memory(frozen, arch, make_work(frozen, arch, 8)).teacher == 0


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("bfloat16", {"distributed": False}),
        ("bfloat16", {"kind": "muon"}),
        ("bfloat16", {"offload": True}),
    ],
)
def test_bytes_of_training_state(layout: Layout, checkpoint: Path, dtype: Any, options: dict[str, Any]) -> None:
    """Catches another precision of gradients, a main copy missing or counted twice, and frozen parts with states."""
    settings = OptimizerConfig(**options)
    config = configured(checkpoint, f"model.dtype={dtype}", "model.freeze=[adapter]")
    arch = load_architecture(checkpoint)
    model = LALM(arch, layout, config.model.torch_dtype)
    model.adapter.requires_grad_(False)  # type: ignore[union-attr]
    ddp = wrap_model(settings, model)
    optimizer, _ = build_optimizer(settings, ddp, 2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(0.1)
    optimizer.step()
    counts = rank_counts(arch, 1, 1, 0)
    trained = counts.trained(("audio_encoder", "language_model"))
    item = config.model.torch_dtype.itemsize
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == counts.total * item
    gradients = [p.main_grad for p in model.parameters() if p.requires_grad]
    assert sum(gradient.nbytes for gradient in gradients) == 4 * trained
    inner = [wrapper.optimizer for wrapper in getattr(optimizer, "chained_optimizers", [optimizer])]
    states = [value for each in inner for state in each.state.values() for value in state.values() if value.dim()]
    mains = [p for each in inner for group in each.param_groups for p in group["params"]] if item < 4 else []
    on_device = mains if settings.offload else [*states, *mains]
    matrices = matrix_counts(arch, 1, 1, 0).trained(("audio_encoder", "language_model"))
    assert sum(t.nbytes for t in on_device) == optimizer_bytes(settings, trained, matrices, item, 1)
    shared, whole = (
        optimizer_bytes(replace(settings, distributed=d), trained, matrices, item, 4) for d in (True, False)
    )
    assert shared == whole / 4


RECOMPUTED = "model.recompute=[audio_encoder,language_model]"
SELECTIVE = "model.recompute_granularity=selective"


@pytest.mark.parametrize(
    ("settings", "mixture"),
    [
        ((), False),
        (("model.freeze=[audio_encoder,adapter]",), False),
        ((RECOMPUTED,), False),
        ((RECOMPUTED, SELECTIVE), False),
        (("model.freeze=[audio_encoder,adapter]",), True),
    ],
)
def test_bytes_of_activations(layout: Layout, checkpoint: Path, settings: tuple[str, ...], mixture: bool) -> None:
    """Catches a missing tensor of a layer, and recomputation or freezing left out: a fifth off what autograd keeps."""
    config = configured(
        checkpoint, "model.dtype=float32", "train.micro_batch_size=4", "rollout.max_new_tokens=40", *settings
    )
    arch = with_experts(load_architecture(checkpoint)) if mixture else load_architecture(checkpoint)
    work = make_work(config, arch, 1, audio_seconds=0.48, text_tokens=20)
    model = LALM(arch, layout, torch.float32, config.model.layer_config)
    for name in config.model.freeze:
        getattr(model, name).requires_grad_(False)
    frames = (48,) * 4
    tokens = torch.full((4, work.student_tokens), 8)
    tokens[:, : int(arch.num_audio_tokens(48))] = arch.audio_token_id  # type: ignore[assignment]
    assert arch.encoder is not None
    batch = ModelInput(
        tokens, torch.randn(4, arch.encoder.num_mels, arch.encoder.window_frames), frames, ("a", "b", "c", "d")
    )
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(batch)
    measured, planned = sum(kept.values()), activation_bytes(config, arch, work, stage=0)
    if config.model.recompute:  # the plan has room for the layer that is being computed again, which is not kept
        language, audio = language_layer_width(arch, 1), encoder_layer_width(arch.encoder, 1)
        if SELECTIVE in settings:
            language -= language_layer_width(arch, 1, selective=True)
            audio -= encoder_layer_width(arch.encoder, 1, selective=True)
        planned -= 4 * 4 * (work.student_tokens * language + work.clip_positions * audio)
    assert hidden.requires_grad and planned == pytest.approx(measured, rel=0.2)
