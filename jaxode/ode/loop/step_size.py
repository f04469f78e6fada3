"""Step-size control: the error of a step, the first step size, and the next one.

Times and step sizes are `[rows]`, states are `[samples, n]`, and each row has its own step.

References: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I" (1993),
section II.4.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxode._jax.sharding import AxisName, axes_of, fori_loop, vary
from jaxode.ode.loop.rows import reduce_rows, size_of_row

SAFETY = 0.9
MIN_FACTOR = 0.2
MAX_FACTOR = 10.0


class Controller(eqx.Module):
    """The error that a step may have, and how long and how many steps may be."""

    rtol: Float[Array, ""]
    atol: Float[Array, ""] | Float[Array, "1 n"]
    max_steps: int = eqx.field(static=True)
    first_step: Float[Array, ""] | None = None
    max_step: Float[Array, ""] | None = None
    axis_name: AxisName | None = eqx.field(static=True, default=None)
    """The device axes over which the state is split."""

    def limit(self, h: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """The step size, capped at `max_step`."""
        return h if self.max_step is None else jnp.clip(h, -self.max_step, self.max_step)

    def norm(
        self, x: Float[Array, "samples n"], of_rows: Float[Array, " rows"]
    ) -> Float[Array, " rows"]:
        """Root mean square of each row, over all devices along `axis_name` if given."""
        size = jnp.asarray(size_of_row(x, of_rows), x.dtype)  # may be too large for a JAX integer
        mean_square = reduce_rows(jnp.sum, x * x, of_rows) / size
        if self.axis_name is not None:
            mean_square = vary(jax.lax.pmean(mean_square, self.axis_name), axes_of(mean_square))
        return jnp.sqrt(mean_square)

    def is_lost(
        self, y: Float[Array, "samples n"], of_rows: Float[Array, " rows"]
    ) -> Bool[Array, " rows"]:
        """Mark states that are not finite, on all devices if on one. An empty solve would not
        notice."""
        return jnp.isnan(self.norm(0 * jax.lax.stop_gradient(y), of_rows))

    def error_ratio(
        self, error: Float[Array, "samples n"], y0, y1, h: Float[Array, " rows"]
    ) -> Float[Array, " rows"]:
        """RMS of `error / (atol + rtol max(|y0|, |y1|))`: one is the largest that is accepted.

        NaN, on all devices, if `y1` is not finite: an infinite scale would hide the error.
        """
        scale = self.atol + self.rtol * jnp.maximum(jnp.abs(y0), jnp.abs(y1))
        return self.norm(jnp.where(jnp.isfinite(y1), _relative(error, scale, h), jnp.nan), h)

    def guess_first_step(
        self,
        field: Callable[..., Float[Array, "samples n"]],
        method: Any,
        t0: Float[Array, " rows"],
        y0: Float[Array, "samples n"],
        span: Float[Array, " rows"],
        evals: Any = 2,
    ) -> tuple[Float[Array, " rows"], Float[Array, "samples n"]]:
        """First step size (with the sign of `span`) and `f(t0, y0)`, from two evaluations of `f`.

        After one evaluation alone, the size has no meaning. The evaluations are iterations of one
        loop, which holds a single copy of `f`. The step has an error of about the tolerance and
        changes the state by roughly its own size at most. It is at most 1e-4 if state or slope is
        zero.
        """
        scale = self.atol + self.rtol * jnp.abs(y0)

        def norm(x):
            return self.norm(_relative(x, scale, t0), t0)

        d0, sign = norm(y0), jnp.sign(span)

        def trial_step(f0):
            d1 = norm(f0)
            h0 = jnp.where((d0 < 1e-5) | ~(d1 >= 1e-5), 1e-6, 0.01 * d0 / jnp.maximum(d1, 1e-5))
            return jnp.minimum(h0.astype(t0.dtype), jnp.abs(span))

        def evaluate(i, carry):
            f0, h0, _ = carry
            k = field(t0 + sign * h0, y0 + (sign * h0)[:, None] * f0)
            return jnp.where(i == 0, k, f0), jnp.where(i == 0, trial_step(k), h0), k

        zero = jnp.zeros_like(y0)
        f0, h0, f1 = fori_loop(0, evals, evaluate, (zero, jnp.zeros_like(t0), zero))
        d1, d2 = norm(f0), norm(f1 - f0) / jnp.where(h0 > 0, h0, 1.0)
        h = jnp.minimum(100.0 * h0, _first_step_of_slopes(method, d1, d2))
        # A non-finite slope must not poison the step: the first attempt then fails with a cause.
        h = jnp.where(jnp.isfinite(h), h, h0).astype(t0.dtype)
        # Nor may the step vanish relative to the time. Error control makes it smaller if needed.
        resolution = jnp.finfo(t0.dtype).eps * jnp.maximum(jnp.abs(t0), jnp.abs(t0 + span))
        h = jnp.maximum(h, 100 * resolution)
        return sign * jnp.minimum(h, jnp.abs(span)), f0


def _relative(x: Float[Array, "samples n"], scale: Float[Array, "samples n"], of_rows):
    """`x / scale`, and zero where both are zero: `atol=0` asks nothing of entries that stay zero.

    Finite entries and their squares stay finite: a tolerance out of reach means an error that is
    too large, not a field that is not finite.
    """
    ratio = jnp.where(x == 0, 0.0, x / jnp.where(x == 0, 1.0, scale))
    # The sum over the row must not overflow either. The thousandth leaves room for many devices.
    limit = 1e-3 * (float(jnp.finfo(x.dtype).max) / size_of_row(x, of_rows)) ** 0.5
    return jnp.where(jnp.isfinite(x), jnp.clip(ratio, -limit, limit), ratio)


def step_factor(
    ratio: Float[Array, " rows"], order: int, rejected_guess: Bool[Array, " rows"]
) -> Float[Array, " rows"]:
    """The factor from a step size to the next, by the error ratio of the step.

    The first step is a guess, from two slopes or by the user. If it is rejected, nothing is known
    about the high derivatives inside it, so it shrinks by more, as for a lower order.
    """
    power = jnp.where(rejected_guess, -1.0 / min(order, 5), -1.0 / order).astype(ratio.dtype)
    # `tiny` keeps the factor of a zero error finite. A NaN ratio gets the smallest factor.
    factor = SAFETY * jnp.maximum(ratio, jnp.finfo(ratio.dtype).tiny) ** power
    return jnp.clip(jnp.where(jnp.isnan(ratio), MIN_FACTOR, factor), MIN_FACTOR, MAX_FACTOR)


def _first_step_of_slopes(
    method: Any, d1: Float[Array, " rows"], d2: Float[Array, " rows"]
) -> Float[Array, " rows"]:
    """A guess from the norms of the first and second derivative. Infinite for a slope of zero.

    The step that the controller would take for `y' = L y`, `L = d2 / d1`, whose estimated error is
    `error_constant d1 L^(order - 1) h^order`. Hairer's guess assumes that all higher derivatives
    are as large as these two, whatever the unit of time, which is too careful for smooth solutions:
    every step is also pulled back, so an extra step costs more than a rejection.
    """
    order, tiny = method.error_order, 1e-15
    rate = jnp.maximum(d2 / jnp.maximum(d1, tiny), tiny)
    error = jnp.maximum(method.error_constant * d1, tiny)
    h = SAFETY * error ** (-1 / order) * rate ** (1 / order - 1)
    return jnp.where(d1 < 1e-5, jnp.inf, h)
