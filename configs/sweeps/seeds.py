"""The same experiment with other seeds of weights, data order and noise: how much of a difference is chance.

    python -m sedd_jax.sweep --sweep=configs/sweeps/seeds.py --workdir=runs/seeds

Hardware: that of the config; with baseline.py 2 CPU cores, 25 to 45 minutes for each of the three points.
"""

from typing import Any

CONFIG = "../baseline.py"


def get_sweep() -> list[dict[str, Any]]:
    return [{"train.seed": seed} for seed in range(3)]
