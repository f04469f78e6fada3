"""A problem of PEtab: its ODE, its likelihood and its estimate."""

import functools
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxode._checks.arguments import integer
from jaxode._checks.caller import arg, public
from jaxode._checks.rules import is_known
from jaxode._checks.samples import check_key
from jaxode.estimation.estimate import Estimate, estimate
from jaxode.estimation.observed.user_functions import check_options
from jaxode.ode.adjoints import Adjoint, DiscreteAdjoint, ForwardMode
from jaxode.ode.solve import solve
from jaxode.ode.solvers.rosenbrock import Rodas5P
from jaxode.petab.channels import Channels
from jaxode.petab.experiments import Experiments
from jaxode.petab.measurements import SETTLED_TIME, Measurements
from jaxode.petab.parameters import Entries, Parameters
from jaxode.petab.sbml_model import read_model
from jaxode.petab.tables import read_tables

Params = dict[str, Float[Array, ""]]
# A state is at rest if it moves by fewer tolerances. One that drifts moves by half of itself, 1e7
# tolerances.
TOLERANCES_AT_REST = 1e3
# Options of `solve` by default.
DEFAULTS_OF_PETAB = {"solver": Rodas5P(), "rtol": 1e-8, "atol": 1e-10, "max_steps": 16384}
# Arguments of `solve` that a problem sets itself, or that are of no use to it.
NOT_OPTIONS_OF_PETAB = (
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
        self._user_options, self._options = options, DEFAULTS_OF_PETAB | options
        parameters = self._parameters = experiments.parameters
        self.names, self.bounds = parameters.names, parameters.bounds
        self.nominal = parameters.by_name(parameters.scaled(parameters.nominal))
        self._breaks = experiments.switches(experiments.rows)
        self._breaks_before = experiments.switches(experiments.before)
        self._continued = experiments.continued()
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
        """The states of all conditions at time 0, after their pre-equilibration; NaN where that
        does not come to rest.

        Differentiation: in forward mode.
        """
        return self._start(self._parameters.vector(params), ForwardMode())[1]

    @public("Problem.nll")
    def nll(self, params: Params) -> Float[Array, ""]:
        """Minus the log-likelihood, with all constants, without priors; NaN where a solve fails,
        noise is not above zero, or a state that must be steady is not.

        Differentiation: in reverse mode.
        """
        self._parameters.check(params)
        value, moving = self._value(params)
        if is_known(moving) and moving.any():
            ids = self._experiments.before_ids + self._experiments.row_ids
            warnings.warn(
                "Problem.nll: a state must be at rest after a pre-equilibration, and at a time of "
                f"inf; that of {ids[int(np.argmax(moving))]!r} still moves, and the likelihood is "
                "NaN. Mend the condition, or use a longer unit of time.",
                stacklevel=3,
            )
        return value

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
        arguments = {"solver": self._options["solver"]}
        # Few steps by default: solves that fail far from the best parameters should do so soon.
        if "max_steps" in self._user_options:
            arguments["max_steps"] = self._user_options["max_steps"]
        if self._breaks is not None:
            arguments["breakpoints"] = self._breaks
        arguments |= {"bounds": self.bounds, "match": False, "row_args": self.row_args}
        arguments |= how | ({"prior": self.prior} if self.prior(self.nominal) else {})
        best = estimate(
            self.f, self.y0, jnp.asarray(measurements.ts), ys, starts, **(arguments | options)
        )
        if measurements.rests.any() or len(self._experiments.before.number):
            self.nll(best.params)  # warns of states that are not at rest
        return eqx.tree_at(lambda result: result.nll, best, best.nll + channels.shift)

    @functools.cached_property
    def _channels(self) -> Channels:
        return Channels(self._measurements)

    @property
    def row_args(self) -> dict[str, Any]:
        """What each condition sets, and the placeholders of its series, `[rows, ...]`."""
        return self._channels.row_args

    def _nll(self, params: Params) -> tuple[Float[Array, ""], Bool[Array, " solves"]]:
        """Minus the log-likelihood, and which solves have a state that still moves: of each
        pre-equilibration, and of each row at a time of infinity."""
        vector, measurements = self._parameters.vector(params), self._measurements
        values, y0, before = self._start(vector, DiscreteAdjoint())
        ys, moving = self._solved(
            values, y0, measurements.ts, self._breaks, DiscreteAdjoint(), measurements.rests
        )
        return measurements.nll(vector, values, ys), jnp.concatenate([before, moving])

    def _start(
        self, vector: Array, adjoint: Adjoint
    ) -> tuple[Array, Array, Bool[Array, " solves"]]:
        """The constants and states of all rows at time 0, and which pre-equilibrations have a state
        that still moves: the states of their rows are NaN."""
        experiments = self._experiments
        values, y0 = experiments.start(vector, experiments.rows)
        count = len(experiments.before.number)
        if not count:
            return values, y0, jnp.zeros(0, bool)
        ts, rests = np.full((count, 1), SETTLED_TIME), np.ones(count, bool)
        before = experiments.start(vector, experiments.before)
        settled, moving = self._solved(*before, ts, self._breaks_before, adjoint, rests)
        y0 = jnp.where(self._continued, settled[experiments.before_of, 0], y0)
        return values, y0, moving

    def _solved(
        self, values, y0, ts, breakpoints, adjoint, rests
    ) -> tuple[Float[Array, "rows times n"], Bool[Array, " rows"]]:
        """States at the times of each row, and which rows move that should be at rest.

        A state is at rest if the second half of its time moves it by less than
        `TOLERANCES_AT_REST`.
        """
        half = np.where(rests, ts[:, -1] / 2, ts[:, -1])[:, None]
        every = np.sort(np.concatenate([ts, half], axis=1), axis=1) if rests.any() else ts
        options = {"ts": jnp.asarray(every), "breakpoints": breakpoints, "adjoint": adjoint}
        ys = solve(
            self._slope, y0, 0.0, ts[:, -1], row_args=values, batch="per_sample", throw=False,
            **options, **self._options,
        ).ys  # fmt: skip
        if not rests.any():
            return ys, jnp.zeros(len(ts), bool)

        def at(times):
            return jnp.take_along_axis(ys, _places(every, times)[..., None], axis=1)

        last, before = jax.lax.stop_gradient((ys[:, -1], at(half)[:, 0]))
        limit = self._options["atol"] + self._options["rtol"] * jnp.abs(last)
        moving = rests & jnp.any(jnp.abs(last - before) > TOLERANCES_AT_REST * limit, axis=1)
        return jnp.where(moving[:, None, None], jnp.nan, at(ts)), moving

    def _slope(self, t, y, args):
        return self._experiments.field(t, y, args[1])


def _places(every: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The places of the times of each row, `[rows, times]`, among `every` time of it, in order."""
    return np.array([np.searchsorted(*pair) for pair in zip(every, times, strict=True)])


@public("petab.load")
def load(path: str | Path, **options: Any) -> Problem:
    """Read an estimation problem in version 1 of PEtab: a YAML file, tables, and a model in SBML.

    It reads reactions with local parameters, functions, compartments, amounts and concentrations,
    assignment and rate rules, initial assignments; conditions that set parameters, compartments and
    states, also after pre-equilibration; formulas of observables and of noise with overrides,
    observables on logarithmic scales, normal noise and Laplace's; inputs that switch at known
    times. All conditions are rows of one solve. Pre-equilibrations, and times of "inf", end at 1e8,
    or at ten times the last time of a measurement: a state that still moves there is NaN.

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
    check_options(options, NOT_OPTIONS_OF_PETAB)
    tables = read_tables(path)
    experiments = Experiments(read_model(tables.sbml), Parameters(tables.parameter), tables)
    return Problem(experiments, Measurements(experiments, tables), options)
