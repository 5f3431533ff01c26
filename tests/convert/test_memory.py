"""Peak host memory of import and export, as the kernel counts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cord.convert import export_tensors, import_tensors
from megatron_cord.convert.checkpoint_files import stored_tensors
from megatron_cord.convert.hf_directory import HFDirectoryWriter, plan_shards
from megatron_cord.convert.inventory import inventory, tensors_for
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from tests.tiny_run import ROOT, write_checkpoint

SIZES = {"hidden_size": 256, "ffn_size": 1024, "layers": 24}
SLACK = 24e6  #: bytes of the interpreter's and the allocator's own that come with any work


def peak_of(directory: str) -> dict[str, float]:
    """Bytes above what the process had before: the peak of import and export, the model's own, and its largest tensor."""
    layout = initialize(ParallelConfig(), seed=0)
    root = Path(directory)
    arch, stored = load_architecture(root / "source"), stored_tensors(root / "source")
    shapes = {entry.name: entry.shape for entry in inventory(arch, layout)}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = _status("VmRSS")
    model = LALM(arch, layout, torch.float32)
    import_tensors(model, tensors_for(model, stored))
    writer = HFDirectoryWriter(root / "out", plan_shards(shapes, torch.float32, 2_000_000), torch.float32, None)
    writer.write(export_tensors(model))
    writer.publish({})
    peak = _status("VmHWM") - before
    sizes = [parameter.nbytes for parameter in model.parameters()]
    finalize()
    return {"peak": peak, "shard": sum(sizes), "largest": max(sizes), "files": len(writer.shards)}


def _status(key: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024.0 * int(line.split()[1])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not let a process reset its peak")
def test_memory_is_the_shard_and_two_tensors(tmp_path: Path) -> None:
    """Catches files that are mapped or read whole, a stream that is collected, and a tensor that is copied once too often."""
    write_checkpoint(tmp_path / "source", **SIZES)
    command = "import json, sys; from tests.convert.test_memory import peak_of; print(json.dumps(peak_of(sys.argv[1])))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["files"] > 20
    assert measured["shard"] > 80e6  # twice that would be noticed
    assert measured["peak"] < measured["shard"] + 1.3 * 2 * measured["largest"] + SLACK, measured
