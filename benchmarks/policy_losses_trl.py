"""Policy losses of TRL's GRPO trainer, with their gradients, for the tests to compare with.

    python -m benchmarks.policy_losses_trl [--output benchmarks/results/policy_losses_trl.json]

It needs `pip install -e '.[bench]'`. TRL's own method computes the loss, in float64, on made-up log-probabilities: only
the model's forward pass is replaced, and what the trainer would have prepared (masks, importance weights) is given as
its other methods make it. Cases name the options of both sides; `tests/trainer/step/test_policy_algorithms.py`
compares.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LENGTHS, TRUNCATED, LONGEST, CAP = [5, 2, 7, 7, 1, 3], [2, 3], 7, 1.5
#: by name: the options of TRL's GRPOConfig, and those of objective.policy_gradient
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": (
        {"loss_type": "grpo", "epsilon": 0.2},
        {"surrogate": "clipped", "normalization": "response_mean"},
    ),
    "bnpo": (
        {"loss_type": "bnpo", "epsilon": 0.1},
        {"surrogate": "clipped", "clip_low": 0.1, "clip_high": 0.1, "normalization": "token"},
    ),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "epsilon": 0.2},
        {"surrogate": "clipped", "normalization": "max_length"},
    ),
    "dapo": (
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "mask_truncated_completions": True},
        {"surrogate": "clipped", "clip_high": 0.28, "normalization": "token", "filter_truncated": True},
    ),
    "gspo": (
        {"loss_type": "grpo", "epsilon": 0.03, "epsilon_high": 0.04, "importance_sampling_level": "sequence"},
        {
            "surrogate": "clipped",
            "ratio": "sequence",
            "clip_low": 0.03,
            "clip_high": 0.04,
            "normalization": "response_mean",
        },
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"surrogate": "cispo", "clip_high": 0.3, "normalization": "token"},
    ),
}


def make_numbers() -> dict[str, Tensor]:
    """Return log-probabilities [B, T] of the present policy, the old one and the engine, and advantages [B]."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS))
    old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return {
        "student": old + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "old": old,
        "engine": old + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "advantages": torch.tensor([0.75, -0.25, -0.25, 1.5, -0.5, 0.5], dtype=torch.float64),
    }


def trl_loss(options: dict[str, Any], numbers: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Return the loss by TRL's method, and its gradient by the present log-probabilities, [B, T]."""
    from trl import GRPOTrainer

    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).int()
    if options.get("mask_truncated_completions"):
        mask[TRUNCATED] = 0
    student = numbers["student"].clone().requires_grad_()
    epsilon = options.get("epsilon", 0.2)
    trainer = SimpleNamespace(
        loss_type=options["loss_type"],
        importance_sampling_level=options.get("importance_sampling_level", "token"),
        epsilon_low=epsilon,
        epsilon_high=options.get("epsilon_high", epsilon),
        max_completion_length=LONGEST,
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (student, torch.zeros_like(student), None),
    )
    ids = torch.zeros_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": numbers["advantages"],
        "old_per_token_logps": numbers["old"],
        "importance_sampling_ratio": ((numbers["old"] - numbers["engine"]) * mask).exp().clamp(max=CAP),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, student)
    return float(loss.detach()), gradient


def main() -> None:
    """Compute all cases and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/policy_losses_trl.json"))
    output: Path = parser.parse_args().output
    from trl import __version__ as trl_version

    numbers, cases = make_numbers(), {}
    for name, (theirs, ours) in CASES.items():
        loss, gradient = trl_loss(theirs, numbers)
        cases[name] = {"trl": theirs, "policy_gradient": ours, "loss": loss, "gradient": gradient.tolist()}
    fixed = {"lengths": LENGTHS, "truncated": TRUNCATED, "max_length": LONGEST, "importance_cap": CAP}
    inputs = {name: tensor.tolist() for name, tensor in numbers.items()}
    output.write_text(json.dumps({"trl": trl_version, **fixed, "numbers": inputs, "cases": cases}, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
