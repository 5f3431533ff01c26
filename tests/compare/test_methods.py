"""Methods are nothing but settings: each reaches the loss and the responses that it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.methods import COMPARED, METHODS, methods_named
from megatron_cord.compare.plan import plan_runs
from megatron_cord.compare.results import responses
from megatron_cord.config.loading import load_config
from megatron_cord.data.loader import Batch
from megatron_cord.data.samples import PreparedSample, Prompt
from megatron_cord.errors import CordError
from megatron_cord.losses import TokenWeightsConfig
from megatron_cord.rollout.types import GenerationRequest, Rollout
from megatron_cord.trainer.collection import Collector
from megatron_cord.trainer.config import RunConfig
from tests.tiny_run import ROOT, make_samples
from tests.trainer.step.test_objective import assert_as_expected

REQUIRED = ("output_dir=x", "model.checkpoint=x", "data.train=x", "data.evaluation=x")
#: what each method asks an engine for, of 4 prompts of which 2 give groups of 3: answers at temperature 1, and at 1.5
SAMPLED = {
    "sft": (0, 0), "off_policy_kl": (0, 0), "grpo": (0, 6), "reverse_kl": (4, 0), "sampled": (4, 0), "jsd": (4, 0),
    "cord": (4, 6), "weighted_kl": (4, 0), "grpo_reverse_kl": (4, 6),
    "grpo_clipped": (0, 6), "dr_grpo": (0, 6), "dapo": (0, 6), "gspo": (0, 6), "cispo": (0, 6),
}  # fmt: skip


def run_config(method: str, *more: str) -> RunConfig:
    """Return a run's configuration from the method's settings and nothing else."""
    rollout = ("rollout.prompts_per_step=4", "rollout.policy_prompts_per_step=2", "rollout.policy_rollouts=3")
    return load_config(RunConfig, None, [*REQUIRED, *rollout, *METHODS[method].settings, *more])


@pytest.mark.parametrize("method", METHODS)
def test_each_reaches_the_loss(method: str) -> None:
    """Catches a setting that the loss ignores: value and gradients are those of a loop over tokens in float64."""
    assert_as_expected(run_config(method, "objective.token_weights.top_k=2").objective)


def test_no_two_are_the_same() -> None:
    """Catches a copy with another title."""
    assert len({repr(run_config(method).objective) for method in METHODS}) == len(METHODS)
    assert len(COMPARED) == 7 and run_config("cord").objective == load_config(RunConfig, None, REQUIRED).objective


class _Answers:
    """A frozen teacher that has answered."""

    mode = "frozen"

    def requests(self, samples: Sequence[PreparedSample]) -> list[GenerationRequest]:
        return []

    def rollouts(self, samples: Sequence[PreparedSample], generated: Sequence[Rollout]) -> list[Rollout]:
        return [Rollout(s.sample.id, (7, 8), (0.0, 0.0), "stop", (), "the answer is 1") for s in samples]


class _Rewards:
    """Never asked here."""


@pytest.mark.parametrize("method", METHODS)
def test_each_trains_on_the_responses_it_says(method: str) -> None:
    """Catches an off-policy method that generates, and a table whose counts of responses are not those of the run."""
    config = run_config(method)
    collector = Collector(config.rollout, config.objective, _Answers(), _Rewards(), 0)  # type: ignore[arg-type]
    samples = [PreparedSample(s, {view: Prompt(s.id, (1,)) for view in collector.views}) for s in make_samples(4)]
    batch = Batch(0, tuple(range(4)), tuple(samples))
    requests = collector.requests(batch)
    alone, groups = (sum(r.temperature == t for r in requests) for t in (1.0, 1.5))
    assert (alone, groups) == SAMPLED[method] and len(requests) == alone + groups == responses(config)["sampled"]
    off_policy = method in ("sft", "off_policy_kl")
    assert responses(config)["trained"] == (4 if off_policy else len(requests))
    if off_policy:
        made = collector.sequences(batch, collector.score(batch, []))
        assert [s.rollout.token_ids for s in made] == [(7, 8)] * 4 and all(s.response.distilled for s in made)
        assert all((s.teacher is not None) == (method == "off_policy_kl") for s in made)


def test_methods_of_the_users_own(tmp_path: Path) -> None:
    """Catches a user's method not based on CORD, overruled by shared settings, or under a known name."""
    shared = ("objective.token_weights.top_k=7", *REQUIRED[1:])
    config = CompareConfig(
        "/dev/null",
        str(tmp_path),
        methods=("cord", "steeper"),
        own={"steeper": ("objective.token_weights.top_k=9",)},
        seeds=(3,),
        settings=shared,
    )
    cord, steeper = (run.config for run in plan_runs(config))
    assert [c.objective.token_weights for c in (cord, steeper)] == [TokenWeightsConfig("cord", k) for k in (7, 9)]
    with pytest.raises(CordError, match=r"own\.sft: this name is one of the project's"):
        methods_named(["sft"], {"sft": ()})
    with pytest.raises(CordError, match=r"'dpo' is unknown; choose from sft, .*, mine"):
        methods_named(["dpo"], {"mine": ()})
    with pytest.raises(CordError, match="sft comes twice"):
        methods_named(["sft", "cord", "sft"], {})


def test_recipes_are_methods() -> None:
    """Catches a recipe that is read in part, or whose settings a run does not take."""
    path = str(ROOT / "examples" / "recipes" / "x3_opd.yaml")
    method = methods_named(["x3"], {}, {"x3": path})["x3"]
    config = load_config(RunConfig, None, [*REQUIRED, *method.settings])
    assert config.objective == load_config(RunConfig, Path(path), REQUIRED).objective
    assert config.objective.teacher_view == "informed" and "{answer}" in config.views["informed"].user[1]
    tars = ROOT / "examples" / "recipes" / "tars.yaml"
    method = methods_named(["tars"], {}, {"tars": str(tars)})["tars"]
    config, whole = load_config(RunConfig, None, [*REQUIRED, *method.settings]), load_config(RunConfig, tars, REQUIRED)
    assert (config.objective, config.reward) == (whole.objective, whole.reward) and config.reward.embedding.is_given
    with pytest.raises(CordError, match=r"recipes\.ts_opd: .* has a teacher for each of its training sets"):
        methods_named(["ts_opd"], {}, {"ts_opd": path.replace("x3_opd", "ts_opd")})
    with pytest.raises(CordError, match=r"recipes\.sft: this name is one of the project's"):
        methods_named(["sft"], {}, {"sft": path})
