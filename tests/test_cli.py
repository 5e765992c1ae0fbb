"""Flags, paths and configs as people type them, and how a command ends that the machine does not let go on."""

import errno
import os
import select
import subprocess
import sys
import textwrap
import threading

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from running import ENVIRONMENT, ROOT

from sedd_jax import cli
from sedd_jax.config import build
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.files import output_path, typed_path, write_atomically

TINY = str(ROOT / "configs" / "tiny.py")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.steps=3", "train.steps", 3),
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("data.shift=false", "data.shift", False),
        ("data.source=a=b", "data.source", "a=b"),
        ("data.vocab_size=None", "data.vocab_size", None),
        ("data.vocab_size=none", "data.vocab_size", None),
        ("data.valid_source=None", "data.valid_source", None),
        ("model.scale_by_sigma=None", "model.scale_by_sigma", None),
        ("model.scale_by_sigma=true", "model.scale_by_sigma", True),
        ("objective=ar", "objective", "ar"),
        ("model.remat=none", "model.remat", "none"),
    ],
)
def test_overrides_have_the_type_of_their_field(override, field, value):
    config = cli.read_config(TINY, [f"--config.{override}"])
    for part in field.split("."):
        config = config[part]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("graph=uniform", "config.graph is a section; give --config.graph.kind=uniform"),
        ("train=None", "config.train is a section"),
        ("train.batch-size=8", "config.train has no 'batch-size'; did you mean batch_size?"),
        ("trian.steps=8", "config has no 'trian'; did you mean train?"),
        ("train.steps[0]=1", "config.train has no 'steps[0]'; did you mean steps?"),
        ("objective[0]=x", "did you mean objective?"),
        ("train.steps.x=1", "config.train.steps is a value"),
        ("train..steps=1", "config.train has no ''; it has batch_size, "),
        ("zzz=1", "config has no 'zzz'; it has data, eval, "),
        ("a" + ".a" * 5000 + "=1", "config has no 'a'"),
        ("train.steps=1e5", "give an integer"),
        ("train.steps=" + "9" * 5000, "give an integer"),
        ("optim.lr=fast", "give a number"),
        ("data.shift=maybe", "give true or false"),
    ],
    ids=lambda value: value[:30],
)
def test_overrides_that_do_not_fit_are_named_with_the_remedy(override, answer):
    with pytest.raises(InputError) as refusal:
        cli.read_config(TINY, [f"--config.{override}"])
    line = cli.one_line(refusal.value)
    assert line.startswith(f"--config.{override}"[:40])
    assert answer in line and "object at" not in line and len(line) <= 300


def test_none_is_refused_where_a_field_cannot_be_none():
    def make(*, source: str, length: int, valid_fraction: float, shift: bool, vocab_size: int | None): ...

    given = {"source": "x", "length": 3, "valid_fraction": 0, "shift": True, "vocab_size": None}
    build(make, "data", ConfigDict({"data": given}))
    for name, what in {
        "source": "a text",
        "length": "an integer",
        "valid_fraction": "a number",
        "shift": "true",
    }.items():
        with pytest.raises(InputError, match=f"config.data.{name}=None: give {what}"):
            build(make, "data", ConfigDict({"data": given | {name: None}}))
    for wrong in (
        {"length": "3"},
        {"length": 2.5},
        {"shift": 1},
        {"vocab_size": [3]},
        {"source": 3},
        {"length": 1 << 32},
    ):
        with pytest.raises(InputError, match=f"config.data.{[*wrong][0]}="):
            build(make, "data", ConfigDict({"data": given | wrong}))


