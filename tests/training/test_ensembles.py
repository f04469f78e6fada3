"""Training several networks as one field."""

import functools
import sys

import jax
import numpy as np
import pytest
from fitting import BENT, CONTEXT, OTHERS, STEPS, bound, equal, fit, fitted, parameters

import jaxode
from jaxode.training import fit as fit_module
from jaxode.training.dataset import MAX_VALIDATION_ROWS, set_aside
from jaxode.training.sources import Rows

pytestmark = pytest.mark.usefixtures("default_settings")
MEMBERS = 3


def ensemble(members=MEMBERS, context_size=0):
    make = functools.partial(jaxode.nn.Residual, 2, 8, 1, context_size=context_size)
    return jaxode.nn.Ensemble(lambda key: make(key=key), members, key=jax.random.key(5))


@functools.cache
def trained():
    return fit(bound(params=ensemble()), validation=OTHERS)


def test_members_are_trained_apart():
    """The first one as it is alone, the others from their own start on batches of their own."""
    alike = jaxode.nn.Ensemble.of([parameters()] * MEMBERS)
    density, _ = fit(bound(params=alike), validation=OTHERS)
    first, *others = density.params.members
    assert equal(first, fitted()[0].params)
    assert not any(equal(first, other) for other in others)
    assert not equal(*others)


def test_the_result_is_one_density():
    density, history = trained()
    assert isinstance(density.params, jaxode.nn.Ensemble)
    nats = lambda params: -float(density.with_params(params).log_prob(OTHERS).mean())
    each = [nats(member) for member in density.params.members]
    # Where the log-density is concave in the field, that of the mean is better; by far here.
    assert nats(density.params) < np.mean(each)
    assert history[-1].step == STEPS
    # The validations have a tolerance of 1e-3; the last look of each is its best.
    np.testing.assert_allclose(history[-1].nats, np.mean(each), atol=5e-3)
    assert [at.seconds for at in history] == sorted(at.seconds for at in history)


@pytest.mark.parametrize(("rows", "part", "members"), [(50, 0.2, 5), (50, 0.5, 3), (12, 0.1, 1)])
def test_each_member_has_other_rows_aside(rows, part, members):
    x = np.arange(rows)[:, None].astype(float)
    context = x.repeat(2, 1)
    parts = set_aside(Rows(x, context), part, jax.random.key(0), members=members)
    assert len(parts) == members
    for source, aside, _ in parts:
        own = source.whole()
        together = np.concatenate([own.x, aside.x])[:, 0]
        np.testing.assert_array_equal(np.sort(together), x[:, 0])
        np.testing.assert_array_equal(own.context[:, 0], own.x[:, 0])
    used = np.concatenate([aside.x[:, 0] for _, aside, _ in parts])
    assert len(np.unique(used)) == min(rows, len(used))
    assert all(len(aside.x) == np.ceil(part * rows) <= MAX_VALIDATION_ROWS for _, aside, _ in parts)


@pytest.mark.slow  # a second training of an ensemble
def test_contexts_likelihood_and_maps():
    """Phases follow each other in all members, whose map is one."""
    start = bound(params=ensemble(2, context_size=1), standardize=None)
    density, history = fit(
        start, BENT, context=CONTEXT[: len(BENT)], steps=50, likelihood=20, optimizer=None
    )
    assert [at.phase for at in history] == sorted((at.phase for at in history), reverse=True)
    assert [at.step for at in history if at.phase == "likelihood"] == [0, 20] * 2
    assert density.standardize is not None
    assert len(density.params.members) == 2
    assert np.isfinite(density.log_prob(BENT[:2], context=CONTEXT[:2])).all()


def test_an_interrupt_keeps_the_best_of_all_members(monkeypatch):
    turns = []
    train = fit_module.Training.train

    def interrupted(run, *given):
        turns.append(run)
        if len(turns) == 8:  # of nine
            raise KeyboardInterrupt
        train(run, *given)

    monkeypatch.setattr(fit_module.Training, "train", interrupted)
    start = bound(params=ensemble())
    density, _ = fit(start, validation=OTHERS)
    for run, member in zip(turns[:MEMBERS], density.params.members, strict=True):
        assert equal(run.best.params, member)
    assert not equal(start, density)


def test_an_early_interrupt_keeps_those_that_began(monkeypatch):
    start, began = fit_module.Training.start, []

    def interrupted(run, phase):
        began.append(run)
        if len(began) == 3:
            raise KeyboardInterrupt
        start(run, phase)

    monkeypatch.setattr(fit_module.Training, "start", interrupted)
    density, history = fit(bound(params=ensemble()), validation=OTHERS)
    assert len(density.params.members) == 2
    assert [at.step for at in history] == [0, 50, 50]


def test_progress_tells_networks_apart(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stderr", type("File", (), {
        "write": lambda self, text: written.append(text), "flush": lambda self: None,
        "isatty": lambda self: False,
    })())  # fmt: skip
    fit(bound(params=ensemble(2)), validation=OTHERS, steps=50, progress=True)
    text = "".join(written)
    assert "matching of network 1: step 50 of 50" in text
    assert "matching of network 2: step 50 of 50" in text
