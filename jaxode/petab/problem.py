"""A problem of PEtab: its ODE, its likelihood and its estimate."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.caller import public
from jaxode.ode.adjoints import Adjoint, DiscreteAdjoint, ForwardMode
from jaxode.ode.solve import solve
from jaxode.ode.solvers.rosenbrock import Rodas5P
from jaxode.petab.experiments import Experiments
from jaxode.petab.measurements import SETTLED, Measurements
from jaxode.petab.model import read_model
from jaxode.petab.parameters import Entries, Parameters
from jaxode.petab.tables import read_tables

Params = dict[str, Float[Array, ""]]
OPTIONS = {"solver": Rodas5P(), "rtol": 1e-8, "atol": 1e-10, "max_steps": 4096}


class Problem:
    """An estimation problem.

    Parameters are dictionaries of those that are estimated, by name, on the scales of their table:
    logarithms to base 10, natural ones, or the numbers themselves.
    """

    names: list[str]
    """The estimated parameters."""
    nominal: Params
    """Their nominal values."""
    bounds: tuple[Params, Params]
    """Their lower and upper bounds."""
    row_args: dict[str, tuple[Array, Array]]
    """What each condition sets, `[rows, ...]`: numbers and indices of parameters."""

    def __init__(
        self, experiments: Experiments, measurements: Measurements, options: dict[str, Any]
    ) -> None:
        self._experiments, self._measurements = experiments, measurements
        self._options = OPTIONS | options
        parameters = self._parameters = experiments.parameters
        self.names, self.bounds = parameters.names, parameters.bounds
        self.nominal = parameters.by_name(parameters.scaled(parameters.nominal))
        self._breaks = experiments.switches(experiments.rows)
        self._breaks_before = experiments.switches(experiments.before)
        self._kept = experiments.kept()
        self._value = jax.jit(self._nll)

    def f(self, t: Float[Array, ""], y: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
        """The vector field `f(t, y, (params, row))`, with a row of `row_args`."""
        params, row = args
        vector = self._parameters.vector(params)
        values, _ = self._experiments.start(vector, Entries(*row["condition"]))
        return self._experiments.field(t, y, values)

    def y0(self, params: Params) -> Float[Array, "rows n"]:
        """The states of all conditions at time 0, after their pre-equilibration.

        Differentiation: in forward mode.
        """
        return self._start(self._parameters.vector(params), ForwardMode())[1]

    def nll(self, params: Params) -> Float[Array, ""]:
        """Minus the log-likelihood, with all constants, without priors; NaN where a solve fails.

        Differentiation: in reverse mode.
        """
        return self._value(params)

    def starts(self, key: PRNGKeyArray, n: int) -> dict[str, Float[Array, " n"]]:
        """Draw `n` first guesses between the bounds, or by the table's priors of initialization."""
        return self._parameters.starts(key, n)

    def _nll(self, params: Params) -> Float[Array, ""]:
        vector = self._parameters.vector(params)
        values, y0 = self._start(vector, DiscreteAdjoint())
        ys = self._solved(values, y0, self._measurements.ts, self._breaks, DiscreteAdjoint())
        return self._measurements.nll(vector, values, ys)

    def _start(self, vector: Array, adjoint: Adjoint) -> tuple[Array, Array]:
        """The constants and states of all rows at time 0."""
        experiments = self._experiments
        values, y0 = experiments.start(vector, experiments.rows)
        if not len(experiments.before.number):
            return values, y0
        ts = np.full((len(experiments.before.number), 1), SETTLED)
        before = experiments.start(vector, experiments.before)
        settled = self._solved(*before, ts, self._breaks_before, adjoint)[:, 0]
        return values, jnp.where(self._kept, settled[experiments.before_of], y0)

    def _solved(self, values, y0, ts, breakpoints, adjoint) -> Float[Array, "rows times n"]:
        return solve(
            self._slope, y0, 0.0, ts[:, -1], row_args=values, batch="per_sample", ts=ts,
            breakpoints=breakpoints, adjoint=adjoint, throw=False, **self._options,
        ).ys  # fmt: skip

    def _slope(self, t, y, args):
        return self._experiments.field(t, y, args[1])


@public("petab.load")
def load(path: str | Path, **options: Any) -> Problem:
    tables = read_tables(path)
    experiments = Experiments(read_model(tables.sbml), Parameters(tables.parameter), tables)
    return Problem(experiments, Measurements(experiments, tables), options)
