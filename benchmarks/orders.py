"""The error of each sampler against network calls, on a known distribution: four tokens, four positions.

python -m benchmarks.orders [--draws=1000000] [--plot=docs/orders.png]

Total variation between samples with exact scores and the true distribution over 256 sequences. The floor is that of
`draws` exact samples.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from matplotlib import pyplot

from sedd_jax import sampling
from sedd_jax.noise import Geometric
from sedd_jax.rates import Absorbing, Graph, Uniform
from tests import toy

SIZE = 4
GRAPHS = {"absorbing": Absorbing(SIZE), "uniform": Uniform(SIZE)}
NOISE = Geometric(1e-4, 20.0)
STEPS = (2, 4, 8, 16, 32, 64)
METHODS = {
    "absorbing": ("analytic", "euler", "trapezoidal", "first_hitting", "confidence"),
    "uniform": ("analytic", "euler", "trapezoidal"),
}
SLICE = 50_000

flags.DEFINE_integer("draws", 1_000_000, "Samples of each kind.")
flags.DEFINE_string("plot", None, "File for the plot.")


def distances(graph: Graph, method: str, p0: np.ndarray, draws: int) -> list[tuple[float, float]]:
    """(network calls, total variation) for each number of steps; from one call to one per position without a grid."""
    score_fn, sampler = toy.exact_score_fn(graph, p0), sampling.Sampler(method=method, rows=10**6)

    @jax.jit
    def count(steps, first):
        key, shape = jax.random.key(0), (SLICE, SIZE)
        drawn = sampling.simulate(key, score_fn, graph, NOISE, shape, steps=steps, sampler=sampler, first_index=first)
        return jnp.bincount(toy.number(drawn.tokens, SIZE), length=len(p0)), drawn.calls

    found = []
    for steps in STEPS if method in sampling.GRID_METHODS else (1, 2, SIZE):
        parts = [count(steps, first) for first in range(0, draws, SLICE)]
        share = sum(np.asarray(counts) for counts, _ in parts) / (SLICE * len(parts))
        found.append((int(parts[0][1]), float(np.abs(share - p0).sum() / 2)))
    return found


def main(_):
    p0, draws = toy.data_distribution(vocab_size=SIZE, length=SIZE), flags.FLAGS.draws
    floor = float(np.sqrt(p0 / (2 * np.pi * draws)).sum())
    found = {
        name: {method: distances(graph, method, p0, draws) for method in METHODS[name]}
        for name, graph in GRAPHS.items()
    }
    if flags.FLAGS.plot:
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for axis, (name, methods) in zip(axes, found.items(), strict=True):
            for method, points in methods.items():
                axis.loglog(*zip(*points, strict=True), marker="o", label=method)
            axis.axhline(floor, color="grey", linestyle=":", label=f"{draws:,} exact draws")
            axis.set(title=name, xlabel="network calls")
            axis.legend()
        axes[0].set_ylabel("total variation")
        figure.savefig(flags.FLAGS.plot, dpi=120)
    print(json.dumps({"floor": floor} | found))


if __name__ == "__main__":
    app.run(main)
