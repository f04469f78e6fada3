"""How far each row of a solve has come."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.errors import Result
from jaxode.ode.loop.stats import Stats


class Progress(NamedTuple):
    """The progress of each row."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]
    """The step size to try next."""
    y: Float[Array, "samples n"]
    at_end: Bool[Array, " rows"]
    """Whether the end time is reached. The time cannot tell: compilers may round it twice."""
    result: Int[Array, " rows"]
    accepted: Int[Array, " rows"]
    rejected: Int[Array, " rows"]
    nonfinite_ahead: Float[Array, " rows"]
    """The reach beyond `t` of the last rejected attempt if it was not finite; otherwise not
    positive. A solve that ends before passing that time failed because of it."""

    @classmethod
    def start(cls, t, h, y, result) -> "Progress":
        """Begin a solve. An empty span takes one step of size zero, which carries the
        derivatives with respect to times."""
        zero = jnp.zeros(t.shape, jnp.int32)
        result = result.astype(jnp.int32)
        return cls(t, h, y, jnp.zeros(t.shape, bool), result, zero, zero, jnp.zeros_like(t))

    @property
    def active(self) -> Bool[Array, " rows"]:
        """Rows that have neither ended nor failed."""
        return ~self.at_end & (self.result == Result.SUCCESS)

    def stats(self, evals_per_step: int, first_evals: int) -> Stats:
        steps = self.accepted + self.rejected
        return Stats(steps, self.accepted, self.rejected, first_evals + evals_per_step * steps)
