"""Ahead-of-time compilation of every recipe for TPU slices, as a table: see docs/tpu.md.

    python -m benchmarks.aot [--only=small/v5e-16] [--write] [-- --config.model.remat=blocks ...]

Training step, evaluation and sampler of a line are compiled by `sedd_jax.compile`, one after the other, each in its own
process and in one to several minutes; the config's own sections `eval` and `sampling` apply. Figures are kept in
.cache/aot, and a command that was stopped goes on there; delete it to start afresh. --write puts the table between the
two markers in docs/benchmarks.md, otherwise it goes to stdout. Arguments after -- apply to every line, and nothing is
kept then.
"""

import json
import math
import pathlib
import subprocess
import sys

from absl import app, flags

flags.DEFINE_string("only", "", "Lines whose name has this prefix.")
flags.DEFINE_bool("write", False, "Put the table into docs/benchmarks.md.")

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENT, KEPT = ROOT / "docs" / "benchmarks.md", ROOT / ".cache" / "aot"
BATCH = 512  # As in the paper, in microbatches of at most 16 sequences per chip.
MARKERS = ("<!-- aot: start -->", "<!-- aot: end -->")

# Cloud name of the slice (v4 and v5p count cores, two per chip) -> its shape in chips.
SLICES = {
    "v5e-16": "v5e:4x4",
    "v5e-256": "v5e:16x16",
    "v4-128": "v4:4x4x4",
    "v5p-512": "v5p:4x8x8",
    "v6e-256": "v6e:16x16",
}
CONFIGS = ("small", "medium", "text8", "lm1b")  # the programs of fineweb_edu are those of small
# Weights are split over 16 chips, at least 48 columns each; the groups of 16 are replicas.
LINES = {
    f"{config}/{name}": (config, shape)
    for config in CONFIGS
    for name, shape in SLICES.items()
    if name == "v5e-16" or config not in ("text8", "lm1b")  # which are too small for hundreds of chips
}
TARGETS = ("train", "evaluate", "sample")
COLUMNS = (
    "recipe/slice",
    "GB per chip",
    "GB sent per chip (of the least)",
    "ms at least",
    "MFU",
)


def compiled(name: str, what: str, overrides: list[str]) -> tuple[dict | None, str]:
    """The figures, or None and the error line."""
    kept = KEPT / f"{name.replace('/', '.')}.{what}.json"
    if kept.exists() and not overrides:
        return json.loads(kept.read_text()), ""
    config, shape = LINES[name]
    options = [f"--config=configs/{config}.py", f"--topology={shape}", f"--what={what}"]
    per_chip = BATCH // math.prod(map(int, shape.partition(":")[2].split("x")))
    fixed = {"mesh.data": -1, "mesh.fsdp": 16, "train.batch_size": BATCH, "train.microbatches": max(1, per_chip // 16)}
    options += [f"--config.{field}={value}" for field, value in fixed.items()]
    command = [sys.executable, "-m", "sedd_jax.compile", *options, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1].removeprefix("error: ")
    if not overrides:
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1]), ""


def cells(name: str, overrides: list[str]) -> list[str]:
    """The name and figures of a line, in the order of TARGETS; bytes sent are of training alone."""
    parts, errors = [], []
    for what in TARGETS:
        result, error = compiled(name, what, overrides)
        if result is None:
            errors.append(f"{what}: {error.partition(';')[0]}")
            continue
        figures = result[what]
        ratio = figures["collective_bytes_ratio"] or 0
        parts.append(
            (
                f"{figures['bytes_per_chip']['total'] / 1e9:.2f}",
                f"{figures['collective_bytes'] / 1e9:.2f} ({ratio:.2f})" if what == "train" else "",
                f"{figures['roofline']['step_seconds'] * 1e3:,.0f}",
                f"{figures['roofline']['mfu']:.0%}",
            )
        )
    columns = [", ".join(filter(None, cell)) for cell in zip(*parts, strict=True)] or [""] * 4
    return [name, *columns[:3], "; ".join([columns[3], *errors])]


def write(table: str) -> None:
    before, _, rest = DOCUMENT.read_text().partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    DOCUMENT.write_text(f"{before}{MARKERS[0]}\n{table}{MARKERS[1]}{after}")


def main(argv):
    lines = [" | ".join(COLUMNS), "|".join(["---"] * len(COLUMNS))]
    for name in LINES:
        if name.startswith(flags.FLAGS.only):
            lines.append(" | ".join(cells(name, argv[1:])))
            print(lines[-1], file=sys.stderr, flush=True)
    table = "".join(f"|{line}|\n" for line in lines)
    if flags.FLAGS.write:
        write(table)
    else:
        print(table, end="")


if __name__ == "__main__":
    app.run(main)
