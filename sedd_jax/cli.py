"""What the commands have in common: flags, one final JSON line on stdout, errors in one line, exit codes.

Exit code 0: done. 1: the run cannot go on. 2: bad input, nothing was done. 128 + n: stopped by signal n, work saved."""

import contextlib
import difflib
import errno
import json
import math
import os
import re
import runpy
import select
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, FieldReference

from sedd_jax.devices import processes
from sedd_jax.errors import InputError, TrainingError, explained
from sedd_jax.files import output_path, system_error, typed_path

OVERRIDES: list[str] = []  # --config.a.b=value of the command line, each in this form and in their order
_READERS: dict[tuple[type, ...], tuple[str, Callable[[str], Any]]] = {
    (bool, np.bool_): ("true or false", flags.BooleanParser().parse),
    (int, np.integer): ("an integer", flags.IntegerParser().parse),
    (float, np.floating): ("a number", flags.FloatParser().parse),
    (str, type(None)): ("a text", str),
}
# What an OSError says of a path that was given. Others, of a full or broken disk, are no fault of the command.
_WRONG_PATH = re.compile("ENOENT|E(NOT|IS)DIR|EEXIST|EACCES|EPERM|EROFS|ELOOP|ENAMETOOLONG|ENOTEMPTY|EINVAL|ENXIO")
_LONGEST_LINE = 300


def define_path(name: str, text: str, *, output: bool = False) -> None:
    """A flag for a path, see `files.typed_path`. output: for a file to write, see `files.output_path`."""
    flags.DEFINE(_Parser(output_path if output else typed_path), name, None, text)


def define_model(text: str = "Directory of a trained model.", name: str = "workdir") -> None:
    """--workdir and --mesh=AXIS:SIZE,... of a command that reads a trained model: a dict, or None for its default."""
    define_path(name, text)
    mesh = "How the devices are laid out, such as data:2,fsdp:4; by default as for the training, where that fits."

    def parse(argument: str) -> dict[str, int]:
        if not re.fullmatch(r"((^|,)(data|fsdp|tensor):(-1|\d{1,6}))+", argument):
            raise InputError("give AXIS:SIZE,... of data, fsdp and tensor, such as data:2,fsdp:4")
        return {axis: int(size) for axis, size in (part.split(":") for part in argument.split(","))}

    flags.DEFINE(_Parser(parse), "mesh", None, mesh)


class _Parser(flags.ArgumentParser):
    def __init__(self, parse: Callable[[str], Any]):
        self.parse = parse


def define_processes() -> None:
    """The flags of a command that may run as several processes. All get the same ones, except for --process_id."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0; found by itself on TPU VMs, Slurm and Open MPI.")
    flags.DEFINE_integer("num_processes", None, "Number of processes; 1 for this one alone.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    span = {"lower_bound": 1, "upper_bound": 10**6}
    flags.DEFINE_integer("start_timeout", 300, "Seconds within which all processes have to start.", **span)
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead.", **span)


def required(name: str) -> Any:
    """The value of a flag that has to be given."""
    if (value := flags.FLAGS[name].value) is None:
        raise InputError(f"--{name} is missing; see --help")
    return value


def given(*names: str) -> dict[str, Any]:
    """Those of these flags that are given, and their values."""
    return {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].value is not None}


def path(name: str = "workdir") -> epath.Path:
    return epath.Path(required(name))


def config() -> ConfigDict:
    """The config of --config, with its overrides."""
    return read_config(required("config"), OVERRIDES)


def read_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a file, locked. path: FILE, or FILE:FORM for get_config(FORM). overrides: --config.a.b=value.
    Raises InputError for a file that gives none, an override that does not fit, and values that are not plain."""
    file, _, form = (path, "", "") if ":" not in path or os.path.isfile(path) else path.rpartition(":")
    made, _ = run_file("config", file, "get_config", *filter(None, [form]))
    if not isinstance(made, ConfigDict):
        raise InputError(f"--config={path}: get_config() gives a {type(made).__name__} and no ConfigDict")
    with explained(f"--config={path}", "give every field a value, and no section itself", Exception):
        with made.ignore_type():
            for override in overrides:
                _override(made, override)
        return ConfigDict(_plain("config", made)).lock()


