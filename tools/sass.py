"""Read machine code of NVIDIA GPUs: what a kernel occupies, and how many instructions its loops issue.

The tools that take a cubin apart, cuobjdump and nvdisasm, come with Triton's wheel; no GPU is needed. The text that
they print is no interface: a form that is not understood is an error here, never a zero.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from megatron_cord.errors import CordError

USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
BRANCH_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
LOAD_BITS = re.compile(r"^LDG\.E(?:\.\w+)*?\.(U?S?8|U?S?16|64|128)(?=\.|$)")


@dataclass(frozen=True)
class Resources:
    """What one thread of a kernel occupies."""

    registers: int
    spilled: int  #: instructions that store to or load from local memory
    stack: int  #: bytes of local memory


@dataclass(frozen=True)
class Loop:
    """One pass through the body of an innermost loop, of one thread."""

    instructions: int
    exponentials: int  #: instructions of the unit for special functions (MUFU)
    loaded: int  #: bytes from global memory


@dataclass(frozen=True)
class MachineCode:
    """A kernel as the GPU runs it."""

    resources: Resources
    instructions: int  #: of the whole kernel, padding left out
    exponentials: int  #: likewise
    loops: tuple[Loop, ...]  #: innermost loops, in the order of their code


def read_cubin(cubin: bytes) -> MachineCode:
    """Return what ptxas made of a kernel.

    Args:
        cubin: the binary of one kernel, `CompiledKernel.asm["cubin"]`.

    Raises:
        CordError: the tools cannot be run, or print what is not understood.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", str(path))
    found = USAGE.findall(usage)
    if len(found) != 1:
        raise CordError(f"cuobjdump -res-usage names {len(found)} kernels where one is expected: {usage.strip()!r}")
    registers, stack, _, local = map(int, found[0])
    return parse_listing(listing, registers=registers, stack=max(stack, local))


def parse_listing(listing: str, *, registers: int, stack: int) -> MachineCode:
    """Return the instructions of nvdisasm's listing of one kernel, with the registers and the stack's bytes given."""
    names: list[str] = []
    operands: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(names)
        if instruction := INSTRUCTION.search(line):
            names.append(instruction[1])
            operands.append(instruction[2])
    if "EXIT" not in names:
        raise CordError("nvdisasm's listing has no EXIT: its form has changed, and tools/sass.py must follow")
    loops = [
        (labels[target[1]], last + 1)
        for last, (name, text) in enumerate(zip(names, operands, strict=True))
        if name.startswith("BRA") and (target := BRANCH_TARGET.search(text)) and labels[target[1]] < last
    ]
    innermost = [
        (first, end)
        for first, end in loops
        if not any(first <= a and b <= end and (a, b) != (first, end) for a, b in loops)
    ]
    counts = Counter(name.partition(".")[0] for name in names)
    return MachineCode(
        resources=Resources(registers=registers, spilled=counts["LDL"] + counts["STL"], stack=stack),
        instructions=len(names) - counts["NOP"],
        exponentials=counts["MUFU"],
        loops=tuple(_loop(names[first:end]) for first, end in sorted(innermost)),
    )


def _loop(names: list[str]) -> Loop:
    return Loop(
        instructions=sum(name != "NOP" for name in names),
        exponentials=sum(name.startswith("MUFU") for name in names),
        loaded=sum(map(_loaded_bytes, names)),
    )


def _loaded_bytes(name: str) -> int:
    """Return the bytes that an instruction loads from global memory: 4 where its name does not say."""
    if not name.startswith("LDG"):
        return 0
    width = LOAD_BITS.match(name)
    return int(width[1].lstrip("US")) // 8 if width else 4


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CordError(f"{Path(command[0]).name}, which Triton's wheel brings, cannot be run: {error}") from None
