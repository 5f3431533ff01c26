"""This project's side of `benchmarks.speech.step`: the trainer's parts as `megatron_cord.train` uses them.

It prints one line of JSON. `teacher`, `loss` and `optimizer` are taken out of the update's time, the rest is `student`.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
import sys
from pathlib import Path

import megatron_cord.trainer.step.step as step_module
from benchmarks.speech.setting import SpeechSetting, questions
from benchmarks.train_ours import timed
from benchmarks.train_setting import Clock
from megatron_cord.config.loading import load_config
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ
from megatron_cord.parallel import portability
from megatron_cord.parallel.layout import finalize, initialize
from megatron_cord.rollout.local.engine import LocalEngine, LocalEngineConfig
from megatron_cord.rollout.types import GenerationRequest, ScoredRollout
from megatron_cord.rollout.weights import ShardedModelWeights
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.batching.batches import TrainingSequence
from megatron_cord.trainer.step.optimizer.building import build_optimizer, wrap_model
from megatron_cord.trainer.step.step import TrainStep
from megatron_cord.trainer.step.teacher import Teacher


def configuration(work: Path, setting: SpeechSetting) -> RunConfig:
    """Configure the step of `make speech`, on one rank."""
    settings = [
        f"output_dir={work}",
        f"model.checkpoint={work / 'student'}",
        f"model.dtype={setting.dtype}",
        "model.freeze=[audio_encoder,language_model]",
        "data.train=none",
        "data.evaluation=none",
        f"rollout.prompts_per_step={setting.prompts}",
        f"rollout.max_new_tokens={setting.new_tokens}",
        "rollout.policy_prompts_per_step=0",
        "objective.policy_gradient.enabled=false",
        f"objective.token_weights.top_k={setting.top_k}",
        "objective.normalization=token",
        f"optimizer.learning_rate={setting.learning_rate}",
        f"train.micro_batch_size={setting.prompts}",
        f"train.steps={setting.skipped_steps + setting.steps}",
        *sys.argv[3:],
    ]
    return load_config(RunConfig, None, settings)


def main() -> None:
    """Train and print the figures."""
    work, setting = Path(sys.argv[1]), SpeechSetting(**json.loads(sys.argv[2]))
    config, clock = configuration(work, setting), Clock(wall=portability.has_cuda())
    layout = initialize(config.parallel, config.seed)
    student = build_student(config.model, layout)
    teacher = Teacher(config.teacher, student, config.model.checkpoint)
    model = wrap_model(config.optimizer, student)
    optimizer, scheduler = build_optimizer(config.optimizer, model, config.train.steps)
    prompts = PromptBuilder(config.model.checkpoint)
    engine = LocalEngine(
        config.model.checkpoint, LocalEngineConfig(device=str(layout.device), dtype=config.model.torch_dtype)
    )
    train = TrainStep(
        model, teacher, optimizer, scheduler, config.objective, config.train, prompts.pad_id, setting.new_tokens
    )
    teacher.hidden_states = timed(clock, "teacher", teacher.hidden_states)  # type: ignore[method-assign]
    optimizer.step = timed(clock, "optimizer", optimizer.step)
    step_module.microbatch_loss = timed(clock, "loss", step_module.microbatch_loss)  # type: ignore[attr-defined]
    responses, divergence = 0, 0.0
    for step in range(config.train.steps):
        if step == setting.skipped_steps:
            clock.start()
            responses = 0
        with clock.phase("prompts"):
            prepared = prompts.prepare(questions(setting, step))
        with clock.phase("rollout"):
            rollouts = engine.generate(
                [GenerationRequest(p.prompts[HEAR], 1.0, setting.new_tokens, step) for p in prepared]
            )
        scored = [ScoredRollout(r, "distill", position=i) for i, r in enumerate(rollouts)]
        sequences = [
            TrainingSequence(p.prompts[HEAR], p.prompts[READ], r, i)
            for i, (p, r) in enumerate(zip(prepared, scored, strict=True))
        ]
        with clock.phase("student"):
            result = train(sequences, scored)
        with clock.phase("weight_sync"):
            engine.update_weights(ShardedModelWeights(student), step + 1)
        divergence = divergence or result.metrics["kl"]
        responses += sum(len(r.token_ids) for r in rollouts)
    seconds = clock.seconds()
    clock.phases["student"] -= sum(clock.phases[name] for name in ("teacher", "loss", "optimizer"))
    phases = {name: round(value / setting.steps, 3) for name, value in clock.phases.items()}
    figures = {
        "seconds_per_step": round(seconds / setting.steps, 3),
        "seconds_per_step_by_phase": phases,
        "response_tokens": responses,
        "first_divergence_per_token": round(divergence, 4),
    }
    print(json.dumps(figures))
    engine.close()
    finalize()


if __name__ == "__main__":
    main()
