"""The held-out questions and training rollouts that the page shows, with their audio.

Questions are drawn at random from each kind (fixed, still wrong, broken, always right) by a hash of their id, so that
the same run gives the same page. Those whose tokens were scored come first, and the voices take turns.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.report.run.contents import Answer, Evaluation, RunContents, TrainingRollout
from megatron_cord.report.run.reading import read_rollouts

#: Kind → how many are shown, in the page's order; the last two are for runs with one evaluation.
QUOTAS = {"fixed": 8, "still wrong": 6, "broken": 4, "always right": 6, "wrong": 12, "right": 12}
_AT_LEAST = 12
#: Bytes of WAV on one page: about 9 MB of base64.
AUDIO_BUDGET = 6_500_000
_MOST_ROLLOUTS = 8  # of one group


@dataclass(frozen=True)
class Example:
    """One held-out question with its answers in the first evaluation (None if there is one alone) and in the last."""

    kind: str
    before: Answer | None
    after: Answer


@dataclass(frozen=True)
class TrainingGroup:
    """The responses to one training question in one step: one rollout to distil on, or a group with rewards."""

    step: int
    rollouts: Sequence[TrainingRollout]


def choose_examples(before: Evaluation | None, after: Evaluation) -> list[Example]:
    """Choose the questions to show, kind by kind; at least 12 if there are as many."""
    earlier = {answer.id: answer for answer in before.answers} if before else {}
    examples = []
    for answer in after.answers:
        first = earlier.get(answer.id)
        if first is not None or before is None:
            examples.append(Example(kind_of(first, answer), first, answer))
    queue = _take_turns(examples)
    chosen = [example for kind, quota in QUOTAS.items() for example in [e for e in queue if e.kind == kind][:quota]]
    spare = [example for example in queue if example not in chosen]
    chosen += spare[: max(_AT_LEAST - len(chosen), 0)]
    order = list(QUOTAS)
    return sorted(chosen, key=lambda example: order.index(example.kind))


def load_clips(data: object, ids: Sequence[str]) -> dict[str, str]:
    """Return recordings by id as ``data:`` addresses of 16-bit WAV files, in order until the budget is spent.

    Raises:
        CordError: the shards at ``data`` cannot be read.
    """
    if not isinstance(data, str):
        raise CordError("the configuration has no data.evaluation")
    dataset, wanted = ShardDataset(data, max_skipped=1.0), set(ids)  # what a run left out has no examples
    waveforms = {
        sample_id: dataset[index].played() for index, sample_id in enumerate(dataset.ids) if sample_id in wanted
    }
    clips, spent = {}, 0
    for sample_id in ids:
        if sample_id in waveforms:
            # The lowest 16-bit value is slightly below -1.
            wav = encode_wav(np.clip(waveforms[sample_id], -1.0, 1.0))
            spent += len(wav)
            if spent > AUDIO_BUDGET:
                break
            clips[sample_id] = "data:audio/wav;base64," + base64.b64encode(wav).decode("ascii")
    return clips


def training_groups(run: RunContents) -> list[TrainingGroup]:
    """Return of the first and last recorded step a rollout to distil on and a group, of mixed rewards if possible."""
    files = list(run.rollout_files.items())
    groups = []
    for step, path in files[:1] + files[1:][-1:]:
        by_prompt: dict[tuple[str, str], list[TrainingRollout]] = {}
        for rollout in read_rollouts(path):
            by_prompt.setdefault((rollout.role, rollout.id), []).append(rollout)
        distilled = [rollouts[:1] for (role, _), rollouts in by_prompt.items() if role == "distill"]
        rewarded = [rollouts[:_MOST_ROLLOUTS] for (role, _), rollouts in by_prompt.items() if role == "policy"]
        rewarded.sort(key=lambda rollouts: len({rollout.reward for rollout in rollouts}) < 2)
        groups += [TrainingGroup(step, rollouts) for rollouts in distilled[:1] + rewarded[:1]]
    return groups


def kind_of(before: Answer | None, after: Answer) -> str:
    """Return how a question's answer changed, a key of QUOTAS."""
    if before is None:
        return "right" if after.audio_correct else "wrong"
    if before.audio_correct:
        return "always right" if after.audio_correct else "broken"
    return "fixed" if after.audio_correct else "still wrong"


def _take_turns(examples: Iterable[Example]) -> list[Example]:
    """Return examples in random order, scored ones first, and within these one of each kind and voice in turn."""
    shuffled = sorted(examples, key=lambda example: hashlib.sha256(example.after.id.encode()).digest())
    turns: Counter[tuple[str, str | None, bool]] = Counter()
    ranked = []
    for example in shuffled:
        scored = example.after.token_kl is not None
        turn = (example.kind, example.after.voice, scored)
        ranked.append((not scored, turns[turn], example))
        turns[turn] += 1
    return [example for _, _, example in sorted(ranked, key=lambda item: item[:2])]
