"""Plans against what models, optimizers and autograd really hold, and the page of estimates against the tool.

The model that is measured is small; its sizes are odd, so that a wrong formula does not come out right by chance.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.cli.actions.plan import gpu_counts
from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import AdapterArchitecture, Architecture, ExpertsArchitecture
from megatron_cord.model.config import LoraConfig, ModelConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.plan import GPUS, PUBLISHED, fitting, make_work, memory, part_counts, published, speed, traffic
from megatron_cord.plan.lora import lora_count, merged_count, trained_expert_count
from megatron_cord.plan.memory import activation_bytes, encoder_layer_width, language_layer_width, optimizer_bytes
from megatron_cord.plan.page import layouts_table
from megatron_cord.plan.parameters import active_count, expert_count, matrix_counts, rank_counts
from megatron_cord.plan.search import balanced_layers
from megatron_cord.plan.speed import RUNNING, train_flops
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.step.optimizer.building import build_optimizer, wrap_model
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from tests.gloo import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:::megatron")
ROOT = Path(__file__).parents[2]
SIZES = TinyModelConfig(
    mel_bins=16, window_seconds=1, encoder_hidden_size=48, encoder_layers=3, encoder_heads=4, encoder_ffn_size=80,
    hidden_size=64, layers=4, heads=8, kv_heads=2, ffn_size=112, max_positions=128,
)  # fmt: skip
PARTS = ("audio_encoder", "adapter", "language_model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Qwen2-Audio of these sizes."""
    path = tmp_path_factory.mktemp("checkpoint")
    create_checkpoint(path, SIZES, [f"word{i}" for i in range(83)], seed=0)
    return path


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """Yield the layout of one rank."""
    yield initialize(ParallelConfig(), seed=0)
    finalize()


def configured(checkpoint: Path | str, *more: str) -> RunConfig:
    """Return a run's configuration on it."""
    return load_config(
        RunConfig, None, ["output_dir=x", f"model.checkpoint={checkpoint}", "data.train=x", "data.evaluation=x", *more]
    )


def counts_of(model: LALM) -> list[int]:
    """Count the parameters of each part that is on this rank."""
    return [
        0 if (part := getattr(model, name)) is None else sum(p.numel() for p in part.parameters()) for name in PARTS
    ]


def with_experts(arch: Architecture) -> Architecture:
    """Return the architecture with four experts in each layer, two for a token, and normed queries and keys."""
    mixture = ExpertsArchitecture(4, 2, normalized=True)
    return replace(arch, language=replace(arch.language, experts=mixture, qkv_bias=False, qk_norm=True))


def build_mixture_on_rank(rank: int, arch: Architecture) -> list[int]:
    """Count parameters by part of a rank of TP 2 × PP 2, whose tensor-parallel ranks share out experts."""
    layout = initialize(ParallelConfig(tp=2, pp=2, ep=2, sequence_parallel=True), seed=0)
    return counts_of(LALM(arch, layout, torch.float32))


def build_on_rank(rank: int, archs: list[Architecture]) -> list[list[int]]:
    """Count parameters by part of a rank of TP 2 × PP 2, for each architecture."""
    layout = initialize(ParallelConfig(tp=2, pp=2), seed=0)
    return [counts_of(LALM(arch, layout, torch.float32)) for arch in archs]


def test_parameters_of_published_models() -> None:
    """Catches a wrong size or formula: the counts of the published files, to the last parameter for Qwen2-Audio."""
    assert part_counts(published("qwen2_audio_7b")).total == 8_397_094_912
    assert part_counts(published("qwen2_5_omni_7b")).total == 8_255_256_576
    assert round(part_counts(published("step_audio2_mini")).total / 1e9, 1) == 8.3


