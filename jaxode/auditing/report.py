"""Is a flow accurate where it is used? One table of checks against a tight solve."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode._checks.arguments import check_not_traced, state_dtype
from jaxode._checks.caller import public
from jaxode._checks.samples import (
    check_finite,
    check_key,
    check_not_empty,
    check_rows,
    check_samples,
)
from jaxode.auditing.audited_flow import AuditedFlow, Row
from jaxode.auditing.checks import CHECKS
from jaxode.density.density import Density
from jaxode.flows.cnf import CNF
from jaxode.flows.embedding import embedded


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `jaxode.audit`. `print` shows it as a table."""

    reference: str
    """The reference of the errors."""
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that could be measured is out of range. What could not is NaN."""
        return not self.advice

    @property
    def advice(self) -> dict[str, str]:
        """Advice for each check that is out of range, by its name."""
        return {row.name: row.advice for row in self.rows if row.advice}

    @property
    def values(self) -> dict[str, float]:
        """The measured value of each check, by name."""
        return {row.name: row.value for row in self.rows}

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'check':{width}}  {'value':>9}    in range"]
        for row in self.rows:
            mark = "!" if row.advice else " "
            lines.append(f"{row.name:{width}}  {row.value:9.3g}  {mark} {row.limit}")
        lines.append(f"Errors are against {self.reference}.")
        lines += [f"! {name}: {advice}" for name, advice in self.advice.items()]
        return "\n".join(lines)

    __repr__ = __str__


@public("audit")
def audit(
    flow: CNF,
    params: PyTree,
    x: Float[Array, "batch *event"],
    key: PRNGKeyArray,
    *,
    context: PyTree = None,
) -> Report:
    """Check the accuracy of a flow on a batch, with advice for every value out of range.

    Errors are relative to a tight solve with the same divergence and probes: in float64 if
    `jax_enable_x64` is set and there are no probes, otherwise in the dtype of `x` and at least
    float32. The divergence is compared with the exact trace. A Metropolis step must leave the
    samples of the base density as they are, which must integrate to one (in up to 8 dimensions).
    Not seen are the noise of a random divergence (`log_prob_and_error` returns it) or a bias below
    a fifth of that of one estimate, and of the base a location or scale that is off by less than a
    fifth of the scale, or modes far apart in wrong shares. `axis_name` is ignored.

    It runs outside `jit`, and a few hundred samples are enough. It compiles about a dozen programs,
    once for all parameters of the same shapes.

    Args:
        flow: made by `jaxode.cnf`.
        params: as for the methods of the flow.
        x: samples, `[batch, *event]`: data that the flow is used on.
        key: draws the probes, and samples of the base.
        context: as for the methods of the flow.

    Returns:
        A `Report`: `print` shows it as a table, `report.ok` says whether nothing that could be
        measured is out of range, and `report.values` and `report.advice` are dictionaries by the
        name of a check. Values that a failed solve makes impossible to measure are NaN.

    Raises:
        TypeError, ValueError: for wrong arguments, as in the methods of the flow; for samples that
            are not finite, for no samples, and inside `jit`.
    """
    if not isinstance(flow, CNF):
        cure = "Pass jaxode.cnf(f, base)."
        if isinstance(flow, Density):
            cure = "Pass density.flow, density.params and density.to_flow(x)."
        raise TypeError(
            f"audit(flow=...): must be a flow made by jaxode.cnf; got {type(flow).__name__}. {cure}"
        )
    check_not_traced("measures numbers", flow, params, x, key, context)
    x = check_samples("x", x, tuple(flow.base.event_shape))
    x = x.astype(state_dtype(x))
    check_key(key)
    context = check_rows("context", context, x.shape[0])
    check_not_empty(x)
    check_finite({"x": x})

    def as_array(leaf):
        return leaf if eqx.is_array(leaf) else jnp.asarray(leaf, x.dtype)

    def floats(leaf):
        return as_array(leaf) if eqx.is_inexact_array_like(leaf) else leaf

    params, context = jax.tree.map(floats, embedded(params, context))
    options = dataclasses.replace(flow.solve_options, axis_name=None)
    flow = dataclasses.replace(flow, throw=False, solve_options=options)
    subject = AuditedFlow(flow, params, x, key, context)
    rows = [check(subject) for check in CHECKS]
    tight, dtype = subject.tight.flow.solve_options, subject.tight.x.dtype
    reference = f"{type(tight.solver).__name__} in {dtype} at tolerance {float(tight.rtol):.1g}"
    return Report(reference, tuple(row for row in rows if row is not None))
