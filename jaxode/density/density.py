"""A flow as a distribution: with its parameters, in the units and on the support of the data.

Let `z` be a sample of the flow, `u` its image under the inverse of the map of `standardize=`, and
`x` the image of `u` under the support's bijection. Then

    log p(x) = log p_flow(z) + log |det dz/du| + log |det du/dx|.
"""

import contextlib
import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxode._checks.arguments import check_bool
from jaxode._checks.caller import arg, public
from jaxode._checks.rules import IN_REACH, INSIDE, PERIODIC, is_eager, is_known
from jaxode._checks.samples import check_batches, check_count, check_finite
from jaxode._jax.closure import hash_of, unwrap_constants, wrap_constants
from jaxode.density.contexts import Contexts, InFlow
from jaxode.density.levels import (
    LEVEL_RULE,
    base_quantiles,
    check_levels,
    check_one_number,
    levels_at,
    levels_of_each,
    of_each_level,
    placed,
)
from jaxode.density.maps.base import Map
from jaxode.density.maps.bind_arguments import Shape, as_map, as_support
from jaxode.density.maps.chain import Chain, from_data, to_data
from jaxode.flows import compiled
from jaxode.flows.bases import Torus, fixed_columns, in_one_period
from jaxode.flows.chunks import Chunks
from jaxode.flows.cnf import CNF, end_state
from jaxode.flows.embedding import Embedded
from jaxode.flows.periods import off_period_of
from jaxode.flows.reverse_kl import Target
from jaxode.ode.field import MISFITS, check_field


