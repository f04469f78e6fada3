"""Fields with the symmetries of particles and of lattices, and closed-form divergences."""

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
from jaxode._checks.caller import arg, public
from jaxode._checks.rules import POSITIVE
from jaxode.distributions import as_event_shape
from jaxode.nn.network import Dense, Network
from jaxode.nn.residual import WAVES

# Up to this many particles, products of all pairs with all pairs are no slower than sums over
# particles: with 13 of 3 dimensions 0.6x the time, with 22 the same, with 38 2.2x.
MOST_BY_PAIRS = 22


class _Symmetric(Network):
    """A network whose coefficients depend on the time and the context, by a hidden layer."""

    hidden: Dense
    last: Dense
    event_shape: tuple[int, ...] = eqx.field(static=True)
    context_size: int = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    @property
    def _sizes(self):
        return math.prod(self.event_shape), self.context_size

    def _fits(self, shape):
        # In another shape, other numbers would be exchanged or shifted.
        return shape in (self.event_shape, (math.prod(self.event_shape),))

    def _hidden(self, t, context) -> Float[Array, " width"]:
        """The hidden layer before its activation."""
        angles = jnp.pi * t * jnp.arange(1, WAVES + 1, dtype=self.hidden.bias.dtype)
        known = [jnp.sin(angles), jnp.cos(angles), *([] if context is None else [context])]
        return self.hidden(jnp.concatenate(known))


@functools.cache
def _signs(n: int) -> np.ndarray:
    """`[pairs, n]`, with 1 and -1 for the two particles of a pair: as a product it subtracts."""
    return np.array([np.eye(n)[i] - np.eye(n)[j] for i, j in itertools.combinations(range(n), 2)])


class _Pairs(NamedTuple):
    """All pairs of a configuration."""

    difference: Float[Array, "pairs dim"]
    distance: Float[Array, " pairs"]
    bumps: Float[Array, "pairs 1+bumps"]
    """The functions of the distance, of which the first is constant."""
    slopes: Float[Array, "pairs 1+bumps"]


