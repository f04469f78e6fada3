"""Is a flow accurate where it is used? One table of checks against a tight solve."""

import dataclasses
import math
from typing import Any

import diffrax
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
from jaxode.auditing import density
from jaxode.auditing.checks import CHECKS
from jaxode.auditing.subject import Row, Subject, cast, tight_dtype
from jaxode.density.bind import Density
from jaxode.divergence import EXACT_UP_TO, Divergence, exact
from jaxode.flows.cnf import CNF
from jaxode.ode.options import SolveOptions


@dataclasses.dataclass(frozen=True)
class Report:
    """What `jaxode.audit` returns. `print` shows it as a table."""

    reference: str
    """What errors are measured against."""
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that could be measured is out of range. What could not is NaN."""
        return not self.advice

    @property
    def advice(self) -> dict[str, str]:
        """One sentence per check that is out of range, by the name of the check."""
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

    Errors are relative to a tight solve with the same probes, in float64 if `jax_enable_x64` is
    set, otherwise in the dtype of `x` and at least float32; the report says which. Samples that the
    flow carries far from its base, such as raw columns of a table, are named first. The divergence
    is compared with the exact trace, in any dimension. The total probability of the flow, for the
    first row of the context, is integrated on a grid in up to two dimensions and by importance
    sampling in up to eight; that of the base density by importance sampling. If the effective
    sample size is too small to tell, the report says so. A Metropolis step must leave the samples
    of the base density as they are. The audit ignores `axis_name`.

    Some faults are within its noise. Of a random divergence it sees a bias above a fifth of the
    standard deviation of one estimate; probes with 3% too much variance pass. So do samples of the
    base whose location or scale is off by less than a fifth of the scale, or which have modes far
    apart in wrong shares.

    It runs outside `jit`, and a few hundred samples are enough. It compiles about a dozen programs,
    once for all parameters of the same shapes, so later audits take little time.

    Args:
        flow: made by `jaxode.cnf`.
        params: as for the methods of the flow.
        x: samples, `[batch, *event]`: data that the flow is used on.
        key: draws the probes, and samples of the flow.
        context: as for the methods of the flow.

    Returns:
        A `Report`: `print` shows it as a table, `report.ok` says whether nothing that could be
        measured is out of range, and `report.values` and `report.advice` are dictionaries by the
        name of a check. A failed solve is reported, and values that it makes impossible to measure
        are NaN.

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
    as_array = lambda leaf: leaf if eqx.is_array(leaf) else jnp.asarray(leaf, x.dtype)
    floats = lambda leaf: as_array(leaf) if eqx.is_inexact_array_like(leaf) else leaf
    params, context = jax.tree.map(floats, (params, context))
    options = dataclasses.replace(flow.solve_options, axis_name=None)
    flow = dataclasses.replace(flow, throw=False, solve_options=options)
    subject = Subject(flow, flow, params, x, key, context)
    subject.tight, reference = _tighten(flow, x, stochastic=subject.probes is not None)
    row = density.divergence(subject)
    if row.advice and not math.isnan(row.value) and subject.probes is None:
        subject.tight = dataclasses.replace(subject.tight, divergence=flow.divergence)
        subject.wrong_divergence = True
    rows = [check(subject) for check in CHECKS]
    return Report(reference, tuple(row for row in rows if row is not None))


def _tighten(flow: CNF, x: Array, stochastic: bool) -> tuple[CNF, str]:
    """The flow with a tight solve, and a description of it."""
    dtype = tight_dtype(x)
    tolerance = 1e-10 if dtype == jnp.float64 else 10 * float(jnp.finfo(dtype).eps)
    own = flow.solve_options
    solver = own.solver if own.implicit else diffrax.Dopri8()
    divergence = flow.divergence
    if stochastic:
        divergence = _same_probes(divergence, x.dtype)
    elif x[0:1].size <= EXACT_UP_TO:
        divergence = exact()  # so that a wrong closed form is found
    options = SolveOptions(
        solver, tolerance, tolerance, max_step=own.max_step, breakpoints=own.breakpoints,
        max_steps=max(10_000, own.max_steps), precision="highest",
    )  # fmt: skip
    f, base = cast((flow.f, flow.base), dtype)
    tight = dataclasses.replace(
        flow, f=f, base=base, divergence=divergence, batch="joint", solve_options=options
    )
    name = f"{type(solver).__name__} in {jnp.dtype(dtype).name} at tolerance {tolerance:.1g}"
    return tight, name


def _same_probes(divergence: Divergence, dtype: Any) -> Divergence:
    """The divergence with probes drawn in this dtype, whatever the dtype of the solve."""
    choose = divergence.choose
    same = None if choose is None else _ChosenIn(choose, dtype)
    return divergence._replace(init=_DrawnIn(divergence.init, dtype), choose=same)


# Pytrees, so that audits of equal divergences share their programs.
class _DrawnIn(eqx.Module):
    init: Any
    dtype: Any = eqx.field(static=True)

    def __call__(self, key, z):
        probe = self.init(key, z.astype(self.dtype))
        return None if probe is None else probe.astype(z.dtype)


class _ChosenIn(eqx.Module):
    choose: Any
    dtype: Any = eqx.field(static=True)

    def __call__(self, g, z):
        return _same_probes(self.choose(g, z), self.dtype)
