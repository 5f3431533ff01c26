"""Products of bfloat16 matrices with fp32 results on a CPU, by the few lines of ``cpu_matmul.cpp``.

torch multiplies bfloat16 on a CPU as fast as the hardware can, but its Python functions round the result. Its C++
library has the product that does not. ``cpu_matmul.cpp``, which makes it reachable, is compiled in a fraction of a
second, once per process that needs it.

Shapes: C rows of the left, K rows of the right, H columns of both.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def bfloat16_product() -> Product | None:
    """Return a function of left [C, H], right [K, H], out [C, K] that writes left · rightᵀ in fp32, if there is one.

    Rows of each must be contiguous and H even.
    """
    try:
        function = _load()
    except (OSError, subprocess.CalledProcessError) as error:
        logger.info("bfloat16 products with fp32 results cannot be compiled, they are formed in fp32: %s", error)
        return None

    def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        pointers = (tensor.data_ptr() for tensor in (left, right, out))
        strides = left.stride(0) // 2, right.stride(0) // 2, out.stride(0)
        failed = function(*pointers, len(left), len(right), left.shape[1] // 2, *strides, torch.get_num_threads())
        if failed:
            raise RuntimeError("this processor has no product of bfloat16 matrices")
        return out

    ones = torch.ones(1, 2, dtype=torch.bfloat16)
    try:
        product(ones, ones, torch.empty(1, 1))
    except RuntimeError as error:
        logger.info("%s: it is formed in fp32", error)
        return None
    return product


def _load() -> Callable[..., int]:
    """Compile, link with torch, and open; OSError or CalledProcessError where that fails."""
    libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "cpu_matmul.so"
        compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run(
            [*compiler, source, "-o", target, f"-L{libraries}", "-ltorch_cpu", "-lc10"], check=True, capture_output=True
        )
        function = ctypes.CDLL(str(target), mode=os.RTLD_NOW).bfloat16_product
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer] * 3 + [size] * 6 + [ctypes.c_int]
    function.restype = ctypes.c_int
    return function
