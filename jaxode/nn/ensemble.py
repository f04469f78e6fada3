"""Several networks as one."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode._checks.arguments import integer
from jaxode._checks.caller import arg, public
from jaxode._checks.samples import check_key
from jaxode.ode.field import Completed


class _NoClosedFormError(Exception):
    """Raised where a member has no closed form of its divergence."""


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
        TypeError, ValueError: for a wrong argument, and networks that differ in more than numbers.

    References: Lakshminarayanan et al. (2017), arXiv:1612.01474.
    """

    stacked: PyTree
    """A network whose arrays have a leading axis, of the members."""

    @public("")
    def __init__(self, make: Callable[[PRNGKeyArray], Any], members: int, *, key: PRNGKeyArray):
        if not callable(make):
            raise TypeError(
                f"Ensemble(make=...): must be a function of a key; got {type(make).__name__}. Pass "
                "lambda key: jaxode.nn.Residual(2, key=key)."
            )
        keys = jax.random.split(check_key(key), integer("members", members))
        self.stacked = _stacked([make(key) for key in keys])

    @classmethod
    def of(cls, networks: Sequence[Any]) -> "Ensemble":
        """The ensemble of networks that differ in their numbers alone."""
        ensemble = object.__new__(cls)
        object.__setattr__(ensemble, "stacked", _stacked(list(networks)))
        return ensemble

    @property
    def members(self) -> tuple[Any, ...]:
        """The networks."""
        arrays, static = eqx.partition(self.stacked, eqx.is_array)
        count = len(jax.tree.leaves(arrays)[0])
        each = (jax.tree.map(lambda leaf, i=i: leaf[i], arrays) for i in range(count))
        return tuple(eqx.combine(one, static) for one in each)

    def __call__(
        self, t: Float[Array, ""], y: Float[Array, " *event"], *context: Any
    ) -> Float[Array, " *event"]:
        return self._mean(lambda network: network(t, y, *context))

    def value_and_divergence(
        self, t: Float[Array, ""], y: Float[Array, " *event"], *context: Any
    ) -> Any:
        """`(m(t, y), div m)` in closed form. `NotImplemented` if a member has none."""

        def of_member(network):
            found = Completed(network).value_and_divergence(t, y, *context)
            if found is NotImplemented:
                raise _NoClosedFormError
            return found

        try:
            return self._mean(of_member)
        except _NoClosedFormError:
            return NotImplemented

    def is_centered(self, *context: Any) -> bool:
        """Whether the members keep the mean of particles, and are blind to it."""
        return Completed(self.stacked).is_centered(*context)

    def _mean(self, of_member: Callable[[Any], Any]) -> Any:
        each = eqx.filter_vmap(of_member)(self.stacked)
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), each)


def _stacked(networks: list[Any]) -> Any:
    arrays, static = zip(*(eqx.partition(each, eqx.is_array) for each in networks), strict=True)
    alike = lambda other: (
        eqx.tree_equal(static[0], other[1]) is True and _shapes(arrays[0]) == _shapes(other[0])
    )
    if not jax.tree.leaves(arrays[0]) or not all(map(alike, zip(arrays, static, strict=True))):
        raise ValueError(
            f"{arg('make')} must make networks that differ in the numbers of their arrays alone; "
            f"got {type(networks[0]).__name__} with other shapes or settings, or no arrays. Let "
            "the key draw weights, and nothing else."
        )
    return eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), static[0])


def _shapes(arrays: PyTree) -> Any:
    return jax.tree.map(lambda leaf: (np.shape(leaf), leaf.dtype), arrays)
