"""A throw-away Slurm cluster on this machine: real munged, slurmctld and one slurmd per virtual node.

`python slurm_cluster.py DIRECTORY NODES` is its keeper: it boots the daemons, prints a line, and takes all
of it down when its input closes, which also happens when the test that started it is killed. Job processes
outlive a killed slurmd and have init as parent otherwise, so the keeper adopts orphans and ends them too.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
_PR_SET_CHILD_SUBREAPER = 36

SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
EnforcePartLimits=ALL
ReturnToService=1
SlurmdTimeout=10
KillWait={kill_wait_s}
MinJobAge=3600
CompleteWait=0
NodeName=DEFAULT CPUs=192 RealMemory=2000000 Gres=gpu:8
NodeName=node[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.[11-{last_address}] Port=[{first_port}-{last_port}]
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

KILL_WAIT_S = 20
"""Between SIGTERM and SIGKILL; Slurm's default is 30."""


def missing_daemons() -> list[str]:
    """Programs of Slurm that this machine does not have."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    return [name for name in DAEMONS if shutil.which(name, path=path) is None]


def needs_slurm() -> pytest.MarkDecorator:
    """Skips where Slurm is missing, but not in CI, which says REQUIRE_SLURM=1 after installing it."""
    missing = ", ".join(missing_daemons())
    return pytest.mark.skipif(
        bool(missing) and not os.environ.get("REQUIRE_SLURM"),
        reason=f"no {missing}: apt-get install slurmctld slurmd slurm-client munge",
    )


def clean_environment() -> dict[str, str]:
    """This process's environment without what a surrounding Slurm job would have put there."""
    prefixes = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "DSR_", "COV_CORE", "COVERAGE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}:/usr/sbin"
    return kept


