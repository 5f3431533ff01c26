"""lhotse's cuts, read by lhotse: a manifest of cuts, or a directory in its Shar format.

A cut's transcript, speaker and language are those of its one supervision; other fields of a row (answer, instruction,
…) are custom fields of the cut or the supervision. A cut is decoded by lhotse, which cuts, mixes and resamples as the
manifest says.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.data.question_files import Reject
from megatron_cord.errors import CordError
from megatron_cord.speech.recordings.audio import Recorded, UnreadableError
from megatron_cord.speech.recordings.sources.source import Source

_LOADING = ("shard_origin", "shar_epoch", "dataloading_info")  # custom fields that lhotse adds while it reads
_CUTS = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut")


@dataclass(frozen=True)
class RecordedCut(Recorded):
    """A cut.

    Attributes:
        cut: lhotse's.
        root: what the manifest's paths are relative to where they do not exist from here.
    """

    cut: Any
    root: Path

    @property
    def identity(self) -> str:
        """All that the manifest says about it."""
        return f"cut {json.dumps(self.cut.to_dict(), sort_keys=True, default=repr)}"

    def read(self) -> np.ndarray:
        """Implement `Recorded.read`."""
        missing = next((path for path in map(Path, _paths(self.cut)) if not _place(path, self.root).is_file()), None)
        if missing is not None:
            raise UnreadableError(f"its file is missing ({missing})")
        cut = self.cut
        if any(_place(Path(path), self.root) != Path(path) for path in _paths(cut)):
            cut = cut.with_recording_path_prefix(self.root)
        try:
            audio = np.asarray(cut.load_audio(), np.float32)
        except Exception as error:  # lhotse's backends raise whatever they like, ruff: noqa: BLE001
            reason = " ".join(str(error).split())[:120]
            raise UnreadableError(f"its recording is not decodable ({cut.id}: {reason})") from None
        mono = audio.mean(axis=0) if audio.ndim == 2 else audio
        if not np.isfinite(mono).all() or len(mono) == 0:
            raise UnreadableError(f"its recording is not decodable ({cut.id}: no samples, or none that are finite)")
        if cut.sampling_rate != SAMPLING_RATE:
            mono = soxr.resample(mono, cut.sampling_rate, SAMPLING_RATE)
        waveform: np.ndarray = np.clip(mono, np.float32(-1.0), np.float32(1.0))
        return waveform


class CutRows(Source):
    """Rows of a manifest of cuts, or of a directory in the Shar format.

    Raises:
        CordError: the extra ``lhotse`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import lhotse
        except ImportError:
            raise CordError(f"{path} holds lhotse's cuts; pip install megatron_cord[lhotse] to read them") from None
        self.name = path.name
        self.root = self._folder = path if path.is_dir() else path.parent
        self.identity = {}
        self._path, self._lhotse = path, lhotse

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
        """Implement `Source.rows`."""
        if self._path.is_dir():
            cuts = self._lhotse.CutSet.from_shar(in_dir=self._path)
        else:
            cuts = self._lhotse.CutSet.from_jsonl_lazy(self._path)
        number = 0
        try:
            for number, cut in enumerate(cuts, 1):
                yield f"cut {number}", self._row(cut)
        except (OSError, ValueError, KeyError, TypeError, AssertionError, EOFError) as error:
            reason = " ".join(str(error).split())[:120]
            raise CordError(
                f"{self._path} cannot be read behind cut {number} ({reason}); write it again with lhotse"
            ) from error

    def _row(self, cut: Any) -> dict[str, Any] | Reject:
        if len(cut.supervisions) != 1:
            return Reject(
                cut.id,
                f"it has another number of supervisions than one ({len(cut.supervisions)}); lhotse's "
                "trim_to_supervisions makes a cut of each",
            )
        (supervision,) = cut.supervisions
        custom = {**(getattr(cut, "custom", None) or {}), **(supervision.custom or {})}
        plain = {
            name: value for name, value in custom.items() if name not in _LOADING and not hasattr(value, "to_dict")
        }
        said = {"question": supervision.text, "voice": supervision.speaker, "language": supervision.language}
        return {**plain, **said, "id": cut.id, "audio": RecordedCut(cut, self._folder)}


def holds_cuts(path: Path) -> bool:
    """Return whether a path is a manifest of cuts, or a directory in the Shar format."""
    if path.is_dir():
        return any(path.glob("cuts.*.jsonl*"))
    if not path.name.endswith((".jsonl", ".jsonl.gz")) or not path.is_file():
        return False
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            first = json.loads(next(filter(bytes.strip, iter(lambda: file.readline(1 << 24), b"")), b"{}"))
    except (OSError, ValueError, RecursionError, EOFError):
        return False
    return isinstance(first, dict) and first.get("type") in _CUTS


def _paths(cut: Any) -> Iterator[str]:
    """Yield the files that a cut's recordings are in."""
    for track in getattr(cut, "tracks", None) or ():
        yield from _paths(track.cut)
    recording = getattr(cut, "recording", None) if not getattr(cut, "tracks", None) else None
    for source in recording.sources if recording is not None else ():
        if source.type == "file":
            yield source.source


def _place(path: Path, root: Path) -> Path:
    return path if path.is_file() else root / path
