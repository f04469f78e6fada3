"""Interface of a solver: a step on rows, its dense output, and the transpose of the step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode._checks.errors import Result
from jaxode._jax.pullback import vjp
from jaxode.ode.loop.stages import weighted_sum

# The vector field on rows: (t [rows], y [samples, n]) -> dy/dt [samples, n].
Field = Callable[[Float[Array, " rows"], Float[Array, "samples n"]], Float[Array, "samples n"]]


@dataclass(frozen=True, eq=False)
class Method:
    """A one-step method: the end, the error and the dense output of a step are sums of its stages.

    A step of size `h` ends at `y + h sum_i b_i k_i`, and `h sum_i b_error_i k_i` estimates its
    error. A family of methods defines `evaluate`, in the directions of time and with rows of size
    zero, and `dense`. Instances are compared by identity: they are static arguments of `jit`.
    """

    implicit: ClassVar[bool] = False
    """Whether a step solves equations, of all samples in a row together."""

    name: str
    order: int
    error_order: int
    """The order of the error estimate in the step size."""
    b: np.ndarray
    b_error: np.ndarray | None
    """None for a method without an error estimate, which needs equal steps."""
    first_same_as_last: bool
    """Whether the last stage of a step is the vector field at its end, the first of the next."""

    @property
    def stages(self) -> int:
        return len(self.b)

    @property
    def advancing_stages(self) -> int:
        """Stages that the end state depends on: all but trailing ones of weight zero."""
        return int(np.flatnonzero(self.b)[-1]) + 1

    @property
    def evaluations(self) -> int:
        """Evaluations of the vector field per step, after the first one."""
        return self.stages - self.first_same_as_last

    @property
    def error_constant(self) -> float:
        """`C` of the estimate `C h^error_order` for the linear equation `y' = y`, `y(t) = 1`.

        It guesses the first step. One where a family does not know it.
        """
        return 1.0

    @property
    def dense(self) -> np.ndarray:
        """Coefficients of the dense output, a polynomial in `theta` without a constant term:

        `y(t + theta h) = y + h sum_i w_i k_i` with `w_i = sum_p dense[p, i] theta^(p + 1)`.
        """
        raise NotImplementedError

    def dense_weights(self, theta: Float[Array, ""]) -> Float[Array, " stages"]:
        """The weights `w` of the dense output at `theta`."""
        dense = jnp.asarray(self.dense, theta.dtype)
        weights = dense[-1]
        for row in dense[-2::-1]:
            weights = row + theta * weights
        return theta * weights

    def evaluate(
        self,
        field: Field,
        t: Float[Array, " rows"],
        h: Float[Array, " rows"],
        y: Float[Array, "samples n"],
        slope: Float[Array, "samples n"] | None,
        count: int,
    ) -> Float[Array, "stages samples n"]:
        """The first `count` stages of one step.

        The first is the vector field at the start, which is `slope` if that is given.
        """
        raise NotImplementedError

    def failure(self, k: Float[Array, "stages samples n"], every: Callable[..., Any]) -> Any:
        """The result of a step that is not finite. `every` reduces flags over each row."""
        del k, every
        return Result.NON_FINITE

    def pull_back(self, sweep: Any, step: Any, bar: Any, y_bar, params_bar: Any, lowest: Any):
        """The cotangents of a step and the parameters, given those of its end, `y_bar`, and of its
        start, size and stages from elsewhere, `bar`.

        By reverse-mode differentiation of `evaluate`. `sweep` knows how the field is
        differentiated. Stages below `lowest` wait for the previous step, if any do.
        """
        del lowest
        params, b = sweep.solved.params, jnp.asarray(self.b, y_bar.dtype)

        def end(params, t, h, y):
            k = self.evaluate(sweep.solved.slope(params), t, h, y, None, len(step.k))
            return y + h[:, None] * weighted_sum(b[: len(k)], k), k

        _, pull = vjp(end, params, step.t, step.h, step.y)
        by_params, *by_step = pull((y_bar, bar.k))
        by_step = map(jnp.add, by_step, (bar.t, bar.h, bar.y))
        return type(step)(*by_step, bar.k), jax.tree.map(jnp.add, params_bar, by_params)
