"""What ranks with transformer-engine compute; importing this installs it, so only they import it."""

from __future__ import annotations

import tests.transformer_engine.preload  # noqa: F401  # isort: skip (before megatron.core)
import megatron_cord.parallel  # noqa: F401  # isort: skip (likewise)

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from megatron.core import parallel_state
from megatron.core.optimizer import Adam
from torch import Tensor

from megatron_cord.config.loading import load_config
from megatron_cord.convert import export_tensors, import_tensors
from megatron_cord.model.architecture import Architecture, ExpertsArchitecture
from megatron_cord.model.config import LayerConfig, LoraConfig
from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.model.layers import transformer
from megatron_cord.model.layers.fusions import Fusions
from megatron_cord.parallel.fused_adam import FusedAdam
from megatron_cord.parallel.layout import ParallelConfig, initialize
from megatron_cord.trainer.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from megatron_cord.trainer.checkpoint.progress import Progress
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.optimizer.building import build_optimizer, release, wrap_model
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher, TeacherConfig
from megatron_cord.verify import layout as verify_layout
from megatron_cord.verify.layout import VerifyLayoutConfig
from megatron_cord.verify.layout_reference import make_checkpoint, make_sequences
from tests.model.ranks import make_batches
from tests.model.test_architecture import ARCHITECTURE, ENCODER, LANGUAGE

SMALL = ["sizes.layers=2", "sizes.encoder_layers=1"]
PACKED, SP = "train.packing=packed", "parallel.sequence_parallel=true"
GROUPED = "sizes.experts=8"
RECOMPUTED = "model.recompute=[audio_encoder, language_model]"
LORA = ["model.lora.rank=3", "model.lora.alpha=6"]
EXPERTS = ["sizes.experts=4", "parallel.tp=2", SP, "parallel.ep=2"]


@contextmanager
def layers_of(kind: str) -> Iterator[None]:
    """Choose layers, with what is fused on a GPU, on this device that is none."""
    kept = transformer.uses_transformer_engine, transformer.choose_fusions
    engine = kind == "transformer_engine"
    transformer.uses_transformer_engine = lambda layers: engine
    transformer.choose_fusions = lambda layers: Fusions(cuda=True, transformer_engine=engine)
    try:
        yield
    finally:
        transformer.uses_transformer_engine, transformer.choose_fusions = kept


def layout(_rank: int, overrides: Sequence[str], kind: str = "transformer_engine") -> Any:
    """Return what `verify layout` finds: loss, gradients and weights after a step against float64."""
    config = load_config(VerifyLayoutConfig, None, [*SMALL, *overrides])
    with layers_of(kind):
        return verify_layout.compare(
            *verify_layout.run_step(config, initialize(config.parallel, config.seed)), config.model.dtype
        )


def names(_rank: int) -> dict[str, Any]:
    """Compare both kinds of layers under the same published tensors: names, outputs, keys of checkpoints, fusions."""
    plain, fused, tensors = _both_kinds(ARCHITECTURE)
    exported = dict(export_tensors(fused))
    batch = make_batches()[1].input
    return {
        "norms inside": [name for name, _ in fused.named_parameters() if name.endswith("layer_norm_weight")],
        "same tensors": exported.keys() == tensors.keys()
        and all(torch.equal(exported[name], tensors[name]) for name in tensors),
        "difference": float((fused(batch) - plain(batch)).abs().max()),
        "keys": [_keys(model) for model in (plain, fused)],
        "kinds": sorted({type(module).__mro__[1].__module__ for module in fused.modules()}),
        "config": {name: getattr(fused.config, name) for name in ("apply_rope_fusion", "bias_activation_fusion")},
    }


