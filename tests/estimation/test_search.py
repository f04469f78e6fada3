"""Levenberg-Marquardt within bounds."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode.estimation.objectives import Objective
from jaxode.estimation.search import Box, minimize


class Line(Objective):
    """Linear least squares."""

    rows: Float[Array, "m n"]
    aims: Float[Array, " m"]

    @property
    def count(self):
        return len(self.aims)

    def quantities(self, flat, start):
        del start
        return self.rows @ flat - self.aims


def test_a_step_that_a_bound_cuts_short_is_no_end():
    # Newton's step goes far beyond a bound. It is within the tolerance from the first start.
    objective = Line(jnp.array([[1.0, 1.0], [0.01, -0.01]]), jnp.array([2000.0, -200.0]))
    starts = np.array([[100.0 + apart, 1000.0] for apart in (5e-5, 5e-3, 1.0, 50.0)])
    box = Box(np.array([100.0, -np.inf]), np.full(2, np.inf))
    found = minimize(objective, starts, box, 50)
    best = (1900.0 + 0.01 * (200.0 + 1.0)) / (1.0 + 0.01**2)
    np.testing.assert_allclose(found.flats, np.tile([100.0, best], (4, 1)), rtol=1e-9)
    assert found.converged.all()
