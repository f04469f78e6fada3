"""A field with the symmetries of a lattice, and its closed-form divergence."""

import functools
import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import check_bool, integer, state_dtype
from jaxode._checks.caller import arg, public
from jaxode._checks.event_shapes import as_event_shape
from jaxode._checks.samples import check_key
from jaxode.nn.base import WAVES, Dense, Symmetric, draws


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


class Lattice(Symmetric):
    """A vector field for scalar fields `y` on a periodic lattice. Each site moves with all others.

        f_i = sum_j sum_a K_a(i - j, t) h_a(y_j),  h = y, sin(w_a y) and, unless odd, cos(w_a y).

    Shifting a configuration along an axis does so with `f`, and if it is odd, `f(-y) = -f(y)`. So a
    flow from `jaxode.standard_normal(shape)` has a density with these symmetries. Kernels
    reach over the whole lattice, as products of Fourier transforms; they and the frequencies `w`
    are trained. The divergence is `sum_i sum_a K_a(0, t) h_a'(y_i)`, in closed form. Times as in
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
        event = as_event_shape(shape, "shape")
        if not 1 <= len(event) <= 3:
            raise ValueError(f"{arg('shape')} must have one to three axes; got {shape!r}.")
        check_bool("odd", odd)
        check_bool("isotropic", isotropic)
        frequencies = integer("frequencies", frequencies)
        modes, width = integer("modes", modes), integer("width", width)
        self.event_shape, self.odd, self.isotropic = event, bool(odd), bool(isotropic)
        self.context_size = integer("context_size", context_size, 0)
        features = 1 + frequencies * (1 if odd else 2)
        orbits = int(_orbits(event, self.isotropic).max()) + 1
        encoded_size = 2 * WAVES + self.context_size
        shapes = (modes, features, orbits), (width, encoded_size), (modes, width)
        kernel, hidden, last = draws(check_key(key), shapes)
        self.kernel = kernel * (0.1 / math.sqrt(features * math.prod(event)))
        self.frequency = jnp.linspace(0.5, 3.0, frequencies)
        self.hidden, self.last = Dense(hidden), Dense(last)
        self.activation = activation

    def _field(self, t, x, context):
        y = x.reshape(self.event_shape)
        return self._convolved(self._kernels(t, context), self._features(y))

    def _closed_form(self, t, x, context):
        x, kernels = x.reshape(self.event_shape), self._kernels(t, context)
        features, slopes = jax.jvp(self._features, (x,), (jnp.ones_like(x),))
        at_zero = kernels.reshape(len(kernels), -1)[:, 0]
        div = at_zero @ slopes.reshape(len(slopes), -1).sum(axis=1)
        return self._convolved(kernels, features), div

    def _features(self, x: Float[Array, " *shape"]) -> Float[Array, "features *shape"]:
        angles = self.frequency.reshape(-1, *(1,) * x.ndim) * x[None]
        waves = [jnp.sin(angles)] if self.odd else [jnp.sin(angles), jnp.cos(angles)]
        return jnp.concatenate([x[None], *waves])

    def _kernels(self, t, context) -> Float[Array, "features *shape"]:
        c = self.last(self.activation(self.hidden(self._encoded(t, context))))
        mixed = jnp.tensordot(c, self.kernel, 1)
        return mixed[:, _orbits(self.event_shape, self.isotropic)]

    def _convolved(self, kernels, features) -> Float[Array, " size"]:
        """The sum over features of the circular convolutions, flattened."""
        axes = tuple(range(1, features.ndim))

        def transform(x):
            return jnp.fft.rfftn(x.astype(state_dtype(x)), axes=axes)

        product = jnp.sum(transform(kernels) * transform(features), axis=0)
        convolved = jnp.fft.irfftn(product, s=self.event_shape, axes=tuple(range(product.ndim)))
        return convolved.reshape(-1)