class Density(eqx.Module):
    """The distribution of a flow, made by `jaxode.bind`. A pytree of its parameters and maps.

    Shapes: `x` is `[..., *event]`, log-densities are `[...]` in nats. A `context` is shared by all
    samples, or has one row per sample, `[..., *row]`. Its leading axes broadcast to those of `x` if
    `bind` knows the shape of a row; if not, they must equal them.

    Each sample takes its own steps, so its density does not depend on the batch around it; with an
    `axis_name`, the steps are joint. The divergence is exact, also in `sample_and_log_prob`;
    `log_prob` with a key and `reverse_kl_loss` take that of the flow. The maps are constants of
    differentiation.

    Many samples are solved in batches, in the memory of one: `batch_size` of them at a time, by
    default as many as are fast (docs/evaluate.md). Outside of transformations, `progress=True`
    writes on stderr how many are done. Neither changes a result, except that the noise of a key
    of JAX's rbg generators depends on the batch, as under `jax.vmap`.

    Raises:
        TypeError, ValueError: at trace time, if arguments do not fit.
        SolveError: if a solve fails outside a transformation. Inside one, such as `jax.jit`, the
            sample or density is NaN; with `cnf(throw=True)` it raises there, too.
    """

    _flow: Any
    _params: PyTree
    maps: Chain
    contexts: Contexts

    def __hash__(self) -> int:
        return hash_of(self)

    @property
    def flow(self) -> CNF:
        """The flow, to train it."""
        return unwrap_constants(self._flow)

    @property
    def params(self) -> PyTree:
        """The parameters of the vector field; with `embed=`, a pair `(params, embed)`."""
        return unwrap_constants(self._params)

    @property
    def embed(self) -> Any:
        """The network of the contexts, if there is one."""
        params = self.params
        return params.embed if isinstance(params, Embedded) else None

    @property
    def support(self) -> Map | None:
        """The bijection of the support."""
        return self.maps.support

    @property
    def standardize(self) -> Map | None:
        """The map of the units, after that of the support."""
        return self.maps.standardize

    def with_params(self, params: PyTree) -> "Density":
        """The same maps around the flow with other parameters, such as trained `density.params`."""
        if isinstance(self._params, Embedded) and not isinstance(params, Embedded):
            raise TypeError(
                "with_params(params=...): must be a pair as density.params, since there is embed=; "
                f"got {type(params).__name__}. Pass density.params._replace(params=...)."
            )
        return dataclasses.replace(self, _params=wrap_constants(params, numbers=True))

    @public("with_flow")
    def with_flow(self, flow: CNF) -> "Density":
        """The same parameters and maps around another flow, such as one with tighter tolerances."""
        if not isinstance(flow, CNF) or tuple(flow.base.event_shape) != self.event_shape:
            got = tuple(flow.base.event_shape) if isinstance(flow, CNF) else repr(flow)
            raise ValueError(
                f"{arg('flow')} must be made by jaxode.cnf, with samples of shape "
                f"{self.event_shape}; got {got}."
            )
        if not self.maps.spares(fixed_columns(flow.base)):
            raise ValueError(
                f"{arg('flow')} needs a base of numbers that are free, since there are maps around "
                f"it; got {type(flow.base).__name__}. Bind it anew."
            )
        return dataclasses.replace(self, _flow=wrap_constants(flow))

    @property
    def event_shape(self) -> Shape:
        """The shape of one sample."""
        return tuple(unwrap_constants(self._flow.base).event_shape)

    def _wrapped(self, x: Float[Array, "rows *event"]) -> Float[Array, "rows *event"]:
        """Angles in their first period."""
        return in_one_period(unwrap_constants(self._flow.base), x)

    @public("log_prob")
    def log_prob(
        self,
        x: Float[Array, "..."],
        *,
        context: PyTree = None,
        key: PRNGKeyArray | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Float[Array, "..."]:
        """Log-density of the samples. Minus infinity outside the support, and where the maps
        overflow."""
        rows, shape = check_batches("x", x, self.event_shape)
        inside, fits, z, log_det = from_data(self.maps, rows)
        flow = self._row_by_row(key, (rows, context), batch_size, progress)
        params, context = self.contexts.embedded(self.params, context, shape)
        log_prob = flow.log_prob(params, z, key=key, context=context) + log_det
        return jnp.where(inside & fits, log_prob, -jnp.inf).reshape(shape)

    @public("sample")
    def sample(
        self,
        key: PRNGKeyArray,
        sample_shape: Shape = (),
        *,
        context: PyTree = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Float[Array, "..."]:
        """Independent samples, `[*sample_shape, *event]`.

        Without a `sample_shape`, `density.sample(key, context=rows)` draws one for each row of the
        context, `[*rows, *event]`, if `bind` knows the shape of a row.
        """
        shape, count, params, context = self._drawn(sample_shape, context)
        flow = self._row_by_row(None, (key, context), batch_size, progress)
        z = flow.sample(params, key, count, context=context)
        return self._wrapped(to_data(self.maps, z)[0]).reshape(*shape, *self.event_shape)

    @public("sample_and_log_prob")
    def sample_and_log_prob(
        self,
        key: PRNGKeyArray,
        sample_shape: Shape = (),
        *,
        context: PyTree = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The samples of `sample`, and the log-density of each, from the same solve."""
        shape, count, params, context = self._drawn(sample_shape, context)
        flow = self._row_by_row(None, (key, context), batch_size, progress)
        z, log_prob = flow.sample_and_log_prob(params, key, count, context=context)
        x, log_det = to_data(self.maps, z)
        x = self._wrapped(x).reshape(*shape, *self.event_shape)
        return x, (log_prob + log_det).reshape(shape)

    @public("cdf")
    def cdf(
        self,
        x: Float[Array, "..."],
        *,
        context: PyTree = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Float[Array, "..."]:
        """Give the probability of a smaller number, for a density of one number.

        It is the level of `x` at the base, after one solve, exact to the tolerances.
        Differentiable: its derivative by `x` is the density.

        Args:
            x: numbers, `[..., *event]`, with `event` one of `()` and `(1,)`. Infinity is allowed.
            context: as for `log_prob`.

        Returns:
            Levels `[...]`; 0 or 1 outside the support, and where the maps overflow.

        Raises:
            ValueError: also for events of several numbers, and a base without `cdf` and `icdf`.
                Distributions of numpyro have them.
        """
        flow = self._row_by_row(None, (x, context), batch_size, progress)
        check_one_number(flow.base)
        rows, shape = check_batches("x", x, self.event_shape)
        z, in_reach, large = placed(self.maps, rows)
        params, context = self.contexts.embedded(self.params, context, shape)
        z = end_state(flow, compiled.transport, "x", z, params, None, context)
        levels = levels_at(self.maps, flow.base, z)
        return jnp.where(in_reach, levels, jnp.where(large, 1.0, 0.0)).reshape(shape)

    @public("quantile")
    def quantile(
        self,
        q: Float[Array, "..."],
        *,
        context: PyTree = None,
        paired: bool = False,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Float[Array, "..."]:
        """Give the number below which the probability is `q`: the inverse of `cdf`.

        Takes one solve for each level and row of the context. Differentiable.

        Args:
            q: levels between 0 and 1, a number or an array.
            context: one, or rows of it `[..., *row]`, if `bind` knows the shape of a row. `fit`
                finds it out.
            paired: whether each row of the context has levels of its own, `q` `[..., *levels]`.

        Returns:
            Numbers `[..., *levels]`, where `levels` is the shape of `q`: rows of the context by
            levels; the shape of `q`, if `paired`. They lack the axis of an event of shape `(1,)`,
            which `cdf` takes.

        Raises:
            ValueError: as for `cdf`, for paired levels without the axes of the context, and for
                levels outside (0, 1). If that is known only at run time, a number is NaN, or it
                raises with `cnf(throw=True)`.
        """
        flow = self._row_by_row(None, (q, self.maps, context), batch_size, progress)
        check_one_number(flow.base)
        levels, of_levels = check_levels(q)
        shape = self.contexts.leading_axes(context)
        check_bool("paired", paired)
        if paired:
            of_levels = levels_of_each(of_levels, shape)
        else:
            levels = jnp.tile(levels, math.prod(shape))
        params, context = self.contexts.embedded(self.params, context, shape)
        context = of_each_level(context, math.prod(of_levels))
        z, wrong = base_quantiles(self.maps, flow.base, levels), LEVEL_RULE.fault(levels)
        z = end_state(flow, compiled.transport, "z", z, params, None, context, wrong)
        return to_data(self.maps, z)[0].reshape(*shape, *of_levels)

    @public("reverse_kl_loss")
    def reverse_kl_loss(
        self,
        log_density: Target,
        n: int,
        *,
        key: PRNGKeyArray,
        context: PyTree = None,
        path: bool = True,
    ) -> Float[Array, ""]:
        """`reverse_kl_loss` of the flow, for a target in the units and on the support of the data.

        `log_density(x)`, or `log_density(x, context_row)`, sees samples and contexts as
        `log_prob` does; the log-determinants of the maps count. Steps and divergence are those of
        the flow. To train, minimize `density.with_params(params).reverse_kl_loss(...)`.
        """
        check_field("log_density", log_density, "log_density(x)")
        flow, shape = self.flow, (check_count(n),)
        target = InFlow(log_density, self.maps, self.contexts)
        context = self.contexts.rows(context, shape)
        return flow.reverse_kl_loss(self.params, target, n, key=key, context=context, path=path)

    @public("to_flow")
    def to_flow(self, x: Float[Array, "batch *event"], context: PyTree = None) -> Any:
        """Map data to what the flow trains on: `z`, or `(z, context)` if there is a context.

        `density.flow.nll(params, density.to_flow(x))` is the mean of `log_det - log_prob`, if the
        flow has no `regularizers`.

        Raises:
            ValueError: if data lie outside the support or are not finite, or their `z` overflows.
                If that is known only at run time, they become NaN.
        """
        rows, shape = check_batches("x", x, self.event_shape)
        inside, fits, z, _ = from_data(self.maps, rows)
        INSIDE.check(inside, rows)
        IN_REACH.check(fits)
        inside = (inside & fits).reshape(len(rows), *(1,) * len(self.event_shape))
        z = jnp.where(inside, z, jnp.nan).reshape(*shape, *self.event_shape)
        if context is None:
            check_finite({"x": rows})
            return z
        context = self.contexts.rows(context, shape)
        # An embedding may accept NaN in the context.
        check_finite({"x": rows} | ({} if self.embed is not None else {"context": context}))
        return z, jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), context)

    @public("from_flow")
    def from_flow(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Map samples of the flow to the units of the data: the inverse of `to_flow`."""
        rows, shape = check_batches("z", z, self.event_shape)
        return to_data(self.maps, rows)[0].reshape(*shape, *self.event_shape)

    @public("log_det")
    def log_det(self, x: Float[Array, "batch *event"]) -> Float[Array, " batch"]:
        """`log |det dz/dx|` of the maps: what `log_prob` adds to the flow's log-density of `z`.

        For samples inside of the support.
        """
        rows, shape = check_batches("x", x, self.event_shape)
        return from_data(self.maps, rows)[3].reshape(shape)

    def _row_by_row(self, key: Any, inputs: PyTree, batch_size: Any, progress: bool) -> CNF:
        """The flow with per-sample steps in batches, and without noise if there is no key."""
        flow = self.flow
        throw = flow.throw
        if throw is None:
            throw = is_eager((flow, self.params, inputs))
        divergence = flow.divergence
        if key is None:
            divergence = divergence.without_noise(self.event_shape)
        chunks = Chunks.make(batch_size, progress, self.params)
        steps, options = "per_sample", flow.solve_options
        if options.axis_name is not None:
            steps, chunks = flow.batch, None
            for name, value in (("batch_size", batch_size), ("progress", progress or None)):
                if value is not None:
                    raise ValueError(
                        f"{arg(name)} needs steps of each sample, which a flow with an axis_name "
                        f"does not take; got {value}. Leave it out."
                    )
        return dataclasses.replace(
            flow, batch=steps, divergence=divergence, throw=throw, chunks=chunks
        )

    def _drawn(
        self, sample_shape: Any, context: PyTree
    ) -> tuple[tuple[Any, ...], Any, PyTree, PyTree]:
        """The shape of the samples, their number, parameters of the field, and their contexts."""
        sizes = sample_shape if isinstance(sample_shape, tuple | list) else (sample_shape,)
        shape = tuple(check_count(size, "sample_shape") for size in sizes)
        shape = shape or self.contexts.leading_axes(context)
        return shape, math.prod(shape), *self.contexts.embedded(self.params, context, shape)


@public("bind")
def bind(
    flow: CNF,
    params: PyTree,
    *,
    standardize: Any = None,
    standardize_context: Any = None,
    support: Any = None,
    context_shape: Any = None,
    embed: Any = None,
) -> Density:
    """Bind a flow to its parameters: a distribution, and a pytree.

    Args:
        flow: made by `jaxode.cnf`.
        params: parameters of its vector field.
        standardize: affine map around the flow, so that the network sees numbers of order one. Pass
            data `[n, *event]`, whose mean and standard deviation it takes; or a tuple
            `(mean, scale)` of numbers or arrays of an event's shape. `jaxode.standardize` has other
            maps. Angles of `jaxode.torus` stay as they are.
        standardize_context: affine map of the context: data `[n, *row]`, a dictionary or named
            tuple of such arrays, or `(mean, scale)`. Integers, such as labels, stay as they are.
            For numbers over several orders of magnitude, pass `jaxode.standardize.normal(data)`.
        support: where the density is not zero: `(low, high)`, numbers or arrays of an event's
            shape, possibly infinite; a numpyro constraint; or a distrax bijector. Data must lie
            strictly inside. `(mean, scale)` then refer to the data after the bijection. Beside
            angles, `(low, high)` that are infinite for them.
        context_shape: shape of one context, or of each of its arrays, so that its leading axes are
            known. Not needed if `standardize_context` is data, or a mean and scale that are arrays.
        embed: a network `embed(row)`, such as `jaxode.nn.DeepSet`, from the context of one sample,
            after that map, to the vector that the vector field gets. It is evaluated once for
            each context, before the solve, and trained by `jaxode.fit`: `density.params` is then a
            pair `(params, embed)`, which the losses of `density.flow` also take. Contexts may hold
            NaN, if it knows what to make of them. `standardize_context` then takes means and
            deviations of the last axis, without NaN: of the numbers of a point, or the channels of
            an image or series.

    Returns:
        A `Density`: `log_prob`, `sample` and `sample_and_log_prob` in the units of the data;
        `to_flow`, `from_flow` and `log_det`, the maps; and `reverse_kl_loss`.
        To train, minimize a loss of `density.flow` on `density.to_flow(x)`, then take
        `density.with_params(trained)`.

    Raises:
        TypeError, ValueError: for an invalid argument, a constant column of the data, or data
            outside the support.
    """
    if not isinstance(flow, CNF):
        raise TypeError(f"bind(flow=...): must be made by jaxode.cnf; got {flow!r}.")
    if isinstance(params, type):
        raise TypeError(
            "bind(params=...): must be a pytree of parameters; got the class "
            f"{params.__name__}. Call it: {params.__name__}(..., key=key)."
        )
    event = tuple(flow.base.event_shape)
    fixed = fixed_columns(flow.base)
    if standardize is not None and len(fixed) == math.prod(event):
        cure = "Divide by one scale yourself, and leave it out."
        if isinstance(flow.base, Torus):
            cure = "Leave it out: angles keep their units."
        raise _fixed("standardize", flow, cure)
    if is_eager(params):
        check_period("bind", "flow", flow, params)
    if embed is not None:
        if not callable(embed) or isinstance(embed, type):
            raise TypeError(
                f"{arg('embed')} must be a function of the context of one sample; got {embed!r}. "
                "Pass a network, such as jaxode.nn.DeepSet(2, 16, key=key)."
            )
        params = Embedded(params, embed)
    maps_are_known = is_known((standardize, standardize_context, support))
    # Maps of known values are computed at once, so that they are the same inside of `jit`.
    with jax.ensure_compile_time_eval() if maps_are_known else contextlib.nullcontext():
        allowed = as_support(support, event)
        if allowed is not None and not allowed.spares(fixed):
            raise _fixed("support", flow, "Pass (low, high), infinite for angles, or leave it out.")
        units = as_map("standardize", standardize, event, allowed, fixed)
        contexts = Contexts.from_arguments(standardize_context, context_shape, embed is not None)
    return Density(
        _flow=wrap_constants(flow),
        _params=wrap_constants(params, numbers=True),
        maps=Chain(tuple(part for part in (allowed, units) if part is not None)),
        contexts=contexts,
    )


def _fixed(name: str, flow: CNF, cure: str) -> ValueError:
    return ValueError(
        f"{arg(name)} would move the angles or the centre of its base, {type(flow.base).__name__}. "
        f"{cure}"
    )


def check_period(start: str, name: str, flow: CNF, params: PyTree, row: PyTree = None) -> None:
    """Raise if the base has angles, and the field is known to differ one period on."""
    try:
        off = off_period_of(flow.f, flow.base, (flow.t0, flow.t1), params, row, jnp.zeros(()))
    except MISFITS:  # the field needs a context, or other parameters
        return
    if off is not None and is_known(off) and not PERIODIC.holds(off):
        raise ValueError(PERIODIC.sentence(where=start, name=name))
