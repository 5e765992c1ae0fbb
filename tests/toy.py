"""A distribution over all sequences of a tiny vocabulary, small enough to enumerate: exact scores, exact everything."""

import itertools

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from sedd_jax.rates import Absorbing, Graph, Uniform

V, L = 3, 2


def rate_matrix(graph: Graph) -> np.ndarray:
    return np.asarray(graph.rate(jnp.arange(graph.num_states)), np.float64).T


def data_distribution(seed: int = 0) -> np.ndarray:
    """p(x0) over V^L sequences, far from uniform and far from a product."""
    weights = np.random.default_rng(seed).dirichlet(np.full(V**L, 0.7))
    return (weights + 0.02) / (1 + 0.02 * V**L)


def sequences(num_states: int) -> np.ndarray:
    """All sequences in the order of their number, [num_states^L, L]."""
    return np.array(list(itertools.product(range(num_states), repeat=L)))


def number(x, num_states: int):
    """The number of each sequence [..., L]."""
    return sum(x[..., i] * num_states ** (L - 1 - i) for i in range(L))


def marginal(graph: Graph, p0: np.ndarray, sigma: float) -> np.ndarray:
    """p_sigma over num_states^L sequences, in float64."""
    transition = scipy.linalg.expm(sigma * rate_matrix(graph))[:, :V]
    p = p0.reshape((V,) * L)
    for axis in range(L):
        p = np.moveaxis(np.tensordot(transition, p, axes=(1, axis)), 0, axis)
    return p.ravel()


def exact_score_fn(graph: Graph, p0: np.ndarray):
    """A score_fn(tokens [B, L], sigma [B]) with the true ratios of p_sigma, computed from p0 in jax.

    A sequence's neighbours are found by number; ratios of states that cannot be reached are never used.
    """
    n = graph.num_states
    p0 = jnp.asarray(p0.reshape((V,) * L), jnp.float32)

    def transition(sigma):
        """Columns p(.|x0), [N, V]."""
        stay = jnp.exp(-sigma)
        if isinstance(graph, Absorbing):
            return jnp.concatenate([stay * jnp.eye(V), -jnp.expm1(-sigma) * jnp.ones((1, V))])
        assert isinstance(graph, Uniform)
        return stay * jnp.eye(V) - jnp.expm1(-sigma) / V

    def log_score(x, sigma):
        p = jnp.einsum("ai,bj,ij->ab", transition(sigma), transition(sigma), p0).ravel()
        here = p[number(x, n)]
        rows = []
        for i in range(L):
            step = n ** (L - 1 - i)
            neighbours = number(x, n) + (jnp.arange(n) - x[i]) * step
            rows.append(jnp.log(p[neighbours]) - jnp.log(here))
        return jnp.stack(rows)

    import jax

    return jax.vmap(log_score)
