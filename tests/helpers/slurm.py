"""A Slurm of one node on this machine, for the tests: munged, slurmctld and slurmd in a folder."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
WANTED = "RESFUSE_TEST_SLURM"  # =1 installs Debian's packages where they are missing
PACKAGES = ("slurm-wlm", "munge")
PATIENCE_S = 120

# No accounting: the smallest cluster there is. A requeued job may start after cred_expire seconds,
# by default two minutes.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
NodeName={host} CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there can be no Slurm here; nothing where there can. May install it, if told to."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "Slurm's daemons are started by root, on Linux"
    os.environ["PATH"] += ":/usr/sbin"
    if os.environ.get(WANTED) == "1" and _missing():
        subprocess.run(["apt-get", "install", "-y", "-q", *PACKAGES], check=True)
    missing = _missing()
    return f"no {', '.join(missing)} here; {WANTED}=1 installs them" if missing else ""


def _missing() -> list[str]:
    return [name for name in DAEMONS if shutil.which(name) is None]


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Slurm's commands talk to this cluster, until it is shut down."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    controller, node = _free_ports()
    cores = len(os.sched_getaffinity(0))
    text = CONFIGURATION.format(
        folder=folder, host=host, controller=controller, node=node, cores=cores
    )
    (folder / "slurm.conf").write_text(text)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munged = [
        "munged", "--foreground", "--force", f"--key-file={key}",
        f"--socket={folder / 'munge.socket'}", f"--pid-file={folder / 'munged.pid'}",
        f"--log-file={folder / 'munged.log'}", f"--seed-file={folder / 'munge.seed'}",
    ]  # fmt: skip
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons = []
    try:
        daemons.append(_start(munged, folder))
        _wait_until(lambda: (folder / "munge.socket").exists(), folder)
        daemons.append(_start(["slurmctld", "-D", "-c"], folder))
        daemons.append(_start(["slurmd", "-D", "-c"], folder))
        _wait_until(lambda: "idle" in said("sinfo", "--noheader", "--format=%t"), folder)
        yield
        said("scancel", "--user=root")  # what a test that failed has left
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(PATIENCE_S)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.stdout + done.stderr


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / f"{command[0]}.out").open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


def _wait_until(true, folder: Path) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.out"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("", 0))
        return one.getsockname()[1], other.getsockname()[1]
