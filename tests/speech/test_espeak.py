"""espeak-ng: real voices, the same recording every time, and errors that name what is wrong."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_cord.errors import CordError
from megatron_cord.speech.synthesizers.espeak import ESPEAK_VOICES, EspeakSynthesizer
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE, Utterance, Voice

TEXT = "take three from nine"
VOICES = (*ESPEAK_VOICES, "en-us+f3", "en-us+m4", "en-gb-x-rp+f2", "en-us-nyc")


@pytest.fixture(scope="module")
def synthesizer() -> EspeakSynthesizer:
    return EspeakSynthesizer()


def test_every_voice_speaks(synthesizer: EspeakSynthesizer) -> None:
    """Would catch a voice that this version lacks, voices that sound alike, leftover silence, and clipping."""
    recordings = synthesizer.speak([Utterance(TEXT, Voice(name)) for name in VOICES])
    for recording in recordings:
        assert recording.dtype == np.float32 and recording.ndim == 1
        assert 0.8 < len(recording) / SAMPLING_RATE < 2.0
        assert np.abs(recording).max() == pytest.approx(0.9, abs=1e-6)
        loud = np.flatnonzero(np.abs(recording) > 0.02)
        assert max(loud[0], len(recording) - loud[-1]) <= 800
    assert len({recording.tobytes() for recording in recordings}) == len(VOICES)


def test_recordings_do_not_depend_on_the_past(synthesizer: EspeakSynthesizer) -> None:
    """Would catch state that leaks from call to call, or noise seeded with the clock's seconds.

    Shards could then not be made again bit for bit.
    """
    utterances = [Utterance(TEXT, Voice(name)) for name in VOICES]
    first = synthesizer.speak(utterances)
    synthesizer.speak([Utterance("something else entirely", Voice("en-gb-x-rp", speed=1.5, pitch=1.4))])
    time.sleep(1.1)
    again = EspeakSynthesizer().speak(utterances)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_threads_take_turns(synthesizer: EspeakSynthesizer) -> None:
    """Would catch two threads in the library at once, which mixes their recordings."""
    calls = [[Utterance(TEXT, Voice(name))] for name in ESPEAK_VOICES] * 2
    alone = [synthesizer.speak(call)[0] for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = [result[0] for result in pool.map(synthesizer.speak, calls)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_speed_and_pitch(synthesizer: EspeakSynthesizer) -> None:
    """Would catch parameters that are ignored."""
    normal, fast, high = synthesizer.speak(
        [Utterance(TEXT, Voice("en-us", speed, pitch)) for speed, pitch in ((1, 1), (1.5, 1), (1, 1.6))]
    )
    assert len(fast) < 0.8 * len(normal)
    assert abs(len(high) - len(normal)) < 0.1 * len(normal) and not np.array_equal(high[:1000], normal[:1000])


@pytest.mark.parametrize(
    ("utterance", "message"),
    [
        (Utterance(TEXT, Voice("xx-yy")), "no voice 'xx-yy'"),
        (Utterance(TEXT, Voice("en-us+zzz")), "no variant 'zzz'"),
        (Utterance(TEXT, Voice("en-us+../../lang/de")), "no variant"),
        (Utterance(TEXT, Voice("en-us", speed=9)), "speed 9"),
        (Utterance(TEXT, Voice("en-us", pitch=-1)), "pitch -1"),
        (Utterance("  . ", Voice("en-us")), "nothing to say"),
        (Utterance("", Voice("en-us")), "nothing to say"),
    ],
)
def test_bad_input_is_named(synthesizer: EspeakSynthesizer, utterance: Utterance, message: str) -> None:
    """Would catch espeak-ng's own habit of speaking with another voice, or of returning silence, without a word."""
    with pytest.raises(CordError, match=message) as caught:
        synthesizer.speak([utterance])
    assert "\n" not in str(caught.value)


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an ImportError's traceback where the extra is not installed."""
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(CordError, match=r"pip install megatron_cord\[speech\]"):
        EspeakSynthesizer()
