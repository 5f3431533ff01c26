"""The batch script on a real SLURM: submitted over two nodes, cut off by its time limit, queued again and resumed."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_cord.rollout.sglang.server.process import ENVIRONMENT
from tests.integration.slurm.cluster import Cluster, missing
from tests.tiny_run import ROOT, losses, metrics, overrides, write_inputs

pytestmark = pytest.mark.slurm
STEPS = 30
SERVED_STEPS = 20
SCRIPT = str(ROOT / "examples" / "slurm" / "train.sbatch")
SGLANG = ROOT / ENVIRONMENT / "bin" / "python"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes. Never skipped: whoever runs these tests wants them run."""
    reason = missing()
    assert reason is None, reason
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint and shards."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def submit(
    cluster: Cluster, inputs: Path, output: Path, *more: str, nodes: Sequence[str] = ("--nodes=2",), **variables: str
) -> str:
    """Submit a run on two nodes, one rank each unless the script's variables differ; return the job's id."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "empty.yaml").touch()
    environment = {
        "CORD_PYTHON": sys.executable,
        "CORD_OUTPUT": str(output),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    environment |= variables
    options = [
        "--parsable",
        "--time=60",
        "--signal=B:USR1@120",
        f"--job-name={output.name}",
        f"--output={output}/job.log",
    ]
    settings = [s for s in overrides(inputs, output, f"train.steps={STEPS}", *more) if not s.startswith("output_dir=")]
    command = ["sbatch", *options, *nodes, SCRIPT, str(output / "empty.yaml"), *settings]
    return cluster.call(*command, cwd=ROOT, environment=environment).strip()


def steps_done(output: Path) -> int:
    """Count the steps in the metrics so far."""
    return len(metrics(output)) if (output / "metrics.jsonl").is_file() else 0


def has_ended(cluster: Cluster, job: str) -> bool:
    """Whether a job will not run again."""
    return cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@contextmanager
def standing_still(output: Path) -> Iterator[list[psutil.Process]]:
    """Stop the ranks of a run between two instructions; they go on afterwards, with the signals they got meanwhile."""
    ranks = [p for p in psutil.process_iter(["cmdline"]) if is_rank(p.info["cmdline"] or [], output)]
    assert len(ranks) == 2, ranks
    for rank in ranks:
        rank.suspend()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.resume()


def has_signal_pending(process: psutil.Process) -> bool:
    """Tell whether SIGUSR1 waits for a process that is stopped."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s+([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1 for mask in masks)


def is_rank(command: list[str], output: Path) -> bool:
    """Tell a rank of the run from its launchers, by the command line."""
    launches = any("launch" in part or "distributed.run" in part for part in command)
    return f"output_dir={output}" in command and "megatron_cord.train" in command and not launches


def run_whole(cluster: Cluster, inputs: Path, output: Path, *more: str, **variables: str) -> None:
    """Run without an interruption."""
    job = submit(cluster, inputs, output, *more, **variables)
    cluster.wait(lambda: has_ended(cluster, job), 1800, "the uninterrupted run")
    assert cluster.job(job)["JobState"] == "COMPLETED", (output / "job.log").read_text()


def run_cut(
    cluster: Cluster,
    inputs: Path,
    output: Path,
    steps: int,
    times: int,
    /,
    *more: str,
    nodes: Sequence[str] = ("--nodes=2",),
    **variables: str,
) -> str:
    """Run, cut off by the time limit so many times, each time queued again and resumed; return the log."""
    # Without an interval, what is saved before the end is saved for the signal.
    job = submit(cluster, inputs, output, "checkpoint.interval=0", *more, nodes=nodes, **variables)
    for restarts in range(times):
        cut_off(cluster, output, job, restarts)
        assert 3 <= steps_done(output) < steps
    cluster.wait(lambda: has_ended(cluster, job), 1800, "the resumed run")
    log = (output / "job.log").read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED" and log.count("resuming after step") >= times, log
    return log


def cut_off(cluster: Cluster, output: Path, job: str, restarts: int) -> None:
    """Let the time limit end a job that was queued again so many times before, and start it once more."""
    before = steps_done(output)
    cluster.wait(lambda: steps_done(output) >= before + 3, 900, "the first steps")
    # SLURM looks at time limits twice a minute: the ranks stand still until it has, however fast they are.
    with standing_still(output) as ranks:
        # As if submitted with a limit that ends in one to two minutes, and a signal two minutes before it.
        hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
        cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
        cluster.wait(lambda: any(map(has_signal_pending, ranks)), 200, "the signal")
    again = str(restarts + 1)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == again, 200, "the job to be queued again")
    log = (output / "job.log").read_text()
    assert (
        "the time limit is near" in log and "ended with status 75" in log and "queueing again, to resume from" in log
    ), log
    # SLURM lets a job wait two minutes before it starts again; this one a moment, as its credential is revoked in the
    # second in which it is queued.
    cluster.wait(lambda: cluster.job(job)["JobState"] == "PENDING", 60, "the nodes to be clean")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=01:00:00", "StartTime=now+5")


