"""The figures of a plan together, as JSON and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_cord.plan.devices import Gpu
from megatron_cord.plan.memory import Memory
from megatron_cord.plan.parameters import PartCounts
from megatron_cord.plan.speed import BANDWIDTH, LINKS, PRODUCTS, Speed
from megatron_cord.plan.work import Work


@dataclass(frozen=True)
class Report:
    """One plan."""

    gpu: Gpu
    gpus: int
    parameters: PartCounts
    work: Work
    memory: Memory
    speed: Speed
    weight_sync: tuple[int, int]  #: bytes with merged weights, and where servers merge LoRA themselves

    @property
    def fits(self) -> bool:
        """Whether the fullest stage fits; allowances are in its sum."""
        return self.memory.total <= self.gpu.memory

    def to_json(self) -> dict[str, Any]:
        """Return plain values: bytes, seconds, tokens a second."""
        parameters = asdict(self.parameters) | {"total": self.parameters.total}
        memory = self.memory.parts() | {"total": self.memory.total, "stage": self.memory.stage}
        return {
            "gpu": asdict(self.gpu),
            "gpus": self.gpus,
            "fits": self.fits,
            "parameters": parameters,
            "work": asdict(self.work),
            "memory_bytes": memory,
            "weight_sync_bytes": {"merged": self.weight_sync[0], "lora": self.weight_sync[1]},
            "speed": asdict(self.speed),
            "assumed": {"products": PRODUCTS, "links": LINKS, "bandwidth": BANDWIDTH},
        }

    def weight_sync_text(self) -> str:
        """Return what a weight sync sends, in words."""
        merged, lora = self.weight_sync
        text = f"a weight sync sends {merged / 1e9:.2f} GB"
        return (
            text if merged == lora else f"{text} of merged weights, or {lora / 1e9:.2f} GB to servers that merge LoRA"
        )

    def speed_text(self) -> str:
        """Return seconds and tokens in words, each as a range."""
        (slow_r, fast_r), (slow_t, fast_t) = self.speed.rollout, self.speed.train
        slow, fast = self.speed.tokens_per_second
        shares = ", ".join(
            f"{low:.0%}–{high:.0%} of {what}"
            for what, (low, high) in (("the peak", PRODUCTS), ("the links", LINKS), ("the bandwidth", BANDWIDTH))
        )
        return (
            f"a step of {self.work.sequences} sequences: rollout {fast_r:.0f}–{slow_r:.0f} s, training "
            f"{fast_t:.1f}–{slow_t:.1f} s; {slow:,.0f}–{fast:,.0f} tokens/s, at {shares}"
        )
