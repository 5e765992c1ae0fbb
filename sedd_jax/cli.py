"""What the commands have in common: flags, one final JSON line on stdout, errors in one line, exit codes.

Exit code 0: done. 1: the run cannot go on. 2: bad input, nothing was done. 128 + n: stopped by signal n, work saved.
"""

import contextlib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from sedd_jax.devices import processes
from sedd_jax.errors import InputError, TrainingError


def define_workdir(text: str) -> None:
    flags.DEFINE_string("workdir", None, text)


def define_processes() -> None:
    """The flags of a command that may run as several processes. All get the same ones, except for --process_id."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0; found by itself on TPU VMs, Slurm and Open MPI.")
    flags.DEFINE_integer("num_processes", None, "Number of processes; 1 for this one alone.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds within which all processes have to start.")
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead.")


def define_config() -> None:
    _define_config(flags.FLAGS, sys.argv)


def _define_config(values: flags.FlagValues, argv: list[str]) -> None:
    # A config may import its neighbours (`from configs import small`) wherever the command is started.
    for argument in argv[1:]:
        if argument.startswith("--config="):
            sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(argument.removeprefix("--config=")))))
    text = "Experiment, a file such as configs/tiny.py."
    config_flags.DEFINE_config_file("config", None, text, flag_values=values, lock_config=True, sys_argv=argv)


def take_overrides() -> list[str]:
    """Removes each --config.a.b=value from the command line, for a command that reads its config later."""
    taken = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in taken]
    return taken


def required(name: str) -> Any:
    """The value of a flag that has to be given."""
    value = flags.FLAGS[name].value
    if value is None:
        raise InputError(f"--{name} is missing; see --help")
    return value


def config() -> ConfigDict:
    """The config of --config, with its overrides."""
    return _require_loaded(required("config"), sys.argv)


def read_config(*arguments: str) -> ConfigDict:
    """The config of a command with the arguments --config=FILE and --config.a.b=value."""
    argv, values = ["", *arguments], flags.FlagValues()
    _define_config(values, argv)
    _parse(argv, values)
    return _require_loaded(values.config, argv)


def workdir() -> epath.Path:
    path = epath.Path(required("workdir"))
    try:
        path.exists()
    except ImportError as error:  # a bucket URL without the package that reads it
        raise InputError(f"--workdir={path}: {_one_line(error)}") from error
    return path


def _parse(argv: list[str], values: flags.FlagValues) -> None:
    with _explained(argv):
        rest = values(argv)
    if rest[1:]:
        raise InputError(f"unexpected argument {rest[1]!r}; options start with --, see --help")


def _require_loaded(config: ConfigDict, argv: list[str]) -> ConfigDict:
    with _explained(argv):
        # ml_collections reports a file that it could not load at the first look into the config.
        config.is_locked  # noqa: B018
    return config


@contextlib.contextmanager
def _explained(argv: list[str]) -> Iterator[None]:
    """Turns what ml_collections raises into an InputError of one line that names the argument."""
    try:
        yield
    # It raises whatever its override meets: an unknown field, a wrong type, a file that is not there.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        raise InputError(_explain(error, argv)) from error


def _explain(error: BaseException, argv: list[str]) -> str:
    # For an override of a field that is not there, the error has no more than a part of the name.
    cause = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if isinstance(cause, KeyError):
        part = re.findall(r"\w+", str(cause.args[0]))[0]
        for argument in argv:
            if argument.startswith("--config.") and part in argument.split("=")[0].split("."):
                return f"{argument}: the config has no field {part!r} there"
    if isinstance(error, OSError):
        return f"--config cannot be read: {_one_line(error).rpartition('Failed loading config file config_config ')[2]}"
    # For a config that raises, the error has the whole traceback; its last line counts.
    before, _, traceback = str(error).partition("Error whilst parsing config file:")
    return " ".join([*before.split(), *traceback.strip().split("\n")[-1].split()]) if traceback else _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def to_json(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: to_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(main: Callable[[], dict[str, Any] | None]) -> None:
    """Parses the flags, calls main, prints its result (if not None) as the last line of stdout, and exits.

    Only the first process prints the result. If one process fails, all end with its line and its exit code.
    """
    if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__, *map(flags.FLAGS.module_help, (__name__, sys.argv[0])))
        sys.exit(0)
    logging.set_verbosity(logging.ERROR)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/sedd_jax/xla"))
    try:
        _parse(sys.argv, flags.FLAGS)
        if "num_processes" in flags.FLAGS:
            _join_processes(flags.FLAGS)
        result = main()
        if processes.is_leader() and result is not None:
            print(json.dumps(to_json(result)), flush=True)
        processes.finish()
        return
    except (InputError, TrainingError) as error:
        line, code = _one_line(error), error.exit_code
        print(f"error: {line}", file=sys.stderr, flush=True)
    except Exception as error:
        processes.exit_if_lost(error)
        traceback.print_exc()
        line, code = f"{type(error).__name__}: {_one_line(error)}", 1
    processes.fail(line, code)
    sys.exit(code)


def _join_processes(values: flags.FlagValues) -> None:
    processes.initialise(
        values.coordinator,
        values.num_processes,
        values.process_id,
        timeout=values.start_timeout,
        heartbeat_timeout=values.heartbeat_timeout,
    )
    if processes.several():
        # When a lost process breaks off a save, Orbax would print a traceback besides raising the error.
        logging.set_verbosity(logging.FATAL)
