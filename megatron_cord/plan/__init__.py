"""Plans: parameters, memory of a GPU and time of a step, from an architecture, a configuration and a GPU.

Nothing here imports torch, touches a device or reads weights. Figures are estimates with their assumptions beside them;
parameters, gradients and optimizer states are exact (tests/plan counts those of a built model).
"""

from megatron_cord.plan.devices import GPUS, Gpu
from megatron_cord.plan.memory import Memory, memory
from megatron_cord.plan.parameters import PartCounts, part_counts
from megatron_cord.plan.published import PUBLISHED, published
from megatron_cord.plan.search import fitting
from megatron_cord.plan.speed import Speed, speed, train_flops
from megatron_cord.plan.traffic import Traffic, traffic
from megatron_cord.plan.work import Work, make_work

__all__ = [
    "GPUS",
    "PUBLISHED",
    "Gpu",
    "Memory",
    "PartCounts",
    "Speed",
    "Traffic",
    "Work",
    "fitting",
    "make_work",
    "memory",
    "part_counts",
    "published",
    "speed",
    "traffic",
    "train_flops",
]
