"""What makes a small model learn faster: the paper's recipe, and the changes of configs/tiny.py one after another.

    python -m sedd_jax.sweep --sweep=configs/sweeps/recipes.py --workdir=runs/recipes

400 steps each, three seeds of the first and the last. Hardware: with tiny.py:paper 2 CPU cores, 3 minutes per point.
"""

from typing import Any

CONFIG = "../tiny.py:paper"
MUON = {"optim.kind": "muon", "optim.lr": 5e-3}
MEAN = {"model.parametrisation": "mean", "model.time_conditioning": False}
DECAY = {"optim.decay": "linear", "optim.decay_steps": 400}


def get_sweep() -> list[dict[str, Any]]:
    changes = [{}, MUON, MUON | MEAN, MUON | MEAN | {"model.dropout": 0.0}]
    best = MUON | MEAN | {"model.dropout": 0.0} | DECAY
    return [*changes, best, *({"train.seed": seed} | recipe for seed in (1, 2) for recipe in ({}, best))]
