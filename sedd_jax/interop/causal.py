"""What causal language models of others have in common: float32 weights, gathered where they are used."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from sedd_jax.devices.sharding import constrain, on_shards, spec
from sedd_jax.errors import InputError
from sedd_jax.interop.sources import as_float32
from sedd_jax.network import Network
from sedd_jax.transformer.linear import precision


class Config(NamedTuple):
    """n_positions: the longest sequence. groups: of heads with the same keys and values. epsilon: of the norms. base:
    of the rotary angles, if there are any."""

    vocab_size: int
    n_positions: int
    dim: int
    layers: int
    inner: int
    heads: int
    groups: int
    epsilon: float
    base: float = 10000.0


def assemble(path: Any, read: Callable, top: dict[str, tuple], blocks: dict[str, tuple], names: list[str]) -> dict:
    """Parameters, float32: {our name: (name, *shape)} of `top`, and {part: shape} of all blocks, whose names are given,
    stacked. read: the array of a name, or None. Raises InputError if one is absent, of another shape or not finite."""

    def take(name: str, *shape: int) -> np.ndarray:
        found, where = read(name), f"{path}: {name}"
        if found is None or found.shape != shape:
            what = "no such weight" if found is None else f"the shape {list(found.shape)}"
            raise InputError(f"{where} should be {list(shape)} by its config, but there is {what}")
        return as_float32({where: found})[where]

    stacked = {part: np.stack([take(f"{name}.{part}", *shape) for name in names]) for part, shape in blocks.items()}
    return {name: take(*entry) for name, entry in top.items()} | {"blocks": stacked}


def gathered(weights: Any) -> Any:
    """The same tree, each array whole on every device."""
    return jax.tree.map(lambda weight: constrain(weight, *[None] * weight.ndim), weights)


def product(x: Float[Array, "... i"], weight: Float[Array, "i o"]) -> Float[Array, "... o"]:
    return jnp.matmul(x, weight, precision=precision(x.dtype))


def look_up(table: Float[Array, "n d"], tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """As in our Transformer, each device looks its columns up."""
    return constrain(table[constrain(tokens, "replica", None)], "replica", None, "embed")


def places(params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Shardings of the weights: all are split along their last axis, which is mostly a multiple of the model width."""
    axes = lambda leaf: (*[None] * (leaf.ndim - 1), "embed")  # noqa: E731
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf.shape, axes(leaf), mesh)), params)


def network(params: Mapping[str, Any], hidden: Callable[[Any], Float[Array, "b l d"]], mesh: Mesh) -> Network:
    """log p(tokens[i + 1] | tokens[:i + 1]), not normalised, at [i], by each device for its own sequences. params: the
    head is `lm_head` [N, D], or without one the embedding `wte`. hidden: tokens [B, L] -> its input."""
    head = {"head": jnp.asarray(params.get("lm_head", params["wte"]))}
    return Network(
        features=lambda tokens, sigma: hidden(tokens),
        log_score=lambda head, features, tokens, sigma: product(features, head["head"].T),
        head=head,
        on_shards=partial(on_shards, places=places(head, mesh), dtype="float32"),
    )
