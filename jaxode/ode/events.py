"""Events: a solve that ends where a condition crosses zero.

The loop finds the time and ends its last step there (`loop/crossing.py`). The solve is
differentiated like any other, with its end held fixed. With `g` the condition and `t*` its zero,
the implicit function theorem gives

    dt* = -dg / (dg/dt + dg/dy f),

where `dg` is the change of `g` at the fixed time `t*`. Differentiating this formula, in which the
state at the fixed time moves with `t*`, gives second derivatives.

References: Chen, Amos and Nickel (2021), arXiv:2011.03902.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxode._checks.arguments import integer, one_of
from jaxode._checks.caller import arg, public
from jaxode._checks.errors import Result
from jaxode._jax.primitives import first_derivatives_only
from jaxode._jax.tangents import instantiate_zeros, undifferentiated_unless, with_tangent
from jaxode.ode.adjoints.base import ended
from jaxode.ode.field import check_field
from jaxode.ode.loop.crossing import Crossing
from jaxode.ode.loop.initial_value_problem import InitialValueProblem
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.rows import replace_rows
from jaxode.ode.loop.stepper import Stepper

UP_TO_SECOND = (
    "Event: the time of an event, and what depends on it, has only first and second derivatives."
)


class Event(eqx.Module):
    """Ends a solve where `condition(t, y, args)` crosses zero, or changes its state there.

    Args:
        condition: a function of time, state (of one sample, with a batch) and `args` that returns a
            floating scalar, with derivatives in forward mode. Its sign is checked at eight equal
            parts of each step. Set `max_step` if it can change sign twice within one part.
        direction: 1 if only a rise through zero along the solve counts, -1 if only a fall does, 0
            for both. A condition that is zero at the start and then moves in this direction ends
            the solve there.
        change: if given, the solve goes on from the state `change(t, y, args, i)`, where `i` is
            the number of the event, an int32 scalar that counts from 0. The first event after
            `most` changes ends the solve. `Solution.ys` at the time of an event is the state before
            it. After the change, the condition should be off zero, or move against `direction`:
            otherwise the event comes at once again, and after `most` changes ends the solve there.
        most: how often the state may change.

    If the condition crosses zero with zero slope, the derivative of the time is not finite, and the
    solve can fail (`EVENT_NOT_FOUND`): use one with a slope there, such as `t - a` for
    `(t - a) ** 3`. If it jumps across zero and has a slope there, the solve fails, too. A NaN
    condition never crosses.

    Raises:
        TypeError, ValueError: for functions and numbers of the wrong kind.
    """

    condition: Callable[[Float[Array, ""], PyTree, PyTree], Float[Array, ""]]
    direction: Literal[-1, 0, 1] = eqx.field(static=True, default=0)
    change: Callable[[Float[Array, ""], PyTree, PyTree, Int[Array, ""]], PyTree] | None = None
    most: int | None = eqx.field(static=True, default=None)

    @public("")
    def __check_init__(self):
        one_of("direction", self.direction, (-1, 0, 1))
        check_field("condition", self.condition, "condition(t, y, args)")
        if self.change is not None:
            check_field("change", self.change, "change(t, y, args, i)")
            cure = " It bounds how often the state changes."
            integer("most", self.most, cure=cure)
        elif self.most is not None:
            raise ValueError(f"{arg('most')} needs a change; got most={self.most!r}. Pass change.")


def solve_to_event(
    event: Event,
    condition: Any,
    problem: InitialValueProblem,
    stepper: Stepper,
    adjoint: Any,
) -> tuple[InitialValueProblem, Integration]:
    """Solve the problem up to the event of each row, where `condition(t, y, args)` is zero."""
    crossing = jax.lax.stop_gradient(Crossing(condition, event.direction))
    out = adjoint.integrate(problem, dataclasses.replace(stepper, stop=crossing))
    problem = ended(problem, out)
    t1, y1 = _moved(condition, out.stopped, problem, out)
    # The time of a failed row is NaN, and so are its derivatives.
    failed = out.result != Result.SUCCESS
    t1 = jnp.where(failed, jnp.sum(y1, axis=1).astype(t1.dtype), t1)
    return problem._replace(t1=t1), out._replace(y1=y1)


def _moved(condition: Callable[..., Array], came, problem: InitialValueProblem, out: Integration):
    """The time of the event or the end, and the state there, both with their derivatives."""
    good = jnp.where(came.any(), came, out.result == Result.SUCCESS)
    shared, row_args = problem.args
    t, y, row_args = replace_rows((problem.t1, out.y1, row_args), ~came, good)
    inputs = (t, y), condition, problem.slope._replace(args=(shared, row_args))
    t, y = _at_zero(*undifferentiated_unless(came.any(), inputs), came)
    return jnp.where(came, t, problem.t1), jnp.where(came[:, None], y, out.y1)


def _at_zero(end, *inputs):
    """The time of the zero and the state there, with derivatives by the implicit function theorem.

    Where the condition has no slope along the solution, they have no derivatives.
    """

    def tangent(primals, dots):
        (end, *inputs), ((_, y_dot), *dots) = primals, dots
        (condition, field, came), (t, y) = inputs, end
        time, state = _at_zero(end, *inputs)
        # This is zero, but has derivatives. The state at `t + after` is right to first order in it.
        after = first_derivatives_only(time - t, UP_TO_SECOND)[:, None].astype(y.dtype)

        def at_fixed_time(condition, field, y):
            y = y + after * field(t, y)
            return y, condition(time, y, field.args)

        point, point_dots = (condition, field, y), (*dots[:2], y_dot)
        (fixed_state, value), dots = eqx.filter_jvp(at_fixed_time, point, point_dots)
        y_dot, value_dot = map(instantiate_zeros, dots, (fixed_state, value))
        slope = field(time, fixed_state)
        _, rate = jax.jvp(
            lambda t, y: condition(t, y, field.args),
            (time, fixed_state),
            (jnp.ones_like(time), slope),
        )
        rate = jnp.where(came, jnp.where(rate == 0, jnp.nan, rate), 1)
        # Without a slope, the time has no derivative even if the condition does not depend on the
        # state.
        t_dot = -(value_dot + 0 * jnp.sum(y_dot, axis=1).astype(rate.dtype)) / rate
        return t_dot.astype(t.dtype), y_dot + t_dot[:, None].astype(state.dtype) * slope

    return with_tangent(end, tangent, *inputs)
