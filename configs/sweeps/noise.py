"""Both graphs with both schedules.

    python -m sedd_jax.sweep --sweep=configs/sweeps/noise.py --workdir=runs/noise
    python -m sedd_jax.sweep --sweep=configs/sweeps/noise.py --workdir=runs/noise --config=configs/small.py \
        --print_commands

Hardware: that of the config; with baseline.py 2 CPU cores, 25 to 45 minutes for each of the four points.
"""

from itertools import product
from typing import Any

CONFIG = "../baseline.py"


def get_sweep() -> list[dict[str, Any]]:
    return [
        {"graph.kind": graph, "noise.kind": noise}
        for graph, noise in product(("absorbing", "uniform"), ("loglinear", "geometric"))
    ]
