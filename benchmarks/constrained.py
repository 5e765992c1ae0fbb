"""A network call of the first-hitting sampler with a rule for a hole, beside the same call without the rule.

python -m benchmarks.constrained [--config=configs/small.py] [--config.model.num_layers=4] [--hole=32] [--states=50]

The rule is a random automaton whose classes share the vocabulary out. No array has both states and tokens as axes.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks.rounds import medians
from sedd_jax.sampling import Automaton, Rules
from sedd_jax.sampling.constrained import grouped
from sedd_jax.training.experiment import SamplingOptions, make_experiment

config_flags.DEFINE_config_file("config", "configs/small.py")
flags.DEFINE_integer("vocab_size", 50_257, "Tokens, without MASK.")
flags.DEFINE_integer("batch", 1, "Sequences.")
flags.DEFINE_integer("hole", 32, "Tokens to fill; the others of the window are given.")
flags.DEFINE_integer("states", 50, "Of the automaton.")
flags.DEFINE_integer("classes", 200, "Of tokens; from each state half of them lead on.")
flags.DEFINE_integer("rows", 512, "sampling.rows: positions of a chunk.")
flags.DEFINE_integer("repeats", 3, "Rounds.")


def random_rule(states: int, classes: int, vocab_size: int, rng: np.random.Generator) -> Automaton:
    class_of = rng.integers(classes, size=vocab_size).astype(np.int32)
    source, label = np.nonzero(rng.random((states, classes)) < 0.5)
    source, label, target = (a.astype(np.int32) for a in (source, label, rng.integers(states, size=len(source))))
    by_source = grouped(source, states)
    return Automaton(grouped(class_of, classes), class_of, source, label, target, by_source, np.arange(states) == 0)


def shapes(jaxpr) -> set[tuple[int, ...]]:
    """Of all arrays in a program, loops and calls included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {getattr(value.aval, "shape", ()) for value in equation.outvars}
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= shapes(inner)
    return found


def main(_):
    options, rng = flags.FLAGS, np.random.default_rng(0)
    experiment = make_experiment(options.config, options.vocab_size)
    shape = options.batch, options.config.data.length
    given = np.broadcast_to(np.arange(shape[1]) >= options.hole, shape)
    places = np.broadcast_to(np.arange(options.hole, dtype=np.int32), (options.batch, options.hole))
    numbers = np.arange(options.batch, dtype=np.int32)
    rules = Rules(places, np.where(places == 0, 0, -1), places == options.hole - 1, numbers * 0, numbers)
    automaton = random_rule(options.states, options.classes, options.vocab_size, rng)
    sampler = SamplingOptions(method="first_hitting", rows=options.rows)
    with jax.set_mesh(experiment.mesh):
        params, values = experiment.init_state(jax.random.key(0)).params, jnp.zeros(shape, jnp.int32)
        draw = experiment.sample_fn(sampler)
        plain = params, jax.random.key(1), (given, values), options.hole, 0
        ruled = params, jax.random.key(1), (given, values, rules), options.hole, 0, automaton
        program = jax.make_jaxpr(draw)(*ruled).jaxpr
        large = [s for s in shapes(program) if options.states in s and max(s) >= options.vocab_size]
        assert not large, large
        seconds = medians(options.repeats, plain=lambda: draw(*plain), ruled=lambda: draw(*ruled))
        assert draw(*plain).calls == draw(*ruled).calls == options.hole
    figures = {name: value / options.hole for name, value in seconds.items()}
    answer = {"seconds_per_call": figures, "ratio": figures["ruled"] / figures["plain"]}
    print(json.dumps(answer | {"moves": len(automaton.source), "device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    app.run(main)
