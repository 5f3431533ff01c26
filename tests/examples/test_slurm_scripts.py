"""What the SLURM scripts hand to SLURM and to a node, with programs in SLURM's place that write their arguments down.

tests/integration/slurm runs them on a real one; this is what a virtual cluster cannot have: GPUs, containers, sites.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples.slurm.stage import stage
from megatron_cord.data.shards.manifest import Manifest, ShardEntry
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import file_digest
from tests.tiny_run import ROOT

SCRIPTS = ROOT / "examples" / "slurm"
_RECORDER = f"""#!{sys.executable}
import json, os, sys, time
name = os.path.basename(sys.argv[0])
kept = {{key: value for key, value in os.environ.items() if key.startswith(("CORD_", "SITE", "CUDA_"))}}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([name, sys.argv[1:], kept]) + "\\n")
if name == "scontrol" and "hostnames" in sys.argv:
    print(*sys.argv[-1].split(","), sep="\\n")
if name == "scontrol" and "node" in sys.argv:
    print(f"NodeName={{sys.argv[-1]}} NodeAddr=10.0.0.{{sys.argv[-1][-1]}} Port=1")
if name == "scontrol" and "job" in sys.argv:
    print("JobId=8 JobName=test TresPerNode=gres:gpu:l40s:4 Power=")
if name == "sbatch" and "--parsable" in sys.argv:
    print(100 + sum(1 for _ in open(os.environ["RECORD"])))
if "examples.slurm.setting" in sys.argv:
    print(sys.argv[3])
if os.environ.get("STAYS") in sys.argv:
    time.sleep(60)
# A training ends the servers beside it, so it must not end before they have written themselves down.
while "megatron_cord.launch" in sys.argv and os.environ.get("STAYS", "") not in open(os.environ["RECORD"]).read():
    time.sleep(0.05)
if name == "srun":
    sys.exit(int(os.environ.get("SRUN_STATUS", "0")))
"""


class Site:
    """A directory of programs that take SLURM's place, and what they were called with."""

    def __init__(self, directory: Path) -> None:
        self.programs, self.record = directory / "bin", directory / "record"
        self.programs.mkdir()
        for name in ("srun", "scontrol", "squeue", "sbatch", "scancel", "python"):
            (self.programs / name).write_text(_RECORDER)
            (self.programs / name).chmod(0o755)

    def run(self, script: str, *arguments: str, status: str = "0", **variables: str) -> str:
        """Run a script; return its output and errors."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        environment |= {"PATH": f"{self.programs}:{os.environ['PATH']}", "RECORD": str(self.record), **variables}
        command = ["bash", str(SCRIPTS / script), *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert str(done.returncode) == status, done.stderr
        return done.stdout + done.stderr

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str]]]:
        """Return arguments and environment of the calls of a program."""
        rows: list[Any] = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [(arguments, environment) for program, arguments, environment in rows if program == name]

    def job(self, output: Path, *overrides: str, status: str = "0", **variables: str) -> str:
        """Run the batch script as SLURM would on two nodes of 96 and 64 CPUs."""
        allocation = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "test",
            "SLURM_JOB_NODELIST": "n1,n2",
            "SLURM_JOB_CPUS_PER_NODE": "96,64",
            "SLURM_GPUS_ON_NODE": "4",
            "CORD_OUTPUT": str(output),
        }
        return self.run("train.sbatch", "c.yaml", *overrides, status=status, **(allocation | variables))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Make programs with an empty record."""
    return Site(tmp_path)


def test_every_task_gets_its_node_whole(site: Site, tmp_path: Path) -> None:
    """Catches srun's default of one CPU a task, which binds all ranks of a node to one core."""
    site.job(tmp_path / "run", "train.steps=2")
    ((arguments, _),) = site.calls("srun")
    assert {"--nodes=2", "--ntasks=2", "--nodelist=n1,n2", "--cpus-per-task=64", "--job-name=trainer"} <= {*arguments}
    assert arguments[-3:] == ["trainer", f"output_dir={tmp_path}/run", "train.steps=2"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"CORD_SRUN_ARGS": "--container-image=/images/cord.sqsh --container-mounts=/data:/data --cpu-bind=none"},
            ["--container-image=/images/cord.sqsh", "--container-mounts=/data:/data", "--cpu-bind=none", "bash"],
        ),
        (
            {"CORD_CONTAINER": "apptainer exec --nv --bind /data cord.sif"},
            ["apptainer", "exec", "--nv", "--bind", "/data", "cord.sif", "bash"],
        ),
    ],
)
def test_containers(site: Site, tmp_path: Path, variables: dict[str, str], words: list[str]) -> None:
    """Catches words that get lost or joined on their way to pyxis or apptainer."""
    site.job(tmp_path / "run", **variables)
    ((arguments, _),) = site.calls("srun")
    begin = arguments.index(words[0])
    assert arguments[begin : begin + len(words)] == words


