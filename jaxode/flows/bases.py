"""Base densities: any object with `event_shape`, `log_prob` and `sample`.

Distributions of numpyro, distrax, TensorFlow Probability and flowjax qualify. To learn the
parameters of a density, make it inside the loss; `cnf` costs nothing at run time. One of numpyro
with bounds must be made there from arrays: as a pytree, it keeps the bounds it was made with.

```python
def loss(params, x):
    field_params, base = params  # base: a jaxode.diagonal_normal, a flowjax distribution, ...
    return jaxode.cnf(f, base).nll(field_params, x)
```
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxode._checks.arguments import integer
from jaxode._checks.caller import public
from jaxode._checks.event_shapes import as_event_shape, as_period, radius_of
from jaxode._checks.rules import is_known
from jaxode._jax.precision import at_precision


class BaseDensity(Protocol):
    """The interface of a base density."""

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    def log_prob(self, z: Float[Array, "..."]) -> Float[Array, "..."]: ...

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...]) -> Float[Array, "..."]: ...


def has_full_support(base: BaseDensity) -> bool:
    """Whether the base has a density of all coordinates.

    It has unless its `full_support` is false, as for `CenteredNormal`, whose samples are centred.
    """
    return getattr(base, "full_support", True)


def fixed_columns(base: BaseDensity) -> tuple[int, ...]:
    """Coordinates of a flattened event that maps around the flow must leave as they are: angles,
    and all of centred particles."""
    if not has_full_support(base):
        return tuple(range(math.prod(base.event_shape)))
    return base.angles if isinstance(base, Torus) else ()


def in_one_period(base: BaseDensity, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Events with angles in their first period, where the base has any."""
    return base.wrapped(x) if isinstance(base, Torus) else x


