"""Learning rates around the 3e-4 of the paper, by factors of about 3.

    python -m sedd_jax.sweep --sweep=configs/sweeps/learning_rate.py --workdir=runs/learning_rate

Hardware: that of the config; with baseline.py 2 CPU cores, 25 to 45 minutes for each of the four points.
"""

from typing import Any

CONFIG = "../baseline.py"


def get_sweep() -> list[dict[str, Any]]:
    return [{"optim.lr": lr} for lr in (1e-4, 3e-4, 1e-3, 3e-3)]
