"""Gradient methods: each wraps the forward solve and knows how to differentiate it."""

from typing import Protocol

from jaxode.ode.adjoints.backsolve import BacksolveAdjoint
from jaxode.ode.adjoints.discrete import DiscreteAdjoint
from jaxode.ode.adjoints.forward import ForwardMode
from jaxode.ode.adjoints.interpolating import InterpolatingAdjoint
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.problem import Problem
from jaxode.ode.loop.stepper import Stepper

__all__ = ["Adjoint", "BacksolveAdjoint", "DiscreteAdjoint", "ForwardMode", "InterpolatingAdjoint"]


class Adjoint(Protocol):
    """A gradient method: a frozen dataclass, compared by value.

    `integrate` runs inside the compiled program. Times and flags are per row, states per sample,
    with one row for each sample or one for all of them (`loop/rows.py`). It returns the same
    `Integration` as the loop (`loop/integrate.py`), which most methods run:

    - `ys[i]`, the states at `problem.ts[i]`, or None without `ts`. From `problem.outputs` on, they
      are padding, which the caller overwrites.
    - `result` per row. A row fails alone, and its `y1` and `ys` are NaN. A row for which `all_hold`
      is false takes no steps and has `INVALID_ARGUMENT`. A row with an empty span keeps `y0`, even
      if the field is not finite; its derivatives with respect to times are those of the ODE.
    - `stats` up to the end or the failure, where a step that is not finite counts as rejected.
    - `t_reached`, which is `t1`, or the end of the last accepted step of a row that failed.
    - `h`, zero without error control; `steps`, only if `stepper.dense`; `stopped`, None.

    Derivatives: with respect to all floating leaves of `problem`, none of `stepper`. Those of a
    failed row are NaN, and so are those of what it shares with other rows. If its cotangents are
    zero, it should add nothing to any gradient instead.

    Errors are raised at trace time: `"<Class>: <rule>; got <value>. <What to change>."`. Those for
    missing modes of differentiation are in `tape.py` (`in_reverse`, `once_only`). At run time the
    caller raises by `result`; only a failed backward solve is raised here, if `stepper.raises`.
    """

    def integrate(self, problem: Problem, stepper: Stepper) -> Integration:
        """Solve the problem. Differentiable in all of its floating leaves."""
        ...
