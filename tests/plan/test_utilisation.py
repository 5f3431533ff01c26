"""Model FLOP utilisation of a step that was made."""

from __future__ import annotations

import logging

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.plan import GPUS, make_work, published
from megatron_cord.plan.speed import train_flops
from megatron_cord.plan.utilisation import Utilisation
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.observability.throughput import StepWork

ARCH = published("qwen2_audio_7b")


def configured(*more: str) -> RunConfig:
    """Return the configuration of a run on it."""
    return load_config(
        RunConfig, None, ["output_dir=x", "model.checkpoint=x", "data.train=x", "data.evaluation=x", *more]
    )


def planned_step(config: RunConfig) -> tuple[StepWork, float]:
    """Return the work of a step whose sequences are all as `cord plan` takes them, and plan's operations."""
    work = make_work(config, ARCH, 8)
    done = StepWork(
        generated_tokens=0,
        sequences=work.sequences,
        scored=work.scored,
        student_tokens=work.sequences * work.student_tokens,
        teacher_tokens=work.scored * work.teacher_tokens,
        response_tokens=work.sequences * work.response_tokens,
        clips=round(work.sequences * work.clips),
        clip_frames=round(work.sequences * work.clips * 1000),  # 10 s, as plan takes them
    )
    return done, train_flops(config, ARCH, work)[0]


@pytest.mark.parametrize("more", [(), ("train.minibatches=2", "train.passes=2"), ("model.freeze=[audio_encoder]",)])
def test_the_share_is_that_of_the_plans_operations(more: tuple[str, ...]) -> None:
    """Catches a number of devices, of passes or a factor that is forgotten or counted twice."""
    config = configured(*more)
    work, flops = planned_step(config)
    metrics = Utilisation(config, 8, "NVIDIA H100 80GB HBM3")(ARCH, ARCH, work, 20.0)
    assert metrics["model_tflops"] == pytest.approx(flops / 20 / 8 / 1e12)
    assert metrics["model_flop_utilisation"] == pytest.approx(flops / 20 / 8 / GPUS["h100"].peak)


@pytest.mark.parametrize("device", ["NVIDIA GeForce RTX 3090", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"])
def test_an_unknown_device_is_said_once_and_has_no_share(device: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a utilisation of some other device's peak, and a metric that is missing without a word."""
    caplog.set_level(logging.INFO)
    work, _ = planned_step(configured())
    unknown = Utilisation(configured(), 8, device)
    assert [unknown(ARCH, ARCH, work, seconds) for seconds in (1.0, 2.0)] == [{}, {}]
    assert [record.getMessage().count(f"the peak of {device} is not known") for record in caplog.records] == [1]
    assert Utilisation(configured(), 8, "CPU")(ARCH, ARCH, work, 1.0) == {} and len(caplog.records) == 1


def test_a_peak_that_is_given_counts() -> None:
    """Catches a setting that changes nothing."""
    config = configured("metrics.device_peak_tflops=71")
    work, flops = planned_step(config)
    for device in ("CPU", "NVIDIA H100 80GB HBM3"):
        share = Utilisation(config, 1, device)(ARCH, ARCH, work, 2.0)["model_flop_utilisation"]
        assert share == pytest.approx(flops / 2 / 71e12)


def test_a_step_without_sequences_has_no_share() -> None:
    """Catches a division by zero in a step whose groups were all without variance."""
    assert Utilisation(configured(), 8, "NVIDIA H100 80GB HBM3")(ARCH, ARCH, StepWork.of((), ()), 1.0) == {}
