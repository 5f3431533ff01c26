"""Compile the loss's Triton kernels for an H100 or H200 without one: ``python -m tools.aot_kernels``.

The backend is called as in training, on small tensors; Triton's own hook hands out each launch before it is compiled:
what is compiled here is what a GPU would compile, as signature, alignment and options are not repeated. ptxas,
cuobjdump and nvdisasm come with Triton's wheel. The command ends with status 1 if a variant spills registers.

It simplifies: nothing runs. The times are estimates from counted instructions and assumed rates (``CHIPS``): a kernel
takes at least the longest of issuing its instructions, its exponentials and moving its bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from megatron_cord.errors import CordError
from megatron_cord.losses.divergences import KINDS, NO_TEACHER, Divergence, make_divergence
from megatron_cord.losses.kernels import triton_kernels
from megatron_cord.losses.kernels.backend import UpstreamGrads
from megatron_cord.losses.statistics import GlobalStats
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.runtime.files import write_json
from tools.sass import Loop, MachineCode, read_cubin

HOPPER = GPUTarget("cuda", 90, 32)
RESULTS = Path("benchmarks/results/kernels-sm90.json")

#: The block that times are estimated for, as in benchmarks/loss.py.
TOKENS, VOCABULARY = 8192, 151936
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DIVERGENCES: dict[str, Divergence] = {
    "none": NO_TEACHER,
    **{kind: make_divergence(kind, beta=0.3, k=20) for kind in KINDS},
}
TERMS = ("kl", "entropy", "logprob")
SCHEDULERS, WARP, EXPONENTIALS_A_CYCLE = 4, 32, 16  #: of one multiprocessor of Hopper


@dataclass(frozen=True)
class Chip:
    """Assumed rates of a GPU: clock under load, and the share of the memory's bandwidth that plain copies reach."""

    multiprocessors: int
    hertz: float
    bytes_a_second: float


CHIPS = {"H100": Chip(132, 1.755e9, 3.0e12), "H200": Chip(132, 1.83e9, 4.3e12)}


@dataclass(frozen=True)
class Case:
    """A call of the backend: which kernel, on what."""

    divergence: str  #: of ``DIVERGENCES``
    logits: torch.dtype
    out: torch.dtype | None = None  #: the gradient's type; None: statistics
    terms: tuple[str, ...] = ()  #: what the loss uses, of ``TERMS``
    aligned: bool = True  #: whether rows begin at multiples of 16 elements

    def __str__(self) -> str:
        types = TYPES[self.logits] + (f"→{TYPES[self.out]} {'+'.join(self.terms)}" if self.out else "")
        kernel = "gradient" if self.out else "statistics"
        return f"{kernel} {self.divergence} {types}" + ("" if self.aligned else ", unaligned")

    @property
    def bytes_a_pair(self) -> int:
        """Bytes that must move for one column of student and teacher."""
        read = self.logits.itemsize * (2 if self.reads_teacher else 1)
        return read + (self.out.itemsize if self.out else 0)

    @property
    def reads_teacher(self) -> bool:
        """Whether the kernel reads the teacher's logits."""
        return self.divergence != "none" and (self.out is None or "kl" in self.terms)


@dataclass(frozen=True)
class Launch:
    """What Triton would compile for one call."""

    function: Any  #: the JITFunction
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A compiled launch; a pair is one column of student and teacher."""

    case: Case
    code: MachineCode
    shared: int  #: bytes of shared memory a program

    @property
    def instructions_a_pair(self) -> float:
        """Instructions that a thread issues for each pair: of the main loop, or of a kernel without one."""
        return self._work[0] / self._pairs

    @property
    def exponentials_a_pair(self) -> float:
        """Special functions among them."""
        return self._work[1] / self._pairs

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Return the estimated time of each limit for [TOKENS, VOCABULARY]; the kernel takes the longest at least."""
        pairs = TOKENS * VOCABULARY
        cycles = chip.multiprocessors * chip.hertz
        return {
            "issue": pairs * self.instructions_a_pair / (SCHEDULERS * WARP * cycles),
            "exponentials": pairs * self.exponentials_a_pair / (EXPONENTIALS_A_CYCLE * cycles),
            "memory": pairs * self.case.bytes_a_pair / chip.bytes_a_second,
        }

    @property
    def _work(self) -> tuple[int, int]:
        """Instructions and exponentials of what runs once for ``_pairs`` pairs a thread."""
        work = self._loop if self.case.out is None else self.code
        return work.instructions, work.exponentials

    @property
    def _pairs(self) -> float:
        if self.case.out is not None:
            return triton_kernels.TILE_COLUMNS / triton_kernels.LANES
        return self._loop.loaded / self.case.bytes_a_pair

    @property
    def _loop(self) -> Loop:
        """The loop with the fewest instructions a byte: others are for rare values."""
        loops = [loop for loop in self.code.loops if loop.loaded]
        if not loops:
            raise CordError(f"{self.case}: no loop of the kernel loads from memory; tools/sass.py does not read it")
        return min(loops, key=lambda loop: loop.instructions / loop.loaded)


def all_cases() -> list[Case]:
    """Return every kernel that a run may launch, aligned rows first."""
    types = {torch.float32: (torch.bfloat16, torch.float32), **{t: (t,) for t in (torch.bfloat16, torch.float16)}}
    with_teacher = [("kl",), ("kl", "entropy", "logprob"), ("kl", "logprob")]
    without = [("entropy",), ("logprob",), ("entropy", "logprob")]
    cases = [
        Case(divergence, logits, out, terms, aligned)
        for aligned, divergence, logits in itertools.product((True, False), DIVERGENCES, types)
        for out, terms in [
            (None, ()),
            *itertools.product(types[logits], without if divergence == "none" else with_teacher),
        ]
    ]
    return sorted(cases, key=lambda case: (not case.aligned, case.out is not None))