class SlurmCluster:
    """The cluster as its user sees it."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.root = root
        self.nodes = nodes
        self._down: list[str] = []
        self.environment = {**clean_environment(), "SLURM_CONF": str(root / "slurm.conf")}
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, str(root), str(nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._keeper.stdout is not None
        told = self._keeper.stdout.readline()
        if told != "ready\n":
            self.stop()
            logs = "\n".join(p.read_text()[-2000:] for p in sorted((root / "log").glob("*")))
            raise AssertionError(f"no cluster: {told}\n{logs}")

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(timeout=60)

    def run(self, *command: str, check: bool = True) -> str:
        """What a Slurm command printed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, launcher: str, log: Path, *options: str, variables: Mapping[str, str] | None = None
    ) -> str:
        """Submits from the repository's root; the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={log}", *options, launcher],
            env={**self.environment, **(variables or {})},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, of the first component."""
        shown = self.run("scontrol", "show", "job", "-o", job, check=False)
        match = re.search(rf"(?:^| ){name}=(\S*)", shown)
        return match[1] if match else ""

    def nodes_of(self, job: str) -> list[str]:
        """Names of a running job's nodes, of the first component."""
        return self.run("scontrol", "show", "hostnames", self.field(job, "NodeList")).split()

    def unused_nodes(self) -> list[str]:
        """Nodes without a job."""
        return self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()

    def take_down(self, node: str) -> None:
        """The node is lost at once, as far as Slurm is concerned."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        self._down.append(node)

    def bring_back(self) -> None:
        """Nodes that were taken down may be used again."""
        for node in self._down:
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self._down.clear()

    def clear(self) -> None:
        """Ends all jobs and brings nodes that were taken down back."""
        self.run("scancel", f"--user={psutil.Process().username()}")
        until(lambda: not self.run("squeue", "-h").strip(), 60, lambda: self.run("squeue"))
        self.bring_back()

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, FAILED, …"""
        return self.field(job, "JobState")

    def wait_for(self, job: str, *states: str, timeout_s: float, log: Path) -> str:
        """Until the job is in one of `states`."""
        until(lambda: self.state(job) in states, timeout_s, lambda: self.story(job, log))
        return self.state(job)

    def story(self, job: str, log: Path) -> str:
        """What to read when something did not happen."""
        text = log.read_text() if log.exists() else "(no log)"
        return f"job {job} is {self.state(job)} {self.field(job, 'Reason')}; its log:\n{text}"

    def start_now(self, job: str, log: Path, *, restart: int, components: int = 1) -> None:
        """Waits for the job's n-th requeue and spares it the two minutes that Slurm lets it wait."""
        until(
            lambda: self.field(job, "Restarts") == str(restart) and self.state(job) == "PENDING",
            90,
            lambda: self.story(job, log),
        )
        # Slurm numbers credentials by the second; started at once, the old one would be refused.
        time.sleep(2)
        for number in range(components):
            # The first may have started the others with it.
            component = f"JobId={int(job) + number}"
            self.run("scontrol", "update", component, "StartTime=now", check=number == 0)

    def signal_batch(self, job: str, name: str) -> None:
        """What `--signal=B:` sends before the time limit, without waiting for one."""
        self.run("scancel", "--batch", f"--signal={name}", job)

    def kill_slurmd(self, node: str) -> None:
        """The node's daemon dies; Slurm notices after `SlurmdTimeout`."""
        os.kill(int((self.root / "run" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes of this cluster's jobs whose command line holds all `words`."""
        found = []
        for process in psutil.Process(self._keeper.pid).children(recursive=True):
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if all(any(word in part for part in line) for word in words):
                found.append(process)
        return found


def until(condition: Callable[[], bool], timeout_s: float, story: Callable[[], str]) -> None:
    """Waits for `condition`; fails with `story`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s\n{story()}"
        time.sleep(0.1)


# The keeper's side.


def _free_ports(count: int) -> int:
    """First of `count` neighbouring ports that are free, below those of outgoing connections."""
    while True:
        first = random.randint(10_000, 30_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def _write_files(root: Path, nodes: int) -> None:
    for name in ("state", "spool", "log", "run", "gpu"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for node in range(1, nodes + 1):
        (root / "spool" / f"node{node}").mkdir(exist_ok=True)
    for number in range(8):
        (root / "gpu" / f"nvidia{number}").symlink_to("/dev/null")
    port = _free_ports(nodes + 1)
    (root / "slurm.conf").write_text(
        SLURM_CONF.format(
            port=port,
            user=psutil.Process().username(),
            root=root,
            nodes=nodes,
            last_address=10 + nodes,
            first_port=port + 1,
            last_port=port + nodes,
            kill_wait_s=KILL_WAIT_S,
        )
    )
    # Nothing here uses control groups; looking for them fails on many machines.
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (root / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={root}/gpu/nvidia[0-7]\n")
    key = root / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))


def _keep(root: Path, nodes: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _write_files(root, nodes)
    os.environ["SLURM_CONF"] = configuration = str(root / "slurm.conf")

    def start(name: str, *command: str) -> None:
        with (root / "log" / f"{name}.out").open("ab") as output:
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    start(
        "munged",
        "munged",
        "-F",
        "--force",
        f"-S{root}/run/munge.socket",
        f"--key-file={root}/munge.key",
        f"--pid-file={root}/run/munged.pid",
        f"--log-file={root}/log/munged.log",
        f"--seed-file={root}/munge.seed",
        "--origin=127.0.0.1",
    )
    until((root / "run" / "munge.socket").exists, 20, lambda: "munged did not start")
    start("slurmctld", "slurmctld", "-D", "-f", configuration)
    for node in range(1, nodes + 1):
        start(f"slurmd.node{node}", "slurmd", "-D", "-N", f"node{node}", "-f", configuration)

    def idle() -> int:
        shown = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True
        )
        return len(shown.stdout.split())

    until(lambda: idle() == nodes, 60, lambda: f"{idle()} of {nodes} nodes are idle")
    print("ready", flush=True)
    sys.stdin.read()
    _end_all()


def _end_all() -> None:
    """Jobs first, then slurmds while slurmctld still answers them, then what is left."""
    me = psutil.Process()
    subprocess.run(["scancel", "--state=PENDING", f"--user={me.username()}"], check=False)
    daemons = {"slurmd", "slurmctld", "munged"}
    for process in me.children(recursive=True):
        if process.name() not in daemons:
            _send(process, signal.SIGKILL)
    for name in ("slurmd", "slurmctld", "munged"):
        ending = [p for p in me.children() if p.name() == name]
        for process in ending:
            _send(process, signal.SIGTERM)
        psutil.wait_procs(ending, timeout=5)
    for process in me.children(recursive=True):
        _send(process, signal.SIGKILL)


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return


if __name__ == "__main__":
    _keep(Path(sys.argv[1]), int(sys.argv[2]))
