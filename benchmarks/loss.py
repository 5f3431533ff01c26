"""``python -m benchmarks.loss``: time and peak memory of the divergence, ours and the baselines', forward and backward.

Parts: ``loss`` (logits given), ``layer`` (output layer included), ``loss-kept`` and ``layer-kept`` (the same on a CPU
in a process that keeps freed memory for the next pass, as torch does on CUDA: without the page faults that new memory
costs every pass), ``ranks`` (vocabulary over two ranks), ``memory`` (in a process of its own), ``sweep`` (against V
and N, for the plot). Within a part the candidates take turns, so that a change of the machine's speed meets all of
them; the median of the turns counts, and the spread is the distance between the quartiles. Results go to
benchmarks/results/, as JSON with machine and versions; ``plot`` draws docs/images/loss.svg from them. With CUDA the
same script takes the sizes of a real model; ``--model smollm2`` takes those of a step of 16 answers of 12 tokens with
SmolLM2-135M, for all parts but the sweep, and writes a file of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import loss_baselines as baselines
from benchmarks.figures import processor
from benchmarks.loss_baselines import Candidate, Inputs, make_inputs
from megatron_cord.losses.kernels.matmul import multiplies_bfloat16

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
RESULTS = ROOT / "benchmarks" / "results" / f"loss-{DEVICE.type}.json"
#: N, V, H
SIZES = {"loss": (512, 32768, 256), "layer": (512, 32768, 256), "ranks": (256, 32768, 256), "memory": (512, 65536, 256)}
SIZES |= {"loss-kept": SIZES["loss"], "layer-kept": SIZES["layer"]}
if CUDA:
    SIZES = dict.fromkeys(SIZES, (8192, 151936, 3584))
MODELS = {"smollm2": (192, 49152, 576)}
SETTABLE = ("loss", "layer", "memory")
PARTS = ("loss", "layer", "loss-kept", "layer-kept", "memory", "ranks", "sweep")
SWEEP_V = [(256, v, 256) for v in (4096, 8192, 16384, 32768, 65536)]
SWEEP_N = [(n, 16384, 256) for n in (64, 128, 256, 512, 1024)]
KERNELS = "triton" if CUDA else "compile"
REFERENCE = "ours, cached_grad"


def from_hidden() -> dict[str, Candidate]:
    """Return the candidates that can run here, by name."""
    compiled = baselines.plain(torch.compile(baselines.plain_loss_from_hidden, dynamic=True))
    exact = baselines.plain(torch.compile(baselines.exact_loss_from_hidden, dynamic=True))
    candidates = {f"ours, {name}": baselines.ours(name, KERNELS) for name in ("cached_grad", "fused", "recompute")}
    candidates |= {
        "torch": baselines.plain(baselines.plain_loss_from_hidden),
        "torch, compiled": compiled,
        "torch, compiled, fp32 logits": exact,
    }
    others = {
        "Liger chunked JSD, compiled": baselines.liger_chunked(),
        "Liger chunked JSD, compiled, fp32 logits": baselines.liger_chunked(exact=True),
        "Liger fused_linear_jsd": baselines.liger_fused(),
    }
    return candidates | {name: candidate for name, candidate in others.items() if candidate is not None}


def from_logits() -> dict[str, Candidate]:
    """Return the same for the loss alone."""
    compiled = baselines.plain_from_logits(torch.compile(baselines.plain_loss, dynamic=True))
    ours = {"ours": baselines.ours_from_logits(KERNELS), "ours, eager": baselines.ours_from_logits("eager")}
    return ours | {"torch": baselines.plain_from_logits(baselines.plain_loss), "torch, compiled": compiled}


def take_turns(candidates: dict[str, Candidate], inputs: Inputs, turns: int) -> dict[str, dict[str, float]]:
    """Return median and spread of each candidate's seconds after a run that compiles, and the ratio to ours."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(turns + 1):
        for name, candidate in candidates.items():
            inputs.clear()
            gc.collect()
            taken = timed(candidate, inputs)
            if turn > 0:
                seconds[name].append(taken)
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in seconds.items()}
    return with_ratios(
        {name: {"seconds": q[1], "spread": q[2] - q[0], "turns": turns} for name, q in quartiles.items()}, "seconds"
    )