def test_servers_of_a_heterogeneous_job(site: Site, tmp_path: Path) -> None:
    """Catches servers placed among the trainer's nodes, or as many of them as the trainer's nodes have GPUs."""
    variables = {
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_ID_HET_GROUP_0": "7",
        "SLURM_JOB_ID_HET_GROUP_1": "8",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n1,n2",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "s3",
        "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0": "64(x2)",
        "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "16",
        "SLURM_GPUS_PER_NODE_HET_GROUP_1": "l40s:2",
    }
    site.job(tmp_path / "gres", **(variables | {"SLURM_GPUS_PER_NODE_HET_GROUP_1": ""}))
    assert {environment["CORD_SERVERS"] for _, environment in site.calls("srun")} == {"4"}
    site.record.unlink()
    site.job(tmp_path / "run", **variables)
    roles = {arguments[0]: (set(arguments), environment) for arguments, environment in site.calls("srun")}
    servers, environment = roles["--job-name=servers"]
    assert {"--het-group=1", "--nodelist=s3", "--cpus-per-task=16"} <= servers
    assert (environment["CORD_SERVERS"], environment["CORD_SERVER_ADDRESSES"]) == ("2", "s3=10.0.0.3")
    assert all("--jobs=7,8" in arguments for arguments, _ in site.calls("squeue"))
    trainer, _ = roles["--job-name=trainer"]
    assert {"--het-group=0", "--nodelist=n1,n2", "--cpus-per-task=64", "rollout.sglang.min_servers=2"} <= trainer


