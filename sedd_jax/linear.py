"""The matrix product of the network: a weight with logical axis names, and products whose results are wider than their
operands."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sedd_jax.sharding import gather

# Uniform on +-1/sqrt(fan_in), for weights [fan_in, ...]: what torch gives a Linear layer, and the reference has.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=-1)


def bias_init(fan_in: int) -> Callable:
    """An initialiser: uniform on +-1/sqrt(fan_in), as torch has it for biases."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, kernel: Array, out_dtype: str) -> Array:
    """x [..., in], kernel [in, ...] -> [..., ...] in out_dtype.

    The backward pass differs from JAX's own in two ways. The gradient of the kernel is taken the way round in which the
    narrower operand is transposed: on a CPU that takes a tenth off a step, elsewhere it is the same. And the operands
    have the dtype of x: the float32 gradient of a result that is wider than they are would run at a fraction of the
    speed.
    """
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out_dtype)


def _product_backward(_, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    gradient = gradient.astype(x.dtype)
    rows, columns = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
    d_x = jax.lax.dot_general(gradient, kernel, ((columns, tuple(range(1, kernel.ndim))), ((), ())))
    over_rows = ((rows, rows), ((), ()))
    if x.shape[-1] * kernel.shape[0] > kernel.size:
        return d_x, jnp.moveaxis(jax.lax.dot_general(gradient, x, over_rows), -1, 0)
    return d_x, jax.lax.dot_general(x, gradient, over_rows)


_product.defvjp(lambda x, kernel, out_dtype: (_product(x, kernel, out_dtype), (x, kernel)), _product_backward)


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
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    zero_init: bool = False
    dtype: str = "float32"
    out_dtype: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        fan_in = x.shape[-1]
        zeros = nn.initializers.zeros_init()
        kernel_init = nn.with_logical_partitioning(zeros if self.zero_init else _kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (fan_in, *self.features), jnp.float32)
        kernel = gather(kernel.astype(self.dtype), self.axes)
        out_dtype = self.out_dtype or self.dtype
        y = _product(x.astype(self.dtype), kernel, out_dtype)
        if self.use_bias:
            init = nn.with_logical_partitioning(zeros if self.zero_init else bias_init(fan_in), self.axes[1:])
            y = _add_bias(y, self.param("bias", init, self.features, jnp.float32))
        return y
