"""The divergence of a vector field: exact, or estimated without bias.

A `Divergence` works on one sample: `g` maps `z [*event]` to `dz [*event]`. A flow passes `FieldAt`
as `g`, so a divergence can ask it for a closed form.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import check_derivative, integer, one_of, state_dtype
from jaxode._checks.caller import public
from jaxode._jax.sharding import axes_of, vary
from jaxode.ode.field import Completed, call_field

__all__ = [
    "EXACT_UP_TO",
    "Divergence",
    "FieldAt",
    "auto",
    "closed_form",
    "exact",
    "hutchinson",
    "noiseless",
]

EXACT_UP_TO = 8
"""Up to this many dimensions, `auto` takes the exact trace."""
# Measured by benchmarks/cases/divergence.py: at 8 dimensions the trace costs less than 8 probes,
# which still leave 5% noise in a gradient; at 16 it costs more.
# Products that `noiseless` computes at a time, in more than twice as many dimensions. All 3,072 at
# once, for 1,024 rows, would take 39 GB.
TANGENTS_AT_ONCE = 64

StateField = Callable[[Float[Array, " *event"]], Float[Array, " *event"]]


@dataclass(frozen=True, eq=False)
class FieldAt:
    """A vector field at a fixed time and arguments: `g(z) = f(t, z, args)`."""

    f: Callable[..., Any]
    t: Float[Array, ""]
    args: Any

    def __call__(self, z: Float[Array, " *event"]) -> Float[Array, " *event"]:
        dz = call_field(self.f, self.t, z, self.args)
        public("cnf")(check_derivative)(z, dz)  # before a divergence meets it
        return dz

    def value_and_divergence(self, z: Float[Array, " *event"]) -> Any:
        """`(g(z), div g)` in the closed form that `f` offers, or `NotImplemented`."""
        return call_field(Completed(self.f).value_and_divergence, self.t, z, self.args)


class Divergence:
    """The divergence of a vector field, as methods on one sample. The base class of all.

    For your own, write a frozen dataclass with `apply`, and with `init` if it draws random numbers
    (docs/divergence.md has an example). All else is optional. Programs are compiled once for equal
    ones.

    `Divergence(init, apply, name)` makes one of two functions, equal to another if its functions
    are: create it once, not at every call.
    """

    standard_error: Callable[[Float[Array, " probes"], int], Array] | None = None
    """`standard_error(estimates, size)`: the standard error of the mean of one estimate per probe,
    in `size` dimensions. For divergences with probes `[probes, *event]`, one estimate each. None if
    it has no standard error."""
    with_norm: Callable[[StateField, Array, Any], tuple[Array, Array, Array]] | None = None
    """`with_norm(g, z, probe)`: like `apply`, plus the squared Frobenius norm of `dg/dz`. None if
    it does not tell the norm."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Divergence":
        del args, kwargs  # `__init__` takes them
        made: Any = _OfFunctions if cls is Divergence else cls
        return super().__new__(made)

    @property
    def name(self) -> str:
        """The name in `describe` and messages."""
        return repr(self)

    def init(self, key: PRNGKeyArray | None, z: Float[Array, " *event"]) -> Any:
        """The noise of one solve, the probe, or None. By default, there is none."""
        del key, z

    def apply(self, g: StateField, z: Float[Array, " *event"], probe: Any) -> tuple[Array, Array]:
        """`(g(z), divergence of g at z)`."""
        raise NotImplementedError

    def chosen(self, g: StateField, z: Any, needs_norm: bool = False) -> "Divergence":
        """The divergence that this one stands for, given the field and the shape and dtype of `z`.

        Itself, except for `auto()` and `noiseless()`, which with `needs_norm` choose one that has
        `with_norm`.
        """
        del g, z, needs_norm
        return self

    def describe(self, f: Callable[..., Any], z: Float[Array, " *event"], args: Any = None) -> str:
        """Which divergence this is for the vector field `f(t, z, args)`, and why."""
        return self.chosen(FieldAt(f, jnp.zeros((), z.dtype), args), z).name

    def without_noise(self, event: tuple[int, ...]) -> "Divergence":
        """This divergence if it draws nothing without a key, else `noiseless()`."""
        like: Any = jax.ShapeDtypeStruct(event, jnp.float32)

        def drawn(key):
            return jax.eval_shape(lambda z: self.init(key, z), like)

        try:
            probe = drawn(None)
        except Exception:  # whatever it says about a key that is missing
            drawn(jax.random.key(0))  # an error with a key is about something else
            return noiseless()
        return self if probe is None else noiseless()

    def cheap(self, event: tuple[int, ...]) -> "Divergence":
        """A divergence that takes few products in any dimension: this one if it draws nothing
        without a key, else `auto()`."""
        return self if self.without_noise(event) is self else auto()


