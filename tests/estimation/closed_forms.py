"""Vector fields with known solutions, which take the place of solves.

A search compiles its equation in one second or two, and its solution in a fifth of that. What it
does with predictions is the same.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxode.estimation.observed import observed_system
from jaxode.estimation.observed.observations import EstimateArguments, posed

REAL = observed_system.solve


@dataclass(frozen=True)
class KnownSolution:
    """A vector field `f(t, y, args)`, and its `solution(t, y0, args)` a time after the start."""

    field: Callable[..., Any]
    solution: Callable[..., Any]

    def __call__(self, t, y, args):
        return self.field(t, y, args)


def decay(t, y, params):
    return -jnp.exp(params["rate"]) * y


DECAY = KnownSolution(decay, lambda t, y0, params: y0 * jnp.exp(-jnp.exp(params["rate"]) * t))


def solved(f, y0, t0, t1, args, *, ts, batch=None, row_args=None, jumps=None, **options):
    """As `jaxode.solve` for what estimates ask for."""
    if not isinstance(f, KnownSolution):
        more = {} if batch is None else {"batch": batch, "row_args": row_args}
        return REAL(f, y0, t0, t1, args, ts=ts, jumps=jumps, **more, **options)

    def at(t, y, given, doses):
        since = t0
        for i, then in enumerate([] if doses is None else doses):
            after = jumps.change(then, f.solution(jnp.minimum(then, t) - since, y, given), given, i)
            y, since = (jnp.where(t > then, new, old) for new, old in ((after, y), (then, since)))
        return f.solution(t - since, y, given)

    def of_row(ts, y0, row, doses):
        given = args if row is None else (args, row)
        return jax.vmap(lambda t: at(t, y0, given, doses))(ts)

    doses = None if jumps is None else jumps.times
    each = 0 if doses is not None and doses.ndim == 2 else None
    of_rows = jax.vmap(of_row, (0, 0, 0, each)) if ts.ndim == 2 else of_row
    return SimpleNamespace(ys=of_rows(ts, y0, row_args, doses))


@contextlib.contextmanager
def known_solutions():
    """Within it, estimates use the solutions of fields that are `KnownSolution`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observed_system, "solve", solved)
        yield


def posed_problem(f, y0, ts, ys, starts, **options):
    """The problem that `jaxode.estimate` poses, its starts as vectors, and their bounds."""
    given = dict.fromkeys(EstimateArguments._fields) | {"t0": 0.0, "options": {}} | options
    return posed(
        EstimateArguments(**given | {"f": f, "y0": y0, "ts": ts, "ys": ys, "starts": starts})
    )
