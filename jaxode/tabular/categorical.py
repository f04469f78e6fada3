"""The joint probability of the modes of a row: an autoregressive network.

The logits of a column are an affine function of the columns before it, plus a masked network of
two layers (MADE; Germain et al. 2015, arXiv:1502.03509), plus a network of the given columns.
"""

import abc
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxode._jax.closure import compiled

CATEGORY_WIDTH = 128  # units of a hidden layer
CATEGORY_DROPOUT = 0.5  # share of hidden units that a step leaves out


class Autoregressive(eqx.Module):
    """`log P(modes | features)`, column after column."""

    sizes: eqx.AbstractVar[tuple[int, ...]]

    @abc.abstractmethod
    def logits(self, one_hot, features, key: PRNGKeyArray | None = None) -> Float[Array, " logits"]:
        """Log-probabilities of all modes of each column, given the columns before it. A key turns
        dropout on."""

    def log_prob(self, modes, features, key: PRNGKeyArray | None = None) -> Float[Array, ""]:
        """`log P(modes | features)`."""
        at = _starts(self.sizes) + modes
        one_hot = jnp.zeros(sum(self.sizes)).at[at].set(1.0)
        return jnp.sum(self.logits(one_hot, features, key)[at])

    def sample(
        self,
        key: PRNGKeyArray,
        features: Float[Array, " features"],
        known_modes: Int[Array, " columns"],
        allowed: Bool[Array, " logits"],
    ) -> tuple[Int[Array, " columns"], Float[Array, ""]]:
        """Draw the modes that are not known, among those allowed.

        Args:
            key: draws them.
            features: of the given columns.
            known_modes: of the modelled columns, -1 for those to draw.
            allowed: the mask of the modes that may be drawn.

        Returns:
            All modes, and the sum of `log P(known mode | modes before it)`.
        """
        column, starts = jnp.asarray(_layout(self.sizes)[0]), jnp.asarray(_starts(self.sizes))

        def step(i, carry):
            at, weight, one_hot = carry
            logits, may_be = self.logits(one_hot, features), allowed & (column == i)
            drawn = jax.random.categorical(
                jax.random.fold_in(key, i), jnp.where(may_be, logits, -jnp.inf)
            )
            is_drawn = known_modes[i] < 0
            chosen = jnp.where(is_drawn, drawn, starts[i] + known_modes[i])
            weight = weight + jnp.where(is_drawn, 0.0, logits[chosen])
            return at.at[i].set(chosen), weight, one_hot.at[chosen].set(1.0)

        start = starts, jnp.zeros(()), jnp.zeros(sum(self.sizes))
        at, weight, _ = jax.lax.fori_loop(0, len(self.sizes), step, start)
        return at - starts, weight


class Categories(Autoregressive):
    """The probabilities of a single network."""

    direct: Float[Array, "logits logits"]
    inner: Float[Array, "width logits"]
    middle: Float[Array, "width width"]
    outer: Float[Array, "logits width"]
    shared: Float[Array, "width features"]
    bias: Float[Array, " logits"]
    offset: Float[Array, " width"]
    sizes: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def make(cls, key: PRNGKeyArray, modes: np.ndarray, sizes: tuple[int, ...], features: int):
        """A network that begins with independent columns, and modes as frequent as in the rows."""
        total, keys = sum(sizes), jax.random.split(key, 4)
        counts = [np.bincount(modes[:, i], minlength=size) for i, size in enumerate(sizes)]
        bias = np.concatenate([np.log((count + 0.5) / len(modes)) for count in counts])

        def draw(key, n, m):
            return jax.random.normal(key, (n, m)) / math.sqrt(max(m, 1))

        return cls(
            direct=jnp.zeros((total, total)),
            inner=draw(keys[0], CATEGORY_WIDTH, total) * math.sqrt(max(total / len(sizes), 1)),
            middle=draw(keys[1], CATEGORY_WIDTH, CATEGORY_WIDTH),
            outer=jnp.zeros((total, CATEGORY_WIDTH)),
            shared=draw(keys[2], CATEGORY_WIDTH, features),
            bias=jnp.asarray(bias, float),
            offset=jnp.zeros(CATEGORY_WIDTH),
            sizes=sizes,
        )

    def logits(self, one_hot, features, key: PRNGKeyArray | None = None) -> Float[Array, " logits"]:
        column, unit, table, place = _layout(self.sizes)

        def before(mask, weight):
            return jnp.where(jnp.asarray(mask), weight, 0.0)

        h = before(unit[:, None] > column[None], self.inner) @ one_hot
        h = jax.nn.silu(h + self.shared @ features + self.offset)
        h = h + jax.nn.silu(before(unit[:, None] >= unit[None], self.middle) @ h)
        if key is not None:
            h = jnp.where(
                jax.random.bernoulli(key, 1 - CATEGORY_DROPOUT, h.shape),
                h / (1 - CATEGORY_DROPOUT),
                0.0,
            )
        logits = before(column[:, None] >= unit[None], self.outer) @ h + self.bias
        logits = logits + before(column[:, None] > column[None], self.direct) @ one_hot
        by_column = jnp.append(logits, -jnp.inf)[table]
        return jax.nn.log_softmax(by_column, axis=1).reshape(-1)[place]


class Average(Autoregressive):
    """The mean of the probabilities of several networks, column after column."""

    sizes: tuple[int, ...] = eqx.field(static=True)
    members: tuple[Categories, ...]

    def logits(self, one_hot, features, key: PRNGKeyArray | None = None) -> Float[Array, " logits"]:
        log_probs = jnp.stack([network.logits(one_hot, features, key) for network in self.members])
        return jax.nn.logsumexp(log_probs, axis=0) - math.log(len(self.members))


def _starts(sizes: tuple[int, ...]) -> np.ndarray:
    """The first logit of each column."""
    return np.cumsum((0, *sizes[:-1]))


@functools.cache
def _layout(sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Where the logits of all columns stand in one vector, and which of them a unit may depend on.

    Returns:
        The column of each logit; the last column that each unit may depend on; a table with a row
        of places of logits for each column, padded with the place after the last logit; and the
        place of each logit in this table.
    """
    column, most = np.repeat(np.arange(len(sizes)), sizes), max(sizes)
    within = np.arange(len(column)) - _starts(sizes)[column]
    table = np.full((len(sizes), most), len(column))
    table[column, within] = np.arange(len(column))
    return column, np.arange(CATEGORY_WIDTH) % len(sizes), table, column * most + within


@compiled
def log_probs(network: Autoregressive, modes, features) -> Float[Array, " rows"]:
    """`log P(modes | features)` of each row."""
    return jax.vmap(network.log_prob)(modes, features)


@compiled
def sampled_modes(network: Autoregressive, keys, features, known_modes, allowed):
    """`Autoregressive.sample` of each row, with the same modes allowed in all."""
    return jax.vmap(network.sample, (0, 0, 0, None))(keys, features, known_modes, allowed)
