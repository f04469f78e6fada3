"""Networks for vector fields: Equinox modules `m`, called as `m(t, y)` on one sample."""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


def field(
    t: Float[Array, ""], y: Float[Array, " *event"], m: Callable[..., Float[Array, " *event"]]
) -> Float[Array, " *event"]:
    """The vector field of a module: `f(t, y, m) = m(t, y)`."""
    return m(t, y)


class _ConcatSquash(eqx.Module):
    """`(W x + b) sigmoid(t u + v) + t w`: an affine layer gated and shifted by the time."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]
    gate: Float[Array, "2 out"]
    shift: Float[Array, " out"]

    def __init__(self, size_in: int, size_out: int, key: PRNGKeyArray):
        weight_key, gate_key, shift_key = jax.random.split(key, 3)
        bound = 1 / math.sqrt(size_in)
        self.weight = jax.random.uniform(
            weight_key, (size_out, size_in), minval=-bound, maxval=bound
        )
        self.bias = jnp.zeros(size_out)
        self.gate = jax.random.uniform(gate_key, (2, size_out), minval=-1.0, maxval=1.0)
        self.shift = jax.random.uniform(shift_key, (size_out,), minval=-1.0, maxval=1.0)

    def __call__(self, t: Float[Array, ""], x: Float[Array, " in"]) -> Float[Array, " out"]:
        gate = jax.nn.sigmoid(t * self.gate[0] + self.gate[1])
        return (self.weight @ x + self.bias) * gate + t * self.shift


class ConcatSquash(eqx.Module):
    """A multilayer perceptron whose hidden layers are gated and shifted by the time.

    The output layer is affine with small initial weights, so a fresh flow is close to the identity.

    Args:
        event_shape: shape of one sample; an integer stands for a vector.
        widths: sizes of the hidden layers.
        key: for the initial weights.
        activation: elementwise, after each hidden layer; smooth, since it is differentiated twice.

    References: Grathwohl et al. (2019), arXiv:1810.01367.
    """

    hidden: tuple[_ConcatSquash, ...]
    weight: Float[Array, "size hidden"]
    bias: Float[Array, " size"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        widths: Sequence[int] = (64, 64),
        *,
        key: PRNGKeyArray,
        activation: Callable[[Array], Array] = jnp.tanh,
    ):
        size = math.prod(np.atleast_1d(event_shape).tolist())
        sizes = [size, *widths]
        *keys, last = jax.random.split(key, len(sizes))
        self.hidden = tuple(map(_ConcatSquash, sizes[:-1], sizes[1:], keys))
        bound = 0.1 / math.sqrt(sizes[-1])
        self.weight = jax.random.uniform(last, (size, sizes[-1]), minval=-bound, maxval=bound)
        self.bias = jnp.zeros(size)
        self.activation = activation

    def __call__(self, t: Float[Array, ""], y: Float[Array, " *event"]) -> Float[Array, " *event"]:
        x = y.reshape(-1)
        for layer in self.hidden:
            x = self.activation(layer(t, x))
        return (self.weight @ x + self.bias).reshape(y.shape)
