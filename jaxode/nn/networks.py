"""Networks with a closed-form divergence.

With at most two hidden layers (`PotentialGradient`: exactly one) and an elementwise activation,
`m.value_and_divergence(t, y)` returns the exact divergence in closed form, for one extra
matrix-vector product.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import integer
from jaxode._checks.caller import public
from jaxode._checks.event_shapes import as_event_shape
from jaxode._checks.samples import check_key
from jaxode._jax.elementwise import is_elementwise
from jaxode.nn.base import Dense, Network, draws
from jaxode.ode.field import Completed, Field


class _ModuleField(eqx.Module, Field):
    """The type of `field`."""

    def __call__(
        self, t: Float[Array, ""], y: Float[Array, " *event"], args: Any
    ) -> Float[Array, " *event"]:
        m, *context = _network_and_context(args)
        _check_network(m)
        return m(t, y, *context)

    def value_and_divergence(self, t: Float[Array, ""], y: Float[Array, " *event"], args: Any):
        """`(f, div f)`, or `NotImplemented` if the module has no closed form."""
        m, *context = _network_and_context(args)
        return Completed(m).value_and_divergence(t, y, *context)

    def is_centered(self, args: Any) -> bool:
        """Whether the module keeps the mean of particles, and is blind to it."""
        m, *context = _network_and_context(args)
        return Completed(m).is_centered(*context)


def _network_and_context(args: Any) -> tuple[Any, ...]:
    """Split `(network, context)`. A network alone, which may be a named tuple, has no context."""
    return args if type(args) is tuple else (args,)


def _check_network(m: Any) -> None:
    if not callable(m):
        raise TypeError(
            "field(t, y, m): must be given a network, called as m(t, y); got "
            f"{type(m).__name__}. Pass the network itself as params."
        )


field: _ModuleField = _ModuleField()
"""The vector field of a module: `field(t, y, m) = m(t, y)`. With a context, in a plain tuple,
`field(t, y, (m, context)) = m(t, y, context)`. It has a closed-form divergence if `m` has one."""


# Coefficients of a polynomial in `e`, highest power first, that equals `log(1 + e) / e` to 3e-8 for
# `0 <= e <= 1`. Without its constant and divided by `e`, it interpolates at 9 Chebyshev points.
_LOG1P = (
    -0.004466211593, 0.02522405431, -0.06675772501, 0.1156184544, -0.1584756572, 0.1985410623,
    -0.2498652617, 0.3333284189, -0.4999999698, 1.0,
)  # fmt: skip


@jax.custom_jvp
def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`log(1 + exp(x))` to rounding, with the sigmoid as its derivative.

    Up to float32 it is faster on a CPU than `jax.nn.softplus`, whose logarithm is most of the cost
    of a small network. It uses a polynomial instead, without a division, which would split the
    kernel in two.
    """
    e = jnp.exp(-jnp.abs(x))
    if jnp.finfo(e.dtype).eps < 1e-8:
        return jnp.maximum(x, 0) + jnp.log1p(e)
    return jnp.maximum(x, 0) + e * jnp.polyval(jnp.array(_LOG1P, e.dtype), e)


@softplus.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return softplus(x), jax.nn.sigmoid(x) * dx


def _value_and_slope(activation, u: Float[Array, " n"]):
    """An elementwise function and its derivative."""
    return jax.jvp(activation, (u,), (jnp.ones_like(u),))


def _affine(rows: Float[Array, "k n"], t: Float[Array, ""], context: Float[Array, " c"] | None):
    """`t rows[0] + context . rows[1:]`."""
    if context is None:
        return t * rows[0]
    return t * rows[0] + context @ rows[1:]


class _Layer(Dense):
    """`(W x + b) sigmoid(gate(t, context)) + shift(t, context)`, without parts that are None."""

    gate: Float[Array, "2+context out"] | None  # time, context, bias
    shift: Float[Array, "1+context out"] | None  # time, context

    def __init__(self, drawn: Float[Array, "out in"], gate: Any, shift: Any):
        super().__init__(drawn)
        self.gate, self.shift = gate, shift

    def with_gate(self, t, x, context) -> tuple[Float[Array, " out"], Float[Array, " out"] | None]:
        """The output and the gate. The gate times `W` is the Jacobian with respect to `x`."""
        u, gate = self(x), None
        if self.gate is not None:
            gate = jax.nn.sigmoid(_affine(self.gate[:-1], t, context) + self.gate[-1])
            u = u * gate
        return u if self.shift is None else u + _affine(self.shift, t, context), gate


