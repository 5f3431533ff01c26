"""Views that are configured: their chats, what they refuse, their filters, and what a set chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ, PromptDefaults, Sample
from megatron_cord.data.shards.texts import read_sample
from megatron_cord.data.turns import AudioPart, TextPart, Turn
from megatron_cord.data.views import ViewConfig, Views, check_student
from megatron_cord.errors import CordError

WORDS = [
    "what",
    "is",
    "one",
    "plus",
    "two",
    "the",
    "answer",
    "3",
    "system",
    "be",
    "brief",
    "now",
    "and",
    "this",
    "A.",
    "B.",
]
CONFIGS = {
    "heard": ViewConfig(("audio", "instruction?")),
    "written": ViewConfig(("text", "instruction?")),
    "informed": ViewConfig(("text", "the answer is {answer}", "instruction?"), system="be brief"),
    "both": ViewConfig(("what is {metadata.hint}", "audio", "text", "choices?"), system=None),
    "noisy": ViewConfig(("audio|noise(10)", "instruction?")),
    "narrow": ViewConfig(("audio | noise(10) | band(3400)",)),
}  # fmt: skip


def noise(samples: int, seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).normal(size=samples)).astype(np.float32)


def question(**more: Any) -> Sample:
    return Sample("s7", "what is one plus two", noise(16000, 1), **more)


def conversation() -> Sample:
    first = Turn("user", (TextPart("now\n"), AudioPart(0, "what is one plus two")))
    last = Turn("user", (AudioPart(1, "and this"), TextPart("be brief")))
    sample = Sample("c1", "", turns=(first, Turn("assistant", (TextPart("the answer is 3"),)), last), answer="3")
    return sample.with_recordings([noise(16000, 1), noise(9000, 2)])


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    directory = tmp_path_factory.mktemp("checkpoint")
    create_checkpoint(directory, TinyModelConfig(), WORDS, seed=0)
    return PromptBuilder(directory, views=CONFIGS)


@pytest.mark.parametrize(
    "sample",
    [question(), question(instruction="be brief", system="now"), conversation()],
    ids=["plain", "all texts", "turns"],
)
def test_built_in_views_written_out_are_the_same(builder: PromptBuilder, sample: Sample) -> None:
    """Catches parts in another order, or set apart otherwise, than in the views that evaluations use."""
    (prepared,) = builder.prepare([sample], [HEAR, READ, "heard", "written"])
    for plain, composed in ((HEAR, "heard"), (READ, "written")):
        assert prepared.prompts[composed].token_ids == prepared.prompts[plain].token_ids
        clips = (prepared.prompts[name].clips for name in (plain, composed))
        assert all(torch.equal(one.features, other.features) for one, other in zip(*clips, strict=True))


def test_chats() -> None:
    """Catches a part out of place, a left-out one that leaves something, texts that run together."""
    views = Views(CONFIGS)
    sample = question(answer="3", instruction="be brief", system="now", metadata={"hint": 7}, choices=("one", "two"))
    informed = views.of(sample, "informed")
    assert informed.chat(sample) == (
        Turn("system", (TextPart("be brief"),)),
        Turn("user", (TextPart("what is one plus two\nthe answer is 3\nbe brief"),)),
    )
    spoken = AudioPart(0, "what is one plus two")
    (turn,) = views.of(sample, "both").chat(sample)
    assert turn.parts == (
        TextPart("what is 7"),
        spoken,
        TextPart("what is one plus two"),
        TextPart("\nA. one. B. two."),
    )
    (turn,) = views.of(sample, "both").chat(replace(sample, choices=()))
    assert turn.parts == (TextPart("what is 7"), spoken, TextPart("what is one plus two"))
    assert views.of(sample, "informed").chat(conversation())[1:] == (
        Turn("user", (TextPart("now\nwhat is one plus two"),)),
        Turn("assistant", (TextPart("the answer is 3"),)),
        Turn("user", (TextPart("and this\nbe brief\nthe answer is 3"),)),
    )


def test_missing_parts_are_named_with_the_sample(builder: PromptBuilder) -> None:
    """Catches a view made without its part, and a set that is opened although a view cannot be made of its samples."""
    with pytest.raises(CordError, match="sample s7 has no answer, which view informed is made of"):
        builder.prepare([question()], ["informed"])
    limits = builder.limits_for(["informed"])
    assert "has no answer" in (limits.fault([16000], question()) or "")
    assert limits.fault([16000], question(answer="3")) is None
    assert "control token" in (limits.fault([16000], question(answer="3 <|im_end|>")) or "")
    assert builder.limits.fault([16000], question()) is None
    with pytest.raises(CordError, match=r"has no metadata\.hint, which view both"):
        builder.prepare([question(metadata={"hint": ["a list"]})], ["both"])


def test_filters_draw_from_sample_and_draw_alone(builder: PromptBuilder) -> None:
    """Catches noise on the other view or on the sample, noise that a resumed run would not have, and a fixed one."""
    sample, clean = question(), question().waveform

    def heard(draw: str, view: str = "noisy") -> np.ndarray:
        (prepared,) = builder.prepare([sample], [HEAR, view], draw=draw)
        assert prepared.prompts[HEAR].token_ids == prepared.prompts[view].token_ids
        assert np.array_equal(prepared.prompts[HEAR].clips[0].waveform, clean) and sample.waveform is not clean
        return prepared.prompts[view].clips[0].waveform

    first = heard("0")
    assert np.array_equal(first, heard("0")) and not np.array_equal(first, heard("1"))
    added = first - clean
    assert 10 * np.log10(np.mean(clean**2) / np.mean(added**2)) == pytest.approx(10.0, abs=0.1)
    spectrum = np.abs(np.fft.rfft(heard("0", "narrow")))
    assert spectrum[3600:].max() < 1e-3 * spectrum.max()


def test_a_set_has_others_stand_for_a_view(builder: PromptBuilder) -> None:
    """Catches a set's choice that reaches another set, or that is lost on the way from its shards."""
    sample = question(answer="3")
    chosen = PromptDefaults(view_names={"informed": "written"}).complete(sample)
    one, other = builder.prepare([chosen, sample], ["informed"])
    (written,) = builder.prepare([sample], ["written"])
    assert (
        one.prompts["informed"].token_ids == written.prompts["written"].token_ids != other.prompts["informed"].token_ids
    )


