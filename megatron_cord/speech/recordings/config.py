"""The configuration of a set that is made of recordings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import Patience
from megatron_cord.speech.quality import QualityConfig
from megatron_cord.speech.recordings.language import language_code

#: What a row may have; `fields` gives them other names.
FIELDS = (
    "id", "audio", "question", "answer", "instruction", "system", "choices", "solution", "voice", "language", "turns",
)  # fmt: skip
#: A recording's lowest peak, as an amplitude; what is below it is silent. Speech from afar may be this quiet.
MIN_PEAK = 0.001


def recording_quality(**bounds: Any) -> QualityConfig:
    """Return bounds of what a microphone recorded, which may be quieter, sparser and more clipped than synthesized."""
    return QualityConfig(**{"max_silence": 0.95, "max_clipping": 0.5, "min_loudness": -60.0} | bounds)


@dataclass(frozen=True)
class RecordingSetConfig:
    """One set of shards made of recordings.

    Attributes:
        source: a file or directory of rows, of lhotse cuts or of tars, a pattern of tars, or hf://OWNER/NAME[@REVISION].
        split, subset: of a data set on the hub.
        fields: names of the source's fields by ours: {"question": "sentence"}.
        ignore_fields: of the source, which may be left aside; any other field that nothing uses is an error.
        language: of the transcripts whose rows state none, "en"; None checks the rows that do.
        shard_size: rows a shard, rejects included.
        max_rejects: the largest share of rows that may be left out; more is an error at the end, when all shards are
            there.
        quality: what a recording must be like.
        api_key_env: environment variable with the key of the endpoint that transcribes; an unset one sends none.
        patience: with that endpoint.
    """

    source: str
    split: str | None = None
    subset: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    ignore_fields: tuple[str, ...] = ()
    language: str | None = None
    shard_size: int = 256
    max_rejects: float = 0.2
    quality: QualityConfig = field(default_factory=recording_quality)
    api_key_env: str = "SPEECH_API_KEY"
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise CordError(f"shard_size is {self.shard_size}; a shard holds at least one row")
        if not 0.0 <= self.max_rejects <= 1.0:
            raise CordError(f"max_rejects is {self.max_rejects}; it is a share between 0 and 1")
        for name in self.fields:
            if name not in FIELDS:
                raise CordError(f"there is no field {name!r}; rows have {', '.join(FIELDS)}")
        if self.language is not None and language_code(self.language) is None:
            raise CordError(f"the language {self.language!r} is neither a code, such as en, nor an English name")
        theirs = list(self.fields.values())
        if twice := next((name for name in theirs if theirs.count(name) > 1), None):
            raise CordError(f"the field {twice!r} of the rows is given two meanings; choose one")
