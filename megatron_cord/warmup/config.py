"""The configuration of a warm-up; it imports nothing heavy, as the command's help lists its keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megatron_cord.errors import CordError


@dataclass(frozen=True)
class CtcConfig:
    """The recognizer: a small network over the encoder's states, trained by CTC and thrown away at the end."""

    steps: int = 150  #: updates
    batch_size: int = 48  #: recordings an update, over all ranks
    learning_rate: float = 2e-3  #: the peak of a linear warm-up and a cosine
    final_learning_rate_fraction: float = 0.05  #: of the peak, where the cosine ends
    hidden_size: int = 768  #: width of the network's one hidden layer
    noise: float = 0.1  #: standard deviation of the Gaussian noise on the encoder's states
    #: the peak of the encoder's own weights, which then learn beside the recognizer and are written with the adapter;
    #: 0 leaves them as they are
    encoder_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        _check_updates("ctc", self)
        if self.hidden_size < 1 or self.noise < 0:
            raise CordError(
                f"hidden_size must be at least 1 and noise cannot be negative, got {self.hidden_size} and {self.noise}"
            )
        if not (self.encoder_learning_rate >= 0 and math.isfinite(self.encoder_learning_rate)):
            raise CordError(f"ctc.encoder_learning_rate cannot be negative, got {self.encoder_learning_rate}")


@dataclass(frozen=True)
class RegressionConfig:
    """The regression of the checkpoint's own adapter onto the embeddings that the recognizer expects."""

    steps: int = 600  #: updates
    batch_size: int = 32  #: recordings an update, over all ranks
    learning_rate: float = 1e-3  #: the peak of a linear warm-up and a cosine
    final_learning_rate_fraction: float = 0.0  #: of the peak, where the cosine ends
    #: text of one token whose embedding stands where the recognizer expects no token; null: a vector of zeros
    filler: str | None = " "
    #: weight, beside the squared error, of the cross-entropy between the recognizer's distribution and the adapter's
    #: outputs read by their distances to the rows; 0 leaves it out
    reading: float = 0.3

    def __post_init__(self) -> None:
        _check_updates("regression", self)
        if not (self.reading >= 0 and math.isfinite(self.reading)):
            raise CordError(f"regression.reading cannot be negative, got {self.reading}")


@dataclass(frozen=True)
class DistillationConfig:
    """The distillation of the reading language model into the adapter, which repeats what a recording says."""

    steps: int = 0  #: updates; 0 leaves the stage out, and the language model is not loaded
    batch_size: int = 32  #: recordings an update, over all ranks
    micro_batch_size: int = 16  #: recordings that a rank takes through the language model at once
    learning_rate: float = 3e-4  #: the peak of a linear warm-up and a cosine
    final_learning_rate_fraction: float = 0.1  #: of the peak, where the cosine ends
    #: text behind the recording, and behind its transcript; null: none
    instruction: str | None = " Repeat this sentence."
    system: str | None = None  #: the system prompt; null: the chat template's own
    measured: int = 64  #: recordings of those held out on which the divergence is measured before and after

    def __post_init__(self) -> None:
        if self.steps:
            _check_updates("distillation", self)
        if self.steps < 0 or self.micro_batch_size < 1 or self.measured < 1:
            raise CordError(
                "distillation.steps cannot be negative, and micro_batch_size and measured must be at least 1"
            )


@dataclass(frozen=True)
class WarmupConfig:
    """A warm-up of a checkpoint's adapter."""

    EXPLAINED_BY: ClassVar[str] = "cord warmup --help"

    #: the warmed-up checkpoint goes to model/ in it; encoder states, the state to go on from and summary.json beside it
    output_dir: str
    checkpoint: str  #: Hugging Face directory such as `cord graft` makes; it is read only
    data: str  #: recordings with transcripts: a directory of shards, a tar file, or a pattern
    held_out: str = ""  #: recordings to measure on, likewise; empty: held_out_share of those of `data`
    #: share of the recordings of `data`, drawn from the seed, that are measured on and not trained on
    held_out_share: float = 0.05
    #: the largest share of a set's recordings that may be left out: damaged, too long for the encoder, or shorter than
    #: their transcript; 0 stops at the first
    max_skipped: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  #: of the encoder and of matrix products; weights are fp32
    seed: int = 0  #: of the split, the order of the recordings, the recognizer and its noise
    ctc: CtcConfig = field(default_factory=CtcConfig)
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    warmup_steps: int = 30  #: over which the learning rate of each stage rises to its peak
    weight_decay: float = 0.01  #: AdamW's, of all stages
    clip_norm: float = 1.0  #: largest norm of a gradient
    save_interval: int = 50  #: updates between two saved states, from which a killed warm-up goes on
    timeout_minutes: float = 10.0  #: how long a collective may take before the ranks are considered dead

    @property
    def stages(self) -> dict[str, CtcConfig | RegressionConfig | DistillationConfig]:
        """The stages that are made, by name, in their order."""
        made: dict[str, CtcConfig | RegressionConfig | DistillationConfig] = {
            "ctc": self.ctc,
            "regression": self.regression,
            "distillation": self.distillation,
        }
        return {name: stage for name, stage in made.items() if stage.steps}

    def __post_init__(self) -> None:
        for name in ("output_dir", "checkpoint", "data"):
            if not getattr(self, name):
                raise CordError(f"{name} is empty; set it")
        if not 0.0 < self.held_out_share < 1.0:
            raise CordError(f"held_out_share is a share above 0 and below 1, not {self.held_out_share}")
        if not 0.0 <= self.max_skipped < 1.0:
            raise CordError(f"max_skipped is a share from 0 to below 1, not {self.max_skipped}")
        if self.seed < 0:
            raise CordError(f"seed cannot be negative, got {self.seed}")
        if self.warmup_steps < 0 or self.weight_decay < 0 or not self.clip_norm > 0:
            raise CordError("warmup_steps and weight_decay cannot be negative, and clip_norm must be positive")
        if self.save_interval < 1 or not self.timeout_minutes > 0:
            raise CordError("save_interval must be at least 1, and timeout_minutes positive")


def _check_updates(name: str, config: CtcConfig | RegressionConfig | DistillationConfig) -> None:
    if config.steps < 1 or config.batch_size < 1:
        raise CordError(f"{name}.steps and {name}.batch_size must be at least 1")
    if not (config.learning_rate > 0 and math.isfinite(config.learning_rate)):
        raise CordError(f"{name}.learning_rate must be positive, got {config.learning_rate}")
    if not 0.0 <= config.final_learning_rate_fraction <= 1.0:
        raise CordError(
            f"{name}.final_learning_rate_fraction is a share from 0 to 1, not {config.final_learning_rate_fraction}"
        )
