"""Solvers that are not explicit Runge-Kutta methods, such as implicit ones: solved by diffrax."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode.adjoints import DiscreteAdjoint, ForwardMode
from jaxode.integrate import Integration
from jaxode.method import Method
from jaxode.results import Result, Stats


class DiffraxSolve(eqx.Module):
    """A gradient method of jaxode for a solver of diffrax, by the like method of diffrax.

    `DiscreteAdjoint` is diffrax's recursive checkpointing, the other two are what their names say.
    """

    solver: diffrax.AbstractSolver
    adjoint: Any = eqx.field(static=True)

    def _controller(self, method: Method) -> diffrax.AbstractStepSizeController:
        if method.steps is not None:
            return diffrax.ConstantStepSize()
        return diffrax.PIDController(rtol=method.rtol, atol=method.atol, dtmax=method.max_step)

    def _adjoint(self, controller) -> diffrax.AbstractAdjoint:
        if isinstance(self.adjoint, DiscreteAdjoint):
            return diffrax.RecursiveCheckpointAdjoint()
        if isinstance(self.adjoint, ForwardMode):
            return diffrax.ForwardMode()
        if self.adjoint.rtol is not None or self.adjoint.atol is not None:
            rtol = controller.rtol if self.adjoint.rtol is None else self.adjoint.rtol
            atol = controller.atol if self.adjoint.atol is None else self.adjoint.atol
            controller = diffrax.PIDController(rtol=rtol, atol=atol)
        return diffrax.BacksolveAdjoint(solver=self.solver, stepsize_controller=controller)

    def integrate(
        self,
        field,
        args: PyTree,
        y0: Float[Array, "rows n"],
        t0: Float[Array, ""],
        t1: Float[Array, ""],
        ts: Float[Array, " times"] | None,
        method: Method,
    ) -> Integration:
        """Solve `dy/dt = field(t, y, args)` on one row."""
        controller = self._controller(method)
        first_step = method.first_step
        if first_step is not None:
            first_step = first_step * jnp.sign(t1 - t0)
        if method.steps is not None:
            first_step = (t1 - t0) / method.steps
        vector_field = lambda t, y, inputs: inputs[0](t[None], y[None], inputs[1])[0]
        # The end is one more output time: diffrax's backsolve takes no other form.
        times = t1[None] if ts is None else jnp.concatenate([ts, t1[None]])
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            self.solver,
            t0,
            t1,
            first_step,
            y0[0],
            args=(field, args),
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=controller,
            adjoint=self._adjoint(controller),
            max_steps=method.tape_length + (method.steps is not None),
            throw=False,
        )
        states = solution.ys
        assert states is not None
        result = _result(solution.result, states)
        # NaN times all inputs, so that every gradient of a failed solve is NaN as well.
        inputs = jax.tree.leaves(eqx.filter((field, args, y0, t0, t1, ts), eqx.is_inexact_array))
        total = sum(jnp.sum(leaf).astype(states.dtype) for leaf in inputs)
        failed = jnp.where(result == Result.SUCCESS, 0.0, jnp.nan).astype(states.dtype)
        states = states + failed * total
        count = solution.stats
        stats = Stats(
            count["num_steps"][None],
            count["num_accepted_steps"][None],
            count["num_rejected_steps"][None],
            jnp.full(1, -1),
        )
        reached = jnp.where(result == Result.SUCCESS, t1, jnp.nan)[None]
        ys = None if ts is None else states[:-1, None]
        return Integration(states[-1:], ys, stats, result[None], reached, jnp.zeros_like(reached))


def _result(result: diffrax.RESULTS, states: Float[Array, "times n"]):
    failed = jnp.where(
        result == diffrax.RESULTS.max_steps_reached,
        Result.MAX_STEPS_REACHED,
        Result.IMPLICIT_SOLVE_FAILED,
    )
    finite = jnp.where(jnp.isfinite(states).all(), Result.SUCCESS, Result.NON_FINITE)
    return jnp.where(result == diffrax.RESULTS.successful, finite, failed).astype(jnp.int32)
