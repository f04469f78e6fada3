"""A problem of PEtab: its ODE, its likelihood and its estimate."""

import functools
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import integer
from jaxode._checks.caller import arg, public
from jaxode._checks.samples import check_key
from jaxode.estimation.estimate import Estimate, estimate
from jaxode.ode.adjoints import Adjoint, DiscreteAdjoint, ForwardMode
from jaxode.ode.solve import solve
from jaxode.ode.solvers.rosenbrock import Rodas5P
from jaxode.petab.channels import Channels
from jaxode.petab.experiments import Experiments
from jaxode.petab.measurements import SETTLED, Measurements
from jaxode.petab.model import read_model
from jaxode.petab.parameters import Entries, Parameters
from jaxode.petab.tables import read_tables

Params = dict[str, Float[Array, ""]]
OPTIONS = {"solver": Rodas5P(), "rtol": 1e-8, "atol": 1e-10, "max_steps": 16384}

SET = (  # options of `solve` that it sets, or has no use for
    "f", "y0", "t0", "t1", "args", "batch", "row_args", "ts", "adjoint", "throw", "dense", "event",
    "jumps", "breakpoints", "axis_name", "steps", "mass",
)  # fmt: skip


class Problem:
    """An estimation problem.

    Parameters are dictionaries of those that are estimated, by name, on the scales of their table:
    logarithms to base 10, natural ones, or the numbers themselves. Made by `jaxode.petab.load`.
    """

    names: list[str]
    """The estimated parameters."""
    nominal: Params
    """Their nominal values."""
    bounds: tuple[Params, Params]
    """Their lower and upper bounds."""

    def __init__(
        self, experiments: Experiments, measurements: Measurements, options: dict[str, Any]
    ) -> None:
        self._experiments, self._measurements = experiments, measurements
        self._given, self._options = options, OPTIONS | options
        parameters = self._parameters = experiments.parameters
        self.names, self.bounds = parameters.names, parameters.bounds
        self.nominal = parameters.by_name(parameters.scaled(parameters.nominal))
        self._breaks = experiments.switches(experiments.rows)
        self._breaks_before = experiments.switches(experiments.before)
        self._kept = experiments.kept()
        self._value = jax.jit(self._nll)

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the numbers in a state, concentrations or amounts as the model says."""
        return self._experiments.model.states

    def f(self, t: Float[Array, ""], y: Float[Array, " n"], args: Any) -> Float[Array, " n"]:
        """The vector field `f(t, y, (params, row))`, with a row of `row_args`."""
        params, row = args
        field, vector = self._experiments.field, self._parameters.vector(params)
        entries = Entries(*row["condition"])
        return field(t, y, self._experiments.constants(vector, entries, field.used))

    def y0(self, params: Params) -> Float[Array, "rows n"]:
        """The states of all conditions at time 0, after their pre-equilibration.

        Differentiation: in forward mode.
        """
        return self._start(self._parameters.vector(params), ForwardMode())[1]

    @public("Problem.nll")
    def nll(self, params: Params) -> Float[Array, ""]:
        """Minus the log-likelihood, with all constants, without priors; NaN where a solve fails, or
        noise is not above zero.

        Differentiation: in reverse mode.
        """
        self._parameters.check(params)
        return self._value(params)

    @public("Problem.starts")
    def starts(self, key: PRNGKeyArray, n: int) -> dict[str, Float[Array, " n"]]:
        """Draw `n` first guesses between the bounds, or by the table's priors of initialization."""
        return self._parameters.starts(check_key(key), integer("n", n))

    def prior(self, params: Params) -> Params:
        """The residuals of the normal objective priors of the table."""
        return self._parameters.prior(params)

    @public("Problem.estimate")
    def estimate(self, starts: dict[str, Float[Array, " n"]], **options: Any) -> Estimate:
        """Estimate the parameters from first guesses, within the bounds and with the priors.

        Args:
            starts: first guesses `[n]` of each parameter, as `starts(key, n)` draws them.
            options: of `jaxode.estimate`, such as `seconds`, `progress`, `bounds` and `rtol`.
                Tolerances are those of `jaxode.estimate`.

        Returns:
            The estimate of `jaxode.estimate`, whose `nll` is that of `Problem.nll`. What it
            predicts are series on the scales of their observables.
        """
        channels, measurements = self._channels, self._measurements
        ys = jnp.asarray(channels.ys)
        if channels.is_simple:
            (kind,) = channels.kinds
            how = {"observe": channels.observe, "noise": channels.noise, "likelihood": kind}
        elif "laplace" in channels.kinds:
            raise ValueError(
                "Problem.estimate: Laplace's noise must be that of all observables, and not depend "
                "on what is predicted; got another. Minimize Problem.nll by other means."
            )
        else:
            how = {"observe": channels.observe_with_noise, "likelihood": channels.log_density}
            ys = jnp.stack([ys, jnp.full(ys.shape, jnp.nan)], axis=-1)
        given = {"solver": self._options["solver"]}
        # By default few: far from the best parameters, solves that fail should do so soon.
        if "max_steps" in self._given:
            given["max_steps"] = self._given["max_steps"]
        if self._breaks is not None:
            given["breakpoints"] = self._breaks
        given |= {"bounds": self.bounds, "match": False, "row_args": self.row_args}
        given |= how | ({"prior": self.prior} if self.prior(self.nominal) else {})
        found = estimate(
            self.f, self.y0, jnp.asarray(measurements.ts), ys, starts, **(given | options)
        )
        return eqx.tree_at(lambda each: each.nll, found, found.nll + channels.shift)

    @functools.cached_property
    def _channels(self) -> Channels:
        return Channels(self._measurements)

    @property
    def row_args(self) -> dict[str, Any]:
        """What each condition sets, and the placeholders of its series, `[rows, ...]`."""
        return self._channels.row_args

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
    """Read an estimation problem in version 1 of PEtab: a YAML file, tables, and a model in SBML.

    It reads reactions with local parameters, functions, compartments, amounts and concentrations,
    assignment and rate rules, initial assignments; conditions that set parameters, compartments and
    states, also after pre-equilibration; formulas of observables and of noise with overrides,
    observables on logarithmic scales, normal noise and Laplace's; inputs that switch at known
    times. All conditions are rows of one solve. A state is steady, and a time "inf" reached, at
    1e8.

    Args:
        path: the YAML file.
        options: of `jaxode.solve`, such as `solver`, `rtol`, `atol` and `max_steps`. By default
            `jaxode.Rodas5P()`, 1e-8, 1e-10 and 16384.

    Returns:
        A `Problem`.

    Raises:
        ImportError: without python-libsbml or PyYAML: `pip install "jaxode[petab]"`.
        TypeError, ValueError: in single precision; for files that lack a table or a column, or name
            what there is not; and for what it does not read: events, switches at times that are
            estimated, algebraic rules, delays, stoichiometries that are computed, conversion
            factors, species in a compartment whose size changes.

    References: Schmiester et al. (2021), doi:10.1371/journal.pcbi.1008646.
    """
    for module in ("libsbml", "yaml"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                "jaxode.petab needs python-libsbml and PyYAML. Install them: "
                "pip install 'jaxode[petab]'."
            )
    if jnp.zeros(0).dtype != jnp.float64:
        raise ValueError(
            f"{arg('path')} needs double precision; got float32. Call "
            "jax.config.update('jax_enable_x64', True) first."
        )
    for name in options:
        if name in SET or name not in inspect.signature(solve).parameters:
            raise TypeError(f"{arg(name)} is not an option of petab.load. Leave it out.")
    tables = read_tables(path)
    experiments = Experiments(read_model(tables.sbml), Parameters(tables.parameter), tables)
    return Problem(experiments, Measurements(experiments, tables), options)
