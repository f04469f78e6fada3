"""`jaxode.cnf`: a flow from its parts, checked."""

from typing import Any, Literal

from jaxode._checks.arguments import check_bool, check_number, one_of
from jaxode._checks.caller import public
from jaxode._checks.rules import TIME
from jaxode.divergence import Divergence, auto
from jaxode.flows.bases import BaseDensity, as_base, has_full_support
from jaxode.flows.centered import Centered
from jaxode.flows.cnf import CNF
from jaxode.ode.field import Completed, VectorField, check_field
from jaxode.ode.options import SolveOptions
from jaxode.ode.solve import check_implicit
from jaxode.regularizers import Regularizer, check_regularizers


@public("cnf")
def cnf(
    f: VectorField,
    base: BaseDensity,
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    divergence: Divergence = auto(),
    batch: Literal["joint", "per_sample"] = "joint",
    regularizers: tuple[Regularizer, ...] = (),
    throw: bool | None = None,
    **solve_options: Any,
) -> CNF:
    """Make a continuous normalizing flow with vector field `f` from the density `base` to the data.

    Args:
        f: vector field of one sample, `f(t, z, params)`, or `f(t, z, (params, context_row))`.
        base: base density at time `t0`: `jaxode.standard_normal(event_shape)`, or any object with
            `event_shape`, `log_prob` and `sample`, such as a distribution of numpyro, distrax or
            flowjax. To learn its parameters, call `cnf` inside the loss with a density made from
            them. With `jaxode.centered_normal`, `f` loses the part that moves the mean.
        t0: time of the base density.
        t1: time of the data.
        divergence: how to compute `div f`, from `jaxode.divergence`.
        batch: "joint" or "per_sample", as for `jaxode.solve`.
        regularizers: running costs to add to `nll`, from `jaxode.regularizers`.
        throw: raise `jaxode.SolveError` when a solve fails or the matching loss is not finite. By
            default all methods raise, except that training losses inside a transformation (`jit`,
            `vmap`) become NaN together with their gradients: a host callback that raises would keep
            the training step out of JAX's persistent compilation cache.
        **solve_options: `solver`, `rtol`, `atol`, `steps`, `adjoint`, `first_step`, `max_step`,
            `breakpoints`, `max_steps` and `precision`, as for `jaxode.solve`, with a number as
            `atol` (matching uses JAX's own precision setting); and `axis_name`, a mapped axis or a
            tuple of them: with a batch split over devices by `jax.shard_map`, all devices take the
            steps of the whole batch. Without it, each device takes its own steps.

    Returns:
        A `CNF` with methods `log_prob`, `log_prob_and_error`, `nll`, `nll_and_stats`,
        `matching_loss`, `reverse_kl_loss`, `sample`, `sample_and_log_prob`, `to_base` and
        `from_base`.

    Raises:
        TypeError, ValueError: for an unknown option or an invalid argument.
    """
    check_field("f", f, "f(t, z, params)")
    _check_divergence(divergence)
    one_of("batch", batch, ("joint", "per_sample"))
    options = SolveOptions.make(**solve_options)
    check_number("atol", options.atol)
    for name, time in (("t0", t0), ("t1", t1)):
        check_number(name, time, TIME, kind="time")
    t0 = Completed(f).check_span(t0, t1)
    if not has_full_support(base):
        f = Centered(f)
    if throw is not None:
        check_bool("throw", throw)
    _check_steps(options, batch)
    return CNF(
        f=f,
        base=as_base(base),
        t0=t0,
        t1=t1,
        divergence=divergence,
        regularizers=check_regularizers(regularizers),
        solve_options=options,
        batch=batch,
        throw=throw,
    )


def _check_divergence(divergence: Any) -> None:
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"cnf(divergence=...): must be a Divergence; got {divergence!r}. "
            "Use a function of jaxode.divergence, called: jaxode.divergence.exact(); or, for your "
            "own, jaxode.divergence.Divergence(init, apply)."
        )


def _check_steps(options: SolveOptions, batch: Literal["joint", "per_sample"]) -> None:
    """Raise if the options of the solver do not go with the steps of a batch, or with a flow."""
    check_implicit(options, batch)
    if batch == "per_sample" and options.axis_name is not None:
        raise ValueError(
            f"cnf(axis_name={options.axis_name!r}): joins the steps of a batch that is split over "
            "devices; with batch='per_sample' each sample has its own. Leave it out."
        )
    if options.jacobian is not None:
        raise ValueError(
            f"cnf(solver=...): integrates more than the field; got {type(options.solver).__name__}("
            "jacobian=...). Leave jacobian out."
        )
