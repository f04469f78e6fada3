"""The ODE of a diffusion model: a vector field that carries noise to data.

At every time, a diffusion `dz = drift(t) z dt + diffusion(t) dW` has the same density as the ODE

    dz/dt = drift(t) z - diffusion(t)^2 / 2 * score(t, z),    score = grad_z log p_t(z).

Times follow the literature: data at `t = 0`, noise at `t = 1`.

Reference: Song et al. (2021), arXiv:2011.13456, appendix D.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import is_number, one_of
from jaxode._checks.caller import arg, caller, public
from jaxode._checks.event_shapes import as_event_shape
from jaxode._checks.rules import FROM_NOISE, Faults
from jaxode.flows.bases import DiagonalNormal
from jaxode.ode.field import Completed, Field, VectorField, check_field

Model = Callable[[Float[Array, ""], Float[Array, " *event"], Any], Float[Array, " *event"]]
Time = Float[Array, ""]


class Path(Protocol):
    """A diffusion from data at `t = 0` to noise at `t = 1`."""

    def drift(self, t: Time) -> Time:
        """The growth rate of `z`."""
        ...

    def diffusion(self, t: Time) -> Time:
        """The factor of the noise `dW`."""
        ...

    def mean_scale(self, t: Time) -> Time:
        """The factor of a data sample in its mean at time `t`."""
        ...

    def std(self, t: Time) -> Time:
        """The standard deviation around that mean."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """Data fade while noise grows, at the rate `beta_min + t (beta_max - beta_min)`.

    The base density is `jaxode.standard_normal(event_shape)`.

    References: Ho et al. (2020), arXiv:2006.11239; Song et al. (2021), arXiv:2011.13456.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    @public("")
    def __post_init__(self):
        _check_order(self, zero=True)

    def _beta(self, t: Time) -> Time:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _log_mean_scale(self, t: Time) -> Time:
        return -0.5 * t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def drift(self, t: Time) -> Time:
        """`-beta(t) / 2`."""
        return -0.5 * self._beta(t)

    def diffusion(self, t: Time) -> Time:
        """`sqrt(beta(t))`."""
        return jnp.sqrt(self._beta(t))

    def mean_scale(self, t: Time) -> Time:
        """`exp(-integral of beta / 2)`."""
        return jnp.exp(self._log_mean_scale(t))

    def std(self, t: Time) -> Time:
        """`sqrt(1 - mean_scale(t)^2)`."""
        return jnp.sqrt(-jnp.expm1(2 * self._log_mean_scale(t)))


