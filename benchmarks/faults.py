"""What becomes of a tiny run under faults: python -m benchmarks.faults --kills=30 --disk --damage --long=2000

--kills=N   SIGKILL at N random moments, each time followed by the same command
--disk      a file system of 32 kB to 8 MB, which gets room when the run has ended (mounts tmpfs, so it needs root)
--damage    each file and folder of a workdir, in seven ways; then sampling, and the same training
--long=N    N steps with evaluations, samples and checkpoints: memory, open files and threads
The law of the first three: the run ends with the states, metrics and samples of one without faults, bit for bit, or is
refused in one line. Progress on stderr, one JSON line on stdout. Exit code 1: a law is broken.
"""

import argparse
import collections
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "tests"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import forked  # noqa: E402
import running  # noqa: E402

STEPS, EVERY, ROOM = 40, 4, "64m"
OFTEN = {"train__checkpoint_every": EVERY, "train__eval_every": 10, "train__sample_every": 20}
SIZES = ("32k", "64k", "128k", "256k", "512k", "1m", "2m", "3m", "4m", "6m", "8m")


def arguments(workdir: Path, **fields: Any) -> list[str]:
    source = workdir.parent / "text.txt"
    source = source if source.exists() else running.write_text(source)
    return running.arguments(workdir, **{"data__source": source, "train__steps": STEPS} | OFTEN | fields)


def outcome(workdir: Path, steps: int = STEPS) -> dict[str, Any]:
    """The last state, the metrics but for how fast it went, and the samples."""
    record = json.loads((workdir / "checkpoints" / str(steps) / "record" / "metadata").read_text())
    rates = ("tokens_per_second", "mfu", "mfu_full")
    entries = [{name: entry[name] for name in entry if name not in rates} for entry in running.metrics(workdir)]
    return {"state": record["manifest"], "metrics": entries, "samples": running.files(workdir / "samples")}


def differences(workdir: Path, expected: dict[str, Any], steps: int = STEPS) -> list[str]:
    try:
        return [f"other {name}" for name, value in outcome(workdir, steps).items() if value != expected[name]]
    except (OSError, ValueError) as error:
        return [f"unreadable: {error}"]


def progress(cases: list[Any]) -> Iterator[Any]:
    begun = time.monotonic()
    for number, case in enumerate(cases):
        left = (time.monotonic() - begun) / max(number, 1) * (len(cases) - number) / 60
        print(f"{number} of {len(cases)}" + f", {left:.1f} minutes left" * (number > 0), file=sys.stderr, flush=True)
        yield case


def kills(number: int, top: Path) -> dict[str, Any]:
    """Most moments lie between the first word of the run itself and its end; some before, in imports."""
    for name in ("compiled", "straight"):
        begun = time.monotonic()
        running.run("train", *arguments(top / name))
    whole, expected = time.monotonic() - begun, outcome(top / "straight")
    own = time.time() - (top / "straight" / "tensorboard").stat().st_mtime
    draw, moments, ends, wrong, workdir = random.Random(number), collections.Counter(), 0, [], None
    kill = progress(list(range(number)))
    more = next(kill, None)
    while more is not None or workdir:
        workdir = workdir or top / f"killed-{ends}"
        report = workdir / "metrics.jsonl"
        before = report.stat().st_mtime_ns if report.exists() else None
        process = running.start("train", *arguments(workdir))
        if more is not None:
            inside = draw.random() < 0.8
            while (
                inside and process.poll() is None and (report.stat().st_mtime_ns if report.exists() else None) == before
            ):
                time.sleep(0.005)
            try:
                process.wait(draw.random() * (own if inside else whole))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                moments[moment(workdir)] += 1
                more = next(kill, None)
                continue
        _, err = process.communicate()
        wrong += [f"killed-{ends}: exit code {process.returncode}: {err[-300:]}"] if process.returncode else []
        wrong += [f"killed-{ends}: {difference}" for difference in differences(workdir, expected)]
        ends, workdir = ends + 1, None
    return {"kills": sum(moments.values()), "runs that ended": ends, "moments": dict(moments), "wrong": wrong}


def moment(workdir: Path) -> str:
    names = [path.name for path in workdir.glob("checkpoints/*")]
    if any("tmp" in name for name in names):
        return "during a save"
    saved = max([int(name) for name in names if name.isdigit()], default=0)
    return "before a save" if not saved else "after the last save" if saved == STEPS else "between saves"


def disk(top: Path) -> dict[str, Any]:
    running.run("train", *arguments(top / "straight"))
    expected, ends, wrong = outcome(top / "straight"), {}, []
    for size in progress(list(SIZES)):
        (place := top / size).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
        try:
            argv = arguments(place / "run", data__source=top / "text.txt")
            process = running.start("train", *argv)
            _, err = process.communicate()
            line = (err.splitlines() or [""])[-1]
            ends[size] = f"exit code {process.returncode}: {line[:300].replace(str(top), '')}"
            if "Traceback" in err or (process.returncode and not line.startswith("error: ")):
                wrong.append(f"{size}: no line but {len(err.splitlines())}, {line[:200]}")
            subprocess.run(["mount", "-o", f"remount,size={ROOM}", place], check=True)
            process = running.start("train", *argv)
            _, err = process.communicate()
            wrong += [f"{size}: with room exit code {process.returncode}: {err[-300:]}"] if process.returncode else []
            wrong += [f"{size}: {difference}" for difference in differences(place / "run", expected)]
        finally:
            subprocess.run(["umount", place], check=True)
    return {"ends": ends, "wrong": wrong}


