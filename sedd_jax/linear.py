"""The matrix product of the network: a weight with logical axis names, and products whose results are wider than their
operands."""

from collections.abc import Callable

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


def _product(x: Array, kernel: Array, out_dtype: str) -> Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out_dtype)


@jax.custom_vjp
def _widening_product(x: Array, kernel: Array) -> Array:
    """bfloat16 operands, float32 result; and bfloat16 operands in the backward pass too, which would otherwise have
    the float32 gradient of the result as one, at a fraction of the speed."""
    return _product(x, kernel, "float32")


def _widening_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda x, kernel: _product(x, kernel, x.dtype), *operands)[1](gradient.astype(operands[0].dtype))


_widening_product.defvjp(lambda x, kernel: (_widening_product(x, kernel), (x, kernel)), _widening_backward)


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
        x = x.astype(self.dtype)
        y = _product(x, kernel, out_dtype) if out_dtype == self.dtype else _widening_product(x, kernel)
        if self.use_bias:
            init = nn.with_logical_partitioning(zeros if self.zero_init else bias_init(fan_in), self.axes[1:])
            y = y + self.param("bias", init, self.features, jnp.float32).astype(out_dtype)
        return y