def quick_cases() -> list[Case]:
    """Return the kernels of the default objective, and one for rows that are not aligned."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        Case("reverse_kl", fp32),
        Case("reverse_kl", bf16),
        Case("reverse_kl", bf16, aligned=False),
        Case("reverse_kl", fp32, bf16, ("kl",)),
        Case("reverse_kl", fp32, bf16, TERMS),
    ]


class _AbsentGPU(DriverBase):  # type: ignore[misc]
    """Triton's driver of a GPU that is not there: it says what to compile for, and launches nothing."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        raise NotImplementedError

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return -1  # no device's compiled kernels are mixed with these

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_of(case: Case) -> Launch:
    """Call the backend and return the one launch that it makes; nothing is compiled or run."""
    columns = triton_kernels.TILE_COLUMNS + (0 if case.aligned else 3)
    student, teacher = (torch.zeros(3, columns, dtype=case.logits) for _ in range(2))
    target, divergence = torch.zeros(3, dtype=torch.int64), DIVERGENCES[case.divergence]
    backend = triton_kernels.TritonBackend()
    with _recorded_launches() as launches:
        if case.out is None:
            backend.partial_stats(student, teacher, target, divergence, 1.0, torch.float32)
        else:
            stats = GlobalStats(*torch.zeros(len(GlobalStats._fields), 3).unbind(0))
            upstream: UpstreamGrads = tuple(torch.ones(3) if term in case.terms else None for term in TERMS)  # type: ignore[assignment]
            out = torch.empty(3, columns, dtype=case.out)
            backend.gradient(student, teacher, target, stats, divergence, 1.0, upstream, out)
    if len(launches) != 1:
        raise CordError(f"{case}: {len(launches)} kernels were launched where one is expected")
    return launches[0]


@contextmanager
def _recorded_launches() -> Iterator[list[Launch]]:
    """Collect launches in place of compiling them."""
    launches: list[Launch] = []

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
        launches.append(
            Launch(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0], options)
        )
        return True  # Triton then neither compiles nor launches

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = record
        driver.set_active(_AbsentGPU())
        try:
            yield launches
        finally:
            driver.set_active(None)  # found anew when it is next needed


def compile_launch(launch: Launch, **options: Any) -> Any:
    """Return Triton's CompiledKernel for ``HOPPER``; further options replace those of the launch."""
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=HOPPER, options={**launch.options, **options})


def build(case: Case) -> Variant:
    """Compile one case and read what came out."""
    kernel = compile_launch(launch_of(case))
    return Variant(case, read_cubin(kernel.asm["cubin"]), int(kernel.metadata.shared))


def objection(code: MachineCode) -> str:
    """Return what is wrong with a kernel: registers that spill to memory; "" if nothing is."""
    used = code.resources
    if used.spilled or used.stack:
        return f"{used.spilled} instructions and {used.stack} bytes of local memory: {used.registers} registers spill"
    return ""


def as_line(variant: Variant) -> str:
    """Return what is printed of a variant."""
    times = []
    for name, chip in CHIPS.items():
        limit, seconds = max(variant.seconds(chip).items(), key=lambda item: item[1])
        times.append(f"{name} ≥ {1e3 * seconds:.2f} ms ({limit})")
    used = variant.code.resources
    return (
        f"{variant.case!s:58} {used.registers:3} registers, {variant.shared:5} B shared, "
        f"{variant.instructions_a_pair:5.1f} instructions a pair; {', '.join(times)}"
    )


def as_record(variant: Variant) -> dict[str, Any]:
    """Return what is saved of a variant."""
    return {
        "kernel": str(variant.case),
        **asdict(variant.code.resources),
        "shared_bytes": variant.shared,
        "instructions": variant.code.instructions,
        "instructions_a_pair": round(variant.instructions_a_pair, 2),
        "exponentials_a_pair": round(variant.exponentials_a_pair, 2),
        "estimated_ms": {
            name: {limit: round(1e3 * seconds, 3) for limit, seconds in variant.seconds(chip).items()}
            for name, chip in CHIPS.items()
        },
    }


def main() -> int:
    """Compile, print and save; return 1 if a kernel spills."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the kernels of the default objective alone")
    parser.add_argument("--output", type=Path, help=f"where the figures go, such as {RESULTS}; default: nowhere")
    given = parser.parse_args()
    variants, failed = [], 0
    for case in quick_cases() if given.quick else all_cases():
        variants.append(variant := build(case))
        wrong = objection(variant.code)
        failed += bool(wrong)
        print(f"{case}: error: {wrong}" if wrong else as_line(variant), flush=True)
    print(f"{failed} of {len(variants)} kernels spill" if failed else f"{len(variants)} kernels for sm_90, none spills")
    if given.output:
        write_json(
            given.output,
            {
                "target": "sm_90",
                "triton": triton.__version__,
                "torch": torch.__version__,
                "measured": "registers, spills, shared memory and instructions, by compiling; nothing ran on a GPU",
                "assumed": {name: asdict(chip) for name, chip in CHIPS.items()},
                "shape": {"tokens": TOKENS, "vocabulary": VOCABULARY},
                "variants": [as_record(variant) for variant in variants],
            },
        )
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
