"""Continuous normalizing flows: log-density, sampling, and the maximum-likelihood loss.

A sample is `x = z(t1)` with `dz/dt = f(t, z, params)` and `z(t0)` from the base density. Along a
trajectory `d/dt log p(z(t)) = -div f`, so

    log p(x) = log p_base(z(t0)) - integral over [t0, t1] of div f dt.

This file decides in which direction of time each method solves, and with which sign. The training
loss is in `jaxode/flows/nll.py`.

References: Chen et al. (2018), arXiv:1806.07366; Grathwohl et al. (2019), arXiv:1810.01367.
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode._checks.arguments import Time, check_args, check_bool, state_dtype
from jaxode._checks.caller import arg, public
from jaxode._checks.errors import report_loss
from jaxode._checks.rules import (
    FINITE_BASE,
    FINITE_SLOPE,
    FINITE_TARGET,
    Faults,
    data_faults,
    weights_faults,
)
from jaxode._checks.samples import (
    check_count,
    check_key,
    check_not_empty,
    check_rows,
    check_samples,
    check_weights,
)
from jaxode._jax.closure import hash_of
from jaxode.coupling import Coupling, independent
from jaxode.divergence import Divergence
from jaxode.flows import compiled, reverse_kl
from jaxode.flows.bases import BaseDensity, has_edge
from jaxode.flows.chunks import Chunks, in_chunks
from jaxode.flows.embedding import Embedded, embedded
from jaxode.flows.integrands import Integrands
from jaxode.flows.matching import matching_loss
from jaxode.flows.nll import NLLStats
from jaxode.flows.periods import period_faults
from jaxode.flows.reverse_kl import Target
from jaxode.ode.field import Completed, VectorField, check_field
from jaxode.ode.options import SolveOptions
from jaxode.ode.solution import Solution, report
from jaxode.ode.system import System, argument_faults, make_system
from jaxode.regularizers import Regularizer

# Which samples are solved for: data, base samples of the user, or draws.
Samples = Literal["x", "z", "base"]


class CNF(eqx.Module):
    """A continuous normalizing flow, made by `jaxode.cnf`. All methods are pure functions.

    It is an Equinox module: a pytree of the arrays in its parts, equal to any flow with equal
    parts.

    Shapes: `x` and `z` are `[batch, *event]`, log-densities are `[batch]` in nats. The vector field
    gets `params` as its `args`; with a `context`, whose leaves are `[batch, ...]`, it gets
    `args = (params, context_row)`. `key` draws one probe per sample and solve, which depends only
    on the key and the sample's index (with JAX's rbg keys, also on the batch). Exact divergences
    need no key.

    Raises:
        TypeError, ValueError: all methods, at trace time, if samples are not floating arrays,
            shapes or numbers of rows do not fit, or a key is missing or invalid.
        SolveError: all methods that solve, at run time, if the solve fails; for the training losses
            see `cnf(throw=...)`. The message names an argument that is NaN or infinite.
    """

    f: VectorField
    base: BaseDensity
    t0: Time
    t1: Time
    divergence: Divergence
    regularizers: tuple[Regularizer, ...]
    solve_options: SolveOptions
    batch: Literal["joint", "per_sample"] = eqx.field(static=True)
    throw: bool | None = eqx.field(static=True)
    # How a `Density` solves a large batch; None for all rows at once.
    chunks: Chunks | None = eqx.field(static=True, default=None)

    def __hash__(self) -> int:
        return hash_of(self)

    @public("log_prob")
    def log_prob(
        self,
        params: PyTree,
        x: Float[Array, "batch *event"],
        *,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> Float[Array, " batch"]:
        """Log-density of the samples. The error control covers the change of volume, too.

        With a stochastic divergence, it is an unbiased estimate.
        """
        return end_state(self, compiled.log_prob, "x", x, params, key, context)

    @public("log_prob_and_error")
    def log_prob_and_error(
        self,
        params: PyTree,
        x: Float[Array, "batch *event"],
        *,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        """`log_prob`, and its standard error per sample from the noise of the divergence.

        The probes of a sample share one linearization, and each has its own integral, so this needs
        `hutchinson(probes=K)` with `K >= 2`. An exact divergence has a standard error of zero.

        Raises:
            ValueError: also if the divergence has only one probe, or no `standard_error`.
        """
        return end_state(self, compiled.log_prob_and_error, "x", x, params, key, context)

    def nll(
        self,
        params: PyTree,
        x: Float[Array, "batch *event"],
        *,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
        weights: Float[Array, " batch"] | None = None,
    ) -> Float[Array, ""]:
        """The training loss: mean negative log-density in nats, plus the regularizers.

        The error control covers only the samples. Gauss nodes on the dense output of their solve
        (Gauss-Lobatto, if the solver has stages at both ends of a step) integrate the change of
        volume, and `jax.value_and_grad` gets value and gradient from one
        sweep back over the steps. With a gradient method other than `DiscreteAdjoint`, the loss
        solves the augmented ODE instead.

        Args:
            weights: weights of the samples in the mean, at least 0 and not all 0; equal by default.
                They are divided by their sum. If invalid weights are known only at run time, the
                loss and its gradient are NaN. With per-sample steps, a row of weight 0 may hold
                NaN.

        With a batch split over devices by `jax.shard_map`, it is the mean over the rows of this
        device. Differentiate `jax.lax.pmean(flow.nll(params, x), axis)`: devices then exchange the
        parameter gradient once. If the flow has an `axis_name`, `weights` are relative to their
        mean over all devices.
        """
        return self.nll_and_stats(params, x, key=key, context=context, weights=weights)[0]

    @public("nll")
    def nll_and_stats(
        self,
        params: PyTree,
        x: Float[Array, "batch *event"],
        *,
        key: PRNGKeyArray | None = None,
        context: PyTree = None,
        weights: Float[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, ""], NLLStats]:
        """`nll` and its `NLLStats`, for `jax.value_and_grad(..., has_aux=True)`.

        The statistics have no gradient.
        """
        system = self._system("x", x, params, context).raising(bool(self.throw))
        check_not_empty(system.y0)
        weights = check_weights(weights, system.y0)
        key = None if key is None else check_key(key)
        loss, stats, result, t_reached = compiled.nll(
            system, self._integrands_and_base, key, weights
        )
        faults = self._faults("x", system, weights)
        remedies = self.solve_options.remedies(state_dtype(system.y0))
        return report_loss(loss, result, t_reached, self.throw, faults, remedies), stats

    @public("matching_loss")
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
        time_power: float = 1.0,
    ) -> Float[Array, ""]:
        """Flow matching: a regression loss that needs no solve and no divergence.

        With base samples `z0` and `u` in [0, 1], this fits the field to the velocity of the
        straight path, `z_t = (1 - u) z0 + u x` at `t = t0 + u (t1 - t0)`:

            mean over rows and coordinates of (f(t, z_t) - (x - z0) / (t1 - t0))^2,

        with angles of a `jaxode.torus` in radians.

        The field that minimizes the loss carries the base density to the data density. `nll` on the
        same parameters then sharpens it (docs/training.md).

        Args:
            key: draws base samples, times and the coupling. The times of a batch are stratified:
                one `v` (see `time_power`) in each of `batch` equal parts of [0, 1].
            x0: start samples to use instead of base samples, one per row of `x`.
            context: moves with the rows of `x`.
            weights: weights of the rows in the mean, as for `nll`. Only for independent pairs: with
                other couplings they would bias the trained density, so draw rows by their weights
                instead.
            coupling: how base samples and rows are paired, from `jaxode.coupling`.
            time_power: `u = 1 - (1 - v)^time_power` with `v` uniform in [0, 1]. Above 1, more times
                are near the data: 2 gives a better likelihood of tables (docs/training.md).

        Base samples have no gradient: train a learned base with `nll`, not with matching. Under
        `jax.shard_map` the loss is, like `nll`, the mean over the rows of this device, which are
        coupled among themselves. If all devices share the key, each row gets the same noise as on a
        single device.

        Raises:
            ValueError: also for weights with a coupling that pairs rows, and if the coupling does
                not return a permutation. Inside a transformation such as `jit`, the latter makes
                the loss NaN.
            SolveError: if the loss is not finite, under the conditions on which `nll` raises.

        References: Lipman et al. (2022), arXiv:2210.02747; Tong et al. (2023), arXiv:2302.00482.
        """
        arguments = x0, context, weights, coupling, time_power
        return matching_loss(self, params, x, check_key(key), *arguments)

    @public("to_base")
    def to_base(
        self, params: PyTree, x: Float[Array, "batch *event"], *, context: PyTree = None
    ) -> Float[Array, "batch *event"]:
        """Carry data to the base density: `z(t0)` for `z(t1) = x`."""
        return end_state(self, compiled.transport, "x", x, params, None, context)

    @public("from_base")
    def from_base(
        self, params: PyTree, z: Float[Array, "batch *event"], *, context: PyTree = None
    ) -> Float[Array, "batch *event"]:
        """Carry base samples to data: `z(t1)` for `z(t0) = z`. The inverse of `to_base`."""
        return end_state(self, compiled.transport, "z", z, params, None, context)

    @public("sample")
    def sample(
        self, params: PyTree, key: PRNGKeyArray, n: int, *, context: PyTree = None
    ) -> Float[Array, "n *event"]:
        """Draw `n` samples. The leaves of a `context` are `[n, ...]`."""
        z, _ = self._drawn(key, n)
        return end_state(self, compiled.transport, "base", z, params, None, context)

    @public("sample_and_log_prob")
    def sample_and_log_prob(
        self, params: PyTree, key: PRNGKeyArray, n: int, *, context: PyTree = None
    ) -> tuple[Float[Array, "n *event"], Float[Array, " n"]]:
        """Draw the samples of `sample` and return their log-densities from the same solve.

        With a stochastic divergence the log-densities are unbiased estimates.
        """
        z, probe_key = self._drawn(key, n)
        return end_state(self, compiled.sample, "base", z, params, probe_key, context)

    @public("reverse_kl_loss")
    def reverse_kl_loss(
        self,
        params: PyTree,
        log_density: Target,
        n: int,
        *,
        key: PRNGKeyArray,
        context: PyTree = None,
        path: bool = True,
    ) -> Float[Array, ""]:
        """The loss for a target without data: the mean of `log q(x) - log p(x)` over `n` samples.

        It estimates the reverse Kullback-Leibler divergence less `log Z`, without bias, and
        minimizing it fits the flow `q` to `p / Z` (docs/reverse_kl.md). Regularizers do not count.

        Args:
            log_density: unnormalized log-density of one sample, `log_density(x)`; with a context
                also `log_density(x, context_row)`. It may close over values with gradients.
            n: number of samples, drawn with `key` as by `sample`.
            context: leaves `[n, ...]`.
            path: take the path gradient, which leaves out a term of mean zero. It has less noise
                near the target, and none where `q = p`. Not for a base whose density jumps, as that
                of a uniform does at its edge: there the mean of the term is not zero.

        Differentiation: once; a second time raises. For `x = F(z)` the path gradient is
        `(dx/dparams)^T (grad log q(x) - grad log p(x))`. Its first factor is exact for the computed
        samples. The score of `q` is solved along with them, `dg/dt = -J^T g - grad div f`, to ten
        times `atol`. So unlike the gradient of the value (`path=False`), the path gradient does not
        look for errors of the solver that lower the loss. With a stochastic
        divergence both are unbiased, and the noise of the probes stays in the path gradient where
        `q = p`: use an exact one if you can. A learned base needs samples that have derivatives by
        its parameters: those of a mixture have none by its weights, which then learn nothing.

        Under `jax.shard_map` it is the mean over the samples of this device: give each device its
        own key, and differentiate `jax.lax.pmean` of the loss, as for `nll`.

        Raises:
            ValueError: also with `path`, for a base that is known to be zero far away.
            SolveError: if the solve fails, or the target or its gradient is not finite at a sample,
                under the conditions on which `nll` raises.

        References: Vaitl et al. (2022), arXiv:2206.09016.
        """
        check_field("log_density", log_density, "log_density(x)")
        check_bool("path", path)
        if isinstance(params, Embedded):
            raise ValueError(
                f"{arg('params')} must come without embed=, since the target would see embedded "
                "contexts; got a pair. Embed the context in the vector field."
            )
        z, probe_key = self._drawn(key, n)
        if path and has_edge(self.base, jnp.result_type(z)):
            raise ValueError(
                f"{arg('path')} needs a base that is nowhere zero, since jumps of its density make "
                f"the path gradient biased; got {self.base!r}. Pass path=False."
            )
        system = self._system("base", z, params, context).raising(bool(self.throw))
        check_not_empty(system.y0, "n")
        loss, result, t_reached, (value, slope) = reverse_kl.reverse_kl(
            system, self._integrands_and_base, probe_key, log_density, path
        )
        faults = self._faults("base", system)
        faults |= FINITE_TARGET.fault(value) | FINITE_SLOPE.fault(slope)
        remedies = self.solve_options.remedies(state_dtype(system.y0))
        return report_loss(loss, result, t_reached, self.throw, faults, remedies)

    def _drawn(self, key: Any, n: Any) -> tuple[Float[Array, "n *event"], PRNGKeyArray]:
        """Samples of the base, and a key for the probes."""
        base_key, probe_key = jax.random.split(check_key(key))
        return self.base.sample(base_key, (check_count(n),)), probe_key

    @property
    def _integrands_and_base(self) -> tuple[Integrands, BaseDensity]:
        """What a compiled program of a flow needs beside the system."""
        return Integrands(self.f, self.divergence, self.regularizers), self.base

    def _system(self, name: Samples, samples: Any, params: PyTree, context: PyTree) -> System:
        """The system that carries samples from one end to the other."""
        span = (self.t1, self.t0) if name == "x" else (self.t0, self.t1)
        check = public("cnf")(check_samples) if name == "base" else check_samples
        y0 = check(name, samples, tuple(self.base.event_shape))
        context = check_rows("context", context, y0.shape[0])
        params, context = embedded(check_args("params", params), context)
        field, options = Integrands(self.f, self.divergence).field, self.solve_options
        return make_system(field, y0, span, params, options, row_args=context, batch=self.batch)

    def _faults(
        self, name: Samples, system: System, weights: Float[Array, " batch"] | None = None
    ) -> Faults:
        """The faults that weights, samples, context, times and options may have."""
        context = {"context": system.row_args}
        if name == "base":
            faults = FINITE_BASE.fault(system.y0, where="cnf") | data_faults(context)
        else:
            joint = self.batch == "joint"
            faults = weights_faults(weights, self.solve_options.axis_name)
            faults |= data_faults({name: system.y0} | context, weights, joint=joint)
        faults |= Completed(self.f).span_faults(self.t0)
        return period_faults(system, self._integrands_and_base) | faults | argument_faults(system)


def end_state(
    flow: CNF,
    program: Callable[..., Solution],
    name: Samples,
    samples: Any,
    params: PyTree,
    key: PRNGKeyArray | None,
    context: PyTree,
    faults: Faults | None = None,
) -> Any:
    """The end state of the compiled `program(system, integrands_and_base, key)`.

    If it fails, `faults` may be the reason, too.
    """
    throw = flow.throw is None or flow.throw
    system = flow._system(name, samples, params, context).raising(throw)
    key = None if key is None else check_key(key)
    solution = in_chunks(program, flow.chunks, system, flow._integrands_and_base, key)
    if throw:
        faults = (faults or {}) | flow._faults(name, system)
        remedies = flow.solve_options.remedies(state_dtype(system.y0))
        solution = report(solution, faults, remedies)
    return solution.y1
