"""Ahead-of-time compilation of the paper's models for TPU slices, as a table: see docs/tpu.md.

    python -m benchmarks.aot [--only=small/v5e-16] [--write] [-- --config.model.remat=blocks ...]

One `sedd_jax.compile` per line, each in its own process; a line takes one to several minutes. --write puts the table
between the two markers in docs/benchmarks.md, otherwise it goes to stdout. Arguments after -- apply to every line.
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
DOCUMENT = ROOT / "docs" / "benchmarks.md"
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
# Weights are split over 16 chips, at least 48 columns each; the groups of 16 are replicas.
LINES = {f"{model}/{name}": (model, shape) for model in ("small", "medium") for name, shape in SLICES.items()}
COLUMNS = (
    "model",
    "slice",
    "chips",
    "GB per chip: state + temporaries = total",
    "left, GB",
    "TFLOPs per chip (useful)",
    "collectives, GB sent per chip (of the least)",
    "ms: compute, HBM, links",
    "MFU: all overlap, none",
)


def compile_line(model: str, shape: str, overrides: list[str]) -> tuple[dict | None, str]:
    """The figures, or None and the error line."""
    command = [sys.executable, "-m", "sedd_jax.compile", f"--config=configs/{model}.py", f"--topology={shape}"]
    per_chip = BATCH // math.prod(map(int, shape.partition(":")[2].split("x")))
    fixed = {"mesh.data": -1, "mesh.fsdp": 16, "train.batch_size": BATCH, "train.microbatches": max(1, per_chip // 16)}
    options = [f"--config.{name}={value}" for name, value in fixed.items()]
    done = subprocess.run([*command, *options, *overrides], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1].removeprefix("error: ")
    return json.loads(done.stdout.splitlines()[-1]), ""


def cells(name: str, figures: dict | None, error: str) -> list[str]:
    model, slice_name = name.split("/")
    if figures is None:
        return [model, slice_name, "", error.partition(";")[0], *[""] * (len(COLUMNS) - 4)]
    train = figures["train"]
    held, roof = train["bytes_per_chip"], train["roofline"]
    milliseconds = ", ".join(
        f"{roof[part] * 1e3:.0f}" for part in ("compute_seconds", "memory_seconds", "link_seconds")
    )
    return [
        model,
        slice_name,
        str(figures["chips"]),
        " + ".join(f"{held[part] / 1e9:.2f}" for part in ("arguments", "temporaries"))
        + f" = {held['total'] / 1e9:.2f}",
        f"{train['headroom'] / 1e9:.2f}",
        f"{train['program_flops_per_chip'] / 1e12:.2f} ({train['flops_per_step'] / figures['chips'] / 1e12:.2f})",
        f"{train['collective_bytes'] / 1e9:.2f} ({train['collective_bytes_ratio']:.2f})",
        milliseconds,
        f"{roof['mfu']:.0%}, {roof['mfu_serial']:.0%}",
    ]


def write(table: str) -> None:
    before, _, rest = DOCUMENT.read_text().partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    DOCUMENT.write_text(f"{before}{MARKERS[0]}\n{table}{MARKERS[1]}{after}")


def main(argv):
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for name, (model, shape) in LINES.items():
        if name.startswith(flags.FLAGS.only):
            lines.append(cells(name, *compile_line(model, shape, argv[1:])))
            print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if flags.FLAGS.write:
        write(table)
    else:
        print(table, end="")


if __name__ == "__main__":
    app.run(main)
