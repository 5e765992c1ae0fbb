"""The matrix product of the network: a weight with logical axis names, and products whose results are wider than their
operands."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sedd_jax.devices.sharding import constrain, gathered

# What rematerialisation knows the results of products by: to it, `_product` with its own backward pass is no dot.
PRODUCT = "product"

# Uniform on +-1/sqrt(fan_in), for weights [fan_in, ...]: what torch gives a Linear layer, and the reference has.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=-1)


def bias_init(fan_in: int) -> Callable:
    """An initialiser: uniform on +-1/sqrt(fan_in), as torch has it for biases."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, kernel: Array, axes: tuple[str | None, ...], out_dtype: str) -> Array:
    """x [..., in], kernel [in, ...] with the logical names `axes` -> [..., ...] in out_dtype.

    The backward pass differs from JAX's own in three ways. It casts and gathers the kernel once more, from the
    parameter itself: what the forward pass made of it would be stored, a second time the weights of all layers. The
    gradient of the kernel is taken the way round in which the narrower operand is transposed: on a CPU that takes a
    tenth off a step, elsewhere it is the same. And the operands have the dtype of x: the float32 gradient of a result
    that is wider than they are would run at a fraction of the speed.
    """
    kernel = gathered(kernel.astype(x.dtype), axes)
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out_dtype)


def _product_backward(axes, _, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    gradient = gradient.astype(x.dtype)
    rows, columns = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
    whole = gathered(kernel.astype(x.dtype), axes)
    d_x = jax.lax.dot_general(gradient, whole, ((columns, tuple(range(1, kernel.ndim))), ((), ())))
    over_rows = ((rows, rows), ((), ()))
    if x.shape[-1] * kernel.shape[0] > kernel.size:
        d_kernel = jnp.moveaxis(jax.lax.dot_general(gradient, x, over_rows), -1, 0)
    else:
        d_kernel = jax.lax.dot_general(x, gradient, over_rows)
    # The gradient is split as the weight is: the compiler by itself would make it whole, with an all-reduce.
    return d_x, constrain(d_kernel, *axes).astype(kernel.dtype)


_product.defvjp(
    lambda x, kernel, axes, out_dtype: (_product(x, kernel, axes, out_dtype), (x, kernel)), _product_backward
)


@jax.custom_vjp
def _add_bias(y: Array, bias: Array) -> Array:
    """The gradient of the bias, a sum over all positions, is a product with ones: of a whole vocabulary's columns a
    CPU's own sum takes as long as the product with the weights."""
    return y + bias.astype(y.dtype)


def _add_bias_backward(features: int, gradient: Array) -> tuple[Array, Array]:
    rows = tuple(range(gradient.ndim - features))
    ones = jnp.ones(gradient.shape[: len(rows)], gradient.dtype)
    return gradient, jax.lax.dot_general(ones, gradient, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)


_add_bias.defvjp(lambda y, bias: (_add_bias(y, bias), bias.ndim), _add_bias_backward)


class Linear(nn.Module):
    """x [..., in] -> [..., *features], with one matrix product however many feature axes there are.

    axes: the logical names of the weight's axes, input first.
    before: what x goes through first. The backward pass computes it again from x instead of storing its result, so it
        should be cheap: a norm, an activation.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    zero_init: bool = False
    dtype: str = "float32"
    out_dtype: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."], before: Callable[[Array], Array] = lambda x: x) -> Float[Array, "..."]:
        fan_in = x.shape[-1]
        zeros = nn.initializers.zeros_init()
        kernel_init = nn.with_logical_partitioning(zeros if self.zero_init else _kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (fan_in, *self.features), jnp.float32)

        # In a scan, nothing need keep XLA from merging what is computed again with the first time.
        @partial(jax.checkpoint, prevent_cse=False)
        def product(x, kernel):
            return _product(before(x).astype(self.dtype), kernel, self.axes, self.out_dtype or self.dtype)

        y = checkpoint_name(product(x, kernel), PRODUCT)
        if self.use_bias:
            init = nn.with_logical_partitioning(zeros if self.zero_init else bias_init(fan_in), self.axes[1:])
            y = _add_bias(y, self.param("bias", init, self.features, jnp.float32))
        return y
