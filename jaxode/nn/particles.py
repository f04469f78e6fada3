"""A field of particles with their symmetries, and its closed-form divergence."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import check_bool, check_number, integer
from jaxode._checks.caller import public
from jaxode._checks.rules import POSITIVE
from jaxode._checks.samples import check_key
from jaxode.nn.base import WAVES, Dense, Network, Symmetric, draws


class _Places(NamedTuple):
    """Which particles are in the pairs and triangles of `n` particles."""

    signs: np.ndarray
    """`[pairs, n]`, with 1 and -1 for the two particles of a pair: as a product it subtracts."""
    sides: np.ndarray
    """`[2, pairs, n-2]`: for each pair and third particle, the numbers of the other two sides."""


@functools.cache
def _places(n: int) -> _Places:
    pairs = list(itertools.combinations(range(n), 2))
    number = {pair: i for i, pair in enumerate(pairs)}

    def side(i, k):
        return number[min(i, k), max(i, k)]

    sides = [
        [[side(pair[end], k) for k in range(n) if k not in pair] for pair in pairs]
        for end in range(2)
    ]
    signs = [np.eye(n)[i] - np.eye(n)[j] for i, j in pairs]
    return _Places(np.array(signs), np.array(sides, int))


class _Pairs(NamedTuple):
    """All pairs of a configuration."""

    difference: Float[Array, "pairs dim"]
    distance: Float[Array, " pairs"]
    bumps: Float[Array, "pairs bumps"]
    """The functions of the distance."""
    slopes: Float[Array, "pairs bumps"]

    @property
    def stretch(self) -> Float[Array, " pairs"]:
        """The derivative of each distance as its two particles move by the difference, apart."""
        # The distance is regularized: its derivative along a difference is not quite one.
        return 2 * jnp.sum(self.difference**2, axis=1) / self.distance


class _Around(eqx.Module):
    """Sums over pairs and triangles of functions of the distance, around each pair."""

    of_all: Float[Array, "width bumps"]
    of_ends: Float[Array, "width bumps"]
    of_sides: Float[Array, "width bumps"]
    of_triangles: Float[Array, "width width"]

    def surroundings(self, pairs: _Pairs, places: _Places) -> Float[Array, "pairs width"]:
        bumps, members = pairs.bumps, jnp.asarray(np.abs(places.signs), pairs.bumps.dtype)
        sides = bumps @ self.of_sides.T
        first, second = (sides[side] for side in places.sides)
        triangles = jnp.sum(first * second, axis=1) @ self.of_triangles.T
        all_pairs = self.of_all @ jnp.sum(bumps, axis=0)
        return all_pairs[None] + members @ (members.T @ (bumps @ self.of_ends.T)) + triangles

    def change(self, pairs: _Pairs, places: _Places) -> Float[Array, "pairs width"]:
        """Differentiate `surroundings` of a pair, as its two particles move by the difference."""
        difference, r, bumps, slopes = pairs
        signs = jnp.asarray(places.signs, r.dtype)
        # Differentiate the sums over the pairs of each particle by its position. Both particles of
        # a pair move, so sums over the pairs of both contain its distance twice.
        of_distance = (slopes / r[:, None]) @ (self.of_all + self.of_ends).T
        by_pairs = jnp.zeros_like(of_distance)
        for along in difference.T:
            by_pairs += (signs @ (signs.T @ (of_distance * along[:, None]))) * along[:, None]
        by_distance = pairs.stretch[:, None] * (slopes @ self.of_ends.T)
        # How fast the distance of each pair changes, as the particles of another pair move apart.
        rates = (signs @ signs.T) * (difference @ difference.T) / r[None]
        rates = [jnp.take_along_axis(rates, side, axis=1)[:, :, None] for side in places.sides]
        sides, of_sides = bumps @ self.of_sides.T, slopes @ self.of_sides.T
        (first, second), (d_first, d_second) = (
            [x[s] for s in places.sides] for x in (sides, of_sides)
        )
        triangles = rates[0] * d_first * second + rates[1] * first * d_second
        return by_pairs + by_distance + jnp.sum(triangles, axis=1) @ self.of_triangles.T


class Particles(Symmetric):
    """Particles that move along the lines between them.

        f_i = 1/n sum_j (x_i - x_j) phi_ij,  phi_ij = c_0 + sum_k c_k(t, s_ij) bump_k(|x_i - x_j|),

    where `s_ij` describes what is around the pair: sums of bumps over all pairs and over those of
    `i` and of `j`, and of products of two functions of the distance over the triangles on the pair.
    Turning or mirroring a configuration `x [n, dim]`, or exchanging its particles, does the same to
    `f`, and shifting it changes nothing; a flow from `jaxode.centered_normal(n, dim)` then has a
    density with these symmetries. The mean of `f` is zero, so configurations stay centred, and
    `div f` is that on the space of centred ones. Samples are `[n, dim]`, or flat, `[n dim]`. Times
    as in `Residual`.

    The bumps are normal densities, up to a factor, with trained centers and widths. The divergence
    is in closed form: `1/n` times the sum over pairs of `2 dim phi` and of the derivative of `phi`
    as the pair moves apart. An evaluation takes time and memory as `n^3`, with the
    divergence as `n^4`.

    Args:
        n: number of particles, at least 2.
        dim: dimension of the space in which they move.
        bumps: number of bumps.
        reach: largest distance at which a fresh network has a bump.
        width: size of the hidden layers of the coefficients `c`.
        blocks: number of hidden layers after the first, each a block as in `Residual`.
        many_body: whether `c` depends on `s`. Without, forces are those between two particles, as
            in Köhler et al., which costs a fraction and describes far less.
        key: draws the initial weights.
        context_size: size of the context vector in `m(t, y, context)`.
        activation: a smooth elementwise function.

    References: Köhler, Klein and Noé (2020), arXiv:2006.02425.
    """

    center: Float[Array, " bumps"]
    log_width: Float[Array, " bumps"]
    blocks: tuple[Dense, ...]
    modulation: tuple[Dense, ...]
    around: _Around | None

    sized_by: ClassVar[str] = "n, dim"

    @public("")
    def __init__(
        self,
        n: int,
        dim: int,
        bumps: int = 24,
        reach: float = 8.0,
        width: int = 64,
        blocks: int = 2,
        *,
        key: PRNGKeyArray,
        many_body: bool = True,
        context_size: int = 0,
        activation: Callable[[Array], Array] = jax.nn.silu,
    ):
        n = integer("n", n, 2)
        self.event_shape = n, integer("dim", dim)
        bumps = integer("bumps", bumps, 2)
        check_number("reach", reach, POSITIVE)
        check_bool("many_body", many_body)
        width = integer("width", width)
        blocks = integer("blocks", blocks, 0)
        self.context_size = integer("context_size", context_size, 0)
        encoded_size = 2 * WAVES + self.context_size
        outside = (width, encoded_size), (1 + bumps, width)
        shapes_of_blocks = [(width, width)] * blocks + [(2 * width, encoded_size)] * blocks
        around = [(width, size) for size in (bumps, bumps, bumps, width)] if many_body else []
        hidden, last, *drawn = draws(check_key(key), (*outside, *shapes_of_blocks, *around))
        dense = tuple(map(Dense, drawn))
        self.hidden, self.last = Dense(hidden), Dense(last, 0.1)
        self.blocks, self.modulation = dense[:blocks], dense[blocks : 2 * blocks]
        self.around = (
            _Around(*(layer.weight for layer in dense[2 * blocks :])) if many_body else None
        )
        self.center = jnp.linspace(0.0, reach, bumps)
        self.log_width = jnp.full(bumps, math.log(reach / (bumps - 1)), self.center.dtype)
        self.activation = activation

    @property
    def is_centered(self) -> bool:
        """Whether it keeps the mean, and is blind to it: a subclass may have another field."""
        return type(self).__call__ is Network.__call__

    def _field(self, t, x, context):
        pairs = self._pairs(x)
        return self._summed(
            pairs, self._strength(t, context, pairs.bumps, self._surroundings(pairs))
        )

    def _closed_form(self, t, x, context):
        (n, dim), pairs = self.event_shape, self._pairs(x)
        surroundings = self._surroundings(pairs)
        change = jnp.zeros_like(surroundings)
        if self.around is not None:
            change = self.around.change(pairs, _places(n))
        phi, of_distances = jax.jvp(
            lambda bumps, surroundings: self._strength(t, context, bumps, surroundings),
            (pairs.bumps, surroundings), (pairs.stretch[:, None] * pairs.slopes, change),
        )  # fmt: skip
        return self._summed(pairs, phi), jnp.sum(2 * dim * phi + of_distances) / n

    def _pairs(self, x: Float[Array, " size"]) -> _Pairs:
        n = self.event_shape[0]
        difference = jnp.asarray(_places(n).signs, x.dtype) @ x.reshape(self.event_shape)
        # Particles at the same place have a distance with a derivative.
        tiny = jnp.finfo(x.dtype).eps ** 2
        r = jnp.sqrt(jnp.sum(difference**2, axis=1) + tiny)
        inverse = jnp.exp(-self.log_width)[None]
        u = (r[:, None] - self.center[None]) * inverse
        bumps = jnp.exp(-0.5 * u**2)
        return _Pairs(difference, r, bumps, -u * inverse * bumps)

    def _surroundings(self, pairs: _Pairs) -> Float[Array, "#pairs width"]:
        if self.around is None:
            return jnp.zeros((1, len(self.hidden.bias)), pairs.bumps.dtype)
        return self.around.surroundings(pairs, _places(self.event_shape[0]))

    def _strength(self, t, context, bumps, surroundings) -> Float[Array, " pairs"]:
        """The factor `phi` of the difference of each pair."""
        encoded = self._encoded(t, context)
        h = self.hidden(encoded)[None] + surroundings
        for block, modulation in zip(self.blocks, self.modulation, strict=True):
            a, b = jnp.split(modulation(encoded)[None], 2, axis=1)
            h = h + self.activation((1 + a) * h + b) @ block.weight.T + block.bias[None]
        c = self.activation(h) @ self.last.weight.T + self.last.bias[None]
        return c[:, 0] + jnp.sum(c[:, 1:] * bumps, axis=1)

    def _summed(self, pairs: _Pairs, phi: Float[Array, " pairs"]) -> Float[Array, " size"]:
        n = self.event_shape[0]
        force = phi[:, None] * pairs.difference
        return (jnp.asarray(_places(n).signs, force.dtype).T @ force).reshape(-1) / n
