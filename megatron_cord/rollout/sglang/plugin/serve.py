"""The process of one SGLang server: run as a file by the interpreter of ``.venv-sglang``, with SGLang's own arguments.

Apart from starting SGLang it does five things. The API key comes from the environment, as arguments can be read by all
users of the machine, and is removed from the log, where SGLang prints all its settings. Without CUDA, stand-ins replace
the compiled kernels. The project's models (`external`) replace those that are missing or compute something else than
the trainer. Weights are received by ``weights.py``. And it ends when its standard input does, that is when the process
that started it is gone.

SGLang's processes import this file again, so everything outside the last block happens in each of them. It must not
import the project.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

KEY_VARIABLE = "MEGATRON_CORD_SERVER_KEY"
_NAMED_KERNELS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)


def hide_key(key: str) -> None:
    """Replace the key in whatever is logged from now on."""
    make = logging.getLogRecordFactory()

    def without_key(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if key in (text := record.getMessage()):
            record.msg, record.args = text.replace(key, "<api key>"), ()
        return record

    logging.setLogRecordFactory(without_key)


def stand_in_for_kernels() -> Any:
    """Make SGLang's imports work on a CPU. Returns what must be kept alive."""
    sys.path.insert(0, str(Path(__file__).parent / "cpu_standins"))
    import torch

    # Of torchvision's compiled operators only the schemas are needed.
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    # Models that are imported beside the one that is served name theirs, and do not call them.
    kernels = torch.library.Library("sgl_kernel", "DEF")  # type: ignore[no-untyped-call]
    for name in _NAMED_KERNELS:
        kernels.define(f"{name}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    torch.cuda.synchronize = lambda *_: None  # /weights_checker waits for a GPU that is not there
    # Where a GPU's unused memory would be freed, SGLang collects garbage on a CPU, half a second a weight sync.
    from sglang.srt.platforms.cpu import CpuDeviceMixin

    CpuDeviceMixin.empty_cache = lambda self: None
    # Chosen experts that are to be returned are kept in memory that SGLang registers with a GPU's driver.
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    ALLOC_MEMORY_FUNCS["cpu"] = lambda sizes, dtype, **_: torch.zeros(sizes, dtype=dtype)
    return library, kernels


def end_with_starter() -> None:
    """End this process and its children once standard input is closed."""

    def watch() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock would be held at the interpreter's end
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run_scheduler(*arguments: Any, **settings: Any) -> None:
    """Run the process that holds the model, or one tensor-parallel part of it."""
    import weights
    from sglang.srt.managers.scheduler import run_scheduler_process

    weights.install()
    run_scheduler_process(*arguments, **settings)


_key = os.environ.get(KEY_VARIABLE, "")
if _key:
    hide_key(_key)
sys.path.insert(0, str(Path(__file__).parent / "external"))  # where SGLANG_EXTERNAL_MODEL_PACKAGE is
_kept = stand_in_for_kernels() if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" else None
# SGLang reads a checkpoint's configuration before it looks for models; this registers those that transformers lacks.
importlib.import_module("cord_models")

if __name__ == "__main__":
    end_with_starter()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    settings = prepare_server_args([*sys.argv[1:], *(["--api-key", _key] if _key else [])])
    launch_server(settings, run_scheduler_process_func=run_scheduler)
