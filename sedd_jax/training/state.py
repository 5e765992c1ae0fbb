"""The state that a training step takes and returns, its optimizer, and its initialisation on the devices."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Int

from sedd_jax.devices import sharding
from sedd_jax.errors import InputError, check_fields
from sedd_jax.typing import PRNGKey, Scalar

Optimizer = optax.GradientTransformation


class TrainState(NamedTuple):
    """step: number of updates. params: those that are trained. ema: their running average."""

    step: Int[Array, ""]
    params: Any
    ema: Any
    opt_state: optax.OptState


# Of the learning rate, by the share that is done of the steps after the warm-up.
DECAYS = {
    "none": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,
}


def learning_rate(
    lr: float, warmup_steps: int, *, decay: str = "none", decay_steps: int = 0, floor: float = 0.0
) -> Callable[[Int[Array, ""]], Scalar]:
    """Linear warm-up to lr, then constant. Update n (from 0) has (n + 1) / warmup_steps of lr, as in the reference.
    decay: of DECAYS, from lr at the end of the warm-up to floor * lr at update decay_steps, and constant from there."""

    def rate(count: Int[Array, ""]) -> Scalar:
        done = jnp.clip((count + 1 - warmup_steps) / max(decay_steps - warmup_steps, 1), 0.0, 1.0)
        share = floor + (1 - floor) * DECAYS[decay](done)
        return lr * jnp.minimum((count + 1) / max(warmup_steps, 1), 1.0) * share

    return rate


def clip_by_global_norm(clip: float) -> Optimizer:
    """Scales the gradient by min(1, clip / its norm), fused into Adam's reading of it. Optax's own adds four passes."""

    def scaled(grads: Any, _) -> Any:
        factor = jnp.minimum(1, clip / optax.tree.norm(grads))
        return jax.tree.map(lambda grad: factor * grad, grads)

    return optax.stateless(scaled)


@functools.lru_cache(maxsize=4)  # so that equal options give equal keys of `abstract_state`
def make_optimizer(
    *,
    lr: float = 3e-4,
    warmup_steps: int = 2500,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decayed: str = "all",
    clip: float = 1.0,
    mu_dtype: str = "float32",
    kind: str = "adamw",
    decay: str = "none",
    decay_steps: int = 0,
    floor: float = 0.0,
) -> Optimizer:
    """AdamW behind a clip of the global gradient norm. The defaults are those of the reference implementation.
    kind: 'muon' takes Muon (Liu et al., arXiv 2502.16982) for the products of the blocks, at the scale of AdamW's
        updates, so that one lr serves both, and AdamW for all other parameters.
    weight_decay, decayed: of all parameters, or of 'kernels' alone, the weights of products (with Muon, those of the
        blocks), and not of biases, norms and embeddings. decay, decay_steps, floor: see `learning_rate`.
    mu_dtype: of the first moment, 'float32' or 'bfloat16', which does not resolve the updates of the second.
    clip: of the gradient of nats per sequence, so that 1 takes effect in almost every step."""
    allowed = dict.fromkeys(("lr", "eps"), "(0, inf)") | dict.fromkeys(("b1", "b2"), "[0, 1)")
    allowed |= {"clip": "(0, inf]", "floor": "[0, 1]"}  # an infinite clip is none
    allowed |= dict.fromkeys(("weight_decay", "warmup_steps"), "[0, inf)")
    allowed |= {"kind": ("adamw", "muon"), "mu_dtype": ("float32", "bfloat16"), "decayed": ("all", "kernels")}
    check_fields("optim", locals(), **allowed, decay=DECAYS)
    if decay != "none" and decay_steps <= warmup_steps:
        raise InputError(f"optim.decay_steps={decay_steps} must be above optim.warmup_steps={warmup_steps}")
    rate = learning_rate(lr, warmup_steps, decay=decay, decay_steps=decay_steps, floor=floor)
    shared = {"eps": eps, "weight_decay": weight_decay, "mu_dtype": mu_dtype}
    if kind == "muon":
        of_adam = {"adam_b1": b1, "adam_b2": b2, "adam_weight_decay": weight_decay if decayed == "all" else 0.0}
        # Kernels [layers, in, ..., out] of the blocks, but for those of the conditioning.
        axes, products = optax.contrib.MuonDimensionNumbers(1, -1), r"^(?!.*modulation).*blocks.*kernel"
        of_muon = {"muon_weight_dimension_numbers": functools.partial(_chosen, products, axes, None)}
        update = optax.contrib.muon(rate, **shared, **of_adam, **of_muon, consistent_rms=0.2)
    else:
        kernels = functools.partial(_chosen, "kernel|lora_", True, False) if decayed == "kernels" else None
        update = optax.adamw(rate, b1, b2, mask=kernels, **shared)
    return optax.chain(clip_by_global_norm(clip), update)


def _chosen(pattern: str, inside: Any, outside: Any, params: Any) -> Any:
    """For each parameter one of two values: whether its path has a match."""
    named = lambda path: re.search(pattern, jax.tree_util.keystr(path))  # noqa: E731
    return jax.tree.map_with_path(lambda path, _: inside if named(path) else outside, params)


def split(params: Any) -> tuple[Any, Any]:
    """Of parameters those that are trained beside a frozen model, adapters and the table of classes; and the others."""
    trained = lambda path: path[0] == "classes" or path[-1].startswith("lora_")  # noqa: E731
    flat = flatten_dict(params)
    return tuple(unflatten_dict({path: flat[path] for path in flat if trained(path) == kind}) for kind in (True, False))


def merged(*trees: Any) -> Any:
    """One tree of all parameters; later ones replace earlier ones."""
    return unflatten_dict({path: leaf for tree in trees for path, leaf in flatten_dict(tree).items()})


def folded(params: Any, scale: float) -> Any:
    """The parameters of the same model without adapters: kernels [layers, in, ...] with scale * a b added."""
    flat = flatten_dict(params)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        a, b = flat.pop(path), flat.pop((*path[:-1], "lora_b"))
        product = jnp.einsum("lir,lr...->li...", a, b, precision=jax.lax.Precision.HIGHEST)
        flat[(*path[:-1], "kernel")] += scale * product
    return unflatten_dict(flat)


def init_params(key: PRNGKey, model: nn.Module) -> Any:
    """Parameters in Flax's boxes. They depend neither on length nor attention kernel, which may refuse this one."""
    return model.clone(attention="plain").init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones(1))["params"]


def _init(key: PRNGKey, model: nn.Module, optimizer: Optimizer) -> TrainState:
    params = init_params(key, model)
    params = split(params)[0] if model.lora_rank else params
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


@functools.lru_cache(maxsize=4)  # tracing a model takes a second
def abstract_state(model: nn.Module, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing anything."""
    return _abstract(jax.eval_shape(lambda: _init(jax.random.key(0), model, optimizer)), mesh)


@functools.lru_cache(maxsize=4)
def abstract_params(model: nn.Module, mesh: Mesh) -> Any:
    """Those of all parameters, also of frozen ones."""
    return _abstract(jax.eval_shape(lambda: init_params(jax.random.key(0), model)), mesh)


def _abstract(boxed: Any, mesh: Mesh) -> Any:
    abstract = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(abstract, nn.unbox(boxed), sharding.tree_sharding(boxed, mesh))


def init_state(key: PRNGKey, model: nn.Module, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """A fresh state; every device computes its own part."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    return jax.jit(lambda key: nn.unbox(_init(key, model, optimizer)), out_shardings=places)(key)
