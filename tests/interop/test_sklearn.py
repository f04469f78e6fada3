"""Estimators of scikit-learn: its own checks, and `tabular.fit` with the same rows."""

import dataclasses
import inspect
import pickle
from unittest import mock

import jax
import narwhals as nw
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from helpers import optional
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import estimator_checks_generator
from untrained import without_training

from jaxode import tabular
from jaxode.sklearn import FlowDensity, FlowRegressor
from jaxode.tabular import fit_table

pytestmark = pytest.mark.usefixtures("default_settings")
FEW = {"steps": 20, "members": 1, "random_state": 0}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 2))
Y = X[:, 0] + 0.3 * RNG.normal(size=40)
TEXT = pd.DataFrame({"a": X[:, 0], "group": np.where(X[:, 1] > 0, "high", "low")})

EXPECTED_TO_FAIL = {
    "check_sample_weight_equivalence_on_dense_data": (
        "steps draw rows by their weights: repeated rows are other draws than weighted ones"
    ),
    # It asks for 1e-7; `test_a_density_is_a_table` for what single precision gives.
    "check_methods_subset_invariance": "a batch of another size rounds otherwise, by 5e-7",
}
STEPS_TO_LEARN = 100  # R^2 is 0.87 then, of which `check_regressors_train` asks for 0.5
FIT = tabular.fit


def checks():
    """Each check of scikit-learn for each estimator, by its name."""
    for estimator in (FlowDensity(**FEW), FlowRegressor(**FEW)):
        for _, check in estimator_checks_generator(
            estimator, expected_failed_checks=EXPECTED_TO_FAIL, mark="skip"
        ):
            bound = inspect.unwrap(check)
            name = "-".join([bound.func.__name__, *map(str, bound.keywords.values())])
            yield f"{type(estimator).__name__}-{name}", (estimator, check)


CHECKS = dict(checks())


@dataclasses.dataclass
class Lines:
    """In place of a table: modelled numbers are normal around a line of the given ones."""

    given: list[str]
    modelled: list[str]
    slopes: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, encoder, frame):
        names = [[column.name for column in some] for some in (encoder.given, encoder.columns)]
        lines = cls(*names, np.zeros((len(names[0]) + 1, len(names[1]))), np.ones(len(names[1])))
        x, y = lines._features(frame), lines._numbers(frame, lines.modelled)
        lines.slopes = np.linalg.lstsq(x, y)[0]
        lines.scale = np.std(y - x @ lines.slopes, axis=0) + 1e-3
        return lines

    def _numbers(self, frame, names):
        frame = nw.from_native(frame, eager_only=True)
        columns = [frame[name].to_numpy().astype(float) for name in names]
        return np.nan_to_num(np.array(columns).reshape(len(names), len(frame)).T)

    def _features(self, frame):
        return np.pad(self._numbers(frame, self.given), ((0, 0), (0, 1)), constant_values=1.0)

    def mean(self, frame):
        return (self._features(frame) @ self.slopes)[:, 0]

    def log_prob(self, frame):
        mean, y = self._features(frame) @ self.slopes, self._numbers(frame, self.modelled)
        return scipy.stats.norm(mean, self.scale).logpdf(y).sum(axis=1)


def fit_lines(frame, **options):
    """In place of `tabular.fit`, with its checks of a frame. Does not depend on a key."""
    nothing = lambda *_: (None, [])
    with mock.patch.multiple(
        fit_table, trained_categories=nothing, _train_numbers=nothing, _moments=nothing
    ):
        table, points = FIT(frame, **options)
    return Lines.of(table.encoder, frame), points


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_of_scikit_learn(name, monkeypatch):
    """Of the estimators, with lines in place of what they train."""
    monkeypatch.setattr(tabular, "fit", fit_lines)
    estimator, check = CHECKS[name]
    check(clone(estimator))


@pytest.mark.slow  # the same checks, each with trainings and programs of its own
@pytest.mark.parametrize("name", CHECKS)
def test_a_check_of_scikit_learn_with_tables(name):
    estimator, check = CHECKS[name]
    steps = STEPS_TO_LEARN if "check_regressors_train" in name else FEW["steps"]
    check(clone(estimator).set_params(steps=steps))


def key(seed):
    return jax.random.key(np.random.RandomState(seed).randint(np.iinfo(np.int32).max))


def test_a_regressor_is_a_table():
    """With text and gaps in a frame, whose types stay."""
    rows = TEXT.assign(a=TEXT["a"].where(TEXT["a"] < 1))
    with without_training():
        model = FlowRegressor(**FEW, bounds={"target": (-9, None)}).fit(rows, Y)
        table, _ = tabular.fit(
            rows.assign(target=Y), key=key(0), given=["a", "group"], steps=20, members=1,
            progress=False,
            bounds={"target": (-9, None)},
        )  # fmt: skip
    few, y = rows[:3], Y[:3]
    np.testing.assert_array_equal(model.predict(few), table.mean(few))
    np.testing.assert_array_equal(model.predict_interval(few, 0.8), table.interval(0.8, few))
    np.testing.assert_array_equal(
        model.predict_quantile(few, [0.2, 0.7]), table.quantile([0.2, 0.7], few)
    )
    np.testing.assert_array_equal(model.log_prob(few, y), table.log_prob(few.assign(target=y)))
    # The numbers of y belong to the rows by their order, whatever the index.
    turned = few[::-1], pd.Series(y[::-1])
    np.testing.assert_allclose(model.log_prob(*turned)[::-1], model.log_prob(few, y), rtol=1e-5)
    assert model.feature_names_in_.tolist() == ["a", "group"]
    assert model.n_features_in_ == 2