def with_kept_memory(part: str, turns: int, options: list[str]) -> dict[str, dict[str, float]]:
    """``take_turns`` in a process of its own whose freed memory stays with it."""
    environment = {**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    command = [sys.executable, "-m", "benchmarks.loss", "turns", part, "--turns", str(turns), *options]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def take_turns_at(part: str, turns: int) -> dict[str, dict[str, float]]:
    """``take_turns`` of the part's candidates and sizes."""
    alone = part.startswith("loss")
    return take_turns(
        from_logits() if alone else from_hidden(), make_inputs(*SIZES[part], DEVICE, with_logits=alone), turns
    )


def with_ratios(entries: dict[str, dict[str, float]], key: str) -> dict[str, dict[str, float]]:
    """Return the entries, each with how many times more it takes than ours."""
    reference = entries[REFERENCE if REFERENCE in entries else "ours"][key]
    return {name: {**entry, "ratio": entry[key] / reference} for name, entry in entries.items()}


def timed(candidate: Candidate, inputs: Inputs) -> float:
    """Return the seconds of one forward and backward pass.

    One thread's time on the processor is what a pass takes on a machine that is not shared; where ranks or a GPU are
    waited for, the clock's.
    """
    clock = time.perf_counter if CUDA or dist.is_initialized() else time.process_time
    if CUDA:
        torch.cuda.synchronize()
    started = clock()
    candidate(inputs)
    if CUDA:
        torch.cuda.synchronize()
    return clock() - started


def peak_of(candidate: Candidate, inputs: Inputs) -> int:
    """Return a pass's peak of bytes above its inputs, gradients included, after a run that compiles."""
    inputs.clear()
    candidate(inputs)
    inputs.clear()
    gc.collect()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate(inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident memory starts anew
    before = _status("VmRSS")
    candidate(inputs)
    return max(_status("VmHWM") - before, mmap.PAGESIZE)  # a tiny pass fits into what the process has


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peaks_in_own_process(sizes: list[tuple[int, int, int]], names: list[str]) -> list[dict[str, int]]:
    """Return ``peak_of`` by size and candidate, in a process whose freed memory goes back to the system at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.loss", "peak", json.dumps(sizes), json.dumps(names)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return result


def on_ranks(turns: int) -> dict[str, dict[str, float]] | None:
    """Two gloo ranks, or as many as torchrun started; None on ranks that do not report."""
    group = dist.group.WORLD
    assert group is not None
    candidates = {f"ours, {name}": baselines.ours(name, KERNELS, group) for name in ("cached_grad", "recompute")}
    candidates |= {"gathered logits": baselines.gathered(group), "all-reduced sums": baselines.all_reduced(group)}
    inputs = make_inputs(*SIZES["ranks"], DEVICE, with_logits=False, ranks=dist.get_world_size(), rank=dist.get_rank())
    result = take_turns(candidates, inputs, turns)
    return result if dist.get_rank() == 0 else None


def ranks_in_own_processes(turns: int, options: list[str]) -> dict[str, dict[str, float]]:
    """``on_ranks`` under torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "benchmarks.loss",
    ]
    done = subprocess.run(
        [*command, "rank", "--turns", str(turns), *options], cwd=ROOT, check=True, capture_output=True, text=True
    )
    result: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def sweep(turns: int) -> list[dict[str, Any]]:
    """Seconds and peak bytes of the main candidates against V and against N."""
    chosen = (
        "ours, cached_grad",
        "ours, recompute",
        "torch",
        "torch, compiled, fp32 logits",
        "Liger chunked JSD, compiled",
    )
    points = []
    axes = [("V", size) for size in SWEEP_V] + [("N", size) for size in SWEEP_N]
    peaks = peaks_in_own_process([size for _, size in axes], list(chosen))
    candidates = {name: candidate for name, candidate in from_hidden().items() if name in chosen}
    for (axis, sizes), peak in zip(axes, peaks, strict=True):
        times = take_turns(candidates, make_inputs(*sizes, DEVICE, with_logits=False), turns)
        points += [
            {"axis": axis, "sizes": sizes, "name": name, "peak_bytes": peak[name], **numbers}
            for name, numbers in times.items()
        ]
    return points


def machine() -> dict[str, str]:
    """Return the machine and the versions that the numbers belong to."""
    found = {
        "device": torch.cuda.get_device_name() if CUDA else processor(),
        "threads": str(torch.get_num_threads()),
        "multiplies bfloat16": "yes" if CUDA or multiplies_bfloat16() else "no",
        "python": platform.python_version(),
    }
    for package in ("torch", "triton", "liger_kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def print_table(part: str, entries: dict[str, dict[str, float]], key: str) -> None:
    """One line a candidate, and how many times more it takes than ours."""
    reference = REFERENCE if REFERENCE in entries else "ours"
    print(f"\n{part}: N, V, H = {SIZES[part]}")
    for name, entry in entries.items():
        value = (
            f"{entry['seconds'] * 1e3:8.1f} ms ± {entry['spread'] * 1e3:5.1f}"
            if key == "seconds"
            else f"{entry[key] / 2**20:8.1f} MiB"
        )
        print(f"  {name:40s} {value}   {entry['ratio']:6.2f} × {reference}", flush=True)


def main() -> None:
    """Run the parts that the command line names and write their results beside those of the others."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["all", *PARTS, "plot", "peak", "rank", "turns"])
    parser.add_argument("rest", nargs="*", help="of peak: sizes and candidates, as JSON; of turns: the part")
    parser.add_argument("--turns", type=int, default=7, help="of each candidate; half as many in the sweep")
    parser.add_argument("--sizes", type=int, nargs=3, metavar=("N", "V", "H"), help="of loss, layer and memory")
    parser.add_argument("--model", choices=MODELS, help="whose sizes the parts have")
    parser.add_argument(
        "--results", type=Path, help="the JSON file that gets the figures (default: by device and model)"
    )
    arguments = parser.parse_args()
    if arguments.model is not None:
        if arguments.part in ("sweep", "plot"):
            parser.error(f"--model is not for {arguments.part}, which has sizes of its own")
        SIZES.update(dict.fromkeys(SIZES, MODELS[arguments.model]))
    options = [] if arguments.model is None else ["--model", arguments.model]
    named = RESULTS if arguments.model is None else RESULTS.with_stem(f"{RESULTS.stem}-{arguments.model}")
    file = arguments.results or named
    if arguments.sizes is not None:
        if arguments.part not in SETTABLE:
            parser.error(f"--sizes is for {', '.join(SETTABLE)}, not for {arguments.part}")
        SIZES[arguments.part] = tuple(arguments.sizes)
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    if arguments.part == "peak":
        every_size, names = map(json.loads, arguments.rest)
        candidates = {name: candidate for name, candidate in from_hidden().items() if name in names}
        every_inputs = (make_inputs(n, v, h, DEVICE, with_logits=False) for n, v, h in every_size)
        print(
            json.dumps(
                [
                    {name: peak_of(candidate, inputs) for name, candidate in candidates.items()}
                    for inputs in every_inputs
                ]
            )
        )
        return
    if arguments.part == "turns":
        print(json.dumps(take_turns_at(arguments.rest[0], arguments.turns)))
        return
    if arguments.part == "rank":
        dist.init_process_group("nccl" if CUDA else "gloo")
        if (result := on_ranks(arguments.turns)) is not None:
            print(json.dumps(result))
        dist.destroy_process_group()
        return
    if arguments.part != "plot":
        whole = arguments.part == "all"
        kept = {} if whole or not file.exists() else json.loads(file.read_text())
        parts = [part for part in PARTS if not (CUDA and part.endswith("-kept"))] if whole else [arguments.part]
        if arguments.model is not None:
            parts = [part for part in parts if part != "sweep"]
        run_parts(parts, arguments.turns, kept, file, options)
    if arguments.part in ("all", "sweep", "plot") and arguments.model is None:
        from benchmarks.loss_plot import plot

        plot(json.loads(file.read_text())["sweep"], ROOT / "docs" / "images" / "loss.svg")


def run_parts(parts: list[str], turns: int, results: dict[str, Any], file: Path, options: list[str]) -> None:
    """Measure, print, and write each part beside ``results`` when it is done; processes of its own get the options."""
    results["machine"] = machine()
    for part in parts:
        key = "peak_bytes" if part == "memory" else "seconds"
        if part == "sweep":
            results[part] = sweep(turns // 2)
        else:
            entries: dict[str, Any]
            if part == "memory":
                (peaks,) = peaks_in_own_process([SIZES[part]], list(from_hidden()))
                entries = with_ratios({name: {key: peak} for name, peak in peaks.items()}, key)
            elif part == "ranks":
                entries = ranks_in_own_processes(turns, options)
            else:
                entries = (
                    with_kept_memory(part, turns, options) if part.endswith("-kept") else take_turns_at(part, turns)
                )
            print_table(part, entries, key)
            results[part] = {"sizes": SIZES[part], "candidates": entries}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
