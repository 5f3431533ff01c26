"""Peak host memory of import, of loading into the model, and of both ways of export, as the kernel counts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cord.convert import export_tensors, read_into
from megatron_cord.convert.hf.reader import stored_tensors
from megatron_cord.convert.hf.writer import HFDirectoryWriter, plan_shards
from megatron_cord.convert.inventory import fake_model, inventory
from megatron_cord.convert.loading import find_sources
from megatron_cord.convert.megatron.reader import SavedWeights
from megatron_cord.convert.megatron.writer import save_weights
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from tests.tiny_run import ROOT, write_checkpoint

SIZES = {"hidden_size": 256, "ffn_size": 1024, "layers": 24}
SLACK = 24e6  #: bytes of the interpreter's and the allocator's own that come with any work


def peaks_of(directory: str) -> dict[str, float]:
    """Return peaks in bytes above what the process had before: of import, of export, and of a loaded model's export.

    Beside them the model's own bytes, and those of the checkpoint's largest tensor.
    """
    layout = initialize(ParallelConfig(), seed=0)
    root = Path(directory)
    arch, stored = load_architecture(root / "source"), stored_tensors(root / "source")
    paper = fake_model(arch, layout, torch.float32)
    shards = plan_shards({entry.name: entry.shape for entry in inventory(paper)}, torch.float32, 2_000_000)

    def save(target: str) -> None:
        save_weights(root / target, paper, find_sources(paper, stored), lambda partial: None, lambda portion: None)

    save("warm")  # the modules that saving imports, and Megatron's plans, are not counted
    before = _reset()
    save("checkpoint")
    imported = _status("VmHWM") - before

    def write(target: str, source: str) -> None:
        writer = HFDirectoryWriter(root / target, shards, torch.float32)
        writer.begin()
        writer.write_files(SavedWeights(root / source, paper).blocks, shards, lambda portion: None)
        writer.publish({})

    write("warm-out", "warm")
    before = _reset()
    write("out", "checkpoint")
    exported = _status("VmHWM") - before
    before = _reset()
    model = LALM(arch, layout, torch.float32)
    read_into(model, root / "source")
    writer = HFDirectoryWriter(root / "of-model", shards, torch.float32)
    writer.begin()
    writer.write(export_tensors(model))
    gathered = _status("VmHWM") - before
    shard, largest = sum(parameter.nbytes for parameter in model.parameters()), max(tensor.nbytes for tensor in stored)
    finalize()
    return {
        "imported": imported,
        "exported": exported,
        "gathered": gathered,
        "shard": shard,
        "largest": largest,
        "files": len(shards),
    }


def _reset() -> float:
    """Bytes that are held now; the peak starts again from there."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024.0 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not let a process reset its peak"
)
def test_import_and_export_take_two_tensors_and_a_loaded_model_its_shard_besides(tmp_path: Path) -> None:
    """Catches files that are mapped or read whole, a stream that is collected, a tensor that is copied too often."""
    write_checkpoint(tmp_path / "source", **SIZES)
    command = (
        "import json, sys; from tests.convert.test_memory import peaks_of; print(json.dumps(peaks_of(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["files"] > 20
    assert measured["shard"] > 80e6  # twice that would be noticed
    bound = 1.3 * 2 * measured["largest"] + SLACK
    assert measured["imported"] < bound and measured["exported"] < bound, measured
    assert measured["gathered"] < measured["shard"] + bound, measured