def lora(_rank: int) -> dict[str, Any]:
    """Compare LoRA beside both kinds of layers: off, with the base, bit for bit; on, outputs and gradients."""
    base, without, on, gradients = [], [], [], []
    batch = make_batches()[1].input
    for model in _both_kinds(ARCHITECTURE)[:2]:
        base.append(model(batch).detach())
        model.add_lora(LoraConfig(rank=3, alpha=6.0), (), seed=0)
        assert model.lora is not None
        factors = sorted(model.lora.factors().items())
        for number, (_, (factor, _)) in enumerate(factors):
            drawn = torch.randn(factor.shape, generator=torch.Generator().manual_seed(number))
            factor.data.copy_(0.2 * drawn)
        with model.lora.disabled():
            without.append(model(batch).detach())
        hidden = model(batch)
        hidden.square().sum().backward()
        on.append(hidden.detach())
        gradients.append({name: torch.as_tensor(factor.grad) for name, (factor, _) in factors})
        trained = {id(factor) for _, (factor, _) in factors}
        assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)
    plain, fused = gradients
    assert plain.keys() == fused.keys() and all(gradient.count_nonzero() for gradient in plain.values())
    return {
        "off": torch.equal(base[1], without[1]),
        "changed": float((on[1] - base[1]).abs().max()),
        "difference": float((on[1] - on[0]).abs().max()),
        "gradients": max(float((fused[name] - g).norm() / g.norm()) for name, g in plain.items()),
        "classes": sorted({type(b).__name__ for b in _adapted(model)}),
    }


def _adapted(model: LALM) -> list[torch.nn.Module]:
    """Return the layers beside which there is LoRA."""
    assert model.lora is not None
    layers = ((name, module) for name, module in model.named_modules() if not name.startswith("lora."))
    return [module for name, module in layers if model.global_name(name) in model.lora.branches]


def experts(_rank: int) -> dict[str, Any]:
    """Compare grouped experts with those that are modules of their own, as LoRA has them too: names, outputs, keys."""
    mixture = ExpertsArchitecture(4, 2, normalized=True)
    plain, fused, tensors = _both_kinds(replace(ARCHITECTURE, language=replace(LANGUAGE, experts=mixture)))
    exported = dict(export_tensors(fused))
    batch = make_batches()[1].input
    with layers_of("transformer_engine"):
        apart = LALM(fused.arch, fused.layout, torch.float32, LayerConfig(grouped_experts=False))
    classes = [type(model.language_model.decoder.layers[0].mlp.experts).__name__ for model in (plain, fused, apart)]
    return {
        "classes": classes,
        "same tensors": exported.keys() == tensors.keys()
        and all(torch.equal(exported[name], tensors[name]) for name in tensors),
        "difference": float((fused(batch) - plain(batch)).abs().max()),
        "keys": [_keys(model) for model in (plain, fused)],
    }


def clips(_rank: int) -> float:
    """Return the largest difference between both kinds of layers in clips' features and their frames' gradients.

    Frames that end a clip attend and are not attended to, so there are more queries than keys.
    """
    encoder = replace(ENCODER, tail_frames=2)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, encoder.num_mels, encoder.window_frames, generator=generator)
    results = []
    for model in _both_kinds(replace(ARCHITECTURE, encoder=encoder))[:2]:
        features = noise.clone().requires_grad_()
        encoded = model.encode_audio(features, (44, 31, 9))
        torch.autograd.backward(encoded.square().sum())
        results.append((encoded.detach(), torch.as_tensor(features.grad)))
    assert all(tensor.count_nonzero() for tensor in results[0])
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def _both_kinds(arch: Architecture) -> tuple[LALM, LALM, dict[str, Tensor]]:
    """Return the model with Megatron's layers and with transformer-engine's, and the random tensors that both have."""
    here = initialize(ParallelConfig(), seed=0)
    models = []
    for kind in ("torch", "transformer_engine"):
        with layers_of(kind):
            models.append(LALM(arch, here, torch.float32))
    plain, fused = models
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors = {name: tensor.clone() for name, tensor in export_tensors(plain)}
    import_tensors(plain, tensors.items())  # zeros where a family has nothing
    import_tensors(fused, tensors.items())
    return plain, fused, tensors


def _keys(model: LALM) -> set[str]:
    named = {getattr(value, "key", name) for name, value in model.sharded_state_dict().items()}
    return {key for key in named if not key.endswith("_extra_state")}