HEAD = "import numpy as np\nfrom ml_collections import ConfigDict, config_dict\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("def get_config(): return get_config()", "RecursionError"),
        ("def get_config():\n    c = ConfigDict()\n    c.a = c\n    return c", "recursion"),
        ("raise SystemExit(0)", "line 3: SystemExit"),
        ("def get_config(): raise KeyboardInterrupt", "line 3: KeyboardInterrupt"),
        ("def get_config(): 1 / 0", "line 3: ZeroDivisionError"),
        ("def get_config(:", "SyntaxError"),
        ("import absent_package", "line 3: ModuleNotFoundError"),
        ("get_confg = None", "'get_config'"),
        ("def get_config(): return None", "gives a NoneType"),
        ("def get_config(): return {}", "gives a dict"),
        ("def get_config(): return ConfigDict({'a': {'b': np.zeros(3)}})", "config.a.b is a ndarray"),
        ("def get_config(): return ConfigDict({'a': [object()]})", "config.a[0] is a object"),
        ("def get_config(): return ConfigDict({'a': config_dict.required_placeholder(int)})", "required"),
    ],
)
def test_config_files_that_give_no_config(tmp_path, text, answer):
    file = tmp_path / "bad.py"
    file.write_text(HEAD + text)
    with pytest.raises(InputError, match="bad.py|config.a") as refusal:
        cli.read_config(str(file))
    assert answer in str(refusal.value)


@pytest.mark.parametrize("path", ["absent.py", "", ":", "/dev/zero", "/dev/null", "a" * 5000, f"{TINY}:smoke"])
def test_paths_of_no_config(path):
    with pytest.raises(InputError, match="--config="):
        cli.read_config(path)


def test_numbers_of_numpy_are_numbers_and_can_be_overridden(tmp_path):
    file = tmp_path / "numbers.py"
    values = (
        "{'steps': np.int64(3), 'lr': np.float32(0.5), 'on': np.bool_(True), 'list': (np.int8(1), 2.5), 'none': None}"
    )
    file.write_text(f"{HEAD}def get_config(): return ConfigDict({{'a': {values}}})")
    read = lambda *overrides: cli.read_config(str(file), overrides).a.to_dict()  # noqa: E731
    assert repr(read()) == repr({"list": [1, 2.5], "lr": 0.5, "none": None, "on": True, "steps": 3})
    assert read("--config.a.steps=7", "--config.a.lr=0.1", "--config.a.on=false") == {
        "steps": 7, "lr": 0.1, "on": False, "list": [1, 2.5], "none": None
    }  # fmt: skip


