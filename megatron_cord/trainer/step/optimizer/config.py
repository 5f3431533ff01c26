"""The optimizer's keys."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_cord.config.curves import Shape
from megatron_cord.errors import CordError

ScheduleKind = Literal["cosine", "linear", "constant", "wsd"]
_GROUP_NAME = re.compile(r"\w[\w-]*")
#: wsd: the share of the steps that it decays over by default
DECAY_SHARE = 0.1


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate or a weight decay of their own."""

    #: which: a part of the model (audio_encoder, adapter, language_model), or a pattern such as '*.layers.1?.mlp.*' for
    #: the names that `cord config parameters FILE` prints; the group's own name if null
    match: str | None = None
    learning_rate: float | None = None  #: at the end of the warm-up; optimizer.learning_rate if null
    weight_decay: float | None = None  #: of its matrices; optimizer.weight_decay if null

    def __post_init__(self) -> None:
        if self.learning_rate is None and self.weight_decay is None:
            raise CordError("a group needs a learning_rate, a weight_decay or both")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise CordError(f"learning_rate must be positive, got {self.learning_rate}; model.freeze leaves a part out")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise CordError(f"weight_decay cannot be negative, got {self.weight_decay}")


@dataclass(frozen=True)
class MuonConfig:
    """Muon, of optimizer.kind=muon; everything that is no matrix inside a layer is AdamW's."""

    momentum: float = 0.95  #: share of it that a step keeps
    nesterov: bool = True  #: look a step ahead, by mixing the gradient in once more
    iterations: int = 5  #: of Newton-Schulz
    #: of an update, times √(longer side of the matrix); at 0.2, learning rates of AdamW carry over
    scale: float = 0.2
    precision: Literal["bfloat16", "float32"] = "bfloat16"  #: of the iteration; float32: alike on every layout

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise CordError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.iterations < 1 or not self.scale > 0:
            raise CordError("iterations must be at least 1 and scale positive")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rates."""

    #: adam: AdamW; muon: orthogonalized momentum for the matrices inside layers, AdamW for the rest
    kind: Literal["adam", "muon"] = "adam"
    learning_rate: float = 3e-5  #: at the end of the warm-up; the paper's value
    #: after the warm-up: cosine and linear fall until the last step, constant stays, wsd stays and falls at the end
    schedule: ScheduleKind = "cosine"
    #: of learning_rate: approached, and reached after the last step; constant never falls
    final_learning_rate_fraction: float = 0.1
    warmup_steps: int = 0  #: linear from zero
    decay_steps: int | None = (
        None  #: wsd: over how many of the last steps it falls, at least 2: the first has the full rate
    )
    decay_share: float | None = None  #: wsd: the same as a share of train.steps; 0.1 if neither is given
    decay_shape: Shape | None = None  #: wsd: how it falls; linear if null. sqrt is 1 - √share
    #: by name: parameters with a rate or a weight decay of their own, as in {adapter: {learning_rate: 3.0e-4}}; the
    #: first group that matches takes a parameter
    groups: dict[str, ParameterGroup] = field(default_factory=dict)
    weight_decay: float = 0.0  #: decoupled; never on biases and norms
    beta1: float = 0.9  #: decay of the first moment
    beta2: float = 0.95  #: decay of the second moment
    epsilon: float = 1e-8  #: in Adam's denominator
    muon: MuonConfig = field(default_factory=MuonConfig)
    clip_norm: float = 1.0  #: global gradient norm; 0 turns clipping off
    #: split states over data-parallel ranks: adam by Megatron's distributed optimizer, muon by whole tensors
    distributed: bool = True
    #: keep the moments in host memory and update there: 8 bytes a parameter of the device for time
    offload: bool = False
    overlap_communication: bool = False  #: reduce gradients while the backward pass runs
    #: a resumed run keeps the learning rates of its checkpoint, whatever learning_rate, warmup_steps, schedule and its
    #: other keys, and train.steps are now; after their last step the final rate stays
    keep_schedule: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise CordError(f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise CordError(f"optimizer.warmup_steps cannot be negative, got {self.warmup_steps}")
        self._check_schedule()
        for name in self.groups:
            if not _GROUP_NAME.fullmatch(name):
                raise CordError(
                    f"groups: the name {name!r} becomes the metric learning_rate_{name}; take letters, digits, _ and "
                    "-, and give the pattern as match"
                )

    def _check_schedule(self) -> None:
        given = {
            key: value
            for key in ("decay_steps", "decay_share", "decay_shape")
            if (value := getattr(self, key)) is not None
        }
        if given and self.schedule != "wsd":
            key, value = next(iter(given.items()))
            until = "never falls" if self.schedule == "constant" else "falls from the warm-up to the last step"
            raise CordError(
                f"two schedules at once: {key}={value} is of schedule=wsd, and schedule={self.schedule} {until}; give "
                "one"
            )
        final = self.final_learning_rate_fraction
        if self.schedule == "constant" and final != OptimizerConfig.final_learning_rate_fraction:
            raise CordError(
                f"two schedules at once: final_learning_rate_fraction={final} is where a rate falls to, and "
                "schedule=constant never falls; leave one out"
            )
        if "decay_steps" in given and "decay_share" in given:
            raise CordError(
                f"two schedules at once: decay_steps={self.decay_steps} and decay_share={self.decay_share}; give one"
            )
        if self.decay_steps is not None and self.decay_steps < 2:
            raise CordError(
                f"decay_steps must be at least 2, got {self.decay_steps}: the first of them has the full rate; "
                "schedule=constant has no decay"
            )
        if self.decay_share is not None and not 0 < self.decay_share <= 1:
            raise CordError(f"decay_share must be above 0 and at most 1, got {self.decay_share}")
        if not 0 <= final <= 1:
            raise CordError(f"final_learning_rate_fraction must lie between 0 and 1, got {final}")