def accumulation(_rank: int) -> dict[str, Any]:
    """Return which weights' gradients were added to main_grad by their products, beside those that are trained."""
    config = load_config(VerifyLayoutConfig, None, [*SMALL, "model.freeze=[audio_encoder]"])
    with layers_of("transformer_engine"), tempfile.TemporaryDirectory() as directory:
        make_checkpoint(Path(directory), config.sizes, config.seed)
        student = build_student(replace(config.model, checkpoint=directory), initialize(config.parallel, config.seed))
        frozen = student.language_model.decoder.layers[0].mlp.linear_fc1.weight.requires_grad_(False)
        wrapped = wrap_model(config.optimizer, student)
        wrapped.zero_grad_buffer()
        hidden = wrapped(ModelInput(torch.arange(12).view(2, 6), None, None, ("first", "second")))
        hidden.square().sum().backward()
    matrices = {
        name: module.weight
        for name, module in student.named_modules()
        if isinstance(module, te.Linear | te.LayerNormLinear)
    }
    release(wrapped)
    return {
        "added": {name for name, weight in matrices.items() if getattr(weight, "grad_added_to_main_grad", False)},
        "trained": {name for name, weight in matrices.items() if weight.requires_grad},
        "zero": [
            name for name, weight in matrices.items() if weight.requires_grad and not weight.main_grad.count_nonzero()
        ],
        "frozen": frozen.grad is None and not hasattr(frozen, "main_grad"),
        "left": [name for name, weight in matrices.items() if weight.grad is not None],
        "output layer": student.language_model.output_layer.gradient_accumulation_fusion,
    }


def checkpoint(_rank: int, before: Sequence[str], after: Sequence[str], kind: str) -> float:
    """Return the largest difference in a weight of two steps on one layout, and of one step each on two."""
    with tempfile.TemporaryDirectory() as name:
        directories: list[str] = [name]
        dist.broadcast_object_list(directories)
        directory = Path(directories[0])
        kept, path = _steps(before, "transformer_engine", directory, resumes=False)
        parallel_state.destroy_model_parallel()
        resumed, _ = _steps(after, kind, directory, resumes=True, path=path)
        dist.barrier()
    return max(float((resumed[name] - tensor).abs().max()) for name, tensor in kept.items())


def _steps(
    overrides: Sequence[str], kind: str, directory: Path, *, resumes: bool, path: Path | None = None
) -> tuple[dict[str, Tensor], Path]:
    """Train two steps with a checkpoint between them, or the second one from that checkpoint; return the weights."""
    config = load_config(VerifyLayoutConfig, None, [*SMALL, *overrides])
    here = initialize(config.parallel, config.seed)
    sequences = make_sequences(config.sizes, config.seed)
    with layers_of(kind):
        source = directory / f"weights{dist.get_rank()}-{resumes}"
        source.mkdir()
        make_checkpoint(source, config.sizes, config.seed)
        model = build_student(replace(config.model, checkpoint=str(source)), here)
        teacher = Teacher(TeacherConfig(), model, str(source))
        wrapped = wrap_model(config.optimizer, model)
        optimizer, scheduler = build_optimizer(config.optimizer, wrapped, steps=10)
        step = TrainStep(
            *(wrapped, teacher, optimizer, scheduler, verify_layout.OBJECTIVE, config.train),
            pad_id=0,
            max_new_tokens=config.sizes.longest,
        )
        share, responses = sequences[here.dp_rank :: here.dp_size], [s.response for s in sequences]
        checkpoints = Checkpoints(directory / "checkpoints", CheckpointConfig(asynchronous=False))
        progress = Progress(step=1, seconds=0.0, skipped_in_a_row=0, seed=0)
        if path is None:
            step(share, responses)
            checkpoints.save(progress, wrapped, optimizer)
        else:
            checkpoints.load(path, wrapped, optimizer)
            scheduler.step(increment=1)
        step(share, responses)
    weights = {name: tensor.clone() for name, tensor in export_tensors(model)}
    release(wrapped)
    return weights, checkpoints.path_of(1)


