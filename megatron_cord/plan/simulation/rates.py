"""The rates that turn counts into seconds, each with where it is from.

Published ones are a vendor's data sheet; assumed ones are ranges, from a slow to a fast end, and no more than that.
This project has measured none of them on a GPU; `measured` is for the first that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

from megatron_cord.plan.devices import NODE, Gpu
from megatron_cord.plan.speed import BANDWIDTH, EAGER_STEP, LINKS, PRODUCTS

#: the end of a range
End = Literal["slow", "fast"]


@dataclass(frozen=True)
class Rate:
    """One rate.

    Attributes:
        name: what it is of.
        slow: the slow end.
        fast: the fast end; equal to the slow one if it is published or measured.
        unit: of both.
        kind: where it is from.
        source: the same in words.
    """

    name: str
    slow: float
    fast: float
    unit: str
    kind: Literal["measured", "published", "assumed"]
    source: str

    def at(self, end: End) -> float:
        """Return one end."""
        return self.slow if end == "slow" else self.fast


@dataclass(frozen=True)
class Rates:
    """All of them."""

    peak: Rate
    products: Rate
    memory: Rate
    memory_share: Rate
    link: Rate
    network: Rate
    transport: Rate
    latency: Rate
    host: Rate
    storage: Rate
    eager: Rate
    spread: Rate

    @classmethod
    def of(cls, gpu: Gpu) -> Rates:
        """Return those of a kind of GPU in machines of eight."""
        sheet = f"data sheet, {gpu.name}"

        def published(name: str, value: float, unit: str, source: str = sheet) -> Rate:
            return Rate(name, value, value, unit, "published", source)

        def assumed(name: str, slow: float, fast: float, unit: str, source: str) -> Rate:
            return Rate(name, slow, fast, unit, "assumed", source)

        machine = f"data sheet, DGX with {gpu.name}"
        return cls(
            peak=published("dense bf16", gpu.peak, "operations/s"),
            products=assumed(
                "share of the peak in a layer",
                *PRODUCTS,
                "",
                "large products alone come near 0.8; norms, activations and launches, which the trace does not time, "
                "take the rest",
            ),
            memory=published("memory", gpu.bandwidth, "bytes/s"),
            memory_share=assumed("share of it", *BANDWIDTH, "", "as for `cord plan`"),
            link=published("NVLink", gpu.link, "bytes/s each way"),
            network=published("network of a GPU", gpu.network, "bytes/s each way", machine),
            transport=assumed("share of link and network", *LINKS, "", "what rings of large messages leave"),
            latency=assumed("of a collective", 40e-6, 15e-6, "s", "half as much again for each doubling of machines"),
            host=published("PCIe", gpu.host, "bytes/s each way", machine),
            storage=assumed("shared file system, for each machine", 1e9, 5e9, "bytes/s", "a parallel file system"),
            eager=assumed("a token of the local engine", *EAGER_STEP, "s", "as for `cord plan`"),
            spread=assumed(
                "of the GPUs' speeds", 0.04, 0.01, "standard deviation", "clocks, heat and neighbours on the network"
            ),
        )

    def all(self) -> list[Rate]:
        """Return all rates."""
        return list(vars(self).values())

    def wire(self, gpus: int, end: End) -> float:
        """Return bytes a second that a GPU sends within a ring over so many neighbouring GPUs."""
        return (self.link if gpus <= NODE else self.network).at(end) * self.transport.at(end)

    def wait(self, gpus: int, end: End) -> float:
        """Return the seconds that a collective over so many neighbouring GPUs takes without any bytes."""
        return self.latency.at(end) * (1 + 0.5 * log2(max(1, ceil(gpus / NODE))))