def test_notes_of_a_shard_are_kept() -> None:
    """Catches notes that do not reach the views."""
    read = read_sample(b'{"question": "what is one", "metadata": {"hint": "two"}}', "a", "here")
    assert read.metadata == {"hint": "two"}


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ((), "user is empty"),
        (("audio", "audio|noise(3)"), "audio twice"),
        (("audio?",), "every sample has audio"),
        (("txet",), "no part of a sample; there are audio, text"),
        (("What is {audio}?",), "a recording cannot be in a text"),
        (("The answer is {ansewr}.",), "'ansewr' is no part"),
        (("The answer is {answer!r}.",), "a part alone into braces"),
        (("The answer is {answer.",), "for braces"),
        (("audio|reverb(1)",), r"'reverb\(1\)' is no filter"),
        (("audio|noise(900)",), "noise takes -10 to 100"),
        (("text|noise(10)",), "filters are for audio"),
    ],
)
def test_what_cannot_be_understood_is_refused(user: tuple[str, ...], message: str) -> None:
    """Catches an entry that is taken for a text, or left out, in silence."""
    with pytest.raises(CordError, match=message):
        ViewConfig(user)


def test_names_and_students_are_checked() -> None:
    """Catches a changed built-in view, which evaluations use, and a student that is given the answer."""
    with pytest.raises(CordError, match=r"views\.read: read is built in"):
        Views({"read": CONFIGS["informed"]})
    views = Views(CONFIGS)
    with pytest.raises(CordError, match="use one of hear, read, heard"):
        views.named("tells", "objective.teacher_view")
    with pytest.raises(CordError, match="gives the student the answer"):
        check_student(views.named("informed", "objective.student_view"), "objective.student_view")
    check_student(views.named("noisy", "objective.student_view"), "objective.student_view")