def adam(_rank: int) -> dict[str, Any]:
    """Compare transformer-engine's FusedAdam with this project's over three steps, as Megatron builds them."""
    parameters, states = [], []
    for kind in (Adam, FusedAdam):
        generator = torch.Generator().manual_seed(0)
        mine = [torch.nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(2)]
        groups = [{"params": [mine[0]], "weight_decay": 0.1}, {"params": [mine[1]], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, adam_w_mode=True)
        for _ in range(3):
            for parameter in mine:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        parameters.append(mine)
        states.append([optimizer.state[parameter] for parameter in mine])
    return {
        "module": Adam.__module__,
        "parameters": max(float((a - b).abs().max()) for a, b in zip(*parameters, strict=True)),
        "states": [set(each) for each in (states[0][0], states[1][0])],
        "moments": max(
            float((a[name] - b[name]).abs().max())
            for a, b in zip(*states, strict=True)
            for name in ("exp_avg", "exp_avg_sq")
        ),
    }


LAYOUTS: dict[str, list[str]] = {
    "tp2 sp packed, lora": ["parallel.tp=2", SP, PACKED, *LORA],
    "tp2 sp packed": ["parallel.tp=2", SP, PACKED],
    "pp2, recomputed": ["parallel.pp=2", RECOMPUTED],
    "tp2 sp ep2 packed, grouped experts": ["parallel.tp=2", SP, "parallel.ep=2", PACKED, GROUPED],
}
MORE_LAYOUTS: dict[str, list[str]] = {
    "dp2 packed": [PACKED],
    "tp2, frozen encoder": ["parallel.tp=2", "model.freeze=[audio_encoder]"],
    "dp2, overlapped": ["optimizer.overlap_communication=true"],
    "dp2 packed in bfloat16": [PACKED, "model.dtype=bfloat16"],
    "tp2 sp in bfloat16": ["parallel.tp=2", SP, "model.dtype=bfloat16"],
    "tp2 sp packed, recomputed selectively": [
        *("parallel.tp=2", SP, PACKED, RECOMPUTED),
        "model.recompute_granularity=selective",
    ],
    "pp2 packed, frozen language model": ["parallel.pp=2", PACKED, "model.freeze=[language_model]"],
    "ep2, grouped experts": ["parallel.ep=2", GROUPED, "sizes.sequences=5"],
    "pp2, grouped experts recomputed": ["parallel.pp=2", GROUPED, RECOMPUTED],
    # Without replay bfloat16 would choose other experts than float64 for some tokens.
    "ep2, grouped experts in bfloat16, replayed": [
        *("parallel.ep=2", GROUPED, "model.dtype=bfloat16", "sizes.router_replay=true")
    ],
    "dp2, ordinary optimizer": ["optimizer.distributed=false"],
    "pp2, lora recomputed": ["parallel.pp=2", RECOMPUTED, *LORA],
    "tp2 packed, lora in bfloat16": ["parallel.tp=2", PACKED, "model.dtype=bfloat16", *LORA],
    "experts": EXPERTS,
    "experts packed, lora": [*EXPERTS, PACKED, *LORA],
}
CASES: dict[str, Callable[[int], Any]] = {
    "names": names,
    "clips": clips,
    "lora": lora,
    "accumulation": accumulation,
    "adam": adam,
    "torch layers, fused": partial(layout, overrides=[PACKED], kind="torch"),
    "checkpoint tp2 to pp2": partial(
        checkpoint, before=["parallel.tp=2"], after=["parallel.pp=2"], kind="transformer_engine"
    ),
    "checkpoint tp2 to torch layers": partial(checkpoint, before=["parallel.tp=2"], after=[], kind="torch"),
    "checkpoint ep2 to torch layers": partial(
        checkpoint, before=["parallel.ep=2", GROUPED], after=[GROUPED], kind="torch"
    ),
    "both forms of experts": experts,
    **{name: partial(layout, overrides=overrides) for name, overrides in (LAYOUTS | MORE_LAYOUTS).items()},
}


def run_cases(rank: int, cases: Sequence[str]) -> dict[str, Any]:
    """Run cases one after the other, each with its own process groups."""
    found = {}
    for name in cases:
        found[name] = CASES[name](rank)
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
    return found
