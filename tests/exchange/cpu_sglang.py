"""Starts the real SGLang server on a CPU: ``.venv-sglang/bin/python tests/exchange/cpu_sglang.py --model-path DIR --port N``.

SGLang imports compiled kernels that do not exist for plain CPUs; tests/exchange/stand_ins takes their place. Its processes import this file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_VLM_CACHE_SIZE_MB": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))

import torch

# Of torchvision's operators only the schemas are needed; weights_checker waits for a GPU that is not there.
_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]

FLAGS = [
    "--host",
    "127.0.0.1",
    "--device",
    "cpu",
    "--attention-backend",
    "torch_native",
    "--sampling-backend",
    "pytorch",
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--max-total-tokens",
    "2048",
    "--mem-fraction-static",
    "0.3",
    "--grammar-backend",
    "none",
    "--skip-server-warmup",
    "--max-running-requests",
    "8",
]

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    launch_server(prepare_server_args([*FLAGS, *sys.argv[1:]]))
