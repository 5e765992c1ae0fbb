"""Muon against AdamW at the rate that suits it here, in the demo's model, at equal time, three seeds.

    python -m sedd_jax.sweep --sweep=configs/sweeps/recipes.py --workdir=runs/recipes

Muon's step takes 1.21 times as long, so AdamW has 484 steps for its 400. Hardware: with tiny.py:paper 2 CPU cores, 3
minutes per point.
"""

from typing import Any

CONFIG = "../tiny.py:paper"
MUON = {"optim.kind": "muon", "optim.lr": 5e-3}
RECIPES = ({"train.steps": 484}, MUON)


def get_sweep() -> list[dict[str, Any]]:
    return [{"train.seed": seed} | recipe for recipe in RECIPES for seed in range(3)]
