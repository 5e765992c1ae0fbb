"""What a run reports to people: metrics, samples, a plot, a progress bar. Only process 0 writes and prints."""

import contextlib
import json
import math
import struct
import sys
import time
from typing import Any

from etils import epath
from tqdm import tqdm

from sedd_jax.devices import processes
from sedd_jax.files import Log, make_folder, plot, write_atomically


def read_metrics(workdir: epath.Path) -> list[dict[str, int | float | None]]:
    """The entries of metrics.jsonl. Damaged lines are dropped, with a message unless it is only the last one."""
    path, entries = workdir / "metrics.jsonl", []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
    if len(entries) < len(lines) - 1:
        processes.say(f"{path}: {len(lines) - len(entries)} damaged lines are dropped")
    return entries


class Report:
    """The files of one run. Every process makes the same calls."""

    def __init__(self, workdir: epath.Path, *, step: int):
        """Entries and samples after `step`, whose steps will be done again, are removed."""
        self._workdir, self._samples, self._events = workdir, workdir / "samples", None
        if processes.is_leader():
            kept = [entry for entry in read_metrics(workdir) if entry["step"] <= step]
            self._metrics = Log(workdir / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept).encode())
            for path in self._samples.iterdir() if self._samples.exists() else []:
                if path.stem.isdigit() and int(path.stem) > step:
                    path.unlink()
            self._events = _Events(workdir / "tensorboard", step=step)

    def entry(self, step: int, **values: float) -> None:
        """Appends to metrics.jsonl and to TensorBoard. A value that is not finite is null in the file."""
        if self._events:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._metrics.append(json.dumps({"step": step} | dict.fromkeys(values) | finite).encode() + b"\n")
            self._events.add(step, "scalar", finite)

    def samples(self, step: int, texts: list[str]) -> None:
        if self._events:
            text = "".join(f"=== sample {i} at step {step} ===\n{text}\n" for i, text in enumerate(texts))
            make_folder(self._samples)
            write_atomically(self._samples / f"{step}.txt", text)
            self._events.add(step, "text", {"samples": text})

    def has(self, step: int) -> tuple[bool, bool]:
        """Whether the evaluation and the samples of a step are there: the same answer on all processes."""

        def look() -> bytes:
            entries = read_metrics(self._workdir)
            evaluated = any(entry["step"] == step and "eval_nats_per_token" in entry for entry in entries)
            return json.dumps([evaluated, (self._samples / f"{step}.txt").exists()]).encode()

        return tuple(json.loads(processes.from_leader("reported", look)))

    def bar(self, *, step: int, steps: int) -> tqdm:
        shown = {"file": sys.stderr, "dynamic_ncols": True, "disable": not processes.is_leader()}
        shown["mininterval"] = 0.1 if sys.stderr.isatty() else 10
        return tqdm(total=steps, initial=step, unit="step", **shown)

    def final(self, step: int) -> dict[str, Any]:
        """Draws the plot and returns the values of the last step, also of a run that is done already."""
        final = {"step": step, "train_loss": None, "eval_bits_per_byte": None}
        if self._events:
            self.flush()
            entries = read_metrics(self._workdir)
            _plot(self._workdir / "loss.png", entries)
            for entry in entries:
                final |= entry if entry["step"] == step else {}
        return final | {"workdir": str(self._workdir)}

    def flush(self) -> None:
        """Writes what is held of metrics and events: before a checkpoint, whose metrics these are, and at the end."""
        if self._events:
            self._metrics.flush()
            self._events.flush()


class _Events(Log):
    """A file of TensorBoard events. Of a full disk, tensorboardX's writer would let the run wait for good."""

    def __init__(self, folder: epath.Path, *, step: int):
        """Events after `step` in older files no longer count."""
        from tensorboardX import summary  # here, since it imports Google's client of buckets, which takes long
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        self._summary, self._event, self._checksum = summary, Event, masked_crc32c
        make_folder(folder)
        super().__init__(folder / f"events.out.tfevents.{time.time_ns()}", self._record(file_version="brain.Event:2"))
        self.append(self._record(step=step + 1, session_log={"status": 1}))  # a start

    def add(self, step: int, kind: str, values: dict[str, Any]) -> None:
        make = getattr(self._summary, kind)
        self.append(b"".join(self._record(step=step, summary=make(name, value)) for name, value in values.items()))

    def _record(self, **fields: Any) -> bytes:
        """An event of now, as a record of a TFRecord file: length, its checksum, event, its checksum."""
        event = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        return b"".join(part + struct.pack("<I", self._checksum(part)) for part in (length, event))


def _plot(path: epath.Path, entries: list[dict[str, int | float | None]]) -> None:
    """Training loss, and the validation bound where it was measured."""
    styles = {"train_loss": {"color": "C0", "alpha": 0.6, "linewidth": 1, "label": "training loss"}}
    styles["eval_nats_per_token"] = {"color": "C1", "marker": "o", "label": "validation bound, averaged weights"}
    with plot(path, size=(7.0, 4.0)) as (_, axes):
        for name, style in styles.items():
            if points := [(entry["step"], entry[name]) for entry in entries if entry.get(name)]:
                axes.plot(*zip(*points, strict=True), **style)
        axes.set(xlabel="step", ylabel="nats per token", yscale="log")
        axes.legend()
