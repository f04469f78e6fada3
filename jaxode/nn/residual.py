"""The residual network of `jaxode.nn`."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import integer
from jaxode._checks.caller import public
from jaxode._checks.event_shapes import as_event_shape, as_period, radius_of
from jaxode._checks.samples import check_key
from jaxode.nn.base import WAVES, Dense, Network, draws, encoded_context, equal_parts

# Activations before the output stay below this. Near the data they are below 10.
LARGEST_ACTIVATION = 20.0


def saturated(h: Array) -> Array:
    """`h` near zero, and at most `LARGEST_ACTIVATION` in size."""
    return LARGEST_ACTIVATION * jnp.tanh(h / LARGEST_ACTIVATION)


class Residual(Network):
    """A residual network whose blocks are scaled and shifted by the time and the context.

    With `e` the sines and cosines of `pi k t` for `k` = 1 to 4 and an encoding of the context, a
    block is `h + W activation((1 + a(e)) h + b(e))`, with affine `a` and `b`. The output is affine
    in `20 tanh(activation(h) / 20)` of the last block, plus `c(e) y`, which is the whole field
    between two normals. So it grows no faster than `y`, and samples far from the data do not
    overflow. Times are in [0, 1], as in `cnf` by default: 2 looks like 0.

    The best density for its time in matching: see docs/choosing.md. It has no closed form of its
    divergence.

    Args:
        event_shape: shape of one sample; an integer stands for a vector.
        width: size of the blocks.
        blocks: number of blocks.
        key: draws the initial weights.
        context_size: size of the context vector in `m(t, y, context)`.
        period: of coordinates that are angles, as for `jaxode.torus`. Of those the network sees
            sine and cosine alone, so that the field has the same periods, and outputs are in
            radians times `period / (2 pi)`.
        activation: a smooth elementwise function.

    Raises:
        ValueError: when called with a context of another shape, or without a context that it needs.
    """

    first: Dense
    blocks: tuple[Dense, ...]
    modulation: tuple[Dense, ...]
    last: Dense
    scale: Dense
    encoder: tuple[Dense, Dense] | None
    activation: Callable[[Array], Array] = eqx.field(static=True)
    period: tuple[float, ...] | None = eqx.field(static=True, default=None)

    @public("")
    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        width: int = 128,
        blocks: int = 3,
        *,
        key: PRNGKeyArray,
        context_size: int = 0,
        period: Any = None,
        activation: Callable[[Array], Array] = jax.nn.silu,
    ):
        event = as_event_shape(event_shape)
        size = math.prod(event)
        self.period = None if period is None else as_period(period, event)
        input_size = size + sum(map(math.isfinite, self.period or ()))
        width = integer("width", width)
        blocks = integer("blocks", blocks)
        context_size = integer("context_size", context_size, 0)
        encoded_size = 2 * WAVES + (width if context_size else 0)
        outside = (width, input_size), (size, width), (size, encoded_size)
        of_blocks = [(width, width)] * blocks + [(2 * width, encoded_size)] * blocks
        encoder = [(width, context_size), (width, width)] if context_size else []
        first, last, scale, *drawn = draws(check_key(key), (*outside, *of_blocks, *encoder))
        dense = tuple(map(Dense, drawn))
        self.first, self.last, self.scale = Dense(first), Dense(last, 0.1), Dense(scale, 0.0)
        self.blocks, self.modulation = dense[:blocks], dense[blocks : 2 * blocks]
        self.encoder = (dense[-2], dense[-1]) if context_size else None
        self.activation = activation

    @property
    def _sizes(self):
        context_size = self.encoder[0].weight.shape[1] if self.encoder else 0
        return self.last.weight.shape[0], context_size

    def _field(self, t, x, context):
        e = encoded_context(t, context, self.encoder, self.activation, x.dtype)
        h, scale = self.first(self._inputs(x)), self.scale(e)
        if self.period is not None:
            scale = jnp.where(jnp.isfinite(jnp.asarray(self.period)), 0.0, scale)
        for block, modulation in zip(self.blocks, self.modulation, strict=True):
            a, b = equal_parts(modulation, e, 2)
            h = h + block(self.activation((1 + a) * h + b))
        output = self.last(saturated(self.activation(h)))
        if self.period is not None:  # the output has the unit of the angles
            output = output * jnp.asarray(radius_of(self.period), x.dtype)
        return output + scale * x

    def _inputs(self, x: Float[Array, " size"]) -> Float[Array, " inputs"]:
        """Coordinates; sine and cosine of angles."""
        if self.period is None:
            return x
        angle = np.isfinite(self.period)
        phase = x[angle] * jnp.asarray(2 * np.pi / np.asarray(self.period)[angle], x.dtype)
        return jnp.concatenate([x[~angle], jnp.sin(phase), jnp.cos(phase)])