@dataclass(frozen=True)
class StandardNormal:
    """Independent normals with mean zero and variance one."""

    event_shape: tuple[int, ...]

    def log_prob(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log-density in nats."""
        _check_events(z, self.event_shape)
        axes = tuple(range(-len(self.event_shape), 0))
        size = math.prod(self.event_shape)
        return -0.5 * jnp.sum(z * z, axis=axes) - 0.5 * size * math.log(2 * math.pi)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Independent draws in JAX's default floating dtype."""
        return jax.random.normal(key, (*sample_shape, *self.event_shape))

    def cdf(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Level of each coordinate."""
        return jax.scipy.special.ndtr(z)

    def icdf(self, q: Float[Array, "..."]) -> Float[Array, "..."]:
        """Each coordinate at its level."""
        return jax.scipy.special.ndtri(q)


@dataclass(frozen=True)
class CenteredNormal:
    """The standard normal density on configurations of particles whose mean is zero."""

    event_shape: tuple[int, ...]
    full_support: ClassVar[bool] = False

    def log_prob(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log-density in nats, on the space of centred configurations. A shift does not count."""
        _check_events(z, self.event_shape)
        n, dim = self.event_shape
        square = jnp.sum(centered(z) ** 2, axis=(-2, -1))
        return -0.5 * square - 0.5 * (n - 1) * dim * math.log(2 * math.pi)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Independent draws in JAX's default floating dtype."""
        return centered(jax.random.normal(key, (*sample_shape, *self.event_shape)))


def centered(z: Float[Array, "... n dim"]) -> Float[Array, "... n dim"]:
    """Configurations less their mean over the particles."""
    return z - jnp.mean(z, axis=-2, keepdims=True)


@dataclass(frozen=True)
class Torus:
    """Angles, uniform over their periods, and standard normals where the period is infinite."""

    event_shape: tuple[int, ...]
    period: tuple[float, ...]
    """The period of each coordinate, flattened; infinite for those that are no angles."""

    @property
    def angles(self) -> tuple[int, ...]:
        """Which coordinates have a period."""
        return tuple(np.flatnonzero(np.isfinite(self.period)).tolist())

    @property
    def radius(self) -> np.ndarray:
        """The radius of the circle of each coordinate, flattened."""
        return radius_of(self.period)

    def log_prob(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log-density in nats. The same for all representatives of an angle."""
        _check_events(z, self.event_shape)
        axes, (period, angle) = tuple(range(-len(self.event_shape), 0)), self._of(z)
        normal = -0.5 * z * z - 0.5 * math.log(2 * math.pi)
        return jnp.sum(jnp.where(angle, -jnp.log(period), normal), axis=axes)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Independent draws in JAX's default floating dtype, angles from 0 on."""
        angle_key, normal_key = jax.random.split(key)
        shape = (*sample_shape, *self.event_shape)
        normal = jax.random.normal(normal_key, shape)
        period, angle = self._of(normal)
        return jnp.where(angle, period * jax.random.uniform(angle_key, shape), normal)

    def arc(self, difference: Float[Array, "..."]) -> Float[Array, "..."]:
        """Differences of angles on the shorter way."""
        period, angle = self._of(difference)
        return jnp.where(angle, difference - period * jnp.round(difference / period), difference)

    def chords(self, z: Float[Array, "rows *event"]) -> Float[Array, "rows coordinates"]:
        """Coordinates in which the distance of two angles is that of their points on the circle.

        Flattened numbers, and sine and cosine of angles times the radius, `period / (2 pi)`.
        """
        flat, angle = z.reshape(len(z), -1), np.isfinite(self.period)
        radius = jnp.asarray(self.radius[angle], z.dtype)[None]
        phase = flat[:, angle] / radius
        return jnp.concatenate(
            [flat[:, ~angle], radius * jnp.sin(phase), radius * jnp.cos(phase)], axis=1
        )

    def wrapped(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Events with angles in `[0, period)`."""
        period, angle = self._of(x)
        inside = x - period * jnp.floor(x / period)
        return jnp.where(angle, jnp.where(inside < period, inside, 0.0), x)

    def _of(self, z: Array) -> tuple[Array, Array]:
        """The period of each coordinate, one where it has none; and whether it has one."""
        shape = (1,) * (z.ndim - len(self.event_shape)) + self.event_shape
        period = np.reshape(self.period, shape)
        angle = np.isfinite(period)
        return jnp.asarray(np.where(angle, period, 1.0), z.dtype), jnp.asarray(angle)


class DiagonalNormal(eqx.Module):
    """Independent normals. Its leaves, the mean and the log of the scale, can be trained."""

    mean: Float[Array, " *event"]
    log_scale: Float[Array, " *event"]

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.mean.shape

    def log_prob(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log-density in nats."""
        _check_events(z, self.event_shape)

        def spread(leaf):
            return leaf.reshape((1,) * (z.ndim - leaf.ndim) + leaf.shape)

        standard = (z - spread(self.mean)) * jnp.exp(-spread(self.log_scale))
        log_scale = jnp.broadcast_to(self.log_scale, self.event_shape)
        return StandardNormal(self.event_shape).log_prob(standard) - jnp.sum(log_scale)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Independent draws in the dtype of the mean."""
        shape = (*sample_shape, *self.event_shape)

        def spread(leaf):
            return jnp.broadcast_to(leaf, shape)

        noise = jax.random.normal(key, shape, self.mean.dtype)
        return spread(self.mean) + spread(jnp.exp(self.log_scale)) * noise

    def cdf(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Level of each coordinate."""
        mean, log_scale = (jnp.broadcast_to(leaf, z.shape) for leaf in (self.mean, self.log_scale))
        return jax.scipy.special.ndtr((z - mean) * jnp.exp(-log_scale))

    def icdf(self, q: Float[Array, "..."]) -> Float[Array, "..."]:
        """Each coordinate at its level."""
        mean, log_scale = (jnp.broadcast_to(leaf, q.shape) for leaf in (self.mean, self.log_scale))
        return mean + jnp.exp(log_scale) * jax.scipy.special.ndtri(q)


@public("diagonal_normal")
def diagonal_normal(event_shape: int | tuple[int, ...]) -> DiagonalNormal:
    """Independent normals with learnable means and scales, initially standard normal.

    It is a pytree of its parameters: give it to the optimizer together with the parameters of the
    field, and call `cnf` inside the loss.

    Raises:
        ValueError: if a dimension is not a positive integer.
    """
    shape = as_event_shape(event_shape)
    return DiagonalNormal(jnp.zeros(shape), jnp.zeros(shape))


@public("standard_normal")
def standard_normal(event_shape: int | tuple[int, ...]) -> StandardNormal:
    """The standard normal density on events of this shape. An integer stands for a vector.

    Raises:
        ValueError: if a dimension is not a positive integer.
    """
    return StandardNormal(as_event_shape(event_shape))


@public("centered_normal")
def centered_normal(n: int, dim: int) -> CenteredNormal:
    """The standard normal density on configurations `[n, dim]` of particles whose mean is zero.

    The base of flows of `jaxode.nn.Particles`. Of other fields, `cnf` subtracts the mean over the
    particles, so that all keep it. Their densities, too, are on the `(n - 1) dim` dimensions of
    centred configurations; a shift of data does not count in `log_prob`, but subtract the mean of
    each configuration before matching. `bind` takes no maps around such a flow.

    Raises:
        ValueError: unless `n` is an integer of at least 2, and `dim` a positive one.
    """
    n = integer("n", n, 2)
    return CenteredNormal((n, integer("dim", dim)))


@public("torus")
def torus(event_shape: int | tuple[int, ...], period: Any = 2 * math.pi) -> Torus:
    """Angles, uniform over a period: the base of densities on circles and tori.

    The flow runs on the line, and its field must have the same periods, as that of
    `jaxode.nn.Residual(period=...)` has. Then all representatives of an angle have the same
    density, which integrates to one over a period. All methods of a flow compare the field one
    period on, at three places, and on both sides of 0 and of half a period, where wrapped angles
    jump, and fail if it differs there. They do not see a field that differs, or jumps, elsewhere
    alone: let it see sine and cosine. Matching takes the shorter way around, in radians, and
    samples of `bind` are in `[0, period)`. Its maps leave angles as they are.

    Args:
        event_shape: shape of one sample; an integer stands for a vector.
        period: of all coordinates, or of each, `[*event]`; infinite for those that are no angles,
            whose base is standard normal.

    Raises:
        ValueError: if a dimension is not a positive integer, or a period not positive.

    References: Chen and Lipman (2023), arXiv:2302.03660.
    """
    shape = as_event_shape(event_shape)
    return Torus(shape, as_period(period, shape))


def _check_events(z: Float[Array, "..."], event: tuple[int, ...]) -> None:
    shape = jnp.shape(z)
    if shape[len(shape) - len(event) :] != event:
        raise ValueError(
            f"log_prob(z=...): must have shape (..., *event) with event {event}; got {shape}."
        )


class _Adapted(eqx.Module):
    """A density from another library: flowjax has `shape`, distrax has `sample(seed=...)`."""

    density: Any
    event_shape: tuple[int, ...] = eqx.field(static=True)
    seed: bool = eqx.field(static=True)

    def log_prob(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        if not _has_support(self.density):
            return self.density.log_prob(z)
        # numpyro's own check is lost whenever the density goes through a pytree.
        inside, axes = self.inside(z), tuple(range(-len(self.event_shape), 0))
        stand_in = self.density.support.feasible_like(z).astype(z.dtype)
        keep = jnp.expand_dims(inside, axes) | ~jnp.isfinite(stand_in)
        log_prob = jnp.where(inside, self.density.log_prob(jnp.where(keep, z, stand_in)), -jnp.inf)
        return jnp.where(jnp.isnan(z).any(axes), jnp.nan, log_prob)

    def inside(self, z: Float[Array, "..."]) -> Bool[Array, "..."]:
        """Whether events are in the support. NaN counts as inside, so that it stays NaN."""
        axes, support = range(-len(self.event_shape), 0), self.density.support
        holds = jnp.all(support(z), tuple(range(support.event_dim - len(axes), 0)))
        return holds | jnp.isnan(z).any(tuple(axes))

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        if self.seed:
            return self.density.sample(seed=key, sample_shape=sample_shape)
        return self.density.sample(key, sample_shape)


def _has_support(density: Any) -> bool:
    """Whether numpyro knows that the density is bounded, to an interval or a half-line."""
    inner: Any = density
    while inner is not None:
        owner = next((cls.__name__ for cls in type(inner).__mro__ if "support" in vars(cls)), "")
        # For these, numpyro takes the range of the last transform, or the support of the first
        # component.
        if owner == "TransformedDistribution" or (
            owner == "MixtureGeneral" and inner._support is None
        ):
            return False
        inner = getattr(inner, "base_dist", None)
    try:
        support: Any = density.support
    except (AssertionError, AttributeError, NotImplementedError):  # its support is not known
        return False
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    bounded = hasattr(support, "lower_bound") or hasattr(support, "upper_bound")
    # Densities on a circle are periodic.
    return bounded and not support.is_discrete and type(support).__name__ != "_Circular"


def as_base(density: Any) -> BaseDensity:
    """The density itself, or an adapter to `BaseDensity` if another library made it."""
    event_shape = getattr(density, "event_shape", getattr(density, "shape", None))
    has_both = all(hasattr(density, name) for name in ("log_prob", "sample"))
    # A class whose objects have a shape is no density.
    if event_shape is None or isinstance(event_shape, property) or not has_both:
        raise TypeError(
            f"cnf(base=...): must have event_shape, log_prob and sample; got {density!r}. "
            "Use jaxode.standard_normal(event_shape)."
        )
    batch_shape = tuple(getattr(density, "batch_shape", ()))
    if batch_shape:
        raise ValueError(
            f"cnf(base=...): must be the density of one event; got a batch of shape {batch_shape}. "
            "Make its axes part of the event: .to_event() in numpyro, Independent in distrax."
        )
    seed = "seed" in inspect.signature(density.sample).parameters
    is_base = isinstance(getattr(density, "event_shape", None), tuple) and not seed
    if is_base and not _has_support(density):
        return density
    return _Adapted(density, as_event_shape(event_shape), seed)


def level_functions(base: BaseDensity) -> tuple[Any, Any]:
    """The methods `cdf` and `icdf` of a density of one number, or None."""
    density: Any = base.density if isinstance(base, _Adapted) else base
    while type(density).__name__ in ("Independent", "ExpandedDistribution"):
        density = getattr(density, "base_dist", None) or density.distribution
    icdf = getattr(density, "icdf", getattr(density, "quantile", None))
    return getattr(density, "cdf", None), icdf


def has_edge(base: BaseDensity, dtype: Any) -> bool:
    """Whether the density is known to be zero far away, so that it may jump on the way."""
    # In half precision densities overflow sooner, which tells nothing of an edge.
    if jnp.finfo(dtype).bits < 32:
        return False
    with jax.ensure_compile_time_eval():
        far = jnp.full((1, *base.event_shape), 1e4, dtype)

        def positive(z):
            return base.log_prob(z) > -jnp.inf

        if isinstance(base, _Adapted) and _has_support(base.density):
            positive = base.inside
        values = [positive(far), positive(-far)]
    return is_known(values) and not np.all([np.asarray(value) for value in values])


def log_prob_of(
    base: BaseDensity, z: Float[Array, "batch *event"], precision: str | None
) -> Float[Array, " batch"]:
    """The log-density of the base, one number per sample, by products of this precision."""
    with at_precision(precision):
        log_prob = base.log_prob(z)
    if jnp.shape(log_prob) != z.shape[:1]:
        raise ValueError(
            f"cnf(base=...): log_prob must have one number per sample, shape {z.shape[:1]}; got "
            f"{jnp.shape(log_prob)} for samples of shape {z.shape}. Sum over the event."
        )
    return log_prob
