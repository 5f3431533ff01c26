"""Which responses are aligned with which, what the terms add to a reward, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_cord.config.loading import load_config
from megatron_cord.data.samples import Prompt
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout
from megatron_cord.reward import Score
from megatron_cord.reward.rewards import TermWeights
from megatron_cord.rollout.types import Rollout
from megatron_cord.trainer.alignment.aligner import Aligner, GroupedResponse
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.step.streams import PolicyStream
from tests.tiny_run import overrides

VECTORS = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [3.0, 3.0]}
STREAMS = (
    PolicyStream("text", "read", responses=2, reward=TermWeights(agreement=0.0, gold=1.0)),
    PolicyStream(
        "speech", "hear", responses=3, reward=TermWeights(0.0, 1.0, 0.0, layers=0.5, embedding=2.0), align_with="text"
    ),
)


class Embedder:
    """Has an embedding for three words."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return the words' vectors."""
        return torch.tensor([VECTORS[text] for text in texts])


def response(position: int, stream: str, text: str, gold: float) -> GroupedResponse:
    rollout = Rollout("sample", (1, 2), (0.0, 0.0), "stop", (), text)
    return GroupedResponse(position, stream, Prompt("sample", (1,)), rollout, Score(gold, {"gold": gold}))


def test_right_answers_are_taken_in_turn(layout: Layout) -> None:
    """Catches a wrong answer, or one to another question, as what is aligned with; and a term that is not weighed."""
    responses = [
        *(response(0, "text", text, gold) for text, gold in (("a", 1.0), ("b", 0.0), ("c", 1.0))),
        *(response(0, "speech", text, 1.0) for text in ("a", "a", "b", " ")),
        response(4, "text", "a", 0.0),
        response(4, "speech", "a", 0.0),
    ]
    asked: list[list[tuple[int, int]]] = []

    def layers(given: Sequence[tuple[Prompt, Rollout]], pairs: Sequence[tuple[int, int]]) -> list[float]:
        assert [rollout.text for _, rollout in given] == [r.rollout.text for r in responses]
        asked.append(list(pairs))
        return [0.25] * len(pairs)

    scores = Aligner(STREAMS, TermWeights(), layers, Embedder(), layout.replica_group).scores(responses)
    assert asked == [[(3, 0), (4, 2), (5, 0), (6, 2)]]
    assert scores[:3] == [r.score for r in responses[:3]] and scores[7] == responses[7].score
    similar = [1.0, 0.5**0.5, 0.0, 0.0]
    for score, cosine in zip(scores[3:7], similar, strict=True):
        assert score.terms == {"gold": 1.0, "layers": 0.25, "embedding": pytest.approx(cosine)}
        assert score.total == pytest.approx(1.0 + 0.5 * 0.25 + 2.0 * cosine)
    assert scores[8].terms == {"gold": 0.0, "layers": 0.0, "embedding": 0.0} and scores[8].total == 0.0


@pytest.mark.parametrize(
    ("text", "speech", "more", "message"),
    [
        ("", "align_with: text, reward: {layers: 1}", (), None),
        ("", "", ("reward.terms.layers=1",), r"streams\.text: the reward has layers.*streams\.text\.align_with"),
        ("", "reward: {layers: 1}", (), r"name that stream in objective\.streams\.speech\.align_with"),
        ("", "align_with: text", (), "has neither layers nor embedding; leave it out"),
        ("", "align_with: none, reward: {layers: 1}", (), "align_with=none must be a stream of .*: text"),
        ("", "align_with: speech, reward: {layers: 1}", (), "that is not aligned itself: text"),
        (
            "reward: {agreement: 0, format: 1}",
            "align_with: text, reward: {layers: 1}",
            (),
            "neither gold nor agreement",
        ),
        ("", "align_with: text, reward: {embedding: 1}", (), r"name the model in reward\.embedding\.checkpoint"),
    ],
)
def test_alignment_that_cannot_be_meant(
    text: str, speech: str, more: tuple[str, ...], message: str | None, tmp_path: Path
) -> None:
    """Catches a term that would be 0 in every reward without a word."""
    streams = [
        f"{name}: {{kind: policy_gradient, student: {view}, responses: 2{given and f', {given}'}}}"
        for name, view, given in (("text", "read", text), ("speech", "hear", speech))
    ]
    settings = overrides(tmp_path, tmp_path / "run", f"objective.streams={{{', '.join(streams)}}}", *more)
    if message is None:
        assert load_config(RunConfig, None, settings).objective.policy_terms[1].align_with == "text"
        return
    with pytest.raises(CordError, match=message):
        load_config(RunConfig, None, settings)


def test_the_objectives_own_policy_gradient_has_no_other_stream(tmp_path: Path) -> None:
    """Catches a run without streams whose reward would lack a term."""
    with pytest.raises(CordError, match=r"reward\.terms\.embedding compares the responses of two streams"):
        load_config(RunConfig, None, overrides(tmp_path, tmp_path / "run", "reward.terms.embedding=1"))
