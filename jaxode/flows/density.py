"""A flow as a distribution: with its parameters, in the units and the support of the data.

With the bijection `u -> x` of the support and `u = mean + scale z`, a sample of the flow is `z`:

    log p(x) = log p_flow(z) + log |det du/dx| - sum log scale.
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode.divergence import noiseless
from jaxode.flows.cnf import CNF
from jaxode.flows.standardize import WHERE, Affine, affine, of_context, split
from jaxode.flows.support import Support, as_support
from jaxode.flows.validation import check_key
from jaxode.ode.validation import check_args, integer, is_known


class _Constant(eqx.Module):
    """A leaf that is no array, as a node without leaves, so that `jax.jit` takes the tree."""

    value: Any = eqx.field(static=True)


def _arrays_alone(tree: PyTree, numbers: bool) -> PyTree:
    """The tree with all but its arrays, and `numbers`, made constants."""
    keep = lambda leaf: eqx.is_array(leaf) or (numbers and isinstance(leaf, int | float))
    return jax.tree.map(lambda leaf: leaf if keep(leaf) else _Constant(leaf), tree)


def _whole(tree: PyTree) -> PyTree:
    """The inverse of `_arrays_alone`."""
    is_constant = lambda leaf: isinstance(leaf, _Constant)
    return jax.tree.map(
        lambda leaf: leaf.value if is_constant(leaf) else leaf, tree, is_leaf=is_constant
    )


class Density(eqx.Module):
    """The distribution of a flow, made by `jaxode.bind`. A pytree of its parameters and maps.

    Shapes: `x` is `[..., *event]`, log-densities are `[...]` in nats. A `context` is one for all
    samples, or has a row for each: leaves `[..., *row]`, with the same leading axes.

    Each sample takes its own steps, so its density does not depend on the batch around it. Without
    a key the divergence is exact; with one it is that of the flow.

    Raises:
        TypeError, ValueError: at trace time, if arguments do not fit.
        SolveError: if a solve fails outside of a transformation; inside, as under `jax.jit`, the
            sample or density is NaN. `cnf(throw=True)` raises there, too.
    """

    _flow: Any
    _params: PyTree
    support: Support | None
    standardize: Affine | None
    of_context: PyTree
    """`Affine` for the leaves of a context that are standardized; None for the others."""

    @property
    def flow(self) -> CNF:
        """The flow, to train it."""
        return _whole(self._flow)

    @property
    def params(self) -> PyTree:
        """Of the vector field of the flow."""
        return _whole(self._params)

    def with_params(self, params: PyTree) -> "Density":
        """The same maps around a flow with other parameters."""
        return dataclasses.replace(self, _params=_arrays_alone(params, numbers=True))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(_whole(self._flow.base).event_shape)

    def log_prob(
        self,
        x: Float[Array, "..."],
        *,
        context: PyTree = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "..."]:
        """Log-density of the samples; minus infinity outside of the support."""
        rows, shape = self._rows("log_prob", x)
        inside, z, log_det = jax.vmap(self._from_data)(rows)
        flow = self._row_by_row(key, (rows, context))
        context = self._context(context, shape)
        log_prob = flow.log_prob(self.params, z, key=key, context=context) + log_det
        return jnp.where(inside, log_prob, -jnp.inf).reshape(shape)

    def sample(
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = (), *, context: PyTree = None
    ) -> Float[Array, "..."]:
        """Independent samples, `[*sample_shape, *event]`."""
        count, context, shape = self._draws(sample_shape, context)
        flow = self._row_by_row(None, (key, context))
        # As in `sample_and_log_prob`.
        base_key, _ = jax.random.split(check_key("sample", key))
        z = flow.sample(self.params, base_key, count, context=context)
        return jax.vmap(self._to_data)(z).reshape(*shape, *self.event_shape)

    def sample_and_log_prob(
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = (), *, context: PyTree = None
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """`sample`, and the log-density of each, from the same solve."""
        where = "sample_and_log_prob"
        count, context, shape = self._draws(sample_shape, context)
        flow = self._row_by_row(None, (key, context))
        z, log_prob = flow.sample_and_log_prob(
            self.params, check_key(where, key), count, context=context
        )
        x = jax.vmap(self._to_data)(z)
        _, _, log_det = jax.vmap(self._from_data)(x)
        return x.reshape(*shape, *self.event_shape), (log_prob + log_det).reshape(shape)

    def to_flow(self, x: Float[Array, "batch *event"], context: PyTree = None) -> Any:
        """Data as the flow sees them, to train it: `z`, or `(z, context)` if there is a context.

        `density.flow.nll(params, density.to_flow(x))` is minus the mean of `log_prob`, but for the
        constant of the maps. Data outside of the support are NaN.
        """
        rows, shape = self._rows("to_flow", x)
        inside, z, _ = jax.vmap(self._from_data)(rows)
        inside = inside.reshape(-1, *(1,) * len(self.event_shape))
        z = jnp.where(inside, z, jnp.nan).reshape(*shape, *self.event_shape)
        return z if context is None else (z, self._standardized(context))

    def _from_data(self, x: Float[Array, " *event"]):
        """Whether an event is in the support, as the flow sees it, and `log |det dz/dx|`."""
        inside, log_det = jnp.ones((), bool), jnp.zeros((), x.dtype)
        if self.support is not None:
            # What is NaN stays so; a density outside is that of another event, and not used.
            inside = self.support.contains(x) | jnp.isnan(x).any()
            x, log_det = self.support.inverse(jnp.where(inside, x, self._some(x)))
        if self.standardize is not None:
            x = self.standardize(x)
            scales = jnp.broadcast_to(self.standardize.scale, x.shape)
            log_det = log_det - jnp.sum(jnp.log(scales))
        return inside, x, log_det

    def _some(self, like: Float[Array, " *event"]) -> Float[Array, " *event"]:
        """An event of the support."""
        assert self.support is not None
        return self.support.forward(jnp.zeros_like(like))

    def _to_data(self, z: Float[Array, " *event"]) -> Float[Array, " *event"]:
        x = z if self.standardize is None else self.standardize.back(z)
        return x if self.support is None else self.support.forward(x)

    def _row_by_row(self, key: Any, inputs: PyTree) -> CNF:
        """The flow, with steps for each row, without noise if there is no key."""
        flow = self.flow
        throw = flow.throw
        if throw is None:
            throw = is_known((self.params, inputs))
        divergence = noiseless() if key is None else flow.divergence
        steps = flow.step_control
        if flow.solve_options.tableau is not None and flow.solve_options.axis_name is None:
            steps = "per_sample"
        return dataclasses.replace(flow, step_control=steps, divergence=divergence, throw=throw)

    def _rows(self, where: str, x: Any) -> tuple[Float[Array, "rows *event"], tuple[int, ...]]:
        """The samples as a batch, and the axes before those of an event."""
        event = self.event_shape
        if isinstance(x, int | float | list):
            x = jnp.asarray(x, float)
        shape = jnp.shape(x)
        split = len(shape) - len(event)
        if split < 0 or shape[split:] != event:
            raise ValueError(
                f"{where}(x=...): must have shape (..., *event) with event {event}; got {shape}."
            )
        return jnp.reshape(x, (math.prod(shape[:split]), *event)), shape[:split]

    def _draws(self, sample_shape: Any, context: PyTree):
        """How many samples, their contexts, and the axes of both."""
        sizes = sample_shape if isinstance(sample_shape, tuple | list) else (sample_shape,)
        shape = tuple(integer("sample", "sample_shape", size, least=0) for size in sizes)
        return math.prod(shape), self._context(context, shape), shape

    def _context(self, context: PyTree, shape: tuple[int, ...]) -> PyTree:
        """A row for each of as many samples as `shape` has."""
        if context is None:
            return None
        check_args("bind", "context", context)
        context, count = self._standardized(context), math.prod(shape)
        leaves = jax.tree.leaves(context)
        each = shape != () and all(jnp.shape(leaf)[: len(shape)] == shape for leaf in leaves)

        def rows(leaf):
            own = jnp.shape(leaf)[len(shape) :] if each else jnp.shape(leaf)
            if each:
                return jnp.reshape(leaf, (count, *own))
            return jnp.broadcast_to(leaf, (count, *own))

        return jax.tree.map(rows, context)

    def _standardized(self, context: PyTree) -> PyTree:
        if self.of_context is None:
            return context
        is_map = lambda x: x is None or isinstance(x, Affine)
        apply = lambda affine, leaf: leaf if affine is None else affine(leaf)
        return jax.tree.map(apply, self.of_context, context, is_leaf=is_map)


def bind(flow: CNF, params: PyTree, *, standardize: Any = None, support: Any = None) -> Density:
    """The distribution of a flow with these parameters: a pytree that goes everywhere.

    Args:
        flow: made by `jaxode.cnf`.
        params: of its vector field.
        standardize: an affine map around the flow, so that the network sees numbers of about one:
            data `[n, *event]`, of which it takes mean and standard deviation; or `(mean, scale)`,
            numbers or arrays of an event's shape; or a pair of such for `(x, context)`, where
            leaves of the context that are integers, such as labels, stay as they are.
        support: where the density is not zero: `(low, high)`, numbers or arrays of an event's
            shape, which may be infinite; a constraint of numpyro; or a bijector of distrax. The
            data lie strictly within. `standardize` then is of what the bijection maps them to, if
            it is not data.

    Returns:
        A `Density` with `log_prob`, `sample`, `sample_and_log_prob`, `event_shape` and `to_flow`.
        To train, take a loss of `density.flow` on `density.to_flow(x)`; then
        `density.with_params(trained)`.

    Raises:
        TypeError, ValueError: if an argument is not what it should be, a column of the data is
            constant, or data lie outside of the support.
    """
    if not isinstance(flow, CNF):
        raise TypeError(f"{WHERE}(flow=...): must be made by jaxode.cnf; got {flow!r}.")
    event = tuple(flow.base.event_shape)
    allowed = as_support(WHERE, support, event)
    of_data, for_context = split(standardize, event)
    return Density(
        _flow=_arrays_alone(flow, numbers=False),
        _params=_arrays_alone(params, numbers=True),
        support=allowed,
        standardize=affine("x", of_data, event, allowed),
        of_context=of_context(for_context),
    )
