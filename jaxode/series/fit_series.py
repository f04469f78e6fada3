"""`series.fit`: maximize the likelihood of series, and keep the network that is best on series
set aside."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxode._checks.arguments import check_not_traced, integer
from jaxode._checks.caller import arg, public
from jaxode._checks.samples import check_key
from jaxode._jax.sharding import axes_of, mean_over, row_numbers
from jaxode.series.series_model import Series, log_probs
from jaxode.series.series_network import Observed, Readings, SeriesNetwork
from jaxode.series.units import Units, check_context, check_series, recalled
from jaxode.training.budget import Budget
from jaxode.training.dataset import split_rows
from jaxode.training.devices import Devices
from jaxode.training.fit import adam
from jaxode.training.loop import Plan, Training
from jaxode.training.sources import InMemory, Rows
from jaxode.training.steps import STEPS_PER_BLOCK, Phase
from jaxode.training.turns import keeping_the_best, take_turns, with_finite_best
from jaxode.training.validations import Point

SERIES_RATE = 8e-3  # of Adam
SERIES_DECAY = 2.0  # of weights, times the rate
SERIES_BATCH = 64  # series in a step
SERIES_WARM_UP = 50  # steps until the full rate
SERIES_DROPOUT = 0.35  # share of hidden units that a step leaves out
# Most series are read with values hidden; the loss counts all values.
HIDING_SHARE = 0.95  # share of the series in a step that hide values
CUT_SHARE = (
    0.5  # share of those that hide all values from some time on; the others hide some of all
)


@public("series.fit")
def fit(
    ts: Float[np.ndarray, "rows times"],
    ys: Float[np.ndarray, "rows times channels"],
    *,
    key: PRNGKeyArray,
    seconds: float | None = None,
    steps: int | None = None,
    context: Float[np.ndarray, "rows columns"] | None = None,
    validation: float = 0.1,
    size: int = 32,
    field: Callable[[Array], Array] | None = None,
    jump: Callable[[Array, Observed, PRNGKeyArray | None], Array] | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> tuple[Series, list[Point]]:
    """Train a model of irregular series with gaps, and keep what is best on series set aside.

    A hidden state follows a Neural ODE between observations and jumps at each one, by a gated unit
    that sees the values, which of them are there, and how surprising they were. Just before each
    jump, the state gives a mixture of normals of all channels, whose gaps are integrated out in
    closed form: the likelihood of a series is exact, and training maximizes it, in the loop of
    `jaxode.fit`. Most series in a step are read with values hidden, or up to some time; the loss
    counts all of their values. The law of a series may depend on the time since its first
    observation, not on the clock.

    Args:
        ts: times in any unit, `[rows, times]`, increasing within a row. A shorter row repeats its
            last time, with NaN in `ys`.
        ys: values in any units, `[rows, times, channels]`. NaN where nothing was observed.
        key: draws everything: the series set aside, the first network, batches.
        seconds: wall-clock time of training, one minute by default. It counts steps and
            validations; it does not count compilation or the first validation.
        steps: end after this many steps. Without `seconds`, the result is a function of `key`.
        context: what is known of each series, such as age and sex, `[rows, columns]` without gaps.
        validation: the part of the series to set aside, above 0 and below 1. At most 1000 are used.
        size: numbers in the hidden state `h`, in pairs.
        field: a network of your own, `field(h)`: what it adds to `dh/dt` beside a learned linear
            part, per median span of a series. A module such as `eqx.nn.MLP`, whose arrays are
            trained.
        jump: likewise, `jump(h, seen, key)`: the state after an observation. `seen` has `surprise`,
            `sd`, `there`, `y` `[channels]`, in standardized units, and `gap` `[1]`; see
            `jaxode.series.series_network.Observed`. `key` is for dropout, and None outside of
            training.
        mesh: devices of one process to train on, as for `jaxode.fit`.
        progress: show steps, the loss on the series set aside and the time left on stderr.

    Returns:
        The model, and its validations in training, in nats of a value.

    Raises:
        TypeError, ValueError: for times out of order or repeated, a row without an observation, a
            channel that is never seen, and wrong shapes.
        FloatingPointError: if no validation is finite.
    """
    budget = Budget.from_arguments(steps, seconds, progress)
    check_not_traced("looks at data and at the clock", ts, ys, context, key)
    ts, ys = check_series(ts, ys)
    context = check_context(context, len(ts))
    size = 2 * integer("size", integer("size", size, 2) // 2)  # pairs
    split_key, network_key, key = jax.random.split(check_key(key), 3)
    rows, aside = _split(len(ts), validation, split_key)
    data = _Data(Units.from_series(ts, ys, context), ts, ys, context)
    readings, standardized = data.rows(rows)
    columns = 0 if context is None else context.shape[1]
    gap, recall = data.units.gap, recalled(readings)
    network = SeriesNetwork.make(network_key, columns, size, gap, recall, SERIES_DROPOUT)
    model = Series(_with_modules(network, field, jump), data.units)
    batch_size = min(SERIES_BATCH, len(rows))
    source = InMemory(Rows(readings.y, (readings.dt, readings.is_observed, standardized)))
    plan = Plan(budget, batch_size, devices=Devices.from_mesh(mesh, batch_size))
    if plan.devices.several_processes:
        raise ValueError(f"{arg('mesh')} must have devices of one process; got several.")

    def take(key):
        return source.take(key, STEPS_PER_BLOCK * batch_size)

    run = Training(model, source, take, data.loss_on(aside), plan)
    phase = Phase("series", Partial(_loss), adam(SERIES_RATE, SERIES_DECAY), key, SERIES_WARM_UP)
    with keeping_the_best([run], budget):
        take_turns([run], phase, budget)
    with_finite_best(
        [run],
        "series.fit: the log-density of the series set aside is never finite. Check the data for "
        "outliers.",
    )
    return run.best.with_params(plan.devices.from_all(run.best.params)), run.points


class _Data(NamedTuple):
    """Series in the units of the user, and the units that standardize them."""

    units: Units
    ts: Float[np.ndarray, "rows times"]
    ys: Float[np.ndarray, "rows times channels"]
    context: Float[np.ndarray, "rows columns"] | None

    def rows(self, rows: np.ndarray) -> tuple[Readings, Any]:
        """The chosen series, and their contexts, for the network."""
        units, context = self.units, None if self.context is None else self.context[rows]
        readings = units.readings(self.ts[rows], self.ys[rows])
        return readings, units.standardized(context, len(rows))

    def loss_on(self, rows: np.ndarray) -> Callable[[SeriesNetwork], float]:
        """The mean loss of a value of the chosen series, in nats, in the units of the user."""
        validation = jax.tree.map(jnp.asarray, self.rows(rows))
        is_observed = ~np.isnan(self.ys[rows])
        log_units = np.sum(is_observed * np.log(self.units.sd))

        def loss(network):
            nats = np.asarray(log_probs(network, *validation), float).sum() - log_units
            return float(-nats / is_observed.sum())

        return loss


def _with_modules(network: SeriesNetwork, field: Any, jump: Any) -> SeriesNetwork:
    """Put the field and the jump of the user in the network, if there are any."""
    h, values = network.start, jnp.zeros_like(network.recall)
    observed = Observed(values, values, values, values, jnp.zeros(1))
    modules = {"push": ("field", field, (h,)), "jump": ("jump", jump, (h, observed, None))}
    for attribute, (name, module, args) in modules.items():
        if module is None:
            continue
        result = eqx.filter_eval_shape(module, *args)
        if getattr(result, "shape", None) != h.shape or result.dtype != h.dtype:
            raise ValueError(
                f"{arg(name)} must return an array {h.dtype}{list(h.shape)}, as the state h; got "
                f"{result}. Pass size= for another state."
            )
        network = dataclasses.replace(network, **{attribute: module})
    return network


def _split(rows: int, validation: Any, key: PRNGKeyArray) -> tuple[np.ndarray, np.ndarray]:
    """Draw the rows to train on, and those set aside."""
    if rows < 3:
        raise ValueError(
            f"{arg('ts')} must have at least three series, since some are set aside; got {rows}. "
            "Cut a long series into several."
        )
    (split,) = split_rows(validation, np.asarray(jax.random.permutation(key, rows)), 1)
    train, aside = map(np.sort, split)
    return train, aside


def _loss(network: SeriesNetwork, x: Any, context: Any, key: PRNGKeyArray) -> Float[Array, ""]:
    """The mean loss of a value in a batch, in nats. The network reads some of those before it."""
    dt, is_observed, context = context

    def row(readings, context, key):
        hide_key, drop_key = jax.random.split(key)
        is_read = visible(hide_key, readings.is_observed)
        return network.log_prob(readings, context, is_read, drop_key)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_numbers(x, key, None))
    nats = jax.vmap(row)(Readings(dt, x, is_observed), context, keys)
    # The loss is the mean over devices: each divides by the mean count of values.
    count = mean_over(jnp.sum(is_observed, dtype=x.dtype), tuple(axes_of(is_observed)))
    return -jnp.sum(nats) / count


def visible(
    key: PRNGKeyArray, is_observed: Bool[Array, "times channels"]
) -> Bool[Array, "times channels"]:
    """Draw the mask of the values that the network reads in a step: some, those before a time, or
    all."""
    keys = jax.random.split(key, 4)
    kind = jax.random.uniform(keys[0])
    is_kept = jax.random.uniform(keys[1], is_observed.shape) < jax.random.uniform(keys[2])
    count = len(is_observed)
    is_before = jnp.arange(count) < jax.random.randint(keys[3], (), 0, count)
    is_cut = kind < HIDING_SHARE * CUT_SHARE
    partly = is_observed & jnp.where(is_cut, is_before[:, None], is_kept)
    return jnp.where(kind < HIDING_SHARE, partly, is_observed)
