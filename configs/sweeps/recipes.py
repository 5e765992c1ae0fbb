"""Muon against the paper's AdamW, in the demo's model, with three seeds.

    python -m sedd_jax.sweep --sweep=configs/sweeps/recipes.py --workdir=runs/recipes

400 steps each. Hardware: with tiny.py:paper 2 CPU cores, 3 minutes per point.
"""

from typing import Any

CONFIG = "../tiny.py:paper"
MUON = {"optim.kind": "muon", "optim.lr": 5e-3}


def get_sweep() -> list[dict[str, Any]]:
    return [{"train.seed": seed} | recipe for seed in range(3) for recipe in ({}, MUON)]
