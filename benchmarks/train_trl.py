"""TRL's side of `benchmarks.train`: its GKD trainer on the language model of the same checkpoints.

It prints one line of JSON. Its options are set to the same work as megatron_cord's, and otherwise to what makes it
fastest here: all on-policy (lmbda 1), reverse KL (beta 1), no gradient checkpointing (which would also turn the cache
of generation off), no reports. In bfloat16 it has megatron_cord's precision, fp32 weights and optimizer states under
autocast; with `16-bit` as a third argument all of them have 16 bits. Phases are timed around its own methods; `student`
is the forward pass, teacher and loss included, as they are one method there, and `backward` all that remains.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import __version__ as trl_version
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.train_setting import Clock, Setting


def language_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the language model inside a Qwen2-Audio checkpoint, or the one beside a grafted checkpoint."""
    if (alone := checkpoint.with_name(f"{checkpoint.name}-llm")).exists():
        text_model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(alone, dtype=dtype)
        return text_model
    config = Qwen2Config(**json.loads((checkpoint / "config.json").read_text())["text_config"])
    model: Any = Qwen2ForCausalLM(config)
    prefix = "language_model."
    weights = {
        name.removeprefix(prefix): t
        for name, t in load_file(checkpoint / "model.safetensors").items()
        if name.startswith(prefix)
    }
    model.load_state_dict(weights)
    model.generation_config.eos_token_id = json.loads((checkpoint / "generation_config.json").read_text())[
        "eos_token_id"
    ]
    whole: PreTrainedModel = model.to(dtype)
    return whole


class TimedTrainer(GKDTrainer):  # type: ignore[misc, unused-ignore]  # untyped where trl is not installed
    """Counts response tokens and seconds."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(**options)
        self.clock, self.responses, self.read = clock, 0, 0
        self.first_divergence: float | None = None

    def generate_on_policy_outputs(self, *arguments: Any, **options: Any) -> Any:
        """Time and count the responses."""
        with self.clock.phase("rollout"):
            ids, mask, labels = GKDTrainer.generate_on_policy_outputs(*arguments, **options)
        counted = int((labels != -100).sum())
        self.responses += counted
        self.read += int(mask.sum()) - counted
        return ids, mask, labels

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Time the loss; keep the first divergence by token, whatever it is divided by afterwards."""
        with self.clock.phase("student"):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.first_divergence is None:
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            self.first_divergence = float(loss) * (
                1.0 if num_items_in_batch is None else float(num_items_in_batch) / tokens
            )
        return loss


class Steps(TrainerCallback):  # type: ignore[misc]
    """Starts the clock after the steps that are left out."""

    def __init__(self, clock: Clock, setting: Setting) -> None:
        self.clock, self.setting, self.seconds = clock, setting, 0.0
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start or read the clock after the update of a step."""
        if state.global_step == self.setting.skipped_steps:
            self.trainer.responses = self.trainer.read = 0
            self.clock.start()
        elif state.global_step == self.setting.skipped_steps + self.setting.steps:
            self.seconds = self.clock.seconds()


def main() -> None:
    """Train and print the figures."""
    work, setting, clock = Path(sys.argv[1]), Setting(**json.loads(sys.argv[2])), Clock(wall=torch.cuda.is_available())
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(work / "student")
    tokenizer.chat_template = (work / "student" / "chat_template.jinja").read_text()
    dtype = getattr(torch, setting.dtype)
    mixed = dtype == torch.bfloat16 and sys.argv[3:] != ["16-bit"]
    questions = (work / "prompts.txt").read_text().splitlines()
    answer = {"role": "assistant", "content": "w1"}  # the format wants one; on-policy training replaces it
    rows = [{"messages": [{"role": "user", "content": question}, answer]} for question in questions]
    options = GKDConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=setting.prompts,
        gradient_accumulation_steps=1,
        max_steps=setting.skipped_steps + setting.steps,
        learning_rate=setting.learning_rate,
        max_grad_norm=1.0,
        adam_beta2=0.95,
        lmbda=1.0,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=setting.new_tokens,
        max_length=1024,
        gradient_checkpointing=False,
        bf16=mixed,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    steps = Steps(clock, setting)
    trainer = TimedTrainer(
        clock, model=language_model(work / "student", torch.float32 if mixed else dtype),
        teacher_model=language_model(work / "teacher", dtype), args=options,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[steps],
    )  # fmt: skip
    steps.trainer = trainer
    trainer.train()
    phases = {name: round(value / setting.steps, 3) for name, value in clock.phases.items()}
    phases["backward_and_rest"] = round(steps.seconds / setting.steps - sum(phases.values()), 3)
    print(json.dumps({
        "response_tokens_per_second": round(trainer.responses / steps.seconds, 1),
        "tokens_per_second": round((trainer.responses + trainer.read) / steps.seconds, 1),
        "seconds_per_step": round(steps.seconds / setting.steps, 3),
        "response_tokens": trainer.responses,
        "seconds_per_step_by_phase": phases,
        "first_divergence_per_token": round(trainer.first_divergence or 0.0, 4),
        "trl": trl_version,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
