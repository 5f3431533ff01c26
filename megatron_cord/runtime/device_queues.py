"""How many queues of work a process opens to its GPU: CUDA_DEVICE_MAX_CONNECTIONS.

With one queue a GPU starts kernels in the order in which they were called. Megatron-Core counts on that under tensor
and context parallelism: a collective that is called before a product must not wait until this has the whole GPU. From
compute capability 10 on (Blackwell) nothing depends on it. The driver reads the variable when a process begins to use
it, too early for a process that has imported torch: the launcher sets it for its ranks. A value of the user's stays.
"""

from __future__ import annotations

import os
import subprocess

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
#: Compute capability from which the order of kernels no longer needs one queue.
INDEPENDENT_FROM = 10


def set_for_ranks(tp: int, cp: int) -> None:
    """Set the variable in this process's environment, which ranks inherit, if their layout needs it."""
    if VARIABLE not in os.environ and max(tp, cp) > 1 and needs_one_queue(tp, cp, _compute_capability()):
        os.environ[VARIABLE] = "1"


def needs_one_queue(tp: int, cp: int, compute_capability: int) -> bool:
    """Return whether a layout's collectives overlap with products only if kernels start in the order of their calls."""
    return max(tp, cp) > 1 and compute_capability < INDEPENDENT_FROM


def missing_setting(tp: int, cp: int, compute_capability: int) -> str:
    """Return what to tell the user of ranks that need the variable and were started with another value; "" if none."""
    value = os.environ.get(VARIABLE)
    if value == "1" or not needs_one_queue(tp, cp, compute_capability):
        return ""
    return (
        f"{VARIABLE} is {value or 'not set'}: collectives of tensor and context parallelism may wait for products "
        f"instead of overlapping with them; start the ranks with {VARIABLE}=1 (megatron_cord.launch gives it to those "
        "of a configuration with parallel.tp or parallel.cp above 1, unless the environment has another value)"
    )


def _compute_capability() -> int:
    """Return the first GPU's major compute capability, without using it; 0 where the driver's program is missing."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return int(printed.splitlines()[0].partition(".")[0])
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return 0
