"""The joint probability of the modes of a row: an autoregressive network, trained by likelihood.

The logits of a column are an affine function of the columns before it, plus a masked network of
two layers (MADE; Germain et al. 2015, arXiv:1502.03509), plus a network of the given columns.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxode._jax.closure import compiled
from jaxode.training.display import described, show
from jaxode.training.loop import VALIDATION_STEP_RATIO, Clock, Limits, Point
from jaxode.training.sources import InMemory, Rows

CATEGORY_WIDTH = 128  # units of a hidden layer
CATEGORY_DROPOUT = 0.5  # share of hidden units that a step leaves out
CATEGORY_RATE = 1e-3  # of Adam
CATEGORY_DECAY = 0.05  # of weights, times the rate
CATEGORY_BATCH = 256  # rows of a step
CATEGORY_WARM_UP = 200  # steps until the full rate
CATEGORY_FIRST_STEP = 50  # of the warm-up: it begins at a quarter of the rate
CATEGORY_AVERAGE_WEIGHT = 0.005  # least weight of a step in the moving average of the network
STEPS_PER_VALIDATION = 50
CATEGORY_PATIENCE = 12  # validations in a row without a better one that end the training
MAX_CATEGORY_STEPS = 6000
CATEGORY_PART_OF_SECONDS = 0.25  # of a training, if there are numbers too


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


@functools.cache
def _optimizer() -> Any:
    import optax

    def matrices(tree):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    return optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(CATEGORY_DECAY, mask=matrices)
    )


@compiled
def _advance(network, average, state, modes, features, key, rate, smoothing, steps):
    """The network, its moving average and the state of the optimizer after `steps` steps."""

    def step(i, carry):
        network, average, state = carry
        row_key, drop_key = jax.random.split(jax.random.fold_in(key, i))
        rows = jax.random.randint(row_key, (CATEGORY_BATCH,), 0, len(modes))
        keys = jax.random.split(drop_key, CATEGORY_BATCH)

        def loss(network):
            return -jnp.mean(jax.vmap(network.log_prob)(modes[rows], features[rows], keys))

        updates, state = _optimizer().update(jax.grad(loss)(network), state, network)
        network = jax.tree.map(lambda a, u: a - rate * u, network, updates)
        average = jax.tree.map(lambda a, b: a + smoothing * (b - a), average, network)
        return network, average, state

    return jax.lax.fori_loop(0, steps, step, (network, average, state))


@dataclasses.dataclass
class _Validations:
    """The best network so far, and the number of validations since, all of which were worse."""

    best: Categories
    best_nll: float = math.inf
    worse: int = 0
    points: list[Point] = dataclasses.field(default_factory=list)

    def add(self, network: Categories, step: int, seconds: float, nats: float) -> None:
        self.points.append(Point("categories", step, seconds, nats))
        self.worse += 1
        if nats < self.best_nll:
            self.best, self.best_nll, self.worse = network, nats, 0


def train(
    key: PRNGKeyArray,
    sizes: tuple[int, ...],
    rows: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    weights: Sequence[np.ndarray | None],
    limits: Limits,
    progress: str,
    begin: float,
) -> tuple[Categories, list[Point]]:
    """Train a network, and keep the best one on the validation rows.

    Args:
        key: draws the first network and the batches.
        sizes: the number of modes of each column.
        rows: modes and features to train on.
        validation: likewise, to validate on.
        weights: of the rows and of the validation rows, None for equal ones.
        limits: ends the training.
        progress: the label of its lines on stderr; empty for none.
        begin: the time of the call, from which validations count.
    """
    init_key, key = jax.random.split(key)
    row_weights, aside_weights = weights
    source = InMemory(Rows(*rows), weights=row_weights)
    modes, aside = source.sample(len(rows[0])).x, tuple(map(jnp.asarray, validation))
    network = average = Categories.make(init_key, modes, sizes, rows[1].shape[1])
    validations, state = _Validations(network), _optimizer().init(network)
    clock, step, due, drawn = Clock(begin), 0, 0.0, jax.tree.map(jnp.asarray, source.rows)
    total = min(limits.steps, MAX_CATEGORY_STEPS)
    while True:
        with clock.running():
            log_prob = np.asarray(log_probs(average, *aside), float)
            nats = -float(np.average(log_prob, weights=aside_weights))
        if step == 0:
            clock.spent = 0.0  # without compilation
        validations.add(average, step, clock.since_call, nats)
        part = max(step / total, clock.spent / limits.seconds if limits.seconds else 1.0)
        ended = part >= 1 or validations.worse >= CATEGORY_PATIENCE
        if progress:
            text = described(progress, f"{step}", nats, validations.best_nll)
            show(text, look=ended or step >= due)
        if step >= due:
            due = VALIDATION_STEP_RATIO * step
        if ended:
            return validations.best, validations.points
        steps = int(min(STEPS_PER_VALIDATION, total - step))
        with clock.running():
            block_key = jax.random.fold_in(key, step)
            if row_weights is not None:
                block = source.take(block_key, STEPS_PER_VALIDATION * CATEGORY_BATCH)
                drawn = jax.tree.map(jnp.asarray, block)
            schedule = *_rates(step, part), jnp.asarray(steps, jnp.int32)
            network, average, state = jax.block_until_ready(
                _advance(network, average, state, *drawn, block_key, *schedule)
            )
        if step == 0:
            clock.spent = 0.0  # without compilation
        step += steps


def _rates(step: int, part: float) -> tuple[Array, Array]:
    """The rate of the optimizer, and the weight of the next step in the moving average.

    `part` of the training is over.
    """
    growth = min(1, (step + CATEGORY_FIRST_STEP) / CATEGORY_WARM_UP)
    rate = CATEGORY_RATE * math.cos(0.5 * math.pi * part) ** 2 * growth
    return jnp.asarray(rate), jnp.asarray(max(CATEGORY_AVERAGE_WEIGHT, 10 / (10 + step)))