# A pytree, so that arrays in the functions are inputs of a program.
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _OfFunctions(Divergence):
    """A divergence of two functions."""

    init: Callable[..., Any]
    apply: Callable[..., tuple[Array, Array]]
    name: str = dataclasses.field(default="a custom divergence", metadata={"static": True})
    standard_error: Callable[..., Array] | None = dataclasses.field(default=None, kw_only=True)
    with_norm: Callable[..., Any] | None = dataclasses.field(default=None, kw_only=True)


def _push(g: StateField, z: Float[Array, " *event"], tangents: Float[Array, "k *event"]):
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
    return Exact(None if chunk is None else integer("chunk", chunk))


@dataclass(frozen=True)
class Exact(Divergence):
    """`exact()`."""

    chunk: int | None = None
    because: str = ""
    """Why it was chosen, for messages."""

    @property
    def name(self):
        return f"exact(), {self.because}" if self.because else f"exact(chunk={self.chunk})"

    def apply(self, g, z, probe):
        dz, div, _ = self.with_norm(g, z, probe)
        return dz, div

    def with_norm(self, g, z, probe):
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

    def cheap(self, event):
        # Not `auto()`: whoever passes `exact()` asks for no closed form.
        return hutchinson()


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
    return Hutchinson(integer("probes", probes), distribution)


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """`hutchinson()`."""

    probes: int = 1
    distribution: str = "rademacher"

    @property
    def name(self):
        return f"hutchinson(probes={self.probes}, distribution={self.distribution!r})"

    def init(self, key, z):
        if key is None:
            raise ValueError(
                "hutchinson: a stochastic divergence needs random numbers; got key=None. "
                "Pass key=jax.random.key(...), or use divergence=jaxode.divergence.exact()."
            )
        return _DRAWS[self.distribution](key, z, self.probes)

    def apply(self, g, z, probe):
        dz, div, _ = self.with_norm(g, z, probe)
        return dz, div

    def with_norm(self, g, z, probe):
        dz, terms, squares = _push(g, z, probe)
        return dz, jnp.mean(terms), jnp.mean(squares)

    def standard_error(self, estimates, size):
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
    return ClosedForm()


@dataclass(frozen=True)
class ClosedForm(Divergence):
    """`closed_form()`."""

    @property
    def name(self):
        return "closed form"

    def apply(self, g, z, probe):
        del probe
        value_and_divergence = _of_field(g, z)
        if value_and_divergence is NotImplemented:
            raise ValueError(
                "closed_form: the vector field offers no value_and_divergence(t, z, args) for "
                "these arguments. Use divergence=jaxode.divergence.exact() or hutchinson()."
            )
        return value_and_divergence


def _of_field(g: StateField, z: Float[Array, " *event"]) -> Any:
    """The checked closed form that the field of `g` offers, or `NotImplemented`."""
    offered = g.value_and_divergence(z) if isinstance(g, FieldAt) else NotImplemented
    if offered is NotImplemented:
        return offered
    if len(offered) != 2 or jnp.shape(offered[1]) != ():
        raise ValueError(
            "value_and_divergence(t, z, args): must return the derivative and a scalar divergence "
            f"of one sample; got shapes {jax.tree.map(jnp.shape, offered)}."
        )
    dz, div = offered
    return dz, div if eqx.is_inexact_array(div) else jnp.asarray(div, jnp.result_type(dz))


def auto() -> Divergence:
    """The closed form if the field has one, else `exact()` for small events, else `hutchinson()`.

    Small means at most 8 dimensions (docs/divergence.md has the measurements). `describe` says
    which one a field gets. A closed form has no Jacobian norm, so a regularizer that needs the norm
    makes `auto` choose by size.
    """
    return Auto()


def noiseless() -> Divergence:
    """The closed form if the field has one, else the exact trace; in more than 128 dimensions, 64
    columns at a time."""
    return Auto(noiseless=True)


@dataclass(frozen=True)
class Auto(Divergence):
    """`auto()` and `noiseless()`: the closed form if the field has one, else by the size of `z`."""

    noiseless: bool = False

    @property
    def name(self):
        return "noiseless()" if self.noiseless else "auto()"

    def init(self, key, z):
        return self._by_size(z).init(key, z)

    def apply(self, g, z, probe):
        closed_form = _of_field(g, z)
        return self._by_size(z).apply(g, z, probe) if closed_form is NotImplemented else closed_form

    def with_norm(self, g, z, probe):
        return self._by_size(z).with_norm(g, z, probe)

    def chosen(self, g, z, needs_norm=False):
        if needs_norm:  # which a closed form does not have
            return self._by_size(z)
        offered = []
        jax.eval_shape(lambda z: offered.append(_of_field(g, z) is not NotImplemented), z)
        return ClosedForm() if offered[0] else self._by_size(z)

    def cheap(self, event):
        return auto()

    def _by_size(self, z: Any) -> Exact | Hutchinson:
        if self.noiseless:
            return Exact(TANGENTS_AT_ONCE if z.size > 2 * TANGENTS_AT_ONCE else None)
        if z.size <= EXACT_UP_TO:
            return Exact(because=f"for at most {EXACT_UP_TO} dimensions")
        return Hutchinson()
