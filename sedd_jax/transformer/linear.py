"""The matrix product of the network: a weight with logical axis names, and products with a wider output dtype."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sedd_jax.devices.sharding import gathered, summed

# The name by which rematerialisation finds products: its own policies do not see them, since `_product` is custom.
PRODUCT = "product"

# Uniform on +-1/sqrt(fan_in) for weights [fan_in, ...]: torch's default for Linear, which the reference uses.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=-1)


def bias_init(fan_in: int) -> Callable:
    """An initialiser: uniform on +-1/sqrt(fan_in), torch's default for biases."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Of products of this dtype: float32 is float32. By default a TPU takes 8 bits of the operands, a GPU 11."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(a: Array, b: Array, contracted: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any) -> Array:
    options = {"precision": precision(a.dtype), "preferred_element_type": dtype}
    return jax.lax.dot_general(a, b, (contracted, ((), ())), **options)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: Array, kernel: Array, axes: tuple[str | None, ...], out_dtype: str, gradient_dtype: str) -> Array:
    """x [..., in], kernel [in, ...] with the logical names `axes` -> [..., ...] in out_dtype.

    The backward pass is not JAX's own. (1) It casts and gathers the kernel again, from the parameter: otherwise the
    gathered kernels of all layers would be stored. (2) The kernel's gradient transposes the narrower operand: a tenth
    of a step on a CPU. (3) Its operands have the dtype of x: float32 would be much slower.
    """
    kernel = gathered(kernel.astype(x.dtype), axes)
    return _dot(x, kernel, ((x.ndim - 1,), (0,)), out_dtype)


def _product_backward(axes, _, gradient_dtype, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    gradient = gradient.astype(x.dtype)
    rows, columns = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
    whole = gathered(kernel.astype(x.dtype), axes)
    d_x = _dot(gradient, whole, (columns, tuple(range(1, kernel.ndim))), x.dtype)

    def d_kernel(x: Array, gradient: Array) -> Array:
        if x.shape[-1] * kernel.shape[0] > kernel.size:
            # The barrier keeps XLA from turning the product round again.
            return jnp.moveaxis(jax.lax.optimization_barrier(_dot(gradient, x, (rows, rows), gradient_dtype)), -1, 0)
        return _dot(x, gradient, (rows, rows), gradient_dtype)

    # Devices sum what comes out of the product, in its dtype.
    return d_x, summed(d_kernel, kernel.shape, axes, x, gradient).astype(kernel.dtype)


_product.defvjp(lambda x, kernel, *options: (_product(x, kernel, *options), (x, kernel)), _product_backward)


@jax.custom_vjp
def _add_bias(y: Array, bias: Array) -> Array:
    """The gradient of the bias, a sum over positions, is taken as a product with ones. On a CPU, XLA's own sum takes as
    long as the product with the weights, for the columns of a vocabulary."""
    return y + bias.astype(y.dtype)


def _add_bias_backward(features: int, gradient: Array) -> tuple[Array, Array]:
    rows = tuple(range(gradient.ndim - features))
    return gradient, _dot(jnp.ones(gradient.shape[: len(rows)], gradient.dtype), gradient, (rows, rows), jnp.float32)


_add_bias.defvjp(lambda y, bias: (_add_bias(y, bias), bias.ndim), _add_bias_backward)


class Linear(nn.Module):
    """x [..., in] -> [..., *features], with one matrix product for any number of feature axes.

    axes: the logical names of the weight's axes, input first.
    before: a cheap function of x (a norm, an activation). The backward pass recomputes it and stores no result.
    gradient_dtype: in which the kernel's gradient is summed over devices.
    lora: (rank, scale) of an adapter, scale * a b beside the kernel (Hu et al., arXiv 2106.09685), zero at first.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    zero_init: bool = False
    dtype: str = "float32"
    out_dtype: str | None = None
    gradient_dtype: str = "float32"
    lora: tuple[int, float] = (0, 0.0)

    @nn.compact
    def __call__(self, x: Float[Array, "..."], before: Callable[[Array], Array] = lambda x: x) -> Float[Array, "..."]:
        fan_in = x.shape[-1]
        zeros = nn.initializers.zeros_init()
        kernel_init = nn.with_logical_partitioning(zeros if self.zero_init else _kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (fan_in, *self.features), jnp.float32)

        (rank, scale), adapter = self.lora, ()
        if rank:
            a_init = nn.with_logical_partitioning(_kernel_init, (self.axes[0], None))
            b_init = nn.with_logical_partitioning(zeros, (None, *self.axes[1:]))
            a = self.param("lora_a", a_init, (fan_in, rank), jnp.float32)
            adapter = a, self.param("lora_b", b_init, (rank, *self.features), jnp.float32)

        # Inside a scan XLA cannot merge the recomputation with the forward pass, so nothing has to prevent it.
        @partial(jax.checkpoint, prevent_cse=False)
        def product(x, kernel, *adapter):
            dtypes, x = (self.out_dtype or self.dtype, self.gradient_dtype), before(x).astype(self.dtype)
            y = _product(x, kernel, self.axes, *dtypes)
            for a, b in [adapter] if adapter else []:
                low = _product(x, a, (self.axes[0], None), *dtypes)
                y += scale * _product(low, b, (None, *self.axes[1:]), *dtypes)
            return y

        y = checkpoint_name(product(x, kernel, *adapter), PRODUCT)
        if self.use_bias:
            init = nn.with_logical_partitioning(zeros if self.zero_init else bias_init(fan_in), self.axes[1:])
            y = _add_bias(y, self.param("bias", init, self.features, jnp.float32))
        return y
