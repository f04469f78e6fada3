"""Training on an unnormalized density: the loss of `CNF.reverse_kl_loss` and its path gradient.

With `x = F(z)` for a base sample `z`, the gradient of the mean of `log q(x) - log p(x)` is the path
gradient plus `d log q / dparams` at a fixed `x`, whose mean is zero. Without that term, no gradient
of the divergence with respect to parameters is needed.

References: Roeder, Wu and Duvenaud (2017), arXiv:1703.09194; Vaitl et al. (2022), arXiv:2206.09016.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.arguments import check_scalar, takes
from jaxode._checks.errors import Result
from jaxode._jax.closure import compiled
from jaxode._jax.primitives import first_derivatives_only
from jaxode.flows.bases import BaseDensity, in_one_period, log_prob_of
from jaxode.flows.compiled import probes_of
from jaxode.flows.integrands import SCORE, Integrands
from jaxode.flows.nll import with_integrals
from jaxode.flows.periods import with_periods
from jaxode.ode.adjoints.base import nan_unless
from jaxode.ode.solution import Solution
from jaxode.ode.solve import run
from jaxode.ode.system import System

ONCE = (
    "reverse_kl_loss: has first derivatives only. For second ones, differentiate the mean of "
    "log_q - log_density(x) of flow.sample_and_log_prob, which has no path gradient."
)

Target = Callable[..., Float[Array, ""]]
"""The unnormalized log-density of one sample, `(x)` or `(x, context_row)`."""


class Samples(NamedTuple):
    """Samples of the flow, `x = F(z)`, and `log q(x)`."""

    solution: Solution
    x: Float[Array, "n *event"]
    log_q: Float[Array, " n"]
    score: Float[Array, "n *event"] | float
    """`grad log q(x)`, without derivatives. Zero if the derivatives of `log_q` are to be taken."""


@compiled
@with_periods
def reverse_kl(
    system: System, integrands_and_base, key, log_density: Target, path: bool
) -> tuple[
    Float[Array, ""], Int[Array, "*rows"], Float[Array, "*rows"], tuple[Bool[Array, " n"], ...]
]:
    """The loss, the `Result` that counts, the time reached, and where the target is finite.

    The last are two masks of the samples: of finite values, and of finite gradients.
    """
    integrands, base = integrands_and_base
    draw = _with_score if path else _with_volume
    solution, x, log_q, score = draw(system, integrands, base, probes_of(system, integrands, key))
    fixed_x = jax.lax.stop_gradient(x)
    log_p, slope, finite = _target(log_density, in_one_period(base, fixed_x), system.row_args)
    # This is zero. Its derivative is that of `log q(x) - log p(x)` along the path.
    along = jnp.sum(((score - slope) * (x - fixed_x)).reshape(len(log_q), -1), axis=1)
    losses = log_q + along.astype(log_q.dtype) - log_p.astype(log_q.dtype)
    solved = solution.ok
    finite = tuple(holds | ~solved for holds in finite)  # a failed solve has a message already
    fine = finite[0] & finite[1]
    result = jnp.where(
        solved & ~(fine if solved.shape else fine.all()),
        Result.INVALID_ARGUMENT,
        solution.result,
    )
    loss = jnp.mean(losses * nan_unless(fine, losses.dtype))
    # The derivatives of the slope and the score are stopped.
    loss = first_derivatives_only(loss, ONCE)
    return loss, result, solution.t_reached, finite


def _with_score(system: System, integrands: Integrands, base: BaseDensity, probes) -> Samples:
    """The samples with their score, solved along: `dg/dt = -J^T g - grad div f`."""
    fixed, precision = jax.lax.stop_gradient, system.stepper.precision

    def of_base(z):
        log_prob = log_prob_of(base, z, precision)
        return jnp.sum(log_prob), log_prob

    score, log_base = jax.grad(of_base, has_aux=True)(fixed(system.y0))
    implicit = system.stepper.method.implicit
    field = integrands.score_with_jacobian if implicit else integrands.score
    state, row_args = (system.y0, *fixed((log_base, SCORE * score))), (probes, system.row_args)
    solution = run(system._replace(field=field, y0=state, row_args=row_args))
    x, log_q, score = solution.y1
    # `log_q` moves with the end times, of which the score has the derivative.
    return Samples(solution, x, fixed(log_q), fixed(score) / SCORE)


def _with_volume(system: System, integrands: Integrands, base: BaseDensity, probes) -> Samples:
    """The samples with the change of their volume, whose derivatives are those of `log_q`."""
    solution = with_integrals(system, integrands.volume, probes, ())
    x, log_det = solution.y1
    log_q = log_prob_of(base, system.y0, system.stepper.precision) - log_det
    return Samples(solution, x, log_q, 0.0)


def _target(log_density: Target, x: Float[Array, "n *event"], context):
    """The target's log-densities `[n]`, their gradients, and where each is finite."""

    def log_density_of_row(x, *row):
        rule = "must return a floating scalar, the log-density of one sample"
        value = log_density(x, *row)
        return check_scalar("log_density", value, rule, "It is mapped over the samples.")

    rows = () if context is None else (context,)
    rows = rows if takes(log_density, x, *rows) else ()
    log_p, slope = jax.vmap(jax.value_and_grad(log_density_of_row))(x, *rows)
    slope, event = jax.lax.stop_gradient(slope), tuple(range(1, x.ndim))
    return log_p, slope, (jnp.isfinite(log_p), jnp.isfinite(slope).all(event))