def test_a_config_finds_its_neighbours_before_other_packages_of_the_name(tmp_path, monkeypatch):
    ours, other = tmp_path / "ours" / "configs", tmp_path / "other" / "configs"
    for folder, steps in ((ours, 1), (other, 2)):
        folder.mkdir(parents=True)
        (folder / "base.py").write_text(f"from ml_collections import ConfigDict\nC = ConfigDict({{'steps': {steps}}})")
    (other / "__init__.py").touch()
    (ours / "mine.py").write_text("from configs import base\nget_config = lambda: base.C")
    monkeypatch.syspath_prepend(str(other.parent))
    monkeypatch.chdir(other.parent)
    before, path = {name: sys.modules[name] for name in sys.modules if name.startswith("configs")}, [*sys.path]
    assert cli.read_config(str(ours / "mine.py")).steps == 1
    assert cli.read_config(f"{ROOT}/configs/small.py:smoke").train.steps == 200
    assert {name: sys.modules[name] for name in before} == before and sys.path == path


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", TINY, "--config.train.steps", "3"],
        ["-config", TINY, "-config.train.steps=3"],
        [f"-config={TINY}", "--config.train.steps=3"],
        ["--config.train.steps=3", f"--config=file://{TINY}"],
        ["--config.train.steps=4", "--config=~/configs/tiny.py", "--config.train.steps=3"],
    ],
)
def test_config_and_overrides_with_one_dash_or_a_space_in_any_order(argv, monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT))
    if "config" not in flags.FLAGS:  # a command that another test imported may have it
        cli.define_path("config", "Experiment, a file such as configs/tiny.py; --config.a.b=value sets a field.")
    cli._parse(["train", *argv])
    assert flags.FLAGS.config == TINY
    assert cli.config().train.steps == 3


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/run", "HOME/run"), ("~", "HOME"), ("file:///x/y", "/x/y"), ("file://~/x", "HOME/x"), ("x//", "x"),
        ("/", "/"), ("gs://bucket/run/", "gs://bucket/run"), ("a~b", "a~b"), ("-1", "-1"), ("a/b", "a/b"),
    ],
)  # fmt: skip
def test_paths_as_people_type_them(text, path, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert typed_path(text) == path.replace("HOME", "/h")


@pytest.mark.parametrize(
    "text", ["", "file://", "http://x/y", "s4://x", "~no-such-user/x", "a" * 5000, "a\0b", "é" * 130]
)
def test_paths_that_no_disk_has(text):
    with pytest.raises(InputError):
        typed_path(text)


def test_a_file_is_written_only_where_it_can_be(tmp_path):
    assert output_path(f"{tmp_path}/new") == f"{tmp_path}/new"
    (tmp_path / "there").touch()
    assert output_path(f"{tmp_path}/there") == f"{tmp_path}/there"
    for bad in (".", "..", "absent/file", "there/file", "f" * 245):
        with pytest.raises(InputError):
            output_path(f"{tmp_path}/{bad}")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device") as nobody_reads:
        write_atomically(pipe, "text")
    assert cli.verdict(nobody_reads.value)[1] == 2
    text = "text" * 100_000  # more than a pipe holds
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)) as reader:
        os.set_blocking(reader.fileno(), True)
        writer = threading.Thread(target=write_atomically, args=(pipe, text))
        writer.start()
        select.select([reader], [], [])  # until the writer is there: what nobody writes is at its end
        assert reader.read(len(text)) == text
        writer.join()
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (InputError("bad"), 2, "bad"),
        (TrainingError("over"), 1, "over"),
        (KeyboardInterrupt(), 130, "SIGINT"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),  # of a worker; 141 is for that of stdout
        (MemoryError(), 1, "out of memory"),
        (np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(int)), 1, "8.00 TiB"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GB"), 1, "out of memory (RESOURCE_EXHAUSTED: 5 GB)"),
        (ImportError("gcsfs is not installed"), 2, "gcsfs"),
        *((OSError(code, os.strerror(code), "/x"), 1, "/x: ") for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT)),
        *(
            (OSError(code, os.strerror(code), "/x"), 2, "/x: ")
            for code in (errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP)
        ),
        (OSError("no number: some library's"), None, ""),
        (ValueError("a defect"), None, "ValueError: a defect"),
        (AssertionError(), None, "AssertionError"),
    ],
    ids=repr,
)
def test_what_ends_a_command_gives_a_line_and_an_exit_code(error, code, named):
    line, found = cli.verdict(error)
    assert found == code
    assert named in line and "\n" not in line


def test_of_long_values_the_middle_is_cut():
    line = cli.one_line(InputError(f"--output={'a' * 5000}: no\nsuch place; {'x y ' * 500} name another"))
    assert len(line) <= 300
    assert line.startswith("--output=aaa") and line.endswith("name another")
    assert cli.one_line("short\n one") == "short one"


SCRIPT = """
    from sedd_jax import cli

    def main():
        print("é" * 100_000)
        return {"done": True}

    cli.run(main)
"""


@pytest.mark.parametrize(
    ("shell", "environment", "code", "err"),
    [
        ("{} | head -c 2", {}, 141, ""),
        ("{} --help | true", {}, 141, ""),
        ("{} > /dev/full", {}, 1, "error: output: No space left on device"),
        ("{} | tail -c 15", {"PYTHONIOENCODING": "ascii"}, 0, ""),
    ],
)
def test_a_closed_pipe_a_full_disk_and_an_ascii_terminal(tmp_path, shell, environment, code, err):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = shell.format(f"{sys.executable} {tmp_path}/script.py") + "; exit ${PIPESTATUS[0]}"
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT | path | environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(err) and len(done.stderr.splitlines()) == bool(err)
    if not code:
        assert done.stdout == '{"done": true}\n'


def test_devices_that_are_not_there(tmp_path):
    (tmp_path / "script.py").write_text("import jax\nfrom sedd_jax import cli\ncli.run(lambda: jax.devices() and None)")
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cuda"}
    done = subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: JAX_PLATFORMS=cuda, but JAX finds no such device; install sedd_jax[cuda12]")
