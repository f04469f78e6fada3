"""The subject of an audit: a flow, a tight solve of it, and what several checks share."""

import dataclasses
import math
from functools import cached_property
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from jaxode._checks.arguments import state_dtype
from jaxode._checks.errors import SolveError, in_rows
from jaxode._jax.closure import equations
from jaxode.flows.cnf import CNF
from jaxode.flows.integrands import Integrands
from jaxode.flows.noise import of_each_row
from jaxode.flows.programs import transport
from jaxode.ode.adjoints import ForwardMode
from jaxode.ode.system import make_system

# Standard deviations. In one dimension, a normal base has no such samples.
BASE_DISTANCE = 10.0
# As many samples are drawn and solved at once.
CHUNK = 2**14


class Row(NamedTuple):
    """The outcome of one check."""

    name: str
    value: float
    """NaN if it could not be measured."""
    limit: str
    """The range, in words."""
    advice: str = ""
    """What to do. Empty if the value is in range."""


@dataclasses.dataclass
class Subject:
    """A flow and the data of its audit. Values that several checks need are computed once."""

    flow: CNF
    """It does not raise."""
    tight: CNF
    params: PyTree
    x: Float[Array, "batch *event"]
    key: PRNGKeyArray
    context: PyTree
    wrong_divergence: bool = False
    """Whether the divergence is not the trace. It has a row of its own: errors of the solve are
    measured with the same divergence, and the total probability with the trace."""

    @cached_property
    def failure(self) -> str:
        """The message of the first failed solve. Empty if there is none.

        `nll` runs the same solve as `to_base`.
        """
        flow = dataclasses.replace(self.flow, throw=True)
        try:
            z = flow.to_base(self.params, self.x, context=self.context)
            flow.from_base(self.params, z, context=self.context)
            flow.log_prob(self.params, self.x, key=self.key, context=self.context)
        except SolveError as error:
            return str(error)
        return ""

    @cached_property
    def tight_failure(self) -> str:
        """Like `failure`, for the tight solve."""
        try:
            self._tight_log_prob(dataclasses.replace(self.tight, throw=True))
        except SolveError as error:
            return str(error)
        return ""

    @property
    def implicit(self) -> bool:
        """Whether the solver is implicit."""
        return self.flow.solve_options.implicit

    @property
    def solve_finer(self) -> str:
        """The first words of advice against solver error."""
        steps = self.flow.solve_options.steps
        if self.rounded:
            return self.rounded.capitalize()
        return "Tighten rtol and atol" if steps is None else f"Raise steps from {steps}"

    @property
    def smoother(self) -> str:
        """Advice if the controller finds no step size."""
        return self.rounded or "look for a kink, a jump or a singularity of the vector field"

    @cached_property
    def rounded(self) -> str:
        """Advice if the vector field computes anything in lower precision than float32."""
        first = jax.tree.map(lambda leaf: leaf[0], (self.x, self.context))
        x, context = cast(first, tight_dtype(self.x))
        field, t = Integrands(self.tight.f, self.tight.divergence).field, jnp.zeros((), x.dtype)
        run = lambda t, x, context: field(t, x, self.tight_params, context)
        program = jax.make_jaxpr(run)(t, x, context).jaxpr
        outputs = (v.aval for equation in equations(program) for v in equation.outvars)
        dtypes = (aval.dtype for aval in outputs if hasattr(aval, "dtype"))
        is_low = lambda d: jnp.issubdtype(d, jnp.floating) and jnp.finfo(d).bits < 32
        low = next(filter(is_low, dtypes), None)
        return "" if low is None else f"compute the vector field in float32, not {low}"

    @cached_property
    def z(self) -> Float[Array, "batch *event"]:
        return self.flow.to_base(self.params, self.x, context=self.context)

    @cached_property
    def base_samples(self) -> Float[Array, "count *event"]:
        base = self.flow.base
        return base.sample(self.key, (min(CHUNK, max(512, 2**22 // math.prod(base.event_shape))),))

    @cached_property
    def base_fault(self) -> str:
        """Advice if the base draws samples that are not finite."""
        bad = ~jnp.isfinite(self.base_samples).all(axis=tuple(range(1, self.x.ndim)))
        advice = f"Fix the base: it draws samples with NaN or inf, in {in_rows(bad)}."
        return advice if bool(bad.any()) else ""

    @cached_property
    def base_distance(self) -> float:
        """The median distance of samples carried to the base from its mean, in deviations.

        Samples of the base score about one.
        """
        base = np.asarray(self.base_samples, float)
        z = np.asarray(self.z, float)[~np.asarray(self.outside)]
        if not len(z):
            return np.nan
        with np.errstate(all="ignore"):
            distance = (z - base.mean(axis=0)) / base.std(axis=0)
            return float(np.median(np.sqrt(np.mean(distance.reshape(len(z), -1) ** 2, axis=1))))

    @cached_property
    def log_prob(self) -> Float[Array, " batch"]:
        return self.flow.log_prob(self.params, self.x, key=self.key, context=self.context)

    @cached_property
    def outside(self) -> Bool[Array, " batch"]:
        """Samples with density zero in both solves, which have no error to measure."""
        return (self.log_prob == -jnp.inf) & (self.tight_log_prob == -jnp.inf)

    @cached_property
    def loss(self):
        """`((loss, NLLStats), gradient)` of the samples inside the support."""
        x, context = self._inside
        return _loss_and_gradient(self.flow, self.params, x, self.key, context)

    @property
    def _inside(self):
        """Samples and context. The first sample inside the support replaces those outside."""
        rows = jnp.arange(self.x.shape[0])
        rows = jnp.where(self.outside, jnp.argmin(self.outside), rows)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], (self.x, self.context))

    @property
    def tight_params(self) -> PyTree:
        return cast(self.params, tight_dtype(self.x))

    def _tight_log_prob(self, tight: CNF) -> Float[Array, " batch"]:
        x, context = cast((self.x, self.context), tight_dtype(self.x))
        return tight.log_prob(self.tight_params, x, key=self.key, context=context)

    @cached_property
    def tight_log_prob(self) -> Float[Array, " batch"]:
        return self._tight_log_prob(self.tight)

    @cached_property
    def tight_loss(self):
        x, context = cast(self._inside, tight_dtype(self.x))
        return _loss_and_gradient(self.tight, self.tight_params, x, self.key, context)

    @cached_property
    def trajectories(self) -> tuple[Float[Array, " times"], Float[Array, "times batch *event"]]:
        """The samples at several times on the way from the data to the base."""
        flow, span = self.flow, (self.flow.t1, self.flow.t0)
        times = jnp.linspace(*span, 9, dtype=self.x.dtype)
        field, options, batch = self.integrands.field, flow.solve_options, flow.batch
        system = make_system(
            field, self.x, span, self.params, options,
            ts=times, row_args=self.context, batch=batch,
        )  # fmt: skip
        return times, transport(system, None, None).ys

    @cached_property
    def probes(self) -> Any:
        """The noise of the divergence. None if it is exact."""
        chosen = self.integrands.chosen_divergence(self.x, self.params, self.context)
        return of_each_row(chosen.init, self.key, self.x, None)

    @property
    def integrands(self) -> Integrands:
        return Integrands(self.flow.f, self.flow.divergence)

    def judge(self, name: str, value: Any, limit: float, unit: str, advice: str) -> Row:
        """The row of a value, which is in range up to `limit`."""
        value, text = float(value), f"at most {limit:.4g} {unit}".rstrip()
        if not np.isnan(value):
            return Row(name, value, text, "" if value <= limit else advice)
        # A failed solve, a faulty base, and samples without a density have their own rows.
        if self.failure or self.tight_failure or self.base_fault or bool(self.outside.all()):
            return Row(name, value, text)
        return Row(
            name, value, text,
            "It is not finite although the solves succeed: look for an operation of the vector "
            "field with an infinite derivative, such as sqrt at 0, or for a backward solve that "
            "fails.",
        )  # fmt: skip


def _loss_and_gradient(flow: CNF, params, x, key, context):
    diff, rest = eqx.partition(params, eqx.is_inexact_array)

    def loss(diff):
        return flow.nll_and_stats(eqx.combine(diff, rest), x, key=key, context=context)

    if isinstance(flow.solve_options.adjoint, ForwardMode):
        return loss(diff), jax.jacfwd(lambda diff: loss(diff)[0])(diff)
    return jax.value_and_grad(loss, has_aux=True)(diff)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating arrays in this dtype, and complex ones in one of its width."""
    kind = lambda leaf: np.result_type(dtype, np.complex64) if jnp.iscomplexobj(leaf) else dtype
    convert = lambda leaf: leaf.astype(kind(leaf)) if eqx.is_inexact_array(leaf) else leaf
    return jax.tree.map(convert, tree)


def tight_dtype(x: Array) -> Any:
    """Double precision where it is enabled."""
    return jnp.float64 if jax.config.read("jax_enable_x64") else state_dtype(x)