def run_file(flag: str, file: str, function: str, *arguments: str) -> tuple[Any, dict[str, Any]]:
    """(what a function of a Python file returns, the names that the file defines). The file may import its neighbours,
    as in `from configs import small`, wherever the command is started. Raises InputError, whatever it raises."""
    if not os.path.isfile(file):
        raise InputError(f"--{flag}={file} is no file; give one such as configs/tiny.py")
    folder = os.path.dirname(os.path.abspath(file))
    name, modules = os.path.basename(folder), {}
    sys.path.append(os.path.dirname(folder))
    if name == "configs" or name not in sys.modules:
        # Made here, since another package of this name, installed or in the current directory, would be found first.
        modules = {known: sys.modules.pop(known) for known in [*sys.modules] if known.split(".")[0] == name}
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [folder]
    try:
        names = runpy.run_path(file)
        return names[function](*arguments), names
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f"{file}, line {lines[-1]}" if lines else file
        raise InputError(f"--{flag}={where}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.remove(os.path.dirname(folder))
        sys.modules.update(modules)


def _override(config: ConfigDict, argument: str) -> None:
    """Sets the field of --config.a.b=value. None, which `config.build` refuses where it does not fit, is for any."""
    name, _, text = argument.removeprefix("--config.").partition("=")
    where, field = "config", config
    for part in name.split("."):
        section = field.get() if isinstance(field, FieldReference) else field
        if not isinstance(section, ConfigDict):
            raise InputError(f"{argument}: {where} is a value and has no {part!r}")
        fields = dict(section.items(preserve_field_references=True))
        if part not in fields:
            close = difflib.get_close_matches(part, fields, 1)
            remedy = f"did you mean {close[0]}?" if close else f"it has {', '.join(fields)}"
            raise InputError(f"{argument}: {where} has no {part!r}; {remedy}")
        where, field = f"{where}.{part}", fields[part]
    kind = field.get_type() if isinstance(field, FieldReference) else type(field)
    if issubclass(kind, ConfigDict):
        inside = "kind" if "kind" in section[part] else next(iter(section[part]), "field")
        raise InputError(f"{argument}: {where} is a section; give --{where}.{inside}={text}, for example")
    what, read = next((reader for kinds, reader in _READERS.items() if issubclass(kind, kinds)), ("", None))
    misreadings = TypeError, ValueError, SyntaxError, MemoryError, RecursionError
    with explained(argument, f"give {what or 'it in the file'}", *misreadings):
        # "none" is the text in a field of texts, such as model.remat, that does not hold None now.
        section[part] = None if text == "None" or (text == "none" and type(field) is not str) else read(text)


def _plain(name: str, value: Any) -> Any:
    """The value as JSON may have it. Raises InputError for others."""
    if isinstance(value, ConfigDict):
        return {str(key): _plain(f"{name}.{key}", value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(value, str | int | float | None):
        return value
    raise InputError(f"{name} is a {type(value).__name__}; give a number, text, truth value, list or None")


def _parse(argv: Sequence[str]) -> None:
    if flagfile := [word for word in argv if re.match("--?flagfile", word)]:
        raise InputError(f"{flagfile[0]}: give the flags themselves")  # absl would read a device without an end
    overrides, names = flags.FlagValues(), {}  # the names of overrides are not known before the config is read
    overrides.set_gnu_getopt()
    try:
        if "config" in flags.FLAGS:
            names = dict.fromkeys(match[1] for word in argv if (match := re.match(r"--?(config\.[^=]+)", word)))
            for name in names:
                flags.DEFINE_string(name, None, "", flag_values=overrides)
        rest = flags.FLAGS(overrides(argv, known_only=True))
    except (flags.Error, ValueError) as error:
        raise InputError(one_line(error)) from error
    OVERRIDES[:] = [f"--{name}={overrides[name].value}" for name in names]
    if rest[1:]:
        raise InputError(f"unexpected argument {rest[1]!r}; options start with --, see --help")


def one_line(error: object) -> str:
    """Its text in one line. Of long values the middle is cut."""
    line = " ".join(str(error).split())
    if len(line) > _LONGEST_LINE:
        line = re.sub(r"\S{81,}", lambda match: f"{match[0][:50]}...{match[0][-25:]}", line)
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 100]} ... {line[-90:]}"


def to_json(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: to_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(main: Callable[[], dict[str, Any] | None]) -> None:
    """Parses the flags, calls main, prints its result (if not None) as the last line of stdout, and exits. Only the
    first process prints the result. If one process fails, all end with its line and its exit code."""
    # Where a save breaks off, Orbax would print a traceback from each thread besides raising the error.
    logging.set_verbosity(logging.FATAL)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # None where it is closed
            stream.reconfigure(errors="backslashreplace")  # a terminal may know nothing but ASCII
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/sedd_jax/xla"))
    try:
        if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
            about = f"{sys.modules['__main__'].__doc__}\n"
            print(about, *map(flags.FLAGS.module_help, (__name__, sys.argv[0])), flush=True)
            sys.exit(0)
        _parse(sys.argv)
        if "num_processes" in flags.FLAGS:
            joining = ("coordinator", "num_processes", "process_id", "start_timeout", "heartbeat_timeout")
            processes.initialise(**{name: flags.FLAGS[name].value for name in joining})
        result = main()
        if processes.is_leader() and result is not None:
            print(json.dumps(to_json(result)))
        print(end="", flush=True)
        processes.finish()
        return
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, InputError | TrainingError | OSError):
            processes.exit_if_lost(error)
        line, code = verdict(error)
        if isinstance(error, OSError):
            (output := select.poll()).register(1, 0)
            if isinstance(error, BrokenPipeError) and output.poll(0):  # the reader of stdout is gone
                line, code = "", 141
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would write again at the end, and complain
        if code is None:
            traceback.print_exc()
        elif line:
            print(f"error: {line}", file=sys.stderr, flush=True)
    processes.fail(line, code or 1)


def verdict(error: BaseException) -> tuple[str, int | None]:
    """(one line, exit code) of what ended a command; None for a defect of the program."""
    line = one_line(error)
    if isinstance(error, InputError | TrainingError):
        return line, error.exit_code
    if isinstance(error, ImportError):  # of an extra
        return f"{line}; pip install 'sedd_jax[gcs]'" if "gcsfs" in line else line, 2
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT", 130
    if isinstance(error, MemoryError) or re.match("RESOURCE_EXHAUSTED", line):
        return one_line(f"out of memory ({line}); ask for less at a time: shorter, fewer, smaller batches"), 1
    if known := system_error(error):
        subject = f"{one_line(known.filename2 or known.filename or 'output')}: {one_line(known.strerror)}"
        if _WRONG_PATH.fullmatch(errno.errorcode.get(known.errno, "")):
            return f"{subject}; name another place, or set this one right", 2
        return f"{subject}; what was saved stays, and the same command goes on once that is mended", 1
    if isinstance(error, RuntimeError | AssertionError):
        try:
            jax.devices()
        except Exception as missing:  # a RuntimeError, or an AssertionError without a text
            where = f"JAX_PLATFORMS={jax.config.jax_platforms}, but JAX finds no such device"
            reason = f" ({missing})" if str(missing) else ""
            return one_line(f"{where}; install sedd_jax[cuda12] or sedd_jax[tpu], or unset it{reason}"), 2
    return f"{type(error).__name__}: {line}", None