def test_a_density_is_a_table():
    """Of an array, whose samples are an array."""
    frame = pd.DataFrame(X, columns=["x0", "x1"])
    with without_training():
        model = FlowDensity(**FEW, kinds={"x1": "continuous"}).fit(X)
        table, _ = tabular.fit(frame, key=key(0), steps=20, members=1, progress=False)
    np.testing.assert_array_equal(model.score_samples(X), table.log_prob(frame))
    assert model.score(X) == model.score_samples(X).mean()
    np.testing.assert_allclose(model.score_samples(X[:7]), model.score_samples(X)[:7], rtol=1e-5)
    drawn = model.sample(5, random_state=1)
    np.testing.assert_array_equal(drawn, table.sample(key(1), 5).to_numpy())
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).sample(5, 1), drawn)
    assert not hasattr(model, "feature_names_in_")


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_of_any_library(library):
    """The model is that of the other library, and samples are of the same type."""
    frame = TEXT if library == "pandas" else optional(library).DataFrame(TEXT.to_dict("list"))
    with without_training():
        density, regressor = FlowDensity(**FEW).fit(frame), FlowRegressor(**FEW).fit(frame, Y)
    assert type(density.sample(3)) is type(frame)
    np.testing.assert_array_equal(regressor.predict(TEXT[:2]), regressor.predict(frame[:2]))


def with_keys(monkeypatch):
    """In place of trainings: samples depend on the key of `tabular.fit`, besides their own."""

    @dataclasses.dataclass
    class Keyed:
        key: jax.Array

        def sample(self, key, count):
            seeds = [np.asarray(jax.random.key_data(each)) for each in (self.key, key)]
            rng = np.random.default_rng(np.concatenate(seeds))
            return pd.DataFrame(rng.normal(size=(count, 2)))

    monkeypatch.setattr(tabular, "fit", lambda frame, key, **options: (Keyed(key), []))


def test_random_states(monkeypatch):
    with_keys(monkeypatch)
    fit = lambda state: FlowDensity(**FEW | {"random_state": state}).fit(X)
    drawn = fit(0).sample(5, 2)
    np.testing.assert_array_equal(drawn, fit(0).sample(5, 2))
    np.testing.assert_array_equal(drawn, fit(np.random.RandomState(0)).sample(5, 2))
    np.random.seed(0)  # noqa: NPY002
    np.testing.assert_array_equal(drawn, fit(None).sample(5, 2))
    assert (drawn != fit(1).sample(5, 2)).any()
    assert (fit(0).sample(5) != fit(0).sample(5)).any()


@pytest.mark.slow  # a whole training, beside that of tabular.fit
def test_a_trained_density_is_a_table_of_its_random_state():
    model, again = (FlowDensity(**FEW).fit(X) for _ in range(2))
    frame = pd.DataFrame(X, columns=["x0", "x1"])
    table, _ = tabular.fit(frame, key=key(0), steps=20, members=1, progress=False)
    np.testing.assert_array_equal(model.score_samples(X), table.log_prob(frame))
    np.testing.assert_allclose(model.score_samples(X[:7]), model.score_samples(X)[:7], rtol=1e-5)
    drawn = model.sample(5, random_state=1)
    np.testing.assert_array_equal(drawn, table.sample(key(1), 5).to_numpy())
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).sample(5, 1), drawn)
    np.testing.assert_array_equal(again.sample(5, 1), drawn)


def test_rows_of_weight_zero_are_left_out():
    fit = lambda rows, weights: FlowDensity(**FEW).fit(rows, sample_weight=weights)
    with without_training():
        scores = fit(X, np.ones(40)).score_samples(X)
        with_others = fit(np.concatenate([X, X + 100]), np.repeat([1.0, 0.0], 40))
    np.testing.assert_array_equal(with_others.score_samples(X), scores)


def test_pipelines_and_searches(monkeypatch):
    monkeypatch.setattr(tabular, "fit", fit_lines)
    pipeline = make_pipeline(StandardScaler(), FlowRegressor(**FEW))
    assert (cross_val_score(pipeline, X, Y, cv=2) > 0.5).all()
    search = GridSearchCV(FlowDensity(**FEW), {"members": [1, 2]}, cv=2).fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.score_samples(X).shape == (40,)


def test_tags():
    tags = get_tags(FlowRegressor(steps=20))
    assert tags.input_tags.allow_nan
    assert tags.estimator_type == "regressor"
    assert not tags.non_deterministic
    assert get_tags(FlowDensity()).non_deterministic  # a minute is no number of steps
    assert get_tags(FlowDensity()).estimator_type == "density_estimator"


WRONG = {
    "few rows": (FlowRegressor(), (X[:9], Y[:9]), "9 sample.* minimum of 10 is required"),
    "few rows of a frame": (FlowDensity(), (TEXT[:9],), "at least 10 rows; got 9"),
    "infinite": (FlowDensity(), (np.where(X > 2, np.inf, X),), "contains infinity"),
    "missing target": (FlowRegressor(), (X, np.where(Y > 1, np.nan, Y)), "y contains NaN"),
    "lengths": (FlowRegressor(), (X, Y[1:]), r"inconsistent numbers of samples: \[40, 39\]"),
    "text in an array": (FlowDensity(), (TEXT.to_numpy(),), "could not convert string to float"),
    "a name": (
        FlowRegressor(), (TEXT.rename(columns={"a": "target"}), Y),
        r"FlowRegressor.fit\(X=...\): must have no column 'target', which is the name of y",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows(name):
    estimator, rows, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        estimator.fit(*rows)
