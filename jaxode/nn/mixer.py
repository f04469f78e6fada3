"""The network for images of `jaxode.nn`."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import integer
from jaxode._checks.caller import arg, public
from jaxode._checks.event_shapes import as_event_shape
from jaxode._checks.samples import check_key
from jaxode.nn.base import WAVES, Dense, Network, draws, encoded_context, equal_parts
from jaxode.nn.residual import saturated


def rows(layer: Dense, h: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
    """Apply a layer to each row."""
    return h @ layer.weight.T + layer.bias[None]


Shapes = tuple[tuple[int, int], ...]


def _shapes(
    event: tuple[int, ...], patch: int, width: int, features: int, context_size: int
) -> tuple[Shapes, Shapes, Shapes]:
    """Shapes `(out, in)` of the weights outside of blocks, in a block, and of the encoder."""
    size, count = math.prod(event), event[0] * event[1] // patch**2  # numbers, patches
    numbers = size // count
    encoded_size = 2 * WAVES + (width if context_size else 0)
    middle, wide = max(width * 2 // 3, 1), 2 * width
    outside = (
        (2 * features, encoded_size), (width, numbers * (4 + features)), (count, width),
        (numbers * (1 + features), width), (size, encoded_size),
    )  # fmt: skip
    of_block = (
        (4 * width, encoded_size), (middle, count), (count, middle), (wide, width), (width, wide),
    )  # fmt: skip
    encoder = ((width, context_size), (width, width)) if context_size else ()
    return outside, of_block, encoder


class Block(eqx.Module):
    """Two layers that mix patches, and two that mix the features of each patch."""

    modulation: Dense
    tokens: tuple[Dense, Dense]
    channels: tuple[Dense, Dense]


class Mixer(Network):
    """An MLP-mixer for images: it mixes patches, and the features of each patch, in turn.

    With `e` the time and the context as in `Residual`, each number `y` has features
    `phi = activation(w(e) y + v(e))`. Those of a patch, its numbers with a margin around it, and
    its place make its row of `h`. A block is `h + V activation(W u)` over patches, then
    `h + activation(u W) V` over features, each of `u = (1 + a(e)) h + b(e)`. The output is
    `k_0 + sum_j k_j 20 tanh(phi_j / 20) + c(e) y`, with `k` affine in
    `20 tanh(activation(h) / 20)`. So it grows no faster than `y`.

    All of it is matrix products and elementwise functions, since XLA runs a convolution slowly
    inside a solve on a CPU. It has no closed form of its divergence.

    Args:
        event_shape: `(height, width)` or `(height, width, channels)`.
        patch: height and width of a patch, which divides those of the image.
        width: size of a row of `h`.
        blocks: number of blocks.
        features: of each number.
        key: draws the initial weights.
        context_size: size of the context vector in `m(t, y, context)`.
        activation: a smooth elementwise function.

    Raises:
        ValueError: when called with a context of another shape, or without a context that it needs.

    References: Tolstikhin et al. (2021), arXiv:2105.01601.
    """

    feature: Dense
    first: Dense
    place: Float[Array, "patches width"]
    blocks: tuple[Block, ...]
    last: Dense
    scale: Dense
    encoder: tuple[Dense, Dense] | None
    event_shape: tuple[int, ...] = eqx.field(static=True)
    patch: int = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    @public("")
    def __init__(
        self,
        event_shape: tuple[int, ...],
        patch: int = 4,
        width: int = 96,
        blocks: int = 6,
        *,
        key: PRNGKeyArray,
        features: int = 8,
        context_size: int = 0,
        activation: Callable[[Array], Array] = jax.nn.gelu,
    ):
        event = as_event_shape(event_shape)
        if len(event) not in (2, 3):
            raise ValueError(
                f"{arg('event_shape')} must be (height, width) or (height, width, channels); got "
                f"{event_shape!r}."
            )
        patch, width = integer("patch", patch), integer("width", width)
        blocks, features = integer("blocks", blocks), integer("features", features)
        context_size = integer("context_size", context_size, 0)
        if event[0] % patch or event[1] % patch:
            raise ValueError(
                f"{arg('patch')} must divide the height and the width, {event[0]} and {event[1]}; "
                f"got {patch}. Pass one that does, or pad the images."
            )
        outside, of_block, encoder = _shapes(event, patch, width, features, context_size)
        feature, first, place, last, scale, *drawn = draws(
            check_key(key), (*outside, *of_block * blocks, *encoder)
        )
        start = jnp.concatenate([jnp.ones(features), jnp.linspace(-2.0, 2.0, features)])
        self.feature = eqx.tree_at(lambda layer: layer.bias, Dense(feature), start)
        self.first, self.place = Dense(first), 0.1 * place
        self.last, self.scale = Dense(last, 0.1), Dense(scale, 0.0)
        dense = tuple(map(Dense, drawn))
        of_blocks = [dense[i : i + 5] for i in range(0, 5 * blocks, 5)]
        self.blocks = tuple(Block(m, (t, u), (c, d)) for m, t, u, c, d in of_blocks)
        self.encoder = (dense[-2], dense[-1]) if context_size else None
        self.event_shape, self.patch, self.activation = event, patch, activation

    @property
    def _sizes(self):
        context_size = self.encoder[0].weight.shape[1] if self.encoder else 0
        return math.prod(self.event_shape), context_size

    @property
    def _shape(self):
        return self.event_shape

    def _field(self, t, x, context):
        e = encoded_context(t, context, self.encoder, self.activation, x.dtype)
        down, size, across, *_ = self._tiled
        y = jnp.swapaxes(x.reshape(self._tiled), 1, 2).reshape(down * across, -1)
        slope, shift = (part[None, :, None] for part in equal_parts(self.feature, e, 2))
        phi = self.activation(slope * y[:, None] + shift)
        patches = jnp.concatenate([self._windows(x), phi.reshape(len(y), -1)], axis=1)
        h = rows(self.first, patches) + self.place
        for block in self.blocks:
            a, b, c, d = (part[None] for part in equal_parts(block.modulation, e, 4))
            h = h + self._mixed(block.tokens, ((1 + a) * h + b).T).T
            h = h + self._mixed(block.channels, (1 + c) * h + d)
        k = rows(self.last, saturated(self.activation(h))).reshape(len(y), -1, y.shape[1])
        patches_out = k[:, 0] + jnp.sum(k[:, 1:] * saturated(phi), axis=1)
        image = jnp.swapaxes(patches_out.reshape(down, across, size, size, -1), 1, 2).reshape(-1)
        return image + self.scale(e) * x

    def _mixed(self, layers: tuple[Dense, Dense], u: Float[Array, "rows size"]) -> Array:
        inner, outer = layers
        return rows(outer, self.activation(rows(inner, u)))

    def _windows(self, x: Float[Array, " size"]) -> Float[Array, "patches 4*numbers"]:
        """Patches with a margin: they have twice the height and width, and overlap."""
        down, size, across, _, channels = self._tiled
        margin = (size // 2, size - size // 2)
        y = jnp.pad(x.reshape(down * size, across * size, channels), (margin, margin, (0, 0)))
        y = y.reshape(down + 1, size, across + 1, size, channels)
        y = jnp.concatenate([y[:-1], y[1:]], axis=1)
        y = jnp.concatenate([y[:, :, :-1], y[:, :, 1:]], axis=3)
        return jnp.swapaxes(y, 1, 2).reshape(down * across, -1)

    @property
    def _tiled(self) -> tuple[int, ...]:
        """An image as rows and columns of patches."""
        height, width, *channels = self.event_shape
        return height // self.patch, self.patch, width // self.patch, self.patch, *(channels or [1])
