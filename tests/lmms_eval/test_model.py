"""A task of lmms-eval from its own command on a tiny checkpoint; runs where lmms-eval is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.evaluate import evaluate
from megatron_cord.parallel.layout import finalize
from megatron_cord.trainer.config import RunConfig
from tests.tiny_run import ROOT, make_samples, write_checkpoint, write_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None or not entry_points(group="lmms_eval.models"),
        reason="the extra lmms-eval is not installed",
    ),
]

TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.heard
doc_to_text: !function utils.asked
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, do_sample: false, until: ["@"]}
process_results: !function utils.kept
metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
import numpy as np

def heard(doc):
    return [{"array": np.load(doc["audio"]), "sampling_rate": 16000}]

def asked(doc, lmms_eval_specific_kwargs=None):
    return ""

def kept(doc, results):
    return {"length": len(results[0])}
"""


def test_a_task_of_lmms_eval(tmp_path: Path) -> None:
    """Catches a model that lmms-eval does not find, and answers that are not those of `evaluate`."""
    import numpy as np

    samples, tasks = make_samples(5), tmp_path / "tasks"
    tasks.mkdir()
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    write_shards(tmp_path / "shards", samples)
    rows = []
    for sample in samples:
        np.save(tmp_path / f"{sample.id}.npy", sample.waveform)
        rows.append({"id": sample.id, "audio": str(tmp_path / f"{sample.id}.npy"), "answer": sample.answer})
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "tiny_sums.yaml").write_text(TASK.replace("ROWS", str(tasks / "rows.jsonl")))
    (tasks / "utils.py").write_text(UTILS)
    settings = [
        f"output_dir={tmp_path / 'run'}", f"model.checkpoint={checkpoint}", "evaluation.checkpoint=base",
        "evaluation.sets.spoken.format=shards", f"evaluation.sets.spoken.path={tmp_path / 'shards'}",
        "evaluation.max_new_tokens=4",
    ]  # fmt: skip
    try:
        evaluate(load_config(RunConfig, None, settings))
    finally:
        finalize()
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "megatron_cord", "--model_args", f"model.checkpoint={checkpoint}",
        "--tasks", "tiny_sums", "--include_path", str(tasks), "--batch_size", "2", "--log_samples",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
    }  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (path,) = (tmp_path / "out").rglob("*samples_tiny_sums.jsonl")
    logged = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, path.read_text().splitlines())}
    found = json.loads((tmp_path / "run" / "evaluations" / "base" / "spoken.json").read_text())["answers"]
    expected = {row["id"]: row["audio_response"] for row in found}
    said = [logged[i][0] if isinstance(logged[i], list) else logged[i] for i in range(5)]
    assert said == [expected[sample.id] for sample in samples]