def test_a_job_cut_off_by_its_time_limit_ends_like_one_that_was_not(
    cluster: Cluster, inputs: Path, tmp_path: Path
) -> None:
    """Catches a job that does not go on after its time limit as if there had been none.

    That is: nodes that take each other's rank, a signal that kills before the ranks have saved or never reaches them,
    a job that is not queued again, one that begins anew, and a loss curve with a seam.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_whole(cluster, inputs, whole, "parallel.tp=2")
    run_cut(cluster, inputs, cut, STEPS, 1, "parallel.tp=2")
    assert losses(cut) == losses(whole) and len(losses(cut)) == STEPS


@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_a_fork_cut_off_twice_ends_like_one_that_was_not(
    cluster: Cluster, inputs: Path, tmp_path: Path, key: str
) -> None:
    """Catches a fork that begins at the other run's checkpoint after each time limit, and so never ends."""
    parent = tmp_path / "parent"
    run_whole(cluster, inputs, parent, "parallel.tp=2", "train.steps=2")
    steps = 2 * STEPS
    fork = ("parallel.tp=2", f"{key}={parent}", f"train.steps={steps}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_whole(cluster, inputs, whole, *fork)
    run_cut(cluster, inputs, cut, steps, 2, *fork)
    assert losses(cut) == losses(whole) and len(losses(cut)) == steps - (2 if key == "resume" else 0)
    assert (cut / "summary.json").is_file() and not list((parent / "checkpoints").glob("damaged*"))
    assert [path.name for path in (parent / "checkpoints").iterdir()] == ["step_000002"]


def test_one_node_trains_and_one_serves(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    """Catches servers that are not started, not found, left behind or of other weights, and a loss curve with a seam.

    The run that is cut off is a heterogeneous job, whose second component serves; the other one is a job of two nodes.
    Greedy responses and L_tok alone: on a CPU SGLang does not follow seeds, and two runs that sample would see other
    responses.
    """
    assert SGLANG.is_file(), f"{SGLANG} is missing; install the real server: make sglang-env"
    greedy = [
        "rollout.temperature=1e-7",
        "objective.policy_gradient.enabled=false",
        "rollout.policy_prompts_per_step=0",
        "parallel.tp=2",
        f"train.steps={SERVED_STEPS}",
    ]
    serving = {
        "CORD_RANKS": "2",
        "CORD_SERVER_ARGS": f"--device cpu --dtype float32 --python {SGLANG}",
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_whole(cluster, inputs, whole, *greedy, CORD_SERVER_NODES="1", **serving)
    components = ("--nodes=1", ":", "--nodes=1", "--ntasks-per-node=1")
    log = run_cut(cluster, inputs, cut, SERVED_STEPS, 1, *greedy, nodes=components, **serving)
    assert log.count("servers on") == 2 and log.count("training on n1, in") == 2
    assert losses(cut) == losses(whole) and len(losses(cut)) == SERVED_STEPS
    key = re.compile(r"MEGATRON_CORD_SERVER_KEY|Bearer")
    for output in (whole, cut):
        assert not list(output.glob("servers-*")) and (output / "server-logs" / "n2").is_dir()
        assert not any(key.search(path.read_text(errors="replace")) for path in output.rglob("*.log"))
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(inputs) in " ".join(p.info["cmdline"] or []) or "sglang" in (p.info["cmdline"] or [""])[0]
    ]
    assert not [p for p in left if any(parent.name() == "slurmstepd" for parent in p.parents())]


def test_a_chain_of_jobs_continues_a_run_and_ends_with_it(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    """Catches a job that requeues itself although it may not, one that begins anew, and jobs that wait for nothing.

    Data and checkpoint come from copies on the node's disk.
    """
    output, stage = tmp_path / "chain", tmp_path / "disk"
    more = ("parallel.tp=2", "checkpoint.interval=0")
    variables = {"CORD_AGAIN": "chain", "CORD_STAGE": str(stage)}
    jobs: list[str] = []
    for _ in range(3):
        nodes = ("--nodes=2", *([f"--dependency=afterany:{jobs[-1]}"] if jobs else []))
        jobs.append(submit(cluster, inputs, output, *more, nodes=nodes, **variables))
    cluster.wait(lambda: steps_done(output) >= 3, 900, "the first steps")
    with standing_still(output) as ranks:
        cluster.call("scancel", "--batch", "--signal=USR1", jobs[0])
        cluster.wait(lambda: any(map(has_signal_pending, ranks)), 60, "the signal")
    cluster.wait(lambda: has_ended(cluster, jobs[2]), 1800, "the chain")
    log = (output / "job.log").read_text()
    assert [cluster.job(job)["JobState"] for job in jobs] == ["FAILED", "COMPLETED", "CANCELLED"], log
    assert log.count("resuming after step") >= 1 and len(losses(output)) == STEPS, log
    assert {path.name.rpartition("-")[0] for path in stage.iterdir()} >= {"checkpoint", "train"}


def test_a_job_that_cannot_start_is_not_tried_again(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    """Catches a configuration error that a job repeats for ever, or that ends as a success."""
    output = tmp_path / "wrong"
    job = submit(cluster, inputs, output, "optimizer.learning_rat=1")
    cluster.wait(lambda: has_ended(cluster, job), 100, "the job to end")
    state = cluster.job(job)
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "unknown key 'optimizer.learning_rat'" in (output / "job.log").read_text()
