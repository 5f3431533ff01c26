"""What a rank on a pretended GPU runs; imported by the process that forks the ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from megatron_cord.config.loading import load_config
from megatron_cord.evaluate import evaluate
from megatron_cord.parallel.layout import finalize
from megatron_cord.train import train
from megatron_cord.trainer.config import RunConfig

torch.set_num_threads(1)


def run_training(settings: Sequence[str]) -> None:
    """Train with these settings."""
    status = train(load_config(RunConfig, None, list(settings)))
    assert status == 0, f"the run ended with status {status}"


def run_evaluation(settings: Sequence[str]) -> None:
    """Evaluate with these settings."""
    assert evaluate(load_config(RunConfig, None, list(settings))) is not None
    finalize()


def leave_device_in_child(_: Sequence[str]) -> None:
    """Use the device in a forked process, as an asynchronous checkpoint must not; for the rules' own tests."""
    tensor = torch.ones(2, device="cuda")
    child = os.fork()
    if child == 0:
        try:
            tensor.add(1)
        except RuntimeError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
