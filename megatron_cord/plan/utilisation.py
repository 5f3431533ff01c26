"""Model FLOP utilisation of a step that was made: the operations that it needs, beside what the devices could do.

The operations are those of `train_flops` for sequences of the step's mean lengths; what is computed again
(`model.recompute`), padded, or generated counts as time and not as work.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megatron_cord.plan.devices import GPUS, peak_of
from megatron_cord.plan.speed import train_flops
from megatron_cord.plan.work import Work

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.trainer.config import RunConfig
    from megatron_cord.trainer.observability.throughput import StepWork

logger = logging.getLogger(__name__)


class Utilisation:
    """Gives a step's metrics `model_tflops` and `model_flop_utilisation`; none where the device's peak is not known.

    Args:
        config: of the run.
        devices: that train.
        device_name: by CUDA's name, or CPU.
    """

    def __init__(self, config: RunConfig, devices: int, device_name: str) -> None:
        self._config, self._devices = config, devices
        given = config.metrics.device_peak_tflops
        self._peak = 1e12 * given if given is not None else peak_of(device_name)
        if self._peak is None and device_name != "CPU":
            known = ", ".join(gpu.name for gpu in GPUS.values())
            logger.info(
                "no metric model_flop_utilisation: the peak of %s is not known (%s are); metrics.device_peak_tflops "
                "gives it",
                device_name,
                known,
            )

    def __call__(
        self, student: Architecture, teacher: Architecture, work: StepWork, seconds: float
    ) -> dict[str, float]:
        """Return the metrics of a step's updates.

        Args:
            student: its architecture.
            teacher: its architecture.
            work: of the step, summed over all ranks.
            seconds: of teacher, forward and backward passes, and the optimizer together.
        """
        if self._peak is None or not work.sequences or seconds <= 0:
            return {}
        achieved = flops_of(self._config, student, teacher, work) / (seconds * self._devices)
        return {"model_tflops": achieved / 1e12, "model_flop_utilisation": achieved / self._peak}


def flops_of(config: RunConfig, student: Architecture, teacher: Architecture, work: StepWork) -> float:
    """Return the floating-point operations that a step's updates need, over all devices."""
    train = config.train
    frames = round(work.clip_frames / max(work.clips, 1))
    mean = Work(
        sequences=work.sequences,
        scored=work.scored,
        student_tokens=round(work.student_tokens / work.sequences),
        teacher_tokens=round(work.teacher_tokens / max(work.scored, 1)),
        response_tokens=round(work.response_tokens / work.sequences),
        clips=work.clips / work.sequences,
        taught_clips=work.taught_clips / max(work.scored, 1),
        clip_positions=student.encoder.computed_positions(frames) if student.encoder is not None and frames else 0,
        dp=1,
        microbatches=1,
        micro_batch=1,
        teacher=teacher,
        minibatches=train.minibatches,
        passes=train.passes,
    )
    return train_flops(config, student, mean)[0]
