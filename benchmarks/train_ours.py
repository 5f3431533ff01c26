"""This project's side of `benchmarks.train`: the trainer's parts as `megatron_cord.train` uses them, on text prompts.

It prints one line of JSON. `teacher`, `optimizer` and `loss` are taken out of the step's time, the rest is `student`;
the gradient of the loss with respect to the logits is formed in its forward pass, so most of its time is in `loss`, the
rest in `student`.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatron_cord.trainer.step.step as step_module
from benchmarks.train_setting import Clock, Setting
from megatron_cord.config.loading import load_config
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel import portability
from megatron_cord.parallel.layout import finalize, initialize
from megatron_cord.plan.devices import peak_of
from megatron_cord.plan.speed import train_flops
from megatron_cord.plan.work import Work
from megatron_cord.rollout.local.engine import LocalEngine, LocalEngineConfig
from megatron_cord.rollout.types import GenerationRequest, ScoredRollout
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from megatron_cord.trainer.step.optimizer.building import build_optimizer, wrap_model
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher


def configuration(work: Path, setting: Setting) -> RunConfig:
    """Configure on-policy reverse KL alone, the audio tower idle."""
    settings = [
        f"output_dir={work}",
        f"model.checkpoint={work / 'student'}",
        f"model.dtype={setting.dtype}",
        "model.freeze=[audio_encoder,adapter]",
        "data.train=none",
        "data.evaluation=none",
        f"rollout.prompts_per_step={setting.prompts}",
        f"rollout.max_new_tokens={setting.new_tokens}",
        "rollout.policy_prompts_per_step=0",
        "objective.policy_gradient.enabled=false",
        "objective.token_weights.factors=uniform",
        "objective.normalization=token",
        f"optimizer.learning_rate={setting.learning_rate}",
        f"train.micro_batch_size={setting.prompts}",
        f"train.steps={setting.skipped_steps + setting.steps}",
    ]
    return load_config(RunConfig, None, settings)


def timed(clock: Clock, name: str, function: Any) -> Any:
    """Wrap a function so that its time is added to a phase; on a GPU until its kernels have ended."""

    def call(*arguments: Any, **options: Any) -> Any:
        with clock.phase(name):
            result = function(*arguments, **options)
            if portability.has_cuda():
                torch.cuda.synchronize()
        return result

    return call


def main() -> None:
    """Train and print the figures."""
    work, setting = Path(sys.argv[1]), Setting(**json.loads(sys.argv[2]))
    config, clock = configuration(work, setting), Clock(wall=portability.has_cuda())
    layout = initialize(config.parallel, config.seed)
    student = build_student(config.model, layout)
    teacher = Teacher(config.teacher, student, str(work / "teacher"))
    model = wrap_model(config.optimizer, student)
    optimizer, scheduler = build_optimizer(config.optimizer, model, config.train.steps)
    prompts = PromptBuilder(config.model.checkpoint)
    engine = LocalEngine(
        config.model.checkpoint, LocalEngineConfig(device=str(layout.device), dtype=config.model.torch_dtype)
    )
    train = TrainStep(
        model,
        teacher,
        optimizer,
        scheduler,
        config.objective,
        config.train,
        prompts.pad_id,
        config.rollout.max_new_tokens,
    )
    teacher.hidden_states = timed(clock, "teacher", teacher.hidden_states)  # type: ignore[method-assign]
    optimizer.step = timed(clock, "optimizer", optimizer.step)
    step_module.microbatch_loss = timed(clock, "loss", step_module.microbatch_loss)  # type: ignore[attr-defined]
    questions = (work / "prompts.txt").read_text().splitlines()
    responses = prompt_tokens = 0
    divergence = 0.0
    for step in range(config.train.steps):
        if step == setting.skipped_steps:
            clock.start()
            responses = prompt_tokens = 0
        with clock.phase("prompts"):
            mine = questions[step * setting.prompts : (step + 1) * setting.prompts]
            prompted = [
                prompts.text_prompt(Sample(f"q{step}-{i}", text, np.zeros(1, np.float32)))
                for i, text in enumerate(mine)
            ]
        with clock.phase("rollout"):
            requests = [
                GenerationRequest(p, 1.0, setting.new_tokens, step * setting.prompts + i)
                for i, p in enumerate(prompted)
            ]
            rollouts = engine.generate(requests)
        scored = [ScoredRollout(r, "distill", position=i) for i, r in enumerate(rollouts)]
        sequences = [TrainingSequence(p, p, r, i) for i, (p, r) in enumerate(zip(prompted, scored, strict=True))]
        with clock.phase("student"):
            result = train(sequences, scored)
        with clock.phase("weight_sync"):
            engine.update_weights(ShardedModelWeights(student), step + 1)
        if step == 0:
            divergence = result.metrics["kl"]
        responses += sum(len(r.token_ids) for r in rollouts)
        prompt_tokens += sum(len(p.token_ids) for p in prompted)
    seconds = clock.seconds()
    clock.phases["student"] -= sum(clock.phases[name] for name in ("teacher", "loss", "optimizer"))
    print(
        json.dumps(
            report(config, setting, clock, seconds, responses, prompt_tokens)
            | {"first_divergence_per_token": round(divergence, 4)}
        )
    )
    engine.close()
    finalize()


def report(
    config: RunConfig, setting: Setting, clock: Clock, seconds: float, responses: int, prompt_tokens: int
) -> dict[str, Any]:
    """Return figures of the timed steps, with model FLOP utilisation where the device's peak is known."""
    sequences = setting.prompts * setting.steps
    length = (responses + prompt_tokens) // sequences
    work = Work(
        sequences=sequences,
        scored=sequences,
        student_tokens=length,
        teacher_tokens=length,
        response_tokens=responses // sequences,
        clips=0,
        clip_positions=0,
        dp=1,
        microbatches=setting.steps,
        micro_batch=setting.prompts,
    )
    flops, _ = train_flops(config, load_architecture(config.model.checkpoint), work)
    training = sum(clock.phases[name] for name in ("teacher", "student", "loss", "optimizer"))
    peak = peak_of(torch.cuda.get_device_name()) if portability.has_cuda() else None
    return {
        "response_tokens_per_second": round(responses / seconds, 1),
        "tokens_per_second": round((responses + prompt_tokens) / seconds, 1),
        "seconds_per_step": round(seconds / setting.steps, 3),
        "response_tokens": responses,
        "seconds_per_step_by_phase": {name: round(value / setting.steps, 3) for name, value in clock.phases.items()},
        "training_gflops_per_second": round(flops / training / 1e9, 1),
        "model_flop_utilisation": None if peak is None else round(flops / training / peak, 3),
    }


if __name__ == "__main__":
    main()
