"""espeak-ng: a robotic synthesizer with many voices, bundled by the package espeakng-loader.

espeak-ng keeps its whole state in variables of the process, and one utterance colours the next (the phase of the voice,
the flutter of the pitch). So the library is loaded afresh for each call of ``speak``, under a lock: what a call returns
depends on its arguments alone, whatever was spoken before, in this process or another. That costs 3 ms a call, so speak
some dozens of utterances at once. Threads may share a synthesizer, but take turns; processes run side by side.

What it simplifies: recordings are held in memory; text is spoken as it stands, without rewriting numbers or formulas.
"""

from __future__ import annotations

import _ctypes
import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.audio.resample import resample
from megatron_cord.errors import CordError
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE, Utterance, UtteranceRefusedError, polish

#: English voices of espeak-ng that differ well; they speak where no others are named.
ESPEAK_VOICES = ("en-us", "en-us+f2", "en-us+m3", "en-us+f4", "en-us+m1", "en-gb-x-rp")

_NORMAL_WORDS_A_MINUTE = 175
_NORMAL_PITCH = 50  # of 0 to 99

# Values of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_FROM_CHARACTER = 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_library_lock = threading.Lock()


class EspeakSynthesizer:
    """Needs the extra ``speech``. Equal calls give equal recordings, bit for bit.

    Raises:
        CordError: the extra is not installed, or its library does not load.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise CordError(
                "no speech synthesizer: espeakng-loader is missing; pip install megatron_cord[speech]"
            ) from None
        self._library_path = espeakng_loader.get_library_path()
        self._data_path = Path(espeakng_loader.get_data_path())
        self._variants = frozenset(path.name for path in (self._data_path / "voices" / "!v").iterdir())

    def speak(self, utterances: Sequence[Utterance]) -> list[np.ndarray]:
        """Implement ``SpeechSynthesizer.speak``; a recording depends on the utterances before it in the same call."""
        for utterance in utterances:
            self._check(utterance)
        with _library_lock, self._fresh_library() as (library, sampling_rate):
            recordings = [_speak(library, utterance) for utterance in utterances]
        return [
            polish(resample(recording, sampling_rate, SAMPLING_RATE), utterance)
            for recording, utterance in zip(recordings, utterances, strict=True)
        ]

    def _check(self, utterance: Utterance) -> None:
        voice = utterance.voice
        if not any(character.isalnum() for character in utterance.text):
            raise UtteranceRefusedError(f"nothing to say in the text {utterance.text!r}; give it at least one word")
        # espeak-ng itself ignores an unknown variant.
        variant = voice.name.partition("+")[2]
        if "+" in voice.name and variant not in self._variants:
            raise CordError(
                f"voice {voice.name!r}: espeak-ng has no variant {variant!r}; try for example f1 to f5 or m1 to m8"
            )
        rate = voice.speed * _NORMAL_WORDS_A_MINUTE
        if not 80 <= rate <= 450:
            raise CordError(
                f"voice {voice.name!r}: speed {voice.speed} is {rate:.0f} words a minute; espeak-ng speaks 80 to 450"
            )
        if not 0 <= voice.pitch * _NORMAL_PITCH <= 99:
            raise CordError(f"voice {voice.name!r}: pitch {voice.pitch} is out of reach; espeak-ng takes 0 to 1.98")

    @contextmanager
    def _fresh_library(self) -> Iterator[tuple[Any, int]]:
        """Load the library in its initial state; yield it with its sampling rate in Hz."""
        try:
            library = ctypes.CDLL(self._library_path)
        except OSError as error:
            raise CordError(f"{self._library_path} does not load ({error}); reinstall espeakng-loader") from error
        try:
            rate = library.espeak_Initialize(
                _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(self._data_path).encode(), _INITIALIZE_DONT_EXIT
            )
            if rate <= 0:
                raise CordError(
                    f"espeak-ng does not start with the voices in {self._data_path}; reinstall espeakng-loader"
                )
            try:
                # Breath is noise, and would be seeded with the time of day.
                library.espeak_ng_SetRandSeed(ctypes.c_long(1))
                yield library, rate
            finally:
                library.espeak_Terminate()
        finally:
            _ctypes.dlclose(library._handle)


def _speak(library: Any, utterance: Utterance) -> np.ndarray:
    """Return float32 [samples] at espeak-ng's own rate."""
    text, voice = utterance.text, utterance.voice
    chunks: list[bytes] = []

    def collect(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, count * 2))
        return 0

    callback = _Callback(collect)  # must stay referenced while the library may call it
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
        raise CordError(f"espeak-ng has no voice {voice.name!r}; try for example {', '.join(ESPEAK_VOICES)}")
    library.espeak_SetParameter(_PARAMETER_RATE, round(voice.speed * _NORMAL_WORDS_A_MINUTE), 0)
    library.espeak_SetParameter(_PARAMETER_PITCH, round(voice.pitch * _NORMAL_PITCH), 0)
    data = text.encode() + b"\0"
    status = library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, _FROM_CHARACTER, 0, _CHARS_UTF8, None, None)
    if status != 0:
        raise UtteranceRefusedError(
            f"espeak-ng could not speak {text!r} with voice {voice.name!r} (status {status}); shorten the text"
        )
    library.espeak_Synchronize()
    return np.frombuffer(b"".join(chunks), dtype=np.int16).astype(np.float32)