class Particles(_Symmetric):
    """Particles that move along the lines between them.

        f_i = 1/n sum_j (x_i - x_j) phi(|x_i - x_j|, t, s),  phi = c_0 + sum_k c_k(t, s) bump_k(r),

    where `s`, the sums of the bumps over all pairs, describe the configuration. Turning, mirroring
    or shifting a configuration `x [n, dim]`, or exchanging its particles, does so with `f`; a flow
    from `jaxode.centered_normal(n, dim)` then has a density with these symmetries. The mean of `f`
    is zero, so configurations stay centred, and `div f` is that on the space of centred ones.
    Samples are `[n, dim]`, or flat, `[n dim]`. Times as in `Residual`.

    The bumps are normal densities, up to a factor, with trained centers and widths. The divergence
    is in closed form: `1/n sum over i != j of dim phi + r dphi/dr`, and what comes by `s`.

    Args:
        n: number of particles, at least 2.
        dim: dimension of the space in which they move.
        bumps: number of bumps.
        reach: largest distance at which a fresh network has a bump.
        width: size of the hidden layer of the coefficients `c`.
        many_body: whether they depend on `s`. Without, forces are those between two particles, as
            in Köhler et al., which costs half and describes far less.
        key: draws the initial weights.
        context_size: size of the context vector in `m(t, y, context)`.
        activation: a smooth elementwise function.

    References: Köhler, Klein and Noé (2020), arXiv:2006.02425.
    """

    center: Float[Array, " bumps"]
    log_width: Float[Array, " bumps"]
    of_state: Float[Array, "width bumps"] | None

    sized_by: ClassVar[str] = "n, dim"

    @public("")
    def __init__(
        self,
        n: int,
        dim: int,
        bumps: int = 24,
        reach: float = 8.0,
        width: int = 64,
        *,
        key: PRNGKeyArray,
        many_body: bool = True,
        context_size: int = 0,
        activation: Callable[[Array], Array] = jax.nn.silu,
    ):
        n = integer("n", n, 2, "an integer of at least 2")
        self.event_shape = n, integer("dim", dim)
        bumps = integer("bumps", bumps, 2, "an integer of at least 2")
        check_number("reach", reach, POSITIVE)
        check_bool("many_body", many_body)
        width = integer("width", width)
        self.context_size = integer("context_size", context_size, 0, "an integer of at least 0")
        first, second, third = jax.random.split(key, 3)
        self.hidden = Dense(2 * WAVES + self.context_size, width, first)
        self.last = Dense(width, 1 + bumps, second, 0.1)
        self.of_state = Dense(bumps, width, third).weight if many_body else None
        self.center = jnp.linspace(0.0, reach, bumps)
        self.log_width = jnp.full(bumps, math.log(reach / (bumps - 1)), self.center.dtype)
        self.activation = activation

    def _field(self, t, x, context):
        pairs = self._pairs(x)
        c = self.last(self.activation(self._inputs(t, pairs, context)))
        return self._summed(pairs, c)

    def value_and_divergence(
        self,
        t: Float[Array, ""],
        y: Float[Array, " *event"],
        context: Float[Array, " context"] | None = None,
    ) -> tuple[Float[Array, " *event"], Float[Array, ""]]:
        """`(m(t, y), div m)` in closed form."""
        (n, dim), pairs = self.event_shape, self._pairs(self._vector(y, context))
        difference, r, bumps, slopes = pairs
        inputs = self._inputs(t, pairs, context)
        hidden, of_inputs = jax.jvp(self.activation, (inputs,), (jnp.ones_like(inputs),))
        c = self.last(hidden)
        # The distance is regularized: its derivative along a difference is not quite one.
        square = jnp.sum(difference**2, axis=1)
        div = 2 * jnp.sum((dim * bumps + (square / r)[:, None] * slopes) @ c)
        if self.of_state is not None:
            # Of each hidden unit: the field that it adds, times the gradient of its input. Both are
            # sums over pairs, which meet where two pairs share a particle.
            fields = (bumps @ self.last.weight) * of_inputs[None]
            gradients = (slopes[:, 1:] / r[:, None]) @ self.of_state.T
            if n <= MOST_BY_PAIRS:
                signs = jnp.asarray(_signs(n) @ _signs(n).T, r.dtype)
                div = div + jnp.sum((fields @ gradients.T) * signs * (difference @ difference.T))
            else:
                of_particles = jnp.asarray(_signs(n).T, r.dtype)
                for along in difference.T:
                    both = (of_particles @ (x * along[:, None]) for x in (fields, gradients))
                    div = div + jnp.sum(next(both) * next(both))
        return self._summed(pairs, c).reshape(y.shape), div / n

    def _pairs(self, x: Float[Array, " size"]) -> _Pairs:
        difference = jnp.asarray(_signs(self.event_shape[0]), x.dtype) @ x.reshape(self.event_shape)
        # Particles at the same place have a distance with a derivative.
        tiny = jnp.finfo(x.dtype).eps ** 2
        r = jnp.sqrt(jnp.sum(difference**2, axis=1) + tiny)
        inverse = jnp.exp(-self.log_width)[None]
        u = (r[:, None] - self.center[None]) * inverse
        bumps, one = jnp.exp(-0.5 * u**2), jnp.ones_like(r)[:, None]
        slopes = jnp.concatenate([jnp.zeros_like(one), -u * inverse * bumps], axis=1)
        return _Pairs(difference, r, jnp.concatenate([one, bumps], axis=1), slopes)

    def _inputs(self, t, pairs: _Pairs, context) -> Float[Array, " width"]:
        inputs = self._hidden(t, context)
        if self.of_state is None:
            return inputs
        return inputs + self.of_state @ jnp.sum(pairs.bumps[:, 1:], axis=0)

    def _summed(self, pairs: _Pairs, c: Float[Array, " 1+bumps"]) -> Float[Array, " size"]:
        n = self.event_shape[0]
        force = (pairs.bumps @ c)[:, None] * pairs.difference
        return (jnp.asarray(_signs(n), force.dtype).T @ force).reshape(-1) / n


@functools.cache
def _orbits(shape: tuple[int, ...], isotropic: bool) -> np.ndarray:
    """The number of the weight of each displacement. With `isotropic`, mirror images share it, and
    so do those with exchanged axes of the same length."""
    if not isotropic:
        return np.arange(math.prod(shape)).reshape(shape)
    places = np.indices(shape).reshape(len(shape), -1)
    sizes = np.array(shape)[:, None]
    places = np.minimum(places, sizes - places)
    for size in set(shape):
        axes = np.flatnonzero(np.array(shape) == size)
        places[axes] = np.sort(places[axes], axis=0)
    return np.unique(places, axis=1, return_inverse=True)[1].reshape(shape)


