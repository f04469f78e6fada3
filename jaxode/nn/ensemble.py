"""Several networks as one."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import integer
from jaxode._checks.caller import public
from jaxode._checks.samples import check_key
from jaxode.ode.field import Completed


class Ensemble(eqx.Module):
    """The mean of several networks: `m(t, y, context) = sum_k m_k(t, y, context) / members`.

    The mean of vector fields is a vector field, so a flow of an ensemble has an exact density.
    `jaxode.fit` trains the members apart from each other, each on batches of its own, with other
    rows set aside. Where rows are few, the mean is much better than any member. It costs as many
    evaluations as there are members.

    Args:
        make: a function of a key that makes a network, such as
            `lambda key: jaxode.nn.Residual(2, key=key)`.
        members: how many.
        key: draws the networks.

    Raises:
        TypeError, ValueError: for a wrong argument.

    References: Lakshminarayanan et al. (2017), arXiv:1612.01474.
    """

    members: tuple[Any, ...]
    """The networks."""

    @public("")
    def __init__(self, make: Callable[[PRNGKeyArray], Any], members: int, *, key: PRNGKeyArray):
        if not callable(make):
            raise TypeError(
                f"Ensemble(make=...): must be a function of a key; got {type(make).__name__}. Pass "
                "lambda key: jaxode.nn.Residual(2, key=key)."
            )
        keys = jax.random.split(check_key(key), integer("members", members))
        self.members = tuple(make(key) for key in keys)

    @classmethod
    def of(cls, networks: Sequence[Any]) -> "Ensemble":
        """The ensemble of these networks."""
        in_turn = iter(networks)
        return cls(lambda _: next(in_turn), len(networks), key=jax.random.key(0))

    def __call__(
        self, t: Float[Array, ""], y: Float[Array, " *event"], *context: Any
    ) -> Float[Array, " *event"]:
        return self._mean([network(t, y, *context) for network in self.members])

    def value_and_divergence(
        self, t: Float[Array, ""], y: Float[Array, " *event"], *context: Any
    ) -> Any:
        """`(m(t, y), div m)` in closed form. `NotImplemented` if a member has none."""
        fields = map(Completed, self.members)
        closed_forms = [field.value_and_divergence(t, y, *context) for field in fields]
        return (
            NotImplemented
            if any(closed_form is NotImplemented for closed_form in closed_forms)
            else self._mean(closed_forms)
        )

    def is_centered(self, *context: Any) -> bool:
        """Whether the members keep the mean of particles, and are blind to it."""
        return all(Completed(network).is_centered(*context) for network in self.members)

    def _mean(self, outputs: list[Any]) -> Any:
        # Members run one after the other: as a batch, their products take twice as long on a CPU.
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *outputs)