def test_servers_on_half_of_each_nodes_gpus(site: Site, tmp_path: Path) -> None:
    """Catches ranks and servers on the same GPU, servers that no node starts, and a signal to save that ends them."""
    site.job(tmp_path / "run", CORD_SERVER_GPUS="half")
    ((arguments, environment),) = site.calls("srun")
    assert {"--job-name=trainer", "rollout.engine=sglang", "rollout.sglang.min_servers=4"} <= {*arguments}
    assert environment["CORD_SERVER_ADDRESSES"].split() == ["n1=10.0.0.1", "n2=10.0.0.2"]
    assert "leaves none to train on" in site.job(tmp_path / "none", status="2", CORD_SERVER_GPUS="4")
    site.record.unlink()
    variables = {
        **{name: environment[name] for name in environment if name.startswith("CORD_")},
        "CORD_PYTHON": "python",
        "SLURMD_NODENAME": "n2",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    site.run("node.sh", *arguments[arguments.index("trainer") :], **variables)
    calls = {words[0] if "serve" in words[0] else words[1]: (words, kept) for words, kept in site.calls("python")}
    served, _ = calls["tools/serve_rollout.py"]
    assert {"model.checkpoint", "--gpus", "2,3", "--count", "2", "--host", "10.0.0.2"} <= {*served}
    assert f"{environment['CORD_SERVERS_FILES']}/n2.json" in served
    launched, kept = calls["megatron_cord.launch"]
    assert kept["CUDA_VISIBLE_DEVICES"] == "0,1" and launched[launched.index("--nproc-per-node") + 1] == "2"


def test_training_on_one_machine(site: Site) -> None:
    """Catches servers that outlive the training or share its GPUs, and a training that waits for servers that ended."""
    gpus = {"CORD_PYTHON": "python", "CUDA_VISIBLE_DEVICES": "0,1,4,5"}
    begun = time.monotonic()
    site.run("../train.sh", "qwen2_audio_7b", "train.steps=3", STAYS="tools/serve_rollout.py", **gpus)
    assert time.monotonic() - begun < 30
    *settings, first, second = (words for words, _ in site.calls("python"))
    served, launched = (first, second) if "tools/serve_rollout.py" in first else (second, first)
    assert [words[2] for words in settings] == ["model.checkpoint", "output_dir"]
    assert {"model.checkpoint", "output_dir/servers.json", "--gpus", "4,5", "--count", "2"} <= {*served}
    assert launched[:4] == ["-m", "megatron_cord.launch", "--nproc-per-node", "2"]
    assert launched[-5:] == [
        *("examples/qwen2_audio_7b/config.yaml", "train.steps=3", "rollout.engine=sglang"),
        *("rollout.sglang.servers_file=output_dir/servers.json", "rollout.sglang.min_servers=2"),
    ]
    assert "servers ended" in site.run("../train.sh", "chains", STAYS="megatron_cord.launch", status="143", **gpus)
    site.record.unlink()
    site.run("../train.sh", "chains", CORD_SERVERS="0", **gpus)
    ((launched, kept),) = site.calls("python")
    assert launched[-1] == "rollout.engine=local" and kept["CUDA_VISIBLE_DEVICES"] == "0,1,4,5"
    assert "leaves none" in site.run("../train.sh", "chains", CORD_SERVERS="4", status="2", **gpus)


def test_a_chain_of_jobs_ends_with_the_run(site: Site, tmp_path: Path) -> None:
    """Catches a requeue where users may not, and jobs that go on waiting for a run that is finished or cannot start."""
    output = tmp_path / "run"
    site.job(output, CORD_AGAIN="chain")
    site.job(output, CORD_AGAIN="chain", SRUN_STATUS="2", status="2")
    assert len(site.calls("scancel")) == 2 and all("--name=test" in arguments for arguments, _ in site.calls("scancel"))
    site.record.unlink()
    (site.programs / "srun").write_text(f"#!/bin/bash\nmkdir -p {output}/checkpoints/step_000003\nexit 75\n")
    log = site.job(output, CORD_AGAIN="chain", status="75")
    assert "the next job of this name resumes from" in log
    assert not site.calls("scancel")
    assert not [arguments for arguments, _ in site.calls("scontrol") if "requeue" in arguments]


def test_submitting(site: Site) -> None:
    """Catches GPUs or whole nodes asked for although the user said what a node has, and a chain out of order."""
    site.run("submit.sh", "chains", "2", "--account=me", "train.steps=3")
    many = {"SBATCH_ACCOUNT": "me", "SBATCH_QOS": "high", "SBATCH_PARTITION": "large"}
    site.run("submit.sh", "chains", "2+1", "--gres=gpu:4", "--cpus-per-task=32", "--mem=100G", **many)
    site.run("submit.sh", "chains", "2+1", CORD_SERVER_OPTIONS="--partition=small --gpus-per-node=1")
    site.run("submit.sh", "chains", CORD_JOBS="3", SBATCH_MEM_PER_NODE="100G")
    site.run("submit.sh", "chains", "1", "--mem", "100G", status="2")
    plain, shared, mixed, *chain = [arguments for arguments, _ in site.calls("sbatch")]
    assert {"--nodes=2", "--gpus-per-node=8", "--exclusive", "--mem=0", "--account=me"} <= {*plain}
    assert plain[-2:] == ["examples/chains/config.yaml", "train.steps=3"]
    assert {"--nodes=3", "--gres=gpu:4", "--mem=100G"} <= {*shared}
    assert not {"--gpus-per-node=8", "--exclusive", "--mem=0"} & {*shared}
    colon = mixed.index(":")
    assert "--nodes=2" in mixed[:colon]
    of_servers = {
        "--nodes=1",
        "--partition=small",
        "--gpus-per-node=1",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
    }
    assert of_servers <= {*mixed[colon:]} and "--gpus-per-node=8" not in mixed[colon:]
    assert len(chain) == 3 and "--exclusive" not in chain[0]
    dependencies = [[word for word in arguments if word.startswith("--dependency")] for arguments in chain]
    assert [len(each) for each in dependencies] == [0, 1, 1] and dependencies[1] != dependencies[2]


def test_a_node_reads_its_site_first(site: Site, tmp_path: Path) -> None:
    """Catches a prologue that is read too late for the interpreter, or breaks on a variable that is not set."""
    prologue = tmp_path / "site.sh"
    prologue.write_text('export SITE="$NOT_SET from the prologue"\n')
    variables = {
        "CORD_PROLOGUE": str(prologue),
        "CORD_PYTHON": "python",
        "CORD_CONFIG": "c.yaml",
        "CORD_ADDRESSES": "10.0.0.1",
        "CORD_PORT": "2000",
        "CORD_LAUNCH_ARGS": "--numa-binding=node",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    site.run("node.sh", "trainer", "train.steps=3", **variables)
    ((arguments, environment),) = site.calls("python")
    assert environment["SITE"] == " from the prologue"
    assert arguments == [
        *("-m", "megatron_cord.launch", "--node-rank", "1", "--nnodes", "2", "--nproc-per-node", "4"),
        *("--master-addr", "10.0.0.1", "--master-port", "2000", "--numa-binding=node"),
        *("-m", "megatron_cord.train", "--config", "c.yaml", "train.steps=3"),
    ]
    assert "cannot be read" in site.job(tmp_path / "run", status="2", CORD_PROLOGUE=str(tmp_path / "none.sh"))


def test_staging_is_continued_and_checked(tmp_path: Path) -> None:
    """Catches a copy that is taken for whole, one that is made again, and shards that changed since their manifest."""
    source, local = tmp_path / "spoken", tmp_path / "local"
    source.mkdir()
    for name in ("a.tar", "b.tar"):
        (source / name).write_bytes(name.encode() * 1000)
    entries = [
        ShardEntry(name, 1, (source / name).stat().st_size, file_digest(source / name)) for name in ("a.tar", "b.tar")
    ]
    Manifest(tuple(entries), {}, 1.0, {}).write(source)
    copies = stage(source, local)
    assert {path.name for path in copies.iterdir()} == {"a.tar", "b.tar", "manifest.json"}
    kept = (copies / "b.tar").stat().st_mtime_ns
    (copies / "a.tar").write_bytes(b"cut")
    assert stage(source, local) == copies and (copies / "a.tar").read_bytes() == (source / "a.tar").read_bytes()
    assert (copies / "b.tar").stat().st_mtime_ns == kept
    (copies / "b.tar").unlink()
    (source / "b.tar").write_bytes(b"x" * (source / "b.tar").stat().st_size)
    with pytest.raises(CordError, match=r"b\.tar does not have the checksum"):
        stage(source, local)
    assert not (copies / "b.tar").exists()
