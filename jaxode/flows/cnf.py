"""Continuous normalizing flows: log-density, sampling, and the maximum-likelihood loss.

A sample is `x = z(t1)` with `dz/dt = f(t, z, params)` and `z(t0)` from the base density. Along a
trajectory `d/dt log p(z(t)) = -div f`, so

    log p(x) = log p_base(z(t0)) - integral over [t0, t1] of div f dt.

This file chooses in which direction of time each method solves, and this sign. The costs of the
training loss have theirs in `jaxode/flows/objective.py` and `jaxode/flows/quadrature.py`.

References: Chen et al. (2018), arXiv:1806.07366; Grathwohl et al. (2019), arXiv:1810.01367;
Ghosh et al. (2020), arXiv:2006.10711 ("STEER").
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode.coupling import Coupling, independent
from jaxode.distributions import BaseDensity, as_base, log_prob_of
from jaxode.divergence import Divergence, auto
from jaxode.flows.integrands import Integrands
from jaxode.flows.matching import matching_loss
from jaxode.flows.objective import Solve, objective
from jaxode.flows.quadrature import random_phases
from jaxode.ode.adjoints import DiscreteAdjoint
from jaxode.ode.loop.tableau import is_explicit
from jaxode.ode.results import NLLStats, Result, Solution, nan_or_raise, raise_on_failure
from jaxode.ode.solve import DEFAULTS, VectorField, check_options, solve_batch
from jaxode.ode.validation import (
    Time,
    check_context,
    check_count,
    check_samples,
    check_steer,
    check_step_control,
    check_time,
    check_weights,
    state_dtype,
)
from jaxode.regularizers import Regularizer, check_regularizers

# Folded into the key for the end time: the index of no sample.
END_TIME = 2**32 - 2


@dataclass(frozen=True, eq=False)
class CNF:
    """A continuous normalizing flow, made by `jaxode.cnf`. All methods are pure functions.

    Shapes: `x` and `z` are `[batch, *event]`, log-densities are `[batch]` in nats. `params` is
    passed to the vector field as `args`; with a `context`, whose leaves are `[batch, ...]`, the
    field gets `args = (params, context_row)`. `key` draws one probe for each sample and solve, a
    function of the key and the sample's index alone; exact divergences need none.
    """

    f: VectorField
    base: BaseDensity
    t0: float
    t1: float
    divergence: Divergence
    step_control: Literal["joint", "per_sample"]
    quadrature: Literal["gauss", "stochastic"]
    regularizers: tuple[Regularizer, ...]
    steer: float
    throw: bool | None
    solve_options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _integrands(self) -> Integrands:
        # One object, by which compiled programs are found again.
        axis_name = self.solve_options.get("axis_name")
        return Integrands(self.f, self.divergence, self.regularizers, axis_name)

    def _samples(self, where: str, name: str, x: Any) -> Float[Array, "batch *event"]:
        return check_samples(where, name, x, tuple(self.base.event_shape))

    def log_prob(
        self,
        params: PyTree,
        x: Float[Array, "batch *event"],
        *,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Float[Array, " batch"]:
        """Log-density of the samples; the error control covers the change of volume, too.

        With a stochastic divergence it is an unbiased estimate of it.

        Raises:
            ValueError: if the shapes do not fit, or if `key` is missing.
            SolveError: at run time, if the solve fails.
        """
        x = self._samples("log_prob", "x", x)
        zero = jnp.zeros(x.shape[:1], x.dtype)
        field = self._integrands.volume
        z, log_det = self._to_base("log_prob", params, x, zero, key, context, field).y1
        return log_prob_of(self.base, z) + log_det

    def log_prob_and_error(
        self,
        params: PyTree,
        x: Float[Array, "batch *event"],
        *,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        """`log_prob`, and the standard error that the noise of the divergence gives each sample.

        The probes of a sample share one linearization, and each has an integral of its own; so it
        takes `hutchinson(probes=K)` with at least two. The error of an exact divergence is zero.

        Raises:
            ValueError: as `log_prob`, and if the divergence has one probe, or no `standard_error`.
        """
        where = "log_prob_and_error"
        x = self._samples(where, "x", x)
        context = check_context(where, context, x.shape[0])
        _check_key(where, key, optional=True)
        probes = self._integrands.probes(key, x, params, context)
        if probes is None:
            log_prob = self.log_prob(params, x, context=context)
            return log_prob, jnp.zeros_like(log_prob)
        chosen = self._integrands.chosen_divergence(x, params, context)
        standard_error = chosen.standard_error
        if standard_error is None or probes.shape[1] < 2:
            raise ValueError(
                f"{where}: needs a divergence with at least two probes and a standard_error; got "
                f"probes of shape {probes.shape[1:]} from {chosen.name}. "
                "Pass divergence=jaxode.divergence.hutchinson(probes=8) to cnf."
            )
        state = (x, jnp.zeros(probes.shape[:2], x.dtype))
        rows = (probes, context)
        z, log_dets = self._solve(
            where, self._integrands.volume_of_each_probe, state, self.t1, self.t0, params, rows
        ).y1
        size = math.prod(x.shape[1:])
        error = jax.vmap(lambda estimates: standard_error(estimates, size))(log_dets)
        return log_prob_of(self.base, z) + jnp.mean(log_dets, axis=1), error

    def nll(
        self,
        params: PyTree,
        x: Float[Array, "batch *event"],
        *,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
        weights: Float[Array, " batch"] | None = None,
    ) -> Float[Array, ""]:
        """The training loss: mean negative log-density, in nats, and the regularizers.

        The error control covers the samples alone. The change of volume is integrated by a
        quadrature on the dense output of their solve, and `jax.value_and_grad` has value and
        gradient from one sweep back over its steps. With another gradient method than
        `DiscreteAdjoint`, or an implicit solver, the loss is that of the augmented ODE.

        Args:
            weights: of the samples in the mean; equal by default. They are divided by their sum:
                if that is zero, the loss and its gradient are NaN.

        With a batch split over devices by `jax.shard_map` it is the mean over the rows of this
        device: differentiate `jax.lax.pmean(flow.nll(params, x), axis)`, and the gradient of the
        parameters crosses between devices once. `weights` are relative to their mean over all
        devices if the flow has an `axis_name`.

        If the solve fails inside a transformation such as `jit`, the loss and its gradient are NaN;
        `throw=True` raises there, too.

        Raises:
            TypeError, ValueError: if `x` is not a floating array, the shapes do not fit, or `key`
                is missing.
            SolveError: at run time, if the solve fails outside a transformation, or anywhere with
                `throw=True`.
        """
        return self.nll_and_stats(params, x, key=key, context=context, weights=weights)[0]

    def nll_and_stats(
        self,
        params: PyTree,
        x: Float[Array, "batch *event"],
        *,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
        weights: Float[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, ""], NLLStats]:
        """`nll` and an `NLLStats`, for `jax.value_and_grad(..., has_aux=True)`.

        The statistics have no gradient.
        """
        where = "nll"
        x = self._samples(where, "x", x)
        context = check_context(where, context, x.shape[0])
        weights = check_weights(where, weights, x, self.solve_options.get("axis_name"))
        _check_key(where, key, optional=True)
        end = self._random_end(key, x)
        if self._fused:
            return self._fused_nll(params, x, end, key, context, weights)
        zeros = jnp.zeros((x.shape[0], 1 + len(self.regularizers)), x.dtype)
        field = self._integrands.field_and_costs
        solution = self._to_base(where, params, x, zeros, key, context, field, end)
        z, costs = solution.y1
        log_det, running = costs[:, 0], costs[:, 1:] * jnp.sign(self.t0 - self.t1)
        log_prob = log_prob_of(self.base, z) + log_det
        loss = jnp.sum(weights * (self._penalty(running) - log_prob).astype(weights.dtype))
        aux = NLLStats(log_prob, log_det, solution.stats, solution.result, self._named(running))
        return loss, jax.lax.stop_gradient(aux)

    def _penalty(self, running: Float[Array, "batch regularizers"]) -> Float[Array, " batch"]:
        weights = [regularizer.weight for regularizer in self.regularizers]
        return running @ jnp.asarray(weights, running.dtype)

    def _named(self, running: Float[Array, "batch regularizers"]) -> dict[str, Array]:
        return {r.name: running[:, i] for i, r in enumerate(self.regularizers)}

    @property
    def _fused(self) -> bool:
        """Whether the loss can have its value and gradient in one sweep over recorded steps."""
        options = {**DEFAULTS, **self.solve_options}
        return isinstance(options["adjoint"], DiscreteAdjoint) and is_explicit(options["solver"])

    def _fused_nll(self, params, x, end, key, context, weights):
        where = "nll"
        integrands, phase = self._integrands, None
        if self.quadrature == "stochastic":
            phase = random_phases(key, x, integrands.axis_name)
        solve = Solve(
            integrands.field, x, self.t1, end, params, context, self.step_control,
            self.solve_options,
        )  # fmt: skip
        probes = integrands.probes(key, x, params, context, of_costs=True)
        coefficients = tuple(regularizer.weight for regularizer in self.regularizers)
        costs = integrands.field_and_costs
        out = objective(where, solve, costs, probes, self.base, weights, coefficients, phase)
        loss, result = out.loss, out.result
        throw = self.throw if self.throw is not None else not isinstance(result, jax.core.Tracer)
        if throw:
            nan = nan_or_raise(result, out.t_reached, where)
            loss = jnp.where(
                (result == Result.SUCCESS).all(), loss, jnp.sum(nan).astype(loss.dtype)
            )
        stats = out.stats
        if self.step_control == "joint":
            stats, result = jax.tree.map(lambda leaf: leaf[0], (stats, result))
        running = self._named(out.running)
        return loss, NLLStats(out.log_prob, out.log_det, stats, result, running)

    def _random_end(self, key, x) -> Time:
        """Where the solve of the training loss ends: `t0`, or a time around it, one for all."""
        if self.steer == 0:
            return self.t0
        if key is None:
            raise ValueError(
                f"nll: steer={self.steer!r} needs random numbers; got key=None. "
                "Pass key=jax.random.key(...)."
            )
        # Drawn in float32 whatever the samples are, so that it is a function of the key alone.
        key, dtype = jax.random.fold_in(key, END_TIME), state_dtype(x)
        uniform = jax.random.uniform(key, (), jnp.float32, -1.0, 1.0).astype(dtype)
        return jnp.asarray(self.t0, dtype) + self.steer * uniform

    def matching_loss(
        self,
        params: PyTree,
        x: Float[Array, "batch *event"],
        *,
        key: PRNGKeyArray,
        x0: Float[Array, "batch *event"] | None = None,
        context: PyTree = None,
        weights: Float[Array, " batch"] | None = None,
        coupling: Coupling = independent(),
    ) -> Float[Array, ""]:
        """Flow matching: the loss of a regression that takes no solve and no divergence.

        With base samples `z0`, and `u` uniform in [0, 1], the field is fitted to the velocity of
        the straight path, `z_t = (1 - u) z0 + u x` at `t = t0 + u (t1 - t0)`:

            mean over rows and coordinates of (f(t, z_t) - (x - z0) / (t1 - t0))^2.

        A field of least loss carries the base density to that of the data. `nll` on the same
        parameters then sharpens it: docs/training.md.

        Args:
            key: draws base samples, times and the coupling. The times of a batch are stratified:
                one in each of as many equal parts as there are rows.
            x0: start samples to use in place of base samples, one for each row of `x`.
            context: moves with the rows of `x`.
            weights: of the rows in the mean, as for `nll`.
            coupling: which base sample each row is matched with, from `jaxode.coupling`.

        Base samples have no gradient: a learned base is trained by `nll`, not by matching. Under
        `jax.shard_map` it is, as `nll`, the mean over the rows of this device, which are coupled
        among themselves; a key that all devices share gives each row the noise that it has on one.

        Raises:
            TypeError, ValueError: if `x` or `x0` is not a floating array, the shapes do not fit,
                `key` is no key, or the coupling does not return a permutation. Inside of a
                transformation such as `jit` the loss is NaN instead if it is none.

        References: Lipman et al. (2022), arXiv:2210.02747; Tong et al. (2023), arXiv:2302.00482.
        """
        return matching_loss(
            self, params, x, key=_check_key("matching_loss", key), x0=x0, context=context,
            weights=weights, coupling=coupling, axis_name=self.solve_options.get("axis_name"),
        )  # fmt: skip

    def to_base(
        self, params: PyTree, x: Float[Array, "batch *event"], *, context: PyTree = None
    ) -> Float[Array, "batch *event"]:
        """Carry data to the base density: `z(t0)` for `z(t1) = x`.

        Raises:
            TypeError, ValueError: if `x` is not a floating array, or the shapes do not fit.
            SolveError: at run time, if the solve fails.
        """
        return self._carry("to_base", "x", params, x, self.t1, self.t0, context)

    def from_base(
        self, params: PyTree, z: Float[Array, "batch *event"], *, context: PyTree = None
    ) -> Float[Array, "batch *event"]:
        """Carry base samples to data: `z(t1)` for `z(t0) = z`. The inverse of `to_base`.

        Raises:
            TypeError, ValueError, SolveError: as `to_base`.
        """
        return self._carry("from_base", "z", params, z, self.t0, self.t1, context)

    def sample(
        self, params: PyTree, key: PRNGKeyArray, n: int, *, context: PyTree = None
    ) -> Float[Array, "n *event"]:
        """Draw `n` samples; the leaves of `context`, if there is one, are `[n, ...]`.

        Raises:
            ValueError: if `n` is not a number of samples, or the context has other rows.
            SolveError: at run time, if the solve fails.
        """
        where = "sample"
        z = self.base.sample(_check_key(where, key), (check_count(where, n),))
        return self._carry(where, "z", params, z, self.t0, self.t1, context)

    def sample_and_log_prob(
        self, params: PyTree, key: PRNGKeyArray, n: int, *, context: PyTree = None
    ) -> tuple[Float[Array, "n *event"], Float[Array, " n"]]:
        """Draw `n` samples and return their log-densities from the same solve.

        With a stochastic divergence the log-densities are unbiased estimates.

        Raises:
            ValueError, SolveError: as `sample`.
        """
        where = "sample_and_log_prob"
        base_key, probe_key = jax.random.split(_check_key(where, key))
        z = self.base.sample(base_key, (check_count(where, n),))
        context = check_context(where, context, z.shape[0])
        rows = (self._integrands.probes(probe_key, z, params, context), context)
        state = (z, log_prob_of(self.base, z))
        return self._solve(where, self._density_field, state, self.t0, self.t1, params, rows).y1

    def _to_base(self, where: str, params, x, zero, key, context, field, end=None) -> Solution:
        """Solve from data to base, at `t0` or `end`, together with integrals that start at zero.

        The divergence has the integral `-integral over [t0, t1] of div f`: the log-determinant.
        """
        context = check_context(where, context, x.shape[0])
        _check_key(where, key, optional=True)
        probes = self._integrands.probes(key, x, params, context, of_costs=where == "nll")
        rows = (probes, context)
        end = self.t0 if end is None else end
        return self._solve(where, field, (x, zero), self.t1, end, params, rows)

    def _carry(self, where, name, params, z, start, end, context) -> Float[Array, "batch *event"]:
        z = self._samples(where, name, z)
        rows = check_context(where, context, z.shape[0])
        return self._solve(where, self._integrands.field, z, start, end, params, rows).y1

    def _solve(self, where: str, field, state, start, end, params, rows) -> Solution:
        loss = where == "nll"
        throw = not loss if self.throw is None else self.throw
        solution = solve_batch(
            where, field, state, start, end, params, rows, self.solve_options, self.step_control,
            throw,
        )  # fmt: skip
        # Outside of a transformation the loss can raise at no cost.
        if loss and self.throw is None and not isinstance(solution.result, jax.core.Tracer):
            solution = raise_on_failure(solution, where)
        return solution

    def _density_field(self, t, state, params, row):
        """Derivative of `(z, log p(z))`: the instantaneous change of variables."""
        dz, div = self._integrands.volume(t, state, params, row)
        return dz, -div


def _check_key(where: str, key: Any, optional: bool = False) -> Any:
    """The key, if it is one: typed, or of the older kind, an array of uint32."""
    dtype = getattr(key, "dtype", None)
    is_key = dtype is not None and (
        jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32
    )
    if not is_key and not (key is None and optional):
        raise TypeError(
            f"{where}(key=...): must be a key of jax.random; got {type(key).__name__}. "
            "Pass jax.random.key(0)."
        )
    return key


def cnf(
    f: VectorField,
    base: BaseDensity,
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    divergence: Divergence = auto(),
    step_control: Literal["joint", "per_sample"] = "joint",
    quadrature: Literal["gauss", "stochastic"] = "gauss",
    regularizers: tuple[Regularizer, ...] = (),
    steer: float = 0.0,
    throw: bool | None = None,
    **solve_options: Any,
) -> CNF:
    """A continuous normalizing flow with vector field `f` from the density `base` to the data.

    Args:
        f: vector field of one sample, `f(t, z, params)`, or `f(t, z, (params, context_row))`.
        base: base density at time `t0`: an object with `event_shape`, `log_prob` and `sample`, such
            as those of `jaxode.distributions`, or of numpyro, distrax and flowjax. To learn its
            parameters, call `cnf` inside the loss with a density made from them.
        t0: time of the base density.
        t1: time of the data.
        divergence: how to compute `div f`, from `jaxode.divergence`.
        step_control: "joint" or "per_sample", as for `jaxode.flow`.
        quadrature: how `nll` integrates the divergence over a step: "gauss" at the nodes of
            a Gauss rule, two of which are at the ends of the step if stages of the solver are there
            (Lobatto), or "stochastic" at one random time for each sample: unbiased, and cheaper.
        regularizers: running costs to add to `nll`, from `jaxode.regularizers`.
        steer: let the solve of `nll` end at a random time instead of `t0`, uniform between
            `t0 - steer` and `t0 + steer`: one draw a call, from `key`, for the whole batch. A flow
            trained so takes fewer steps (STEER). At least 0, and less than `|t1 - t0|`. The field
            is evaluated up to `steer` beyond `t0`; all other methods end at `t0`.
        throw: raise `jaxode.SolveError` when a solve fails. By default all methods do, but for the
            training loss inside a transformation (`jit`, `vmap`), which turns NaN together with
            its gradient: the host callback that raises would keep the training step out of the
            persistent compilation cache.
        **solve_options: `solver`, `rtol`, `atol`, `steps`, `adjoint`, `first_step`, `max_step` and
            `max_steps`, as for `jaxode.solve`, and `axis_name`: with a batch split over devices by
            `jax.shard_map`, the devices take the same steps, those of the whole batch. Without it
            each device steps for itself. It is a name, or a tuple for a batch over several axes.

    Returns:
        A `CNF` with methods `log_prob`, `log_prob_and_error`, `nll`, `nll_and_stats`,
        `matching_loss`, `sample`, `sample_and_log_prob`, `to_base` and `from_base`.

    Raises:
        TypeError, ValueError: for an unknown option, or an argument that is not what it should be.
    """
    check_options("cnf", solve_options, without=("ts",))
    if not callable(f):
        raise TypeError(f"cnf(f=...): must be a function f(t, z, params); got {f!r}.")
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"cnf(divergence=...): must be a Divergence; got {divergence!r}. "
            "Use a function of jaxode.divergence, called: jaxode.divergence.exact(); or, of your "
            "own, jaxode.divergence.Divergence(init, apply)."
        )
    check_time("cnf", "t0", t0)
    check_time("cnf", "t1", t1)
    check_step_control("cnf", step_control)
    if quadrature not in ("gauss", "stochastic"):
        raise ValueError(
            f"cnf(quadrature=...): must be 'gauss' or 'stochastic'; got {quadrature!r}."
        )
    regularizers = check_regularizers("cnf", regularizers)
    flow = CNF(
        f, as_base(base), t0, t1, divergence, step_control, quadrature, regularizers,
        check_steer(steer, t0, t1), throw, solve_options,
    )  # fmt: skip
    if step_control == "per_sample" and solve_options.get("axis_name") is not None:
        raise ValueError(
            f"cnf(axis_name={solve_options['axis_name']!r}): joins the steps of a batch that is "
            "split over devices; with step_control='per_sample' each sample has its own. Leave it "
            "out."
        )
    if quadrature == "stochastic" and not flow._fused:
        raise ValueError(
            "cnf(quadrature='stochastic'): needs adjoint=jaxode.DiscreteAdjoint() and an explicit "
            "Runge-Kutta solver. Use quadrature='gauss'."
        )
    return flow
