"""What the message about an unknown key proposes."""

from __future__ import annotations

import pytest

from megatron_cord.config.loading import keys_of, load_config
from megatron_cord.config.renamed import RENAMED
from megatron_cord.config.suggestions import suggest
from megatron_cord.config.synonyms import SYNONYMS
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig

KEYS = list(keys_of(RunConfig))


@pytest.mark.parametrize(
    ("given", "proposed"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("min_lr", "optimizer.final_learning_rate_fraction"),
        ("gradient_accumulation_steps", "train.micro_batch_size"),
        ("per_device_train_batch_size", "train.micro_batch_size"),
        ("num_generations", "rollout.policy_rollouts"),
        ("rollout.n", "rollout.policy_rollouts"),
        ("teacher.path", "teacher.checkpoint"),
        ("model.path", "model.checkpoint"),
        ("model_name_or_path", "model.checkpoint"),
        ("max_completion_length", "rollout.max_new_tokens"),
        ("kl_coef", "objective.divergence.kind"),
        ("num_train_epochs", "train.steps"),
        ("warmup_ratio", "optimizer.warmup_steps"),
        ("trainer.total_epochs", "train.steps"),
        ("tp", "parallel.tp"),
        ("train.step", "train.steps"),
        ("modle.checkpoint", "model.checkpoint"),
        ("paralel.tp", "parallel.tp"),
    ],
)
def test_the_right_key_is_proposed(given: str, proposed: str) -> None:
    """Catches a synonym that is unknown, and a slip that is not recognised."""
    assert proposed in suggest(given, KEYS)


@pytest.mark.parametrize(
    "given", ["foo", "rollout.foo", "train.x", "n", "model.window", "parallel.xx", "data.name", "id"]
)
def test_silence_is_better_than_a_wrong_guess(given: str) -> None:
    """Catches the nearest of keys that are all far away, and one that only shares a common last name."""
    assert suggest(given, KEYS) == ""


def test_what_is_proposed_exists() -> None:
    """Catches a synonym or a new name that was renamed itself, and a section in the place of a key."""
    for name in SYNONYMS:
        assert suggest(name, KEYS), name
        assert name not in KEYS
    tops, sections = {key.partition(".")[0] for key in KEYS}, {key.rpartition(".")[0] for key in KEYS}
    for old, new in RENAMED.items():
        if old.partition(".")[0] in tops:  # others belong to the checks of `verify`
            assert " " in new or new in KEYS or new in sections, old


def test_messages_of_a_run() -> None:
    """Catches a message that does not point to the command that explains keys, or an old key without its new name."""
    for override, message in [
        ("optimizer.lr=1", r"did you mean 'optimizer\.learning_rate'\? See: cord config"),
        ("foo=1", r"unknown key 'foo' \(override foo\); see: cord config"),
        ("objective.top_k=3", r"it is now 'objective\.token_weights\.top_k'"),
        ("objective.divergence=jsd", r"is a section now .*the value belongs to 'objective\.divergence\.kind'"),
        ("rollout.exchange.way=disk", r"it is now 'rollout\.weight_sync'"),
    ]:
        with pytest.raises(CordError, match=message):
            load_config(RunConfig, None, ["output_dir=o", "model.checkpoint=c", override])
