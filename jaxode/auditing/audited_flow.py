"""The subject of an audit: a flow, a tight solve of it, and what several checks share."""

import dataclasses
import math
from functools import cached_property
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from jaxode._checks.errors import SolveError
from jaxode.divergence import Divergence
from jaxode.flows.cnf import CNF
from jaxode.flows.integrands import Integrands
from jaxode.ode.adjoints import ForwardMode
from jaxode.ode.options import SolveOptions


class Row(NamedTuple):
    """The outcome of one check."""

    name: str
    value: float
    """NaN if it could not be measured."""
    limit: str
    """The range, in words."""
    advice: str = ""
    """Advice. Empty if the value is in range."""


def within(name: str, value: Any, limit: float, unit: str, advice: str) -> Row:
    """The row of a value, which is in range up to `limit`."""
    value, text = float(value), f"at most {limit:.4g} {unit}".rstrip()
    return Row(name, value, text, advice if value > limit else "")


@dataclasses.dataclass
class AuditedFlow:
    """A flow, which does not raise, at some parameters and samples.

    Values that several checks need are computed once.
    """

    flow: CNF
    params: PyTree
    x: Float[Array, "batch *event"]
    key: PRNGKeyArray
    context: PyTree

    @cached_property
    def tight(self) -> "AuditedFlow":
        """The same flow with a tight solve.

        It is in double precision, if that is enabled and would not draw other probes.
        """
        double = jax.config.read("jax_enable_x64") and not self.noisy
        dtype = jnp.dtype(jnp.float64) if double else self.x.dtype
        tolerance = 1e-10 if dtype == jnp.float64 else 10 * float(jnp.finfo(dtype).eps)
        audited = self.flow.solve_options
        options = SolveOptions(
            audited.solver if audited.implicit else diffrax.Dopri8(), tolerance, tolerance,
            max_step=audited.max_step, breakpoints=audited.breakpoints,
            max_steps=max(10_000, audited.max_steps), precision="highest",
        )  # fmt: skip
        floating = self.flow.f, self.flow.base, self.params, self.x, self.context
        f, base, params, x, context = _cast(floating, dtype)
        flow = dataclasses.replace(self.flow, f=f, base=base, batch="joint", solve_options=options)
        return AuditedFlow(flow, params, x, self.key, context)

    @cached_property
    def log_prob(self) -> Float[Array, " batch"]:
        return self.flow.log_prob(self.params, self.x, key=self.key, context=self.context)

    @cached_property
    def z(self) -> Float[Array, "batch *event"]:
        return self.flow.to_base(self.params, self.x, context=self.context)

    @cached_property
    def failed(self) -> str:
        """The message of the first solve that fails: to the base, back, or for `log_prob`."""
        flow, of_rows = dataclasses.replace(self.flow, throw=True), {"context": self.context}
        try:
            flow.from_base(self.params, flow.to_base(self.params, self.x, **of_rows), **of_rows)
            flow.log_prob(self.params, self.x, key=self.key, **of_rows)
        except SolveError as error:
            return str(error)
        return ""

    @cached_property
    def outside(self) -> Bool[Array, " batch"]:
        """Samples with density zero in both solves, which have no error to measure."""
        return (self.log_prob == -jnp.inf) & (self.tight.log_prob == -jnp.inf)

    @cached_property
    def losses(self):
        """Losses of the flow and the tight solve. A sample inside replaces those outside."""
        rows = jnp.arange(self.x.shape[0])
        rows = jnp.where(self.outside, jnp.argmin(self.outside), rows)
        return self._loss(rows), self.tight._loss(rows)

    def _loss(self, rows: Array):
        """The gradient of `nll` at some of the samples, and the work of the solve."""
        diff, constants = eqx.partition(self.params, eqx.is_inexact_array)
        x, context = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], (self.x, self.context))

        def loss(diff):
            params = eqx.combine(diff, constants)
            value, stats = self.flow.nll_and_stats(params, x, key=self.key, context=context)
            return value, stats.stats

        forward = isinstance(self.flow.solve_options.adjoint, ForwardMode)
        return (jax.jacfwd if forward else jax.grad)(loss, has_aux=True)(diff)

    @cached_property
    def base_samples(self) -> Float[np.ndarray, "count *event"]:
        count = min(2**14, max(512, 2**22 // math.prod(self.flow.base.event_shape)))
        return np.asarray(self.flow.base.sample(self.key, (count,)))

    @property
    def divergence(self) -> Divergence:
        integrands = Integrands(self.flow.f, self.flow.divergence)
        return integrands.chosen_divergence(self.x, self.params, self.context)

    @cached_property
    def noisy(self) -> bool:
        """Whether the divergence is stochastic."""
        return self.divergence.init(self.key, self.x[0]) is not None


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating arrays in this dtype, and complex ones in one of its width."""

    def kind(leaf):
        return np.result_type(dtype, np.complex64) if jnp.iscomplexobj(leaf) else dtype

    def convert(leaf):
        return leaf.astype(kind(leaf)) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(convert, tree)
