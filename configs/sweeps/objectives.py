"""The AR baseline and the diffusion models at equal budget: the same network, data, steps and tokens.

    python -m sedd_jax.sweep --sweep=configs/sweeps/objectives.py --workdir=runs/objectives

The AR figure is a likelihood, the others are bounds. Hardware: with tiny.py:paper 2 CPU cores, 6 minutes per point.
"""

from typing import Any

CONFIG = "../tiny.py:paper"


def get_sweep() -> list[dict[str, Any]]:
    return [
        {"objective": "ar"},
        {"graph.kind": "absorbing"},
        {"graph.kind": "absorbing", "model.parametrisation": "mean", "model.time_conditioning": False},
        {"graph.kind": "uniform", "noise.kind": "geometric"},
        {"graph.kind": "uniform", "model.parametrisation": "plugin"},
    ]
