"""The options of a solve: made and checked once, at the entrance of a public function."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import as_array, check_breakpoints, check_number, integer, one_of
from jaxode._checks.atol import check_atol, for_each_number
from jaxode._checks.caller import arg, caller
from jaxode._checks.errors import EXPLANATIONS, IMPLICIT, JACOBIAN_GIVEN, Remedies, Result
from jaxode._checks.rules import is_known, rules_of
from jaxode._jax.sharding import AxisName
from jaxode.ode.adjoints import Adjoint, DiscreteAdjoint
from jaxode.ode.loop.step_size import Controller
from jaxode.ode.loop.stepper import Stepper
from jaxode.ode.solvers.base import Method
from jaxode.ode.solvers.explicit import Solver, method_of
from jaxode.ode.solvers.rosenbrock import with_mass

PRECISIONS = ("highest", "high", "default")
NO_LIMIT = 2**31 - 1  # steps are counted in int32
FEW_ROUNDINGS = 4  # a relative tolerance below so many roundings measures rounding


class SolveOptions(eqx.Module):
    """Options of a solve, explained by `jaxode.solve`. Equal if all options are equal."""

    solver: diffrax.AbstractSolver | Solver = diffrax.Tsit5()
    rtol: float | Float[Array, ""] = 1e-5
    atol: PyTree[float | Float[Array, "..."]] = 1e-5
    steps: int | None = eqx.field(static=True, default=None)
    adjoint: Adjoint = DiscreteAdjoint()
    first_step: float | Float[Array, ""] | None = None
    max_step: float | Float[Array, ""] | None = None
    breakpoints: Sequence[float] | Float[Array, "*rows points"] | None = None
    max_steps: int = eqx.field(static=True, default=4096)
    axis_name: AxisName | None = eqx.field(static=True, default=None)
    precision: str | None = eqx.field(static=True, default=None)
    mass: tuple[tuple[float, ...], ...] | None = eqx.field(static=True, default=None)
    """An option of `solve` alone, which checks it."""

    @classmethod
    def make(cls, **keywords: Any) -> "SolveOptions":
        """Make the options from the keywords that a user passed.

        Raises:
            TypeError, ValueError: for an unknown option, and for an invalid value that is known at
                trace time.
        """
        names = sorted({field.name for field in dataclasses.fields(cls)} - {"mass"})
        unknown = sorted(set(keywords) - set(names))
        if unknown:
            raise TypeError(
                f"{caller()}: unknown options {unknown}. The solve options are {names}."
            )
        if keywords.get("steps") is not None:
            keywords["steps"] = integer("steps", keywords["steps"])
        if "max_steps" in keywords:
            keywords["max_steps"] = min(integer("max_steps", keywords["max_steps"]), NO_LIMIT)
        options = cls(**keywords)
        options._check()
        return options

    @property
    def method(self) -> Method:
        """The solver's method."""
        method = method_of(self.solver)
        return method if self.mass is None else with_mass(method, self.mass)

    @property
    def jacobian(self) -> Any:
        """The Jacobian of the vector field that the user gave, or None."""
        return self.solver.jacobian if isinstance(self.solver, Solver) else None

    @property
    def implicit(self) -> bool:
        """Whether each step solves equations."""
        return self.method.implicit

    def remedies(self, dtype: jnp.dtype) -> Remedies:
        """Advice in the message of a failed solve in `dtype`, by the solver and the tolerance."""
        usual = JACOBIAN_GIVEN if self.jacobian is not None else IMPLICIT if self.implicit else {}
        rtol, rounding = self.rtol, float(jnp.finfo(dtype).eps)
        if not is_known(rtol) or not 0 < float(rtol) < FEW_ROUNDINGS * rounding:
            return usual
        cure = f"raise it to {10 * rounding:.0e}"
        if dtype != jnp.float64:
            cure = f"use float64, by jax.config.update('jax_enable_x64', True), or {cure}"
        first = f"rtol={float(rtol):g} is below a few roundings of {dtype}, {rounding:.1e}: {cure}."
        stuck = Result.MAX_STEPS_REACHED, Result.STEP_SIZE_UNDERFLOW
        return usual | {
            result: f"{first} Otherwise: {usual.get(result, EXPLANATIONS[result][1])}"
            for result in stuck
        }

    def _check(self) -> None:
        if not isinstance(self.adjoint, Adjoint):
            raise TypeError(
                f"{arg('adjoint')} must be a gradient method such as "
                f"jaxode.DiscreteAdjoint(); got {self.adjoint!r}."
            )
        if not isinstance(self.solver, diffrax.AbstractSolver | Solver):
            got = f"{self.solver!r}."
            if isinstance(self.solver, type):
                got = f"the class {self.solver.__name__}. Call it: {self.solver.__name__}()."
            raise TypeError(
                f"{arg('solver')} must be an ODE solver, such as diffrax.Tsit5() or "
                f"jaxode.Rodas5P(); got {got}"
            )
        method = self.method
        if method.b_error is None and self.steps is None:
            raise ValueError(
                f"{arg('solver')} {method.name} has no error estimate; got steps=None. "
                "Pass steps=N for N equal steps, or an adaptive solver such as diffrax.Tsit5()."
            )
        names = self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)
        if self.axis_name is not None and not all(isinstance(n, str) for n in names):
            raise TypeError(
                f"{arg('axis_name')} must be the name of a mapped axis, or a tuple of names; "
                f"got {self.axis_name!r}. Pass the name that jax.shard_map has for it."
            )
        one_of("precision", self.precision, (None, *PRECISIONS))
        check_atol(self.atol)
        for name in ("rtol", "first_step", "max_step"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), *rules_of(name))
        if self.breakpoints is not None:
            check_breakpoints(self.breakpoints)

    def stepper(self, dtype: jnp.dtype, row: PyTree[jax.ShapeDtypeStruct]) -> Stepper:
        """The settings of the loop for states with rows such as `row`, solved in `dtype`."""

        def value(x: Any) -> Any:
            return None if x is None else jax.lax.stop_gradient(as_array(x, dtype))

        rtol, atol = value(self.rtol), self.atol
        of_all = jax.tree_util.all_leaves([atol]) and np.shape(atol) == ()
        coarsest = max((dtype, *(leaf.dtype for leaf in jax.tree.leaves(row))), key=_least)
        lost_up_to: Any = _least(coarsest)
        if not of_all:
            # Each number is compared in the dtype of its leaf.
            lost_up_to = jax.tree.map(lambda leaf: _least(leaf.dtype), row)
            lost_up_to = for_each_number(lost_up_to, row, dtype)
            atol = for_each_number(atol, row, dtype)
        atol = value(atol)
        if is_known((rtol, atol)):
            lost = np.maximum(rtol, atol) <= lost_up_to
            if lost.any():
                least = self.atol if of_all else np.min(atol, where=lost, initial=np.inf)
                both = f"rtol={float(self.rtol):g}, atol={float(least):g}"
                role = "a dtype of the state"
                if coarsest == dtype:
                    role = "in which the state is solved"
                lost = "" if both == "rtol=0, atol=0" else f" in {coarsest}, {role}"
                raise ValueError(
                    f"{caller()}({both}): at least one tolerance must be positive{lost}."
                )
        else:
            lost = jnp.any(jnp.maximum(rtol, atol) <= lost_up_to)
            rtol, atol = (jnp.where(lost, jnp.minimum(x, 0), x) for x in (rtol, atol))
        controller = Controller(
            rtol,
            atol,
            max_steps=self.max_steps,
            first_step=value(self.first_step),
            max_step=value(self.max_step),
            axis_name=self.axis_name,
        )
        return Stepper(self.method, controller, self.steps, precision=self.precision)


@functools.cache
def _least(dtype: jnp.dtype) -> float:
    """The largest number that becomes zero in `dtype`. Programs flush denormals of float32."""
    info = jnp.finfo(dtype)
    if info.bits < 32:
        return 0.5 * float(info.tiny) * float(info.eps)
    return float(np.nextafter(info.tiny, info.dtype.type(0)))
