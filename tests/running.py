"""A very small experiment for the tests that run the commands, in this process or as a user would."""

import atexit
import functools
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import baseline
from sedd_jax.training.loop import train

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {
    "model.num_layers": 1,
    "model.dim": 32,
    "model.num_heads": 2,
    "model.cond_dim": 16,
    "data.length": 32,
    "data.source": "text.txt",
    "optim.warmup_steps": 2,
    "train.steps": 6,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.keep_last": 100,
    "eval.num_times": 2,
    "eval.num_sequences": 4,
    "sampling.steps": 4,
    "sampling.num": 2,
}
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
# One device, as on a laptop; programs that are quick to compile, as in conftest.py. And modules are compiled once even
# where that is turned off: it is most of a start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "NPROC"} | {
    "XLA_FLAGS": QUICK_TO_COMPILE,
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": str(ROOT / ".cache" / "python"),
}


def write_text(path: pathlib.Path, characters: int = 20_000) -> pathlib.Path:
    """About so many characters, not all of them ASCII; the same ones every time."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlué", k=draw.randint(1, 9))) for _ in range(300)]
    lines = [" ".join(draw.choices(words, k=8)).capitalize() + ".\n" for _ in range(characters // 45)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_config(**fields: object) -> ConfigDict:
    """SMALL, and then `fields`, over configs/baseline.py; "__" stands for the dot."""
    config = baseline.get_config()
    config.update_from_flattened_dict(SMALL | _dotted(fields))
    return config


def train_here(workdir: pathlib.Path, **fields: object) -> dict:
    return train(make_config(**fields), epath.Path(workdir))


def arguments(workdir: pathlib.Path, **fields: object) -> list[str]:
    """The command line of `train_here`."""
    overrides = [f"--config.{name}={value}" for name, value in (SMALL | _dotted(fields)).items()]
    return ["--config=configs/baseline.py", f"--workdir={workdir}", *overrides]


@functools.cache
def _forkserver() -> str:
    """The socket of a server that lives as long as this process."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="sedd_jax")) / "socket"
    command = [sys.executable, "tests/forkserver.py", str(path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)  # streams as the commands will have them
    server = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes)
    atexit.register(server.communicate)
    while not path.exists():
        assert server.poll() is None, server.stderr.read()
        time.sleep(0.02)
    return str(path)


def command(name: str, *argv: str, real: bool = False, **environment: str) -> list[str]:
    """The command line of sedd_jax.NAME. Unless it is to be `real`, it runs in a copy of a process that has imported
    what it imports, and with it read what the environment says to JAX."""
    if real or any(name.startswith("JAX_") for name in environment):
        return [sys.executable, "-m", f"sedd_jax.{name}", *argv]
    return [sys.executable, "-S", str(ROOT / "tests" / "forkserver.py"), _forkserver(), name, *argv]


def start(name: str, *argv: str, real: bool = False, **environment: str) -> subprocess.Popen:
    """`command`, with pipes."""
    line, pipe = command(name, *argv, real=real, **environment), subprocess.PIPE
    return subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT | environment, stdout=pipe, stderr=pipe, text=True)


def run(name: str, *argv: str, expect: int = 0, **options: Any) -> tuple[str, str]:
    """(stdout, stderr) of a command that has to end with the exit code `expect`. options: of `start`."""
    process = start(name, *argv, **options)
    out, err = process.communicate(timeout=900)
    assert process.returncode == expect, err
    assert "Traceback" not in err
    return out, err


def close(figures: dict, rel: float) -> dict:
    """What equals figures that differ by no more than `rel` of them; their words have to be the same."""
    return {name: value if isinstance(value, str) else pytest.approx(value, rel=rel) for name, value in figures.items()}


def metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train_loss"]) for line in metrics(workdir) if "train_loss" in line]


def saved_states(workdir: pathlib.Path) -> dict[int, dict]:
    """Of every checkpoint the data position, and the dtype, shape and hash of every array of the state."""
    states = {}
    for folder in (workdir / "checkpoints").iterdir():
        record = json.loads((folder / "record" / "metadata").read_text())
        states[int(folder.name)] = {"position": record["position"], **record["manifest"]}
    return states


def files(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Everything under a folder; None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _dotted(fields: dict[str, object]) -> dict[str, object]:
    return {name.replace("__", "."): value for name, value in fields.items()}
