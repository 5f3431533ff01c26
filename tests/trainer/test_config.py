"""The run's configuration: the paper's numbers by default, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cord.config.loading import dump_config, load_config
from megatron_cord.data.samples import PromptLimits
from megatron_cord.data.sets import open_training
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig

REQUIRED = ["output_dir=o", "model.checkpoint=c", "data.train=t", "data.evaluation=e"]


def load(*overrides: str) -> RunConfig:
    return load_config(RunConfig, None, [*REQUIRED, *overrides])


def test_defaults_are_the_papers() -> None:
    """Catches a default that drifts from CORD's training details (arXiv 2601.16547)."""
    config = load()
    objective, rollout = config.objective, config.rollout
    weights, policy = objective.token_weights, objective.policy_gradient
    assert (weights.factors, weights.top_k, weights.alpha, weights.beta) == ("cord", 20, 2.0, 2.0)
    assert (objective.responses, objective.divergence.kind) == ("student", "reverse_kl")
    assert policy.enabled and policy.weight == 1.0 and not policy.normalize_std
    assert objective.normalization == "response"
    assert (rollout.temperature, rollout.policy_temperature, rollout.policy_rollouts) == (1.0, 1.5, 4)
    assert (rollout.prompts_per_step, rollout.policy_prompts_per_step, rollout.max_new_tokens) == (32, 8, 200)
    assert (config.optimizer.learning_rate, config.train.steps) == (3e-5, 3000)
    assert config.model.dtype == "bfloat16" and config.teacher.mode == "frozen"


def test_a_dump_reads_back(tmp_path: Path) -> None:
    """Catches a value that config.yaml cannot hold, so that a run could not be repeated from its directory."""
    config = load(
        "model.freeze=[language_model, adapter]",
        "model.recompute=[audio_encoder]",
        "data.long_audio=cut",
        "replay=r",
        "record.rollouts=null",
        "optimizer.learning_rate=1e-30",
    )
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(RunConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "unknown key 'optimizer.learning_rat'.*did you mean 'optimizer.learning_rate'"),
        ("tp=2", "unknown key 'tp'.*did you mean 'parallel.tp'"),
        ("train.steps=many", "train.steps: expected .*got 'many'"),
        ("train.steps=0", "train.steps.* must be at least 1"),
        ("parallel.tp=0", "parallel.ep and parallel.virtual_pp are at least 1, got tp=0"),
        ("parallel.sequence_parallel=true", "needs parallel.tp > 1"),
        ("model.freeze=[audio_encoder, adapter, language_model]", "nothing is left to train"),
        ("model.freeze=[decoder]", "model.freeze.0: expected"),
        ("objective.divergence.kind=kl", "objective.divergence.kind: expected"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate must be positive"),
        ("checkpoint.interval=-1", "cannot be negative"),
        ("evaluation.samples=-1", "cannot be negative"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    """Catches a typo that trains with the default, and a message that does not say which key."""
    with pytest.raises(CordError, match=message):
        load(override)


def test_what_is_required() -> None:
    """Catches a run that starts without data or a model.

    Also an evaluation of a plain checkpoint that must name data to train on.
    """
    for missing in REQUIRED[:2]:
        with pytest.raises(CordError, match=f"{missing.split('=')[0]} is required"):
            load_config(RunConfig, None, [setting for setting in REQUIRED if setting != missing])
    without = load_config(RunConfig, None, REQUIRED[:2])
    with pytest.raises(CordError, match=r"^data\.train is required: set it .* to a directory of shards"):
        open_training(without.data, PromptLimits())


def test_question_sets_are_named_maps() -> None:
    """Catches sets that the command line cannot name, an unknown format.

    Also a name that leaves the results' directory.
    """
    config = load(
        "evaluation.sets.obqa.path=x.parquet",
        "evaluation.sets.obqa.format=voicebench",
        "evaluation.sets.mine.path=y.jsonl",
    )
    assert {name: (s.path, s.format) for name, s in config.evaluation.sets.items()} == {
        "obqa": ("x.parquet", "voicebench"),
        "mine": ("y.jsonl", "plain"),
    }
    for override, message in [
        ("evaluation.sets={'../x': {path: y}}", "becomes a file's name"),
        ("evaluation.sets.x.format=voicebench", r"evaluation\.sets\.x\.path is required"),
        (
            "evaluation.sets={x: {path: y, format: other}}",
            r"evaluation\.sets\.x\.format: expected one of shards, plain",
        ),
        ("evaluation.max_rejects=2", "a share between 0 and 1"),
    ]:
        with pytest.raises(CordError, match=message):
            load(override)
