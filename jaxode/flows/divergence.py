"""The divergence of a vector field: exact, or estimated without bias.

Each function here returns a `Divergence`, which works on one sample: `g` maps `z [*event]` to
`dz [*event]`. A flow passes `FieldAt` as `g`, so an estimator can ask it for a closed form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import check_derivative, integer, one_of, state_dtype
from jaxode._checks.caller import public
from jaxode._jax.sharding import axes_of, vary
from jaxode.ode.field import call_field

# Up to this many dimensions, `auto` takes the exact trace. benchmarks/cases/divergence.py: at 8
# dimensions it costs less than 8 probes, which still leave 5% noise in a gradient; at 16 it costs
# more.
EXACT_UP_TO = 8
# Products that `noiseless` computes at a time, in more than twice as many dimensions. All 3,072 at
# once, for 1,024 rows, would take 39 GB.
TANGENTS_AT_ONCE = 64

Field = Callable[[Float[Array, " *event"]], Float[Array, " *event"]]


@dataclass(frozen=True, eq=False)
class FieldAt:
    """A vector field at a fixed time and arguments: `g(z) = f(t, z, args)`."""

    f: Callable[..., Any]
    t: Float[Array, ""]
    args: Any

    def __call__(self, z: Float[Array, " *event"]) -> Float[Array, " *event"]:
        dz = call_field(self.f, self.t, z, self.args)
        public("cnf")(check_derivative)(z, dz)  # before an estimator meets it
        return dz

    def value_and_divergence(self, z: Float[Array, " *event"]) -> Any:
        """`(g(z), div g)` in the closed form that `f` offers, or `NotImplemented`."""
        if not hasattr(self.f, "value_and_divergence"):
            return NotImplemented
        return call_field(self.f.value_and_divergence, self.t, z, self.args)


WithNorm = Callable[[Field, Array, Array | None], tuple[Array, Array, Array]]


class Divergence(NamedTuple):
    """A divergence as two pure functions of one sample. The other fields are optional.

    Equal if its functions are equal: create a custom one once, not at every call.
    """

    init: Callable[[PRNGKeyArray | None, Float[Array, " *event"]], Array | None]
    """`init(key, z) -> probe`: the noise, or None. Drawn once per solve."""
    apply: Callable[[Field, Float[Array, " *event"], Array | None], tuple[Array, Array]]
    """`apply(g, z, probe) -> (g(z), divergence of g at z)`."""
    name: str = "a custom divergence"
    """For `describe`."""
    choose: Callable[[Field, Any], "Divergence"] | None = None
    """`choose(g, z)`: the divergence that this one stands for, given the shape and dtype of `z`."""
    standard_error: Callable[[Float[Array, " probes"], int], Array] | None = None
    """`standard_error(estimates, size)`: the standard error of the mean of one estimate per probe,
    in `size` dimensions. For divergences with probes `[probes, *event]`, one estimate each."""
    with_norm: WithNorm | None = None
    """`with_norm(g, z, probe)`: like `apply`, plus the squared Frobenius norm of `dg/dz`."""

    def describe(self, f: Callable[..., Any], z: Float[Array, " *event"], args: Any = None) -> str:
        """Which divergence this is for the vector field `f(t, z, args)`, and why."""
        g = FieldAt(f, jnp.zeros((), z.dtype), args)
        return self.name if self.choose is None else self.choose(g, z).name


def _push(g: Field, z: Float[Array, " *event"], tangents: Float[Array, "k *event"]):
    """`g(z)`; `v . (dg/dz v)` and `|dg/dz v|^2` for every tangent, on one linearization."""
    tangents = vary(tangents, axes_of(z))
    if len(tangents) == 1:
        # An axis of size one would cost transposes around the matrix products.
        dz, jv = jax.jvp(g, (z,), (tangents[0],))
        term, square = _products(tangents[0], jv)
        return dz, term[None], square[None]
    dz, jvp = jax.linearize(g, z)
    terms, squares = jax.vmap(lambda v: _products(v, jvp(v)))(tangents)
    return dz, terms, squares


def _products(v: Float[Array, " *event"], jv: Float[Array, " *event"]):
    return jnp.sum(v * jv), jnp.sum(jv * jv)


@dataclass(frozen=True)
class _WithoutNorm:
    with_norm: WithNorm

    def __call__(self, g, z, probe):
        dz, div, _ = self.with_norm(g, z, probe)
        return dz, div


@public("exact")
def exact(chunk: int | None = None) -> Divergence:
    """The trace of the Jacobian, `sum_i e_i . (dg/dz e_i)`: one product per dimension.

    Args:
        chunk: compute this many products at a time, to bound the memory; all by default. For a
            network, value and gradient then need less than `3 (chunk + 1)` times its input, output
            and hidden layers: 8 MB instead of 780 MB for 32 samples of 784 dimensions, two hidden
            layers of 256, and chunks of 4, in float64.

    Raises:
        ValueError: if `chunk` is not a positive integer.
    """
    chunk = None if chunk is None else integer("chunk", chunk)
    trace = _Trace(chunk)
    return Divergence(_no_probe, _WithoutNorm(trace), f"exact(chunk={chunk})", with_norm=trace)


@dataclass(frozen=True)
class _Trace:
    chunk: int | None

    def __call__(self, g, z, probe):
        del probe
        if self.chunk is None or self.chunk >= z.size:
            basis = jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
            dz, terms, squares = _push(g, z, basis)
            return dz, jnp.sum(terms), jnp.sum(squares)
        dz, jvp = jax.linearize(g, z)

        # Recomputed for a gradient, not stored: otherwise chunks would not bound its memory.
        @jax.checkpoint
        def column(i):
            v = (jnp.arange(z.size) == i).astype(z.dtype).reshape(z.shape)
            v = vary(v, axes_of(z))
            return _products(v, jvp(v))

        terms, squares = jax.lax.map(column, jnp.arange(z.size), batch_size=self.chunk)
        return dz, jnp.sum(terms), jnp.sum(squares)


def _no_probe(key: PRNGKeyArray | None, z: Float[Array, " *event"]) -> None:
    del key, z


@public("hutchinson")
def hutchinson(
    probes: int = 1, distribution: Literal["rademacher", "gaussian", "orthogonal"] = "rademacher"
) -> Divergence:
    """The unbiased estimate `mean_k v_k . (dg/dz v_k)` with random probes, `E[v v^T] = I`.

    Args:
        probes: number of probes. They share one linearization of `g`.
        distribution: distribution of the probes. "rademacher" draws random signs, which have the
            smallest variance among independent entries; "gaussian" draws standard normals;
            "orthogonal" draws scaled rows of a random orthogonal matrix, at most one per dimension,
            and is exact with one per dimension.

    Raises:
        ValueError: at construction, for an unknown distribution or an invalid number of probes; at
            trace time, without a key.

    References: Hutchinson (1990); Grathwohl et al. (2019), arXiv:1810.01367.
    """
    one_of("distribution", distribution, tuple(_DRAWS))
    probes = integer("probes", probes)
    return Divergence(
        _Probes(probes, distribution),
        _WithoutNorm(_mean_of_probes),
        f"hutchinson(probes={probes}, distribution={distribution!r})",
        standard_error=_StandardError(distribution),
        with_norm=_mean_of_probes,
    )


@dataclass(frozen=True)
class _Probes:
    probes: int
    distribution: str

    def __call__(self, key, z):
        if key is None:
            raise ValueError(
                "hutchinson: a stochastic divergence needs random numbers; got key=None. "
                "Pass key=jax.random.key(...), or use divergence=jaxode.divergence.exact()."
            )
        return _DRAWS[self.distribution](key, z, self.probes)


def _mean_of_probes(g, z, probe):
    dz, terms, squares = _push(g, z, probe)
    return dz, jnp.mean(terms), jnp.mean(squares)


@dataclass(frozen=True)
class _StandardError:
    distribution: str

    def __call__(self, estimates, size):
        probes = len(estimates)
        # Orthogonal probes are drawn without replacement: the mean over all `size` is exact.
        left = 1 - probes / size if self.distribution == "orthogonal" else 1.0
        return jnp.sqrt(jnp.var(estimates, ddof=1) / probes * left)


def _orthogonal(key: PRNGKeyArray, z: Float[Array, " *event"], probes: int):
    if probes > z.size:
        raise ValueError(
            f"hutchinson(probes=..., distribution='orthogonal'): at most one probe per dimension; "
            f"got {probes} for {z.size} dimensions. Use divergence=jaxode.divergence.exact()."
        )
    # `probes` columns cost less than a whole matrix.
    dtype = state_dtype(z)  # LAPACK has no half precision
    columns = jax.random.orthogonal(key, z.size, dtype=dtype, m=probes)
    return (columns.T.reshape(probes, *z.shape) * np.sqrt(z.size).astype(dtype)).astype(z.dtype)


_DRAWS = {
    "rademacher": lambda key, z, probes: jax.random.rademacher(key, (probes, *z.shape), z.dtype),
    "gaussian": lambda key, z, probes: jax.random.normal(key, (probes, *z.shape), z.dtype),
    "orthogonal": _orthogonal,
}


def closed_form() -> Divergence:
    """The exact divergence that the vector field itself provides.

    A field provides it with a method `value_and_divergence(t, z, args) -> (dz, div)`, which may
    return `NotImplemented` for arguments without a closed form. `jaxode.nn.field` has this method;
    docs/divergence.md lists the networks of `jaxode.nn` that it works for.

    Raises:
        ValueError: at trace time, if the field has no closed form.
    """
    return Divergence(_no_probe, _apply_closed_form, "closed form")


def _apply_closed_form(g: Field, z: Float[Array, " *event"], probe: Array | None) -> Any:
    del probe
    out = _closed_form(g, z)
    if out is NotImplemented:
        raise ValueError(
            "closed_form: the vector field offers no value_and_divergence(t, z, args) for "
            "these arguments. Use divergence=jaxode.divergence.exact() or hutchinson()."
        )
    return out


def _closed_form(g: Field, z: Float[Array, " *event"]) -> Any:
    """The checked closed form of `g`, or `NotImplemented`."""
    if not hasattr(g, "value_and_divergence"):
        return NotImplemented
    out = g.value_and_divergence(z)
    if out is NotImplemented:
        return out
    if len(out) != 2 or jnp.shape(out[1]) != ():
        raise ValueError(
            "value_and_divergence(t, z, args): must return the derivative and a scalar divergence "
            f"of one sample; got shapes {jax.tree.map(jnp.shape, out)}."
        )
    dz, div = out
    return dz, div if eqx.is_inexact_array(div) else jnp.asarray(div, jnp.result_type(dz))


def auto() -> Divergence:
    """The closed form if the field has one, else `exact()` for small events, else `hutchinson()`.

    Small means at most 8 dimensions (docs/divergence.md has the measurements). `describe` says
    which one a field gets. A closed form has no Jacobian norm, so a regularizer that needs the norm
    makes `auto` choose by size.
    """
    return Divergence(_init_auto, _apply_auto, "auto()", _choose, with_norm=_auto_with_norm)


def noiseless() -> Divergence:
    """The closed form if the field has one, else the exact trace; in more than 128 dimensions, 64
    columns at a time."""
    return Divergence(_no_probe, _apply_noiseless, "noiseless()", _choose_noiseless)


def is_trace(divergence: Divergence) -> bool:
    """Whether it is `exact()`, in chunks or not."""
    return isinstance(divergence.with_norm, _Trace)


def without_noise(divergence: Divergence, event: tuple[int, ...]) -> Divergence:
    """The divergence itself if it draws nothing without a key, else `noiseless()`."""
    like: Any = jax.ShapeDtypeStruct(event, jnp.float32)
    drawn = lambda key: jax.eval_shape(lambda z: divergence.init(key, z), like)
    try:
        probe = drawn(None)
    except Exception:  # whatever it says about a key that is missing
        drawn(jax.random.key(0))  # an error with a key is about something else
        return noiseless()
    return divergence if probe is None else noiseless()


def _trace_of(z: Any) -> Divergence:
    return exact(chunk=TANGENTS_AT_ONCE) if z.size > 2 * TANGENTS_AT_ONCE else exact()


def _choose_noiseless(g: Field, z: Any) -> Divergence:
    chosen = _choose(g, z)
    return chosen if chosen == closed_form() else _trace_of(z)


def _apply_noiseless(g, z, probe):
    out = _closed_form(g, z)
    return _trace_of(z).apply(g, z, probe) if out is NotImplemented else out


def _by_size(z: Any) -> Divergence:
    if z.size <= EXACT_UP_TO:
        return exact()._replace(name=f"exact(), for at most {EXACT_UP_TO} dimensions")
    return hutchinson()


def _choose(g: Field, z: Any) -> Divergence:
    offered = []
    jax.eval_shape(lambda z: offered.append(_closed_form(g, z) is not NotImplemented), z)
    return closed_form() if offered[0] else _by_size(z)


def _init_auto(key, z):
    return _by_size(z).init(key, z)


def _apply_auto(g, z, probe):
    out = _closed_form(g, z)
    return _by_size(z).apply(g, z, probe) if out is NotImplemented else out


def _auto_with_norm(g, z, probe):
    of_size = _by_size(z).with_norm
    assert of_size is not None
    return of_size(g, z, probe)