@dataclass(frozen=True)
class VarianceExploding:
    """Data plus noise with standard deviation `sigma_min (sigma_max / sigma_min)^t`.

    The density at `t = 0` is the data density blurred by `sigma_min`. The base density is
    `path.base(event_shape)`, a normal with standard deviation `sigma_max`, which must be far above
    the scale of the data.

    References: Song and Ermon (2020), arXiv:2006.09011; Song et al. (2021), arXiv:2011.13456.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    @public("")
    def __post_init__(self):
        _check_order(self, zero=False)

    def drift(self, t: Time) -> Time:
        """Zero."""
        return jnp.zeros_like(t)

    def diffusion(self, t: Time) -> Time:
        """The square root of the growth rate of the variance."""
        return self.std(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def mean_scale(self, t: Time) -> Time:
        """One."""
        return jnp.ones_like(t)

    def std(self, t: Time) -> Time:
        """`sigma_min (sigma_max / sigma_min)^t`."""
        return self.sigma_min * jnp.exp(t * math.log(self.sigma_max / self.sigma_min))

    @public("base")
    def base(self, event_shape: int | tuple[int, ...]) -> DiagonalNormal:
        """The density at `t = 1`, for data around zero that are small compared with `sigma_max`."""
        zero = jnp.zeros(as_event_shape(event_shape))
        return DiagonalNormal(zero, zero + math.log(self.sigma_max))


def _check_order(path: Any, zero: bool) -> None:
    """Raise unless both numbers are finite and rising, from above zero (or at least zero)."""
    (low, least), (high, most) = vars(path).items()
    numbers = all(is_number(x) for x in (least, most))
    if not numbers or not (0 <= least < most < math.inf) or (least == 0 and not zero):
        rule = "at least 0" if zero else "positive"
        raise ValueError(
            f"{caller()}({low}=..., {high}=...): must be {rule}, finite and in rising order; got "
            f"{least!r} and {most!r}."
        )


class _ProbabilityFlow(eqx.Module, Field):
    """The vector field. Equal to another with the same model and path."""

    model: Model
    path: Path
    predicts: Literal["score", "noise"] = eqx.field(static=True)

    def __call__(self, t: Time, z: Float[Array, " *event"], args: PyTree):
        """The velocity of one sample."""
        prediction = self.model(t, z, args)
        if (
            jax.tree.structure(prediction) != jax.tree.structure(z)
            or jnp.shape(prediction) != z.shape
        ):
            return prediction  # the field's usual check names the shape
        return self.path.drift(t) * z + self._factor(t) * prediction

    def value_and_divergence(self, t: Time, z: Float[Array, " *event"], args: PyTree):
        """`(velocity, divergence)`, or `NotImplemented` if the model has no closed form."""
        closed_form = Completed(self.model).value_and_divergence(t, z, args)
        if closed_form is NotImplemented:
            return closed_form
        drift, factor = self.path.drift(t), self._factor(t)
        dz, div = closed_form
        return drift * z + factor * dz, drift * jnp.asarray(z.size, z.dtype) + factor * div

    def _factor(self, t: Time) -> Time:
        """The factor of the model's output in the velocity."""
        of_score = -0.5 * self.path.diffusion(t) ** 2
        return of_score if self.predicts == "score" else -of_score / self.path.std(t)

    def check_span(self, t0: Any, t1: Any) -> Any:
        """The start time for `cnf`. If only the run can tell that the span is wrong, it is NaN."""
        if not FROM_NOISE.check(t0, t1):
            return t0
        return jnp.where(FROM_NOISE.holds(t0, t1), jnp.asarray(t0, float), jnp.nan)

    def span_faults(self, t0: Any) -> Faults:
        """The fault of a start time from `check_span`."""
        return {FROM_NOISE.sentence(where="cnf"): lambda: jnp.isnan(t0)}


@public("probability_flow")
def probability_flow(
    model: Model, path: Path, *, predicts: Literal["score", "noise"] = "score"
) -> VectorField:
    """The ODE of a diffusion model as a vector field, for use with `jaxode.cnf`.

        dz/dt = drift(t) z - diffusion(t)^2 / 2 * score(t, z)

    It has a closed-form divergence if the model has one. Time runs from data at 0 to noise at 1, so
    the base is at time 1, and `cnf` rejects any other order, and times outside of [0, 1]:

        flow = jaxode.cnf(jaxode.probability_flow(model, path), base, t0=1.0, t1=1e-5)

    Args:
        model: network of one sample, `model(t, z, args)`. Like a vector field, it gets `params` or
            `(params, context_row)` as `args`.
        path: the diffusion that the model was trained for: `jaxode.VariancePreserving()`,
            `jaxode.VarianceExploding()`, or your own object with the same four functions of time,
            `drift`, `diffusion`, `mean_scale` and `std`.
        predicts: what the model returns: the "score", or the "noise" `e` in
            `z = mean_scale(t) x + std(t) e`, whose score is `-e / std(t)`. A variance-preserving
            path has `std(0) = 0`, so a noise prediction needs `t1 > 0`.

    Raises:
        TypeError, ValueError: if the model is not a function, the path lacks one of the four
            functions, or `predicts` is neither word.

    Reference: Song et al. (2021), arXiv:2011.13456, appendix D.
    """
    check_field("model", model, "model(t, z, args)")
    if isinstance(path, type):
        raise TypeError(
            f"{arg('path')} must be a path; got the class {path.__name__}. Pass an instance of it."
        )
    needed = ("drift", "diffusion", "mean_scale", "std")
    missing = [name for name in needed if not callable(getattr(path, name, None))]
    if missing:
        raise TypeError(
            f"{arg('path')} must have functions of time drift, diffusion, mean_scale and std; "
            f"got {path!r} without {', '.join(missing)}. Use jaxode.VariancePreserving()."
        )
    one_of("predicts", predicts, ("score", "noise"))
    return _ProbabilityFlow(model, path, predicts)