def _replaced(by: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        by(path)

    return damage


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0x55 for byte in content[middle : middle + 4]) + content[middle + 4 :]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "gone": _replaced(lambda path: None),
    "a folder": _replaced(Path.mkdir),
    "a link loop": _replaced(lambda path: path.symlink_to(path.name)),
    "unreadable": lambda path: path.chmod(0),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(_flip(path.read_bytes())),
}
FOLDERS = {"gone", "a link loop", "unreadable"}


def damage(top: Path) -> dict[str, Any]:
    """Files whose names differ only in numbers and hashes count as one, that of the newest checkpoint."""
    os.chmod(top, 0o755)
    forked.preload()
    steps, straight = 4, top / "inputs" / "run"
    straight.parent.mkdir()
    argv = [
        part.replace(f"{top}/inputs/", "") for part in arguments(straight, **dict.fromkeys(OFTEN, 2), train__steps=4)
    ]
    argv[0] = f"--config={running.ROOT}/configs/baseline.py"
    forked.Forked("train", argv, straight.parent, privileged=True).wait()
    forked.Forked("sample", ["--workdir=run"], straight.parent, privileged=True).wait()
    expected = outcome(straight, steps)
    names = sorted(str(path.relative_to(straight)) for path in straight.rglob("*"))
    # In ascending order, so the one that stays for each is of the newest checkpoint.
    paths = {re.sub(r"[0-9a-f]{6,}|\d+", "#", name): straight / name for name in names}
    cases = [
        (str(path.relative_to(straight)), kind)
        for path in paths.values()
        for kind in DAMAGES
        if path.is_file() or kind in FOLDERS
    ]
    ends, wrong = collections.Counter(), []
    for name, kind in progress(cases):
        folder = top / "case"
        subprocess.run(["cp", "-a", straight.parent, folder], check=True)
        if os.getuid() == 0:
            subprocess.run(["chown", "-hR", str(forked.NOBODY), folder], check=True)
        DAMAGES[kind](folder / "run" / name)
        for command, given in (("sample", ["--workdir=run", "--num=1"]), ("train", argv)):
            ended = forked.Forked(command, given, folder).wait()
            ends[f"{command}: {ended.code}"] += 1
            bad = list(ended.wrong)
            if command == "sample" and ended.code == 0 and json.loads(ended.out.splitlines()[-1])["step"] != steps:
                said = f"checkpoint {steps}" in ended.err or kind == "gone"
                bad += [] if said else ["an older checkpoint in silence"]
            if command == "train" and ended.code == 0 and not name.startswith(("metrics", "samples")):
                bad += differences(folder / "run", expected, steps)
            if bad:
                wrong.append(f"{name} {kind}, {command}: {'; '.join(bad)}: {ended.last_line[:200]}")
                print(wrong[-1], file=sys.stderr, flush=True)
        subprocess.run(["chmod", "-R", "u+rwx", folder], check=False)
        shutil.rmtree(folder)
    return {"cases": len(cases), "ends": dict(sorted(ends.items())), "wrong": wrong}


def long(steps: int, top: Path) -> dict[str, Any]:
    """Growth per 1000 steps, fitted to the second half, with its standard error (of 20 means, one after another)."""
    often = dict.fromkeys(OFTEN, 20)
    process = running.start("train", *arguments(top / "run", **often, train__steps=steps, train__keep_last=3))
    measured, shown = [], 0.0
    while process.poll() is None:
        time.sleep(0.1)
        try:
            step = running.losses(top / "run")[-1][0]
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory, threads = (int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmRSS", "Threads"))
            measured.append((step, memory / 1024, len(os.listdir(f"/proc/{process.pid}/fd")), threads))
        except (OSError, ValueError, IndexError, TypeError):
            continue
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"step {step} of {steps}: {measured[-1][1]:.0f} MB", file=sys.stderr, flush=True)
    table = np.array([row for row in measured if row[0] > steps / 2], float)
    growth, wrong = {}, [] if process.returncode == 0 else [f"exit code {process.returncode}"]
    for column, (name, least) in enumerate({"megabytes": 2, "open files": 0.5, "threads": 0.5}.items(), start=1):
        means = np.array([part.mean(0) for part in np.array_split(table, 20)])
        (slope, _), covariance = np.polyfit(means[:, 0], means[:, column], 1, cov=True)
        slope, error = 1000 * slope, 1000 * float(np.sqrt(covariance[0, 0]))
        growth[name] = {"mean": table[:, column].mean(), "per 1000 steps": slope, "standard error": error}
        wrong += [f"{name} grow"] if slope > max(least, 3 * error) else []
    return {"steps": steps, "measurements": len(table), "growth": growth, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--long", type=int)
    for name in ("disk", "damage"):
        parser.add_argument(f"--{name}", action="store_true")
    options, result = parser.parse_args(), {}
    for name, given in vars(options).items():
        if given:
            with tempfile.TemporaryDirectory() as top:
                values = () if given is True else (given,)
                result[name] = globals()[name](*values, Path(top))
    print(json.dumps(result))
    return any(part["wrong"] for part in result.values())


if __name__ == "__main__":
    sys.exit(main())
