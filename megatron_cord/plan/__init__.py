"""What a run will need before it is started: parameters, memory a GPU and time a step, from an architecture, a configuration and a GPU.

Nothing here touches a device or reads weights. Figures are estimates with their assumptions stated beside them; parameters, gradients and
optimizer states are exact (see tests/plan/test_plan.py, which counts those of a built model).
"""

from megatron_cord.plan.devices import GPUS, Gpu
from megatron_cord.plan.memory import Memory, memory
from megatron_cord.plan.parameters import PUBLISHED, PartCounts, part_counts, published
from megatron_cord.plan.search import fitting
from megatron_cord.plan.speed import Speed, speed
from megatron_cord.plan.work import Work, make_work

__all__ = [
    "GPUS",
    "PUBLISHED",
    "Gpu",
    "Memory",
    "PartCounts",
    "Speed",
    "Work",
    "fitting",
    "make_work",
    "memory",
    "part_counts",
    "published",
    "speed",
]
