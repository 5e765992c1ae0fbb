"""A distribution over all sequences of a tiny vocabulary, small enough to enumerate: exact scores, exact everything."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from sedd_jax.rates import Absorbing, Graph, Uniform

V, L = 3, 2

# As users compile, unlike what conftest.py asks for: for functions that go through millions of numbers.
OPTIMISED = {"xla_backend_optimization_level": 3}


def rate_matrix(graph: Graph) -> np.ndarray:
    return np.asarray(graph.rate(jnp.arange(graph.num_states)), np.float64).T


def data_distribution(seed: int = 0, vocab_size: int = V, length: int = L) -> np.ndarray:
    """p(x0) over vocab_size^length sequences, far from uniform and far from a product."""
    size = vocab_size**length
    weights = np.random.default_rng(seed).dirichlet(np.full(size, 0.7))
    return (weights + 0.18 / size) / 1.18


def sequences(num_states: int) -> np.ndarray:
    """All sequences in the order of their number, [num_states^L, L]."""
    return np.array(list(itertools.product(range(num_states), repeat=L)))


def number(x, num_states: int):
    """The number of each sequence, of [..., length]."""
    length = x.shape[-1]
    return sum(x[..., i] * num_states ** (length - 1 - i) for i in range(length))


def marginal(graph: Graph, p0: np.ndarray, sigma: float) -> np.ndarray:
    """p_sigma over num_states^L sequences, in float64."""
    transition = scipy.linalg.expm(sigma * rate_matrix(graph))[:, :V]
    p = p0.reshape((V,) * L)
    for axis in range(L):
        p = np.moveaxis(np.tensordot(transition, p, axes=(1, axis)), 0, axis)
    return p.ravel()


def transition(graph: Graph, sigma):
    """Columns p(.|x0), [N, V]."""
    v, stay = graph.vocab_size, jnp.exp(-sigma)
    if isinstance(graph, Absorbing):
        return jnp.concatenate([stay * jnp.eye(v), -jnp.expm1(-sigma) * jnp.ones((1, v))])
    assert isinstance(graph, Uniform)
    return stay * jnp.eye(v) - jnp.expm1(-sigma) / v


def plugin_score_fn(graph: Graph, p0: np.ndarray, error: float = 0.0):
    """The same scores through `Graph.score_of_plugin`, from p(x0 at i | x at the others); error: of its logits."""
    v = graph.vocab_size
    length = round(math.log(p0.size, v))
    p0 = jnp.asarray(p0.reshape((v,) * length), jnp.float32)
    wrong = error * jnp.sin(jnp.arange(length * v).reshape(length, v) * 1.7)

    def logits(x, sigma):
        seen, rows = transition(graph, sigma)[x], []
        for i in range(length):
            p = p0
            for j in reversed([j for j in range(length) if j != i]):
                p = jnp.tensordot(p, seen[j], axes=(j, 0))
            rows.append(jnp.log(p))
        return jnp.pad(jnp.stack(rows) + wrong, ((0, 0), (0, graph.num_states - v)))

    return lambda x, sigma: graph.score_of_plugin(jax.vmap(logits)(x, sigma), x, sigma[:, None])


def exact_score_fn(graph: Graph, p0: np.ndarray):
    """A score_fn(tokens [B, length], sigma [B]) with the true ratios of p_sigma, computed from p0 in jax.

    A sequence's neighbours are found by number; ratios of states that cannot be reached are never used.
    """
    n, v = graph.num_states, graph.vocab_size
    length = round(math.log(p0.size, v))
    p0 = jnp.asarray(p0.reshape((v,) * length), jnp.float32)

    def marginal(sigma):
        p = p0
        for axis in range(length):
            p = jnp.moveaxis(jnp.tensordot(transition(graph, sigma), p, axes=(1, axis)), 0, axis)
        return p.ravel()

    def log_score(x, p):
        rows = []
        for i in range(length):
            step = n ** (length - 1 - i)
            neighbours = number(x, n) + (jnp.arange(n) - x[i]) * step
            # e^-1000 stands for a probability that is 0 in float32.
            rows.append(jnp.maximum(jnp.log(p[neighbours]), -1000) - jnp.log(p[number(x, n)]))
        return jnp.stack(rows)

    def log_scores(x, sigma):
        # Most samplers have all sequences at one noise level, and then one marginal serves all of them.
        return jax.lax.cond(
            jnp.all(sigma == sigma[0]),
            lambda: jax.vmap(log_score, in_axes=(0, None))(x, marginal(sigma[0])),
            lambda: jax.vmap(lambda x, sigma: log_score(x, marginal(sigma)))(x, sigma),
        )

    return log_scores