class _Network(Network):
    """Base class of multilayer networks, which differ in gating and in where the time enters."""

    hidden: tuple[_Layer, ...]
    weight: Float[Array, "outputs hidden"]
    bias: Float[Array, " outputs"]
    shift: Float[Array, "1+context outputs"] | None
    activation: Callable[[Array], Array] = eqx.field(static=True)
    context_size: int = eqx.field(static=True)

    gated: ClassVar[bool] = False
    time_in_every_layer: ClassVar[bool] = True
    time_in_output: ClassVar[bool] = False
    scalar_output: ClassVar[bool] = False

    @public("")
    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        widths: Sequence[int] = (64, 64),
        *,
        key: PRNGKeyArray,
        activation: Callable[[Array], Array] = jnp.tanh,
        context_size: int = 0,
    ):
        name = type(self).__name__
        size = math.prod(as_event_shape(event_shape))
        if not np.iterable(widths):
            raise TypeError(
                f"{name}(widths=...): must be a sequence, one size for each hidden layer; got "
                f"{widths!r}. Pass widths=({widths!r},)."
            )
        context_size = integer("context_size", context_size, 0)
        outputs = 1 if self.scalar_output else size
        sizes = [size, *(integer("widths", width) for width in widths)]
        shapes = [(outputs, sizes[-1])]
        for a, b in itertools.pairwise(sizes):
            shapes += [(b, a), (2 + context_size, b), (1 + context_size, b)]
        output_weight, *drawn = draws(check_key(key), tuple(shapes))

        def timed(i):
            return i == 0 or self.time_in_every_layer

        self.hidden = tuple(
            _Layer(weight, gate if self.gated else None, shift if timed(i) else None)
            for i, (weight, gate, shift) in enumerate(
                zip(drawn[::3], drawn[1::3], drawn[2::3], strict=True)
            )
        )
        self.weight = output_weight * (0.1 * math.sqrt(size / outputs) / math.sqrt(sizes[-1]))
        self.bias = jnp.zeros(outputs)
        timed_output = self.time_in_output or not (self.hidden or self.scalar_output)
        self.shift = jnp.zeros((1 + context_size, outputs)) if timed_output else None
        self.activation = activation
        self.context_size = context_size

    @property
    def _sizes(self):
        return (self.hidden[0] if self.hidden else self).weight.shape[1], self.context_size

    def _field(self, t, x, context):
        for layer in self.hidden:
            x = self.activation(layer.with_gate(t, x, context)[0])
        return self._output(t, x, context)

    def _closed_form(self, t, x, context):
        """With at most two hidden layers.

        With `s1`, `s2` the slopes of the hidden layers (of the activation, times the gate), the
        Jacobian is `W3 diag(s2) W2 diag(s1) W1`. Its trace is `s2 . M s1` with
        `M = W2 * (W1 W3)^T`, which depends only on the parameters and is shared by the batch.
        """
        if len(self.hidden) > 2:
            return NotImplemented
        slopes = []
        for layer in self.hidden:
            u, gate = layer.with_gate(t, x, context)
            if not is_elementwise(self.activation, u):
                return NotImplemented
            x, slope = _value_and_slope(self.activation, u)
            slopes.append(slope if gate is None else slope * gate)
        match [layer.weight for layer in self.hidden]:
            case []:
                div = jnp.trace(self.weight)
            case [w1]:
                div = jnp.sum(w1 * self.weight.T, axis=1) @ slopes[0]
            case [w1, w2]:
                div = slopes[1] @ ((w2 * (w1 @ self.weight).T) @ slopes[0])
        return self._output(t, x, context), div

    def _output(self, t, x, context) -> Float[Array, " outputs"]:
        output = self.weight @ x + self.bias
        return output if self.shift is None else output + _affine(self.shift, t, context)


class MLP(_Network):
    """A multilayer perceptron that gets the time in its first layer.

    Args:
        event_shape: shape of one sample; an integer stands for a vector.
        widths: sizes of the hidden layers.
        key: draws the initial weights.
        activation: function after each hidden layer. It must be smooth: it is differentiated
            twice. If it is not elementwise, such as `jax.nn.softmax`, there is no closed form.
        context_size: size of the context vector in `m(t, y, context)`, which enters wherever the
            time does.

    Raises:
        ValueError: when called with a context of another shape, or without a context that it needs.
    """

    time_in_every_layer = False
    __init__ = _Network.__init__


class Concat(_Network):
    """A multilayer perceptron with the time concatenated to the input of every layer.

    Args: as for `MLP`.
    References: Chen et al. (2018), arXiv:1806.07366.
    """

    time_in_output = True
    __init__ = _Network.__init__


class ConcatSquash(_Network):
    """A multilayer perceptron whose hidden layers are gated and shifted by the time.

    Args: as for `MLP`.
    References: Grathwohl et al. (2019), arXiv:1810.01367.
    """

    gated = True
    __init__ = _Network.__init__


class PotentialGradient(_Network):
    """The gradient in `y` of a scalar network with the time in every hidden layer.

    Its Jacobian is symmetric. It has a closed-form divergence with one hidden layer.

    Args: as for `MLP`; the activation is differentiated three times.
    References: Onken et al. (2021), arXiv:2006.00104.
    """

    scalar_output = True
    __init__ = _Network.__init__

    def _field(self, t, x, context):
        potential = super()._field
        return jax.grad(lambda x: potential(t, x, context)[0])(x)

    def _closed_form(self, t, x, context):
        """With one hidden layer.

        With output weights `w`, the gradient is `W1^T (w a'(u))` and its divergence is
        `sum_j w_j a''(u_j) |W1_j|^2`. A second hidden layer would need a matrix product per sample,
        which costs more than the exact trace of a small event (docs/divergence.md).
        """
        if len(self.hidden) != 1:
            return NotImplemented
        (layer,), (w,) = self.hidden, self.weight
        u, _ = layer.with_gate(t, x, context)
        if not is_elementwise(self.activation, u):
            return NotImplemented
        slope, curvature = _value_and_slope(lambda u: _value_and_slope(self.activation, u)[1], u)
        div = (w * jnp.sum(layer.weight**2, axis=1)) @ curvature
        return layer.weight.T @ (w * slope), div
