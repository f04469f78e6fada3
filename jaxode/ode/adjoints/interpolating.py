"""The adjoint ODE on the stored trajectory of the forward solve."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxode._checks.arguments import integer
from jaxode._checks.caller import public
from jaxode._jax.sharding import while_loop
from jaxode._jax.tangents import filled
from jaxode.ode.adjoints.base import Solved
from jaxode.ode.adjoints.continuous import (
    ContinuousAdjoint,
    Segment,
    adjoint_product,
    solve_segment,
)
from jaxode.ode.adjoints.tape import OutputBars, Step, walk_back
from jaxode.ode.loop.integrate import Integration
from jaxode.ode.loop.outputs import Curve


@dataclass(frozen=True)
class InterpolatingAdjoint(ContinuousAdjoint):
    """Solve the adjoint ODE backwards, on the dense output of the forward solve.

    The error control covers only the cotangent. Unlike `BacksolveAdjoint`, it does not recompute
    the state backwards, so it is as stable as the forward solve. It keeps the trajectory as
    `checkpoints` states and replays the steps in between. The gradient belongs to the continuous
    problem, exact up to the tolerances and the interpolation, and not to the computed solution.

    Args:
        rtol, atol: tolerances of the backward solve, as for `BacksolveAdjoint`.
        checkpoints: number of states to keep, at least 2.

    References: Chen et al. (2018), arXiv:1806.07366.
    """

    checkpoints: int = 64

    @public("")
    def __post_init__(self) -> None:
        super().__post_init__()
        integer("checkpoints", self.checkpoints, least=2, cure=" The default is 64.")

    def solve_back(self, solved: Solved, bar: Integration) -> Segment:
        """The adjoint solve, over one recorded step of the forward solve after the other."""
        problem, tape, tableau = solved.problem, solved.tape, solved.stepper.tableau
        assert tape is not None
        stepper, span = self.backward_stepper(solved.stepper), problem.t1 - problem.t0
        outputs = OutputBars.of(problem, bar)

        def visit(step: Step, number, carry):
            curve = Curve.of(tableau, *step)

            def adjoint_field(time, a, weight):
                _, da, integrand = adjoint_product(
                    solved.apply, solved.params, time, curve.at(time), a, weight
                )
                return da, integrand

            def to_output(carry):
                """To the last output that is left in the step, or to its start."""
                left, segment, _ = carry
                if outputs is None:
                    segment = solve_segment(adjoint_field, stepper, segment, step.t, span)
                    return left, segment, jnp.zeros_like(step.t, bool)
                due = outputs.due(left, step, number)
                _, end, jump = outputs.last(left, due, step.t)
                segment = solve_segment(adjoint_field, stepper, segment, end, span)
                return left - due.astype(jnp.int32), segment.moved(y=segment.y + jump), due

            carry = (*carry, jnp.ones(step.t.shape, bool))
            left, segment, _ = while_loop(lambda carry: carry[2].any(), to_output, carry)
            return left, segment

        zeros = jax.tree.map(jnp.zeros_like, solved.params)
        y1_bar, failed = filled(bar.y1, problem.y0), ~solved.ok | (tape.num_steps == 0)
        segment = Segment.start(problem.t1, -solved.integration.h, y1_bar, zeros, failed)
        left = jnp.zeros(problem.t0.shape, jnp.int32) if outputs is None else outputs.count
        _, segment = walk_back(solved, visit, (left, segment))
        return segment