@pytest.mark.slow
def test_parameters_of_each_rank(checkpoint: Path) -> None:
    """Catches a tensor that is counted as cut and is whole, or the other way round, and a part on the wrong stage."""
    arch = load_architecture(checkpoint)
    archs = [replace(arch, language=replace(arch.language, tied_embeddings=tied)) for tied in (False, True)]
    for rank, built in enumerate(run_ranks(build_on_rank, 4, archs)):
        for this, counts in zip(archs, built, strict=True):
            planned = rank_counts(this, 2, 2, stage=rank // 2)
            assert [planned.audio_encoder, planned.adapter, planned.language_model] == counts


@pytest.mark.slow
def test_parameters_of_each_rank_of_a_mixture(checkpoint: Path) -> None:
    """Catches experts that are counted on each rank, and a router that is counted as shared out."""
    arch = with_experts(load_architecture(checkpoint))
    for rank, built in enumerate(run_ranks(build_mixture_on_rank, 4, arch)):
        planned = rank_counts(arch, 2, 2, rank // 2, ep=2)
        assert [planned.audio_encoder, planned.adapter, planned.language_model] == built
    whole, lm = part_counts(arch), arch.language
    idle = lm.num_layers * 2 * 3 * lm.hidden_size * lm.ffn_hidden_size
    assert active_count(arch) == whole.language_model - idle


def test_a_plan_deals_experts() -> None:
    """Catches states of experts that are divided by ranks without them, and a search that leaves experts together."""
    arch = with_experts(published("step_audio2_mini"))
    two, four = (
        configured("x", "parallel.tp=2", "parallel.sequence_parallel=true", f"parallel.ep={ep}") for ep in (2, 4)
    )
    held = [memory(config, arch, make_work(config, arch, 8)) for config in (two, four)]
    experts = expert_count(arch)
    assert held[0].weights - held[1].weights == (experts // 2 - experts // 4) * 2
    assert held[0].optimizer == held[1].optimizer  # the eight ranks have all states, whoever has the weights
    sent = [traffic(config, arch, make_work(config, arch, 8), 0).ep for config in (two, four)]
    assert 0 < sent[0] < sent[1]
    settings = fitting(configured("x"), arch, GPUS["h100"], 32, 8)
    assert settings is not None and any(setting.startswith("parallel.ep=") for setting in settings)


@pytest.mark.parametrize(
    ("mixture", "settings", "message"),
    [
        (False, ("parallel.ep=2",), "deals experts, and the model has none"),
        (True, ("parallel.tp=2", "parallel.ep=2"), "needs parallel.sequence_parallel=true"),
        (True, ("parallel.ep=2", "optimizer.overlap_communication=true"), "overlap_communication is not built"),
    ],
)
def test_layouts_that_training_refuses(mixture: bool, settings: tuple[str, ...], message: str) -> None:
    """Catches a plan for a layout of experts that no run could start with."""
    arch = published("step_audio2_mini")
    with pytest.raises(CordError, match=message):
        make_work(configured("x", *settings), with_experts(arch) if mixture else arch, 8)


def lora_on_rank(_rank: int, arch: Architecture, settings: Sequence[ModelConfig]) -> list[int]:
    """Build this rank's part of two stages on two tensor-parallel ranks; return the parameters of each LoRA."""
    layout = initialize(ParallelConfig(tp=2, pp=2), seed=0)
    counts = []
    for config in settings:
        model = LALM(arch, layout, torch.float32)
        model.add_lora(config.lora, config.freeze, seed=0)
        assert model.lora is not None
        counts.append(sum(parameter.numel() for parameter in model.lora.parameters()))
    return counts


LORA = [
    ModelConfig("", lora=LoraConfig(rank=3)),
    ModelConfig(
        "", lora=LoraConfig(rank=5, targets=("q_proj", "down_proj", "*.layers.2.*")), freeze=("audio_encoder",)
    ),
]


@pytest.mark.slow
def test_lora_of_each_rank(checkpoint: Path) -> None:
    """Catches a factor that is counted as cut and is whole, or the other way round, and one on the wrong stage."""
    arch = load_architecture(checkpoint)
    for rank, built in enumerate(run_ranks(lora_on_rank, 4, arch, LORA)):
        assert [lora_count(config, arch, 2, 2, rank // 2) for config in LORA] == built


def lora_beside_experts(_rank: int, arch: Architecture, settings: Sequence[ModelConfig]) -> list[tuple[int, int]]:
    """Return the parameters of LoRA on this of two ranks that share out experts, and those of them beside experts."""
    layout = initialize(ParallelConfig(ep=2), seed=0)
    counts = []
    for config in settings:
        model = LALM(arch, layout, torch.float32)
        model.add_lora(config.lora, config.freeze, seed=0)
        assert model.lora is not None
        factors = {name: factor.numel() for name, (factor, _) in model.lora.factors().items()}
        counts.append((sum(factors.values()), sum(size for name, size in factors.items() if ".experts." in name)))
    return counts


def test_lora_of_experts(checkpoint: Path) -> None:
    """Catches LoRA of experts that is counted on each rank, as cut over tensor-parallel ranks, or not at all.

    Also that of a shared expert, which has another width.
    """
    arch = with_experts(load_architecture(checkpoint))
    mixture = ExpertsArchitecture(4, 2, normalized=True, shared_ffn_hidden_size=24)
    arch = replace(arch, language=replace(arch.language, experts=mixture))
    for built in run_ranks(lora_beside_experts, 2, arch, LORA[:1]):
        config = LORA[0]
        assert built == [(lora_count(config, arch, ep=2), trained_expert_count(config, arch, 1, 0, ep=2))]
        assert built[0][1] > 0 and trained_expert_count(config, arch, 1, 0) == 2 * built[0][1]
        assert lora_count(config, arch) == built[0][0] + built[0][1]


@pytest.mark.parametrize("kind", ["linear", "convolution", "stacking", "gated_stacking"])
def test_lora_of_each_adapter(layout: Layout, checkpoint: Path, kind: Any) -> None:
    """Catches a size of LoRA, and of the matrices that are merged with it, that is only Qwen2-Audio's."""
    arch = load_architecture(checkpoint)
    adapter = AdapterArchitecture(kind, hidden_size=36, stride=2, kernel_size=3, bias=True)
    kinds = {
        "linear": "qwen2_audio",
        "convolution": "step_audio_2",
        "stacking": "voxtral",
        "gated_stacking": "ultravox",
    }
    arch = replace(arch, adapter=adapter, model_type=kinds[kind])
    for config in LORA:
        model = LALM(arch, layout, torch.float32)
        model.add_lora(config.lora, config.freeze, seed=0)
        assert model.lora is not None
        assert lora_count(config, arch) == sum(parameter.numel() for parameter in model.lora.parameters())
        assert merged_count(config, arch) == sum(weight.numel() for weight in model.lora.weights())


def test_teachers_in_a_plan() -> None:
    """Catches a teacher's weights that are left out or counted twice, and the copy that one with audio needs."""
    arch, small = published("qwen2_audio_7b"), published("step_audio2_mini")
    named = ["objective.streams={a: {taught_by: x}, b: {taught_by: y}, c: {}}", "teachers.x.checkpoint=x"]
    one, several, shared, hears = (
        memory(config, arch, make_work(config, arch, 8, others=others)).teacher
        for config, others in (
            (configured("x"), ()),
            (configured("x", *named, "teachers.y.mode=live"), (("x", small),)),
            (configured("x", *named, "teachers.y.mode=frozen"), (("x", small),)),
            (configured("x", "model.freeze=[language_model]", "objective.teacher_view=hear"), ()),
        )
    )
    assert one == hears == pytest.approx(2 * part_counts(arch).total, rel=1e-3)  # the vocabulary is padded
    assert several == shared == pytest.approx(one + 2 * part_counts(small).total, rel=1e-3)
    frozen = configured("x", "model.freeze=[language_model]")
    assert memory(frozen, arch, make_work(frozen, arch, 8)).teacher == 0


def test_lora_in_a_plan() -> None:
    """Catches base weights that are counted with gradients, states or a teacher's copy beside LoRA."""
    arch = published("qwen2_audio_7b")
    plain = configured("qwen2_audio_7b", "parallel.tp=2", "model.recompute=[language_model]")
    lora = replace(plain, model=replace(plain.model, lora=LoraConfig(rank=16)))
    before, after = (memory(config, arch, make_work(config, arch, 8)) for config in (plain, lora))
    assert after.teacher == 0 and after.gradients < before.gradients / 50 and after.optimizer < before.optimizer / 50
    assert after.weights - before.weights == lora_count(lora.model, arch, 2) * 2
    assert (
        train_flops(lora, arch, make_work(lora, arch, 8))[0]
        < 0.8 * train_flops(plain, arch, make_work(plain, arch, 8))[0]
    )


@pytest.mark.parametrize("kind", ["linear", "convolution", "stacking", "gated_stacking"])
def test_parameters_of_each_adapter(layout: Layout, checkpoint: Path, kind: Any) -> None:
    """Catches a formula that only knows Qwen2-Audio's projection."""
    arch = replace(
        load_architecture(checkpoint),
        adapter=AdapterArchitecture(kind, hidden_size=36, stride=2, kernel_size=3, bias=True),
    )
    assert rank_counts(arch, 1, 1, 0).adapter == counts_of(LALM(arch, layout, torch.float32))[1]


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


def test_operations_are_those_of_the_products(checkpoint: Path) -> None:
    """Catches a wrong factor: 6 operations a parameter and token of a text model, 2 for the teacher, and attention."""
    arch = replace(published("qwen2_audio_7b"), encoder=None, adapter=None)
    config = configured(
        checkpoint,
        "rollout.max_new_tokens=100",
        "objective.policy_gradient.enabled=false",
        "rollout.prompts_per_step=8",
    )
    work = make_work(config, arch, 8, text_tokens=100)
    flops, again = train_flops(config, arch, work)
    lm = arch.language
    layers = part_counts(arch).language_model - 2 * lm.vocab_size * lm.hidden_size
    student, teacher, output = 8 * 150, 8 * 200, lm.vocab_size * lm.hidden_size * 8 * 100
    attention = lm.num_layers * lm.hidden_size * (2 * 3 * student * 150 + 2 * teacher * 200)
    assert again == 0 and flops == pytest.approx(
        6 * layers * student + 2 * layers * teacher + attention + (6 + 2) * output, rel=1e-3
    )


def test_streams_count_with_the_lengths_of_their_views(checkpoint: Path) -> None:
    """Catches streams that are all taken for the heard prompt, and a second view or a teacher's audio left out."""
    arch = published("qwen2_audio_7b")
    policy = ("objective.policy_gradient.enabled=false", "rollout.prompts_per_step=8", "rollout.max_new_tokens=100")
    streams = "{a: {student: read, responses: 3}, b: {teacher: hear, contrast: {view: read}}}"
    plain, several = (
        make_work(configured(checkpoint, *policy, *more), arch, 8, audio_seconds=10.0, text_tokens=60)
        for more in ((), (f"objective.streams={streams}",))
    )
    heard, read = 250 + 30, 60
    assert (plain.student_tokens, plain.teacher_tokens, plain.clips) == (heard + 100, read + 100, 1)
    assert (several.sequences, several.scored) == (32, 32)
    assert several.student_tokens == (3 * (read + 100) + heard + 100) / 4 and several.clips == 0.25
    assert several.teacher_tokens == (3 * (read + 100) + heard + 100 + read + 100) / 4
    assert several.longest_tokens == plain.student_tokens and several.taught_clips == 0.25


def test_given_responses_are_not_generated(checkpoint: Path) -> None:
    """Catches responses of the data that a plan has the engine generate, and prompts of another view than is answered.

    Also a step of fine-tuning with a rollout that lasts.
    """
    arch, gpu = published("qwen2_audio_7b"), GPUS["h100"]
    common = ("objective.policy_gradient.enabled=false", "rollout.prompts_per_step=512", "rollout.max_new_tokens=100")

    def planned(streams: str) -> Any:
        config = configured(checkpoint, *common, f"objective.streams={{{streams}}}")
        work = make_work(config, arch, 8, audio_seconds=10.0, text_tokens=60)
        return work, speed(config, arch, work, gpu, 8, 8)

    given = "b: {source: answer, divergence: {kind: nll}}"
    (alone, fast), (both, mixed), (fine, none) = map(planned, ("a: {}", f"a: {{}}, {given}", given))
    assert (alone.generated, alone.generated_tokens) == (alone.sequences, alone.student_tokens)
    assert (both.sequences, both.generated, fine.generated) == (1024, 512, 0)
    assert mixed.rollout == fast.rollout and none.rollout == (0.0, 0.0)
    assert mixed.train > fast.train > none.train
    elsewhere, _ = planned("a: {rollout: read, responses: 2}, b: {student: read}")
    assert elsewhere.generated_tokens == 60 + 100 < elsewhere.student_tokens


def test_several_updates_and_further_rounds_cost_their_time(checkpoint: Path) -> None:
    """Catches plans of GRPO and DAPO without their passes, minibatches, and rounds of dynamic sampling."""
    arch, gpu = replace(published("qwen2_audio_7b"), encoder=None, adapter=None), GPUS["h100"]
    groups = "rollout={prompts_per_step: 64, policy_prompts_per_step: 24, policy_rollouts: 64}"
    one, four, resampled = (
        configured(checkpoint, groups, "parallel.pp=2", RECOMPUTED, *more)
        for more in ((), ("train.minibatches=2", "train.passes=2"), ("rollout.dynamic_sampling=3",))
    )
    works = [make_work(config, arch, 8) for config in (one, four, resampled)]
    (flops, again), (more, more_again), _ = (
        train_flops(config, arch, work) for config, work in zip((one, four, resampled), works, strict=True)
    )
    lm, work = arch.language, works[0]
    output = lm.vocab_size * lm.hidden_size
    layers = part_counts(arch).language_model - 2 * output + lm.num_layers * lm.hidden_size * work.student_tokens
    scoring = 2 * work.sequences * (layers * work.student_tokens + output * work.response_tokens)
    assert more == pytest.approx(2 * flops + scoring, rel=1e-9) and more_again == 2 * again
    assert memory(four, arch, works[1]).teacher_hidden == memory(one, arch, works[0]).teacher_hidden / 2
    assert works[1].microbatches == -(-works[0].microbatches // 2)
    assert works[2].resampled == (24 * 64, 16 * 64)
    plain, longer = (speed(c, arch, w, gpu, 8).rollout for c, w in zip((one, resampled), works[::2], strict=True))
    waves = [-(-count // (8 * RUNNING)) for count in (works[2].sequences, *works[2].resampled)]
    assert longer[0] == pytest.approx(plain[0] * sum(waves) / waves[0]) and longer[1] == plain[1]


def test_settings_for_a_run_that_does_not_fit(checkpoint: Path) -> None:
    """Catches advice that does not fit either, and a layout that fits but is called too large."""
    arch, gpu = published("qwen2_audio_7b"), GPUS["h100"]
    config = configured(checkpoint)
    assert memory(config, arch, make_work(config, arch, 8)).total > gpu.memory
    settings = fitting(config, arch, gpu, 8)
    assert settings is not None
    advised = configured(checkpoint, *settings)
    work = make_work(advised, arch, 8)
    assert memory(advised, arch, work).total <= gpu.memory
    slow, fast = speed(advised, arch, work, gpu, 8).tokens_per_second
    assert 0 < slow < fast
    assert fitting(config, arch, gpu, 1) is None


def test_layers_are_dealt_by_what_stages_compute(checkpoint: Path) -> None:
    """Catches stages that are balanced without the encoder or the loss, and advice that makes a step slower."""
    arch, gpu = published("qwen2_audio_7b"), GPUS["h100"]
    even = configured(checkpoint, "parallel.pp=4", "model.freeze=[]")
    work = make_work(even, arch, 8)
    counts = balanced_layers(even, arch, work)
    assert sum(counts) == arch.language.num_layers and counts[0] < min(counts[1:3])
    uneven = replace(even, parallel=replace(even.parallel, pipeline_layers=counts))
    assert speed(uneven, arch, work, gpu, 8).train[0] < speed(even, arch, work, gpu, 8).train[0]
    whole = [sum(rank_counts(arch, 1, 4, stage, each).total for stage in range(4)) for each in (counts, ())]
    assert whole[0] == whole[1]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_page_has_the_tables_of_the_tool(name: str) -> None:
    """Catches a table that was not made again after the formulas or the examples' configuration changed."""
    config = load_config(RunConfig, ROOT / "examples" / name / "config.yaml")
    table = layouts_table(config, published(name), GPUS["h100"], {})
    assert table in (ROOT / "docs" / "plan.md").read_text(), f"make docs/plan.md's table again:\n{table}"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_examples_have_the_layout_that_is_chosen(name: str) -> None:
    """Catches an example with another layout or recomputation than the fastest that fits, servers on half of a node."""
    config = load_config(RunConfig, ROOT / "examples" / name / "config.yaml")
    assert fitting(config, published(name), GPUS["h100"], 4, 4) == []
    if published(name).language.experts is not None:
        assert config.parallel.ep == 4  # how large a mixture is decides, not what its ranks send
        return
    slower = replace(config, parallel=replace(config.parallel, tp=4), model=replace(config.model, recompute=()))
    sent = [
        traffic(each, published(name), make_work(each, published(name), 4), 0)
        for each in (config, replace(config, parallel=replace(config.parallel, tp=4)))
    ]
    assert sent[0].tp + sent[0].dp < 0.6 * (sent[1].tp + sent[1].dp)
    settings = fitting(slower, published(name), GPUS["h100"], 4, 4)
    assert settings is not None and "parallel.tp=2" in settings


@pytest.mark.parametrize(("gpus", "settings"), [(8, ()), (32, ("parallel.tp=4", "parallel.pp=4"))])
def test_an_example_on_more_gpus(gpus: int, settings: tuple[str, ...]) -> None:
    """Catches layouts in the words above an example's configuration that are not the fastest ones any more."""
    path = ROOT / "examples" / "qwen2_5_omni_7b" / "config.yaml"
    config = load_config(RunConfig, path, list(settings))
    assert fitting(config, published("qwen2_5_omni_7b"), GPUS["h100"], gpus, gpus) == []
    assert not settings or " ".join(settings) in path.read_text()


def test_numbers_of_gpus() -> None:
    """Catches several numbers of which all but the first are ignored, and a traceback for what is no number."""
    assert gpu_counts("8, 64", several=True) == [8, 64]
    with pytest.raises(CordError, match="several numbers are for --trace"):
        gpu_counts("8,64", several=False)
    with pytest.raises(CordError, match="--gpus 0: give a number"):
        gpu_counts("0", several=False)


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool on the 7B's example."""
    command = [sys.executable, "tools/plan.py", "--config", "examples/qwen2_audio_7b/config.yaml", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_tool_answers_and_refuses() -> None:
    """Catches JSON that says something else than the exit status, advice that is missing, and tracebacks."""
    done = plan("--model", "qwen2_audio_7b", "--json", "parallel.tp=1", "parallel.sequence_parallel=false")
    assert done.returncode == 1 and json.loads(done.stdout)["fits"] is False and json.loads(done.stdout)["suggestion"]
    done = plan("--model", "qwen2_audio_7b", "--gpus", "7")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: 7 GPUs cannot be laid out")
        and done.stderr.count("\n") == 1
    )