class Lattice(_Symmetric):
    """A scalar field on a periodic lattice that changes at each site with all others.

        f_x = sum_y sum_a K_a(x - y, t) h_a(y_y),  h = y, sin(w_a y) and, unless odd, cos(w_a y).

    Shifting a configuration along an axis does so with `f`, and if it is odd, `f(-y) = -f(y)`. So a
    flow from `jaxode.standard_normal(shape)` has a density with these symmetries. Kernels
    reach over the whole lattice, as products of Fourier transforms; they and the frequencies `w`
    are trained. The divergence is `sum_x sum_a K_a(0, t) h_a'(y_x)`, in closed form. Times as in
    `Residual`.

    Args:
        shape: sites along each axis, one to three axes. An integer stands for a ring.
        frequencies: number of frequencies.
        odd: whether a change of sign of the field is a symmetry.
        isotropic: whether mirror images, and axes of the same length, are symmetries.
        modes: number of kernels that the time and the context mix.
        width: size of the hidden layer for the time and the context.
        key: draws the initial weights.
        context_size: size of the context vector in `m(t, y, context)`.
        activation: a smooth elementwise function.

    References: Gerdes et al. (2022), arXiv:2207.00283.
    """

    frequency: Float[Array, " frequencies"]
    kernel: Float[Array, "modes features orbits"]
    odd: bool = eqx.field(static=True)
    isotropic: bool = eqx.field(static=True)

    sized_by: ClassVar[str] = "shape"

    @public("")
    def __init__(
        self,
        shape: int | tuple[int, ...],
        frequencies: int = 8,
        *,
        key: PRNGKeyArray,
        odd: bool = True,
        isotropic: bool = True,
        modes: int = 16,
        width: int = 64,
        context_size: int = 0,
        activation: Callable[[Array], Array] = jax.nn.silu,
    ):
        event = as_event_shape(shape)
        if not 1 <= len(event) <= 3:
            raise ValueError(f"{arg('shape')} must have one to three axes; got {shape!r}.")
        check_bool("odd", odd)
        check_bool("isotropic", isotropic)
        frequencies = integer("frequencies", frequencies)
        modes, width = integer("modes", modes), integer("width", width)
        self.event_shape, self.odd, self.isotropic = event, bool(odd), bool(isotropic)
        self.context_size = integer("context_size", context_size, 0, "an integer of at least 0")
        kernel_key, hidden_key, last_key = jax.random.split(key, 3)
        features = 1 + frequencies * (1 if odd else 2)
        orbits = int(_orbits(event, self.isotropic).max()) + 1
        bound = 0.1 / math.sqrt(features * math.prod(event))
        self.kernel = jax.random.uniform(
            kernel_key, (modes, features, orbits), minval=-bound, maxval=bound
        )
        self.frequency = jnp.linspace(0.5, 3.0, frequencies)
        self.hidden = Dense(2 * WAVES + self.context_size, width, hidden_key)
        self.last = Dense(width, modes, last_key)
        self.activation = activation

    def _field(self, t, x, context):
        y = x.reshape(self.event_shape)
        return self._convolved(self._kernels(t, context), self._features(y)).reshape(-1)

    def value_and_divergence(
        self,
        t: Float[Array, ""],
        y: Float[Array, " *event"],
        context: Float[Array, " context"] | None = None,
    ) -> tuple[Float[Array, " *event"], Float[Array, ""]]:
        """`(m(t, y), div m)` in closed form."""
        x = self._vector(y, context).reshape(self.event_shape)
        kernels = self._kernels(t, context)
        features, slopes = jax.jvp(self._features, (x,), (jnp.ones_like(x),))
        at_zero = kernels.reshape(len(kernels), -1)[:, 0]
        div = at_zero @ slopes.reshape(len(slopes), -1).sum(axis=1)
        return self._convolved(kernels, features).reshape(y.shape), div

    def _features(self, x: Float[Array, " *shape"]) -> Float[Array, "features *shape"]:
        angles = self.frequency.reshape(-1, *(1,) * x.ndim) * x[None]
        waves = [jnp.sin(angles)] if self.odd else [jnp.sin(angles), jnp.cos(angles)]
        return jnp.concatenate([x[None], *waves])

    def _kernels(self, t, context) -> Float[Array, "features *shape"]:
        c = self.last(self.activation(self._hidden(t, context)))
        mixed = jnp.tensordot(c, self.kernel, 1)
        return mixed[:, _orbits(self.event_shape, self.isotropic)]

    def _convolved(self, kernels, features) -> Float[Array, " *shape"]:
        """The sum over features of the circular convolutions."""
        axes = tuple(range(1, features.ndim))
        transform = lambda x: jnp.fft.rfftn(x, axes=axes)
        product = jnp.sum(transform(kernels) * transform(features), axis=0)
        return jnp.fft.irfftn(product, s=self.event_shape, axes=tuple(range(product.ndim)))
