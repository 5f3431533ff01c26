"""A real SLURM of two virtual nodes on this machine, as root: controller, node daemons and munge, in one directory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")

_CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
SlurmUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17101-17102] CPUs=2 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return what keeps a cluster from running here and what to do about it; None if nothing does.

    As root, absent packages are installed by apt.
    """
    if os.geteuid() != 0:
        return "a SLURM of virtual nodes needs root; run as root, e.g. in a container"
    if not all(shutil.which(command) for command in COMMANDS) and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=False, capture_output=True, timeout=300)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        subprocess.run(install, check=False, capture_output=True, env=environment, timeout=600)
    absent = [command for command in COMMANDS if not shutil.which(command)]
    return (
        f"{', '.join(absent)} not found; install SLURM (Debian: apt-get install {' '.join(PACKAGES)})"
        if absent
        else None
    )


class Cluster:
    """Starts on entry and ends on exit; commands go to this cluster alone.

    Args:
        directory: for state, logs and the configuration; absolute.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment["SLURM_CONF"] = str(directory / "slurm.conf")
        self._munged = False

    def __enter__(self) -> Self:
        for name in ("state", "spool", "log"):
            (self.directory / name).mkdir(parents=True)
        configuration = self.directory / "slurm.conf"
        configuration.write_text(_CONFIGURATION.format(host=socket.gethostname(), directory=self.directory))
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode != 0:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True, timeout=60)
            self._munged = True
        self.call("slurmctld", "-f", str(configuration))
        for node in ("n1", "n2"):
            self.call("slurmd", "-f", str(configuration), "-N", node)
        self.wait(
            lambda: self.call("sinfo", "--noheader", "--format=%T").split() == ["idle"], 60, "the nodes to be idle"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.call("scancel", "--user=root", "--full", "--signal=KILL")
        self.wait(
            lambda: not self.call("squeue", "--noheader"), 60, "the jobs to be gone"
        )  # else the nodes' daemons stay
        self.call("scontrol", "shutdown")
        if self._munged:
            subprocess.run(["runuser", "-u", "munge", "--", "munged", "--stop"], check=False, timeout=60)

    def call(self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """Output of a command that must succeed."""
        done = subprocess.run(
            command,
            env=self.environment | (environment or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields that SLURM shows of a job."""
        fields = self.call("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Asks twice a second. Raises AssertionError, with the controller's log, when time is up."""
        deadline = time.monotonic() + seconds
        while not condition():
            log = self.directory / "log" / "slurmctld.log"
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{log.read_text()[-2000:]}"
            time.sleep(0.5)
