"""The integrands along a trajectory: the field, its divergence, and costs.

All functions are for one sample and increasing time. `cnf` chooses the direction.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import check_scalar
from jaxode._checks.caller import public
from jaxode.divergence import Divergence, FieldAt
from jaxode.ode.field import VectorField, of_row
from jaxode.regularizers import Regularizer

# The scale of a score in a state: its absolute tolerance is ten times that of the samples. The same
# tolerance would take 1.5 times the steps, for errors far below the noise of a gradient.
SCORE = 0.1


def of_one_sample(name: str, value: Any) -> Float[Array, ""]:
    """Check the value that a divergence or a regularizer, argument `name` of `cnf`, returned."""
    cure = "Sum over the event, and average over probes."
    return public("cnf")(check_scalar)(name, value, "must return one number of a sample", cure)


class Integrands(eqx.Module):
    """Functions `(t, state, params, row)` of one sample, where `row` is `(probe, context)`.

    They are compared by value, so that equal ones share compiled programs.
    """

    f: VectorField
    divergence: Divergence
    regularizers: tuple[Regularizer, ...] = ()

    def at(self, t: Float[Array, ""], params: PyTree, context: PyTree) -> FieldAt:
        """The vector field at one time."""
        return FieldAt(self.f, t, of_row(params, context))

    def field(self, t, z: Float[Array, " *event"], params, context) -> Float[Array, " *event"]:
        """The vector field. Its `row` is only the context."""
        return self.at(t, params, context)(z)

    def volume(self, t, state, params, row):
        """Derivative of `(z, integral of div f)`."""
        probe, context = row
        dz, div = self.divergence.apply(self.at(t, params, context), state[0], probe)
        return dz, of_one_sample("divergence", div)

    def score(self, t, state, params, row):
        """Derivative of `(z, log p(z), SCORE grad log p(z))`. Only that of `z` has derivatives."""
        dz, *derivatives = self.score_with_jacobian(t, state, params, row)
        return dz, *jax.lax.stop_gradient(derivatives)

    def score_with_jacobian(self, t, state, params, row):
        """`score` for a solver that takes derivatives by the state."""
        z, _, score = state

        def change(z):
            dz, div = self.volume(t, (z,), params, row)
            return jnp.sum(score * dz) + SCORE * div, (dz, div)

        slope, (dz, div) = jax.grad(change, has_aux=True)(z)
        return dz, -div, -slope

    def volume_of_each_probe(self, t, state, params, row):
        """Derivative of `(z, integral of each estimate of div f)`, on one linearization."""
        probe, context = row

        def volume_of_probe(v):
            return self.volume(t, state, params, (v[None], context))

        return jax.vmap(volume_of_probe, out_axes=(None, 0))(probe)

    def field_and_costs(self, t, state, params, row):
        """Derivative of `(z, integrals of the costs)`."""
        (z, _), (probe, context) = state, row
        g, norm = self.at(t, params, context), None
        if self._needs_norm:
            divergence = self.divergence.chosen(g, z, needs_norm=True)
            with_norm = divergence.with_norm
            if with_norm is None:
                raise ValueError(
                    "nll: a regularizer needs the norm of the Jacobian, which the divergence "
                    f"({divergence.name}) does not provide. "
                    "Pass divergence=jaxode.divergence.hutchinson() to cnf."
                )
            dz, div, norm = with_norm(g, z, probe)
        else:
            dz, div = self.divergence.apply(g, z, probe)
        costs = [regularizer.cost(dz, norm) for regularizer in self.regularizers]
        costs = [of_one_sample("regularizers", cost) for cost in costs]
        return dz, jnp.stack([of_one_sample("divergence", div), *costs])

    @property
    def _needs_norm(self) -> bool:
        return any(regularizer.needs_norm for regularizer in self.regularizers)

    def chosen_divergence(
        self, x: Float[Array, "batch *event"], params, context, *, of_costs: bool = False
    ) -> Divergence:
        """The divergence that `auto()` stands for; with `of_costs`, for the running costs, too.

        It is chosen before probes are drawn, so that a closed form needs no key.
        """

        def like_row(leaf):
            return jnp.zeros(jnp.shape(leaf)[1:], jnp.result_type(leaf))

        t = jnp.zeros((), x.dtype)
        g = self.at(t, params, jax.tree.map(like_row, context))
        return self.divergence.chosen(g, like_row(x), needs_norm=of_costs and self._needs_norm)
