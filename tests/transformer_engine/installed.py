"""transformer-engine's Python code on a CPU: its wheel of this environment, over the extension of `extension.py`."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

from tests.transformer_engine.extension import Extension, make_extension
from tools.install_transformer_engine import folder, version_for_megatron

#: Why tests of it are skipped; "" if they can run.
MISSING = "" if folder().is_dir() else "no transformer-engine here: python -m tools.install_transformer_engine"


def install() -> None:
    """Make `import transformer_engine.pytorch` work in this process, before megatron.core is imported.

    Raises:
        RuntimeError: megatron.core was imported before, which then does without transformer-engine.
    """
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before transformer-engine could be installed")
    version = version_for_megatron()
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not look for compiled libraries
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its fused functions are compiled on first use
    sys.path.insert(0, str(folder()))
    sys.modules["transformer_engine_torch"] = make_extension(version)
    # Export to ONNX, whose packages are not here.
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = Extension("onnx_extensions")
    _answer_for_a_device()
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda _framework: None
    import transformer_engine.pytorch
    from transformer_engine.pytorch.attention.dot_product_attention.softmax import FusedScaleMaskSoftmax

    # `from transformer_engine import …` looks at the package's attribute, which a failed first import leaves unset.
    transformer_engine.pytorch = sys.modules["transformer_engine.pytorch"]
    FusedScaleMaskSoftmax.is_kernel_available = lambda *_, **__: False


def _answer_for_a_device() -> None:
    """Answer the questions about a device that transformer-engine asks without computing on it: an H100."""
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100")
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    # Its modules refuse tensors of a CPU; for everyone else they stay what they are.
    tensor: Any = torch.Tensor
    available, on_device = cuda.is_available, tensor.is_cuda
    cuda.is_available = lambda: _is_asked_by_engine() or available()
    tensor.is_cuda = property(lambda self: _is_asked_by_engine() or on_device.__get__(self))


def _is_asked_by_engine() -> bool:
    """Return whether the caller of the function that calls this one is transformer-engine."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("transformer_engine.")
