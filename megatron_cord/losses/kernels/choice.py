"""Which backend computes a call: ``objective.backend``, ``backend=`` of the public functions."""

from __future__ import annotations

import logging
import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch

from megatron_cord.errors import CordError
from megatron_cord.losses.kernels.backend import Backend
from megatron_cord.losses.kernels.compiled import compiled_backend
from megatron_cord.losses.kernels.eager import EagerBackend

logger = logging.getLogger(__name__)

#: By the name that configuration and the public functions use.
BACKENDS = ("auto", "eager", "compile", "triton")

#: Logits of a call from which "auto" compiles on a CPU. Compiled, this many take half a second less (benchmarks.loss);
#: compiling takes some ten seconds once a process, which twenty such calls pay for. A test's or a small model's call
#: has far fewer.
COMPILE_ELEMENTS = 2**24


def choose_backend(name: str, device: torch.device, elements: int = 0, dtype: torch.dtype = torch.float32) -> Backend:
    """Return the backend of that name for tensors on the device.

    "auto" is triton on CUDA where it is installed, but eager for float64, which triton refuses. On a CPU it is compile
    for calls of so many logits that compiling pays, where there is a compiler, else eager: a function of the call
    alone, so that a run repeats itself to the bit.

    Args:
        name: one of ``BACKENDS``.
        device: of the tensors.
        elements: logits of the call, N · V/TP.
        dtype: in which the call computes, float32 or float64.

    Raises:
        CordError: an unknown name, or triton where it is not installed or cannot run.
    """
    if name not in BACKENDS:
        raise CordError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name == "auto":
        if device.type == "cuda" and dtype == torch.float32 and _triton_is_installed():
            name = "triton"
        else:
            name = "compile" if device.type == "cpu" and elements >= COMPILE_ELEMENTS and _has_compiler() else "eager"
        _log_once(name)
    if name == "triton":
        if not _triton_is_installed():
            raise CordError(
                "backend triton needs the package triton, which is not installed here; choose eager or compile"
            )
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise CordError(f"backend triton needs CUDA tensors, but these are on {device}; choose eager or compile")
        return _triton()
    return compiled_backend() if name == "compile" else EagerBackend()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _has_compiler() -> bool:
    """Whether torch.compile finds what it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


@cache
def _log_once(name: str) -> None:
    """Log each choice once a process."""
    logger.info("divergence: backend %s", name)


@cache
def _triton() -> Backend:
    from megatron_cord.losses.kernels.triton_kernels import TritonBackend

    return TritonBackend()
