"""The density of a table is one, and what is drawn from it is a frame like that of training."""

import dataclasses
import decimal
import pickle

import jax
import numpy as np
import pandas as pd
import pytest
from helpers import optional, with_slow
from tables import FRAMES, KEY, OPTIONS, table, trained, training
from untrained import small_networks, untrained

from jaxode import tabular
from jaxode.tabular import frames
from jaxode.training import loop

pytestmark = pytest.mark.usefixtures("default_settings")
# Rows of calls that share programs: FEW have as many draws of noise as IMPUTED have proposals.
ROWS, FEW, IMPUTED = 300, 16, 4
AGES = np.linspace(-25, 125, 21)  # three quarters of the standard deviation of a group apart


def all_rows(**columns):
    index = pd.MultiIndex.from_product(columns.values(), names=columns)
    return index.to_frame(index=False)


@pytest.mark.parametrize("make", with_slow([table, trained], [trained]))  # 140,000 solves
def test_a_table_of_all_kinds_sums_to_one(make):
    """Over all groups and counts, and by quadrature over the age where it is not missing."""
    frame = all_rows(group=["a", "b", None], count=range(41), age=[np.nan, *AGES])
    weight = np.where(frame.age.isna(), 1.0, AGES[1] - AGES[0])
    # Numbers that stand in for those that are not there need more draws than the noise of counts.
    stands_in = (frame.age.isna() | (frame["count"] == 0)).to_numpy()
    p = weight.copy()
    for rows, draws in ((stands_in, 256), (~stands_in, 8)):
        p[rows] *= np.exp(make("mixed").log_prob(frame[rows], draws=draws))
    assert abs(p.sum() - 1) < 0.01  # of the draws
    if make is trained:
        # Where an age is missing is learned, and counts are zero as often as in training.
        shares = FRAMES["mixed"].age.isna().mean(), (FRAMES["mixed"]["count"] == 0).mean()
        assert abs(p[frame.age.isna()].sum() - shares[0]) < 0.1
        assert abs(p[frame["count"] == 0].sum() - shares[1]) < 0.1


def test_each_row_of_given_columns_sums_to_one():
    counts = np.arange(-60, 100)
    frame = all_rows(age=[40.0, np.nan], group=["a", "z"], count=counts)
    with pytest.raises(ValueError, match="'z'"):  # a category without rows
        table("atom").log_prob(frame)
    frame = frame[(frame.age == 40) == (frame.group == "a")].replace({"group": {"z": "c"}})
    p = np.exp(table("atom").log_prob(frame, draws=16)).reshape(2, -1)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=0.01)
    assert (p > 0).all()


def test_categories_alone_sum_to_one_and_are_learned():
    frame = all_rows(group=["a", "b", "c"], old=[True, False])
    p = np.exp(trained("categories").log_prob(frame))
    assert abs(p.sum() - 1) < 1e-5
    data = FRAMES["categories"]
    share = [((data.group == g) & (data.old == o)).mean() for g, o in frame.itertuples(index=False)]
    np.testing.assert_allclose(p, share, atol=0.06)


def test_the_same_key_trains_the_same_categories_and_progress_is_a_line_for_each_look(capsys):
    """With progress, too; steps end where they should."""
    first, expected = training("categories")
    options = {"key": KEY, **OPTIONS["categories"]}
    again, history = tabular.fit(FRAMES["categories"], **options)
    frame = FRAMES["categories"][:6]
    np.testing.assert_array_equal(again.log_prob(frame), first.log_prob(frame))
    assert [point.step for point in history] == [0, 100, 100, 120, 120]
    assert [point.nats for point in history] == [point.nats for point in expected]
    lines = capsys.readouterr().err.splitlines()
    for number in (1, 2):
        (first, *looks) = [line for line in lines if line.startswith(f"categories {number} of 2: ")]
        assert first.endswith(": compiling")
        steps = [look.partition(": step ")[2].partition(" of 120, ")[0] for look in looks]
        assert steps == ["0", "100", "120"]


@pytest.mark.filterwarnings("ignore:.*hardly trained. 0 steps of matching before Ctrl-C")
@pytest.mark.parametrize("name", ["categories", "mixed"])
def test_an_interrupt_keeps_the_categories_so_far(name, monkeypatch):
    """And numbers as they are at the start."""
    advance, calls = loop.advance, []

    def interrupted(program, state, *rest):
        calls.append(int(state.count))
        if calls[-1] >= 150:
            raise KeyboardInterrupt
        return advance(program, state, *rest)

    monkeypatch.setattr(loop, "advance", interrupted)
    with small_networks():
        fitted, history = tabular.fit(FRAMES[name], key=KEY, steps=500, members=1, progress=False)
    assert [(at.phase, at.step) for at in history] == [
        ("categories", 0), ("categories", 100), ("categories", 150),
        *[("matching", 0)] * (name == "mixed"),
    ]  # fmt: skip
    assert name == "mixed" or history[2].nats < history[0].nats
    assert np.isfinite(fitted.log_prob(FRAMES[name][:6])).all()


def test_categories_have_the_mean_of_the_probabilities_of_several_networks():
    """Column after column: so the joint probability is the product of two means."""
    fitted, frame = trained("categories"), FRAMES["categories"][:6]
    rows = fitted.encoder.encode(frames.as_frame("frame", frame))
    sizes, starts = fitted.encoder.sizes, np.cumsum([0, *fitted.encoder.sizes[:-1]])
    expected, logits = np.zeros(6), jax.jit(lambda network, *row: network.logits(*row))
    for i, modes in enumerate(rows.modes):
        one_hot = np.zeros(sum(sizes), np.float32)
        one_hot[starts + modes] = 1
        each = [logits(network, one_hot, rows.features[i]) for network in fitted.categories.members]
        expected[i] = np.log(np.mean(np.exp(each), axis=0))[starts + modes].sum()
    np.testing.assert_allclose(fitted.log_prob(frame), expected, rtol=1e-5)
    drawn = fitted.sample(jax.random.key(1), 2000)
    for name in frame.columns:
        values, counts = np.unique(drawn[name].astype(str), return_counts=True)
        shares = FRAMES["categories"][name].astype(str).value_counts(normalize=True)
        np.testing.assert_allclose(counts / 2000, shares[values], atol=0.06)


def test_one_positive_number_has_a_density():
    x = np.exp(np.linspace(-12, 4.5, 200))
    p = np.exp(table("one").log_prob(pd.DataFrame({"x": x}))) * x * np.log(x[1] / x[0])
    assert abs(p.sum() - 1) < 0.005


def test_a_number_of_few_values_is_a_category():
    frame = all_rows(group=["a", "b", "c"], n=range(5))
    p = np.exp(table("few").log_prob(frame))
    np.testing.assert_allclose(p.reshape(3, 5).sum(axis=1), 1, rtol=1e-5)
    assert (table("few").log_prob(pd.DataFrame({"group": ["a"], "n": [7]})) == -np.inf).all()
    assert table("few").kinds == {"n": "categorical", "group": "categorical"}


def test_units():
    """Log-densities are those of the data: per year, not per standard deviation."""
    encoder = table("mixed").encoder
    rows = encoder.encode(frames.as_frame("frame", FRAMES["mixed"]))
    present = ~FRAMES["mixed"].age.isna()
    scale = encoder.columns[2].scale
    np.testing.assert_allclose(rows.log_scale, np.where(present, -np.log(scale), 0.0))
    rounded = pd.DataFrame({"x": np.round(np.random.default_rng(0).normal(size=300), 1)})
    fitted = untrained(rounded)
    x = np.arange(-80, 81) / 10
    total = np.exp(fitted.log_prob(pd.DataFrame({"x": x}))).sum() * 0.1
    assert abs(total - 1) < 0.005


@pytest.mark.parametrize(("of_q", "of_r"), [(1.0, 1.0), (0.1, 10.0)])
def test_pooled_categories_sum_to_one(of_q, of_r):
    """Each has the part of the weights of its rows."""
    rows = ["a"] * 60 + ["b"] * 30 + ["q", "r", "r"]
    frame, weights = pd.DataFrame({"x": rows}), [1.0] * 90 + [of_q, of_r, of_r]
    fitted = untrained(frame, other=5, weights=weights)
    p = np.exp(fitted.log_prob(pd.DataFrame({"x": ["a", "b", "q", "r", "new"]})))
    assert abs(p.sum() - 1) < 1e-5
    assert p[3] / p[2] == pytest.approx(2 * of_r / of_q, rel=1e-5)
    assert p[4] == 0


@pytest.mark.parametrize("make", with_slow([table, trained], [table]))  # a part of the trained
@pytest.mark.filterwarnings("ignore:Table.sample")  # of numbers at the ends, after few steps
def test_samples_are_like_the_training_frame(make):
    fitted, data = make("mixed"), FRAMES["mixed"]
    samples = fitted.sample(KEY, ROWS)
    assert samples.dtypes.equals(data.dtypes)
    assert samples["count"].between(0, 40).all()
    assert set(samples.group.dropna()) == {"a", "b"}
    if make is trained:
        for name in ("group", "age"):
            assert abs(samples[name].isna().mean() - data[name].isna().mean()) < 0.1
        assert abs((samples["count"] == 0).mean() - (data["count"] == 0).mean()) < 0.1
    assert np.isfinite(fitted.log_prob(samples[:FEW])).all()
    pd.testing.assert_frame_equal(samples, fitted.sample(KEY, ROWS))
    assert not samples.equals(fitted.sample(jax.random.key(1), ROWS))
    assert len(fitted.sample(KEY, 0)) == 0


def test_samples_have_the_density():
    """The mean log-probability of samples is minus the entropy."""
    frame = table("one").sample(KEY, 900)
    x = np.exp(np.linspace(-12, 4.5, 400))
    log_p = table("one").log_prob(pd.DataFrame({"x": x}))
    entropy = np.sum(np.exp(log_p) * log_p * x) * np.log(x[1] / x[0])
    of_samples = table("one").log_prob(frame)
    assert abs(of_samples.mean() - entropy) < 4 * of_samples.std() / 30


def test_samples_of_given_rows():
    """In their order, `n` of each, with the columns and categories of training."""
    given = pd.DataFrame({"group": ["b", "c"], "age": [np.nan, 30.0], "more": [1, 2]})
    samples = table("atom").sample(KEY, 3, given)
    assert samples.columns.equals(FRAMES["atom"].columns)
    assert samples.dtypes.equals(FRAMES["atom"].dtypes)
    assert [*samples.group] == ["b"] * 3 + ["c"] * 3
    assert [*samples.age.fillna(-1)] == [-1] * 3 + [30] * 3


def test_given_fractions_stay_as_they_are():
    frame = pd.DataFrame({"area": np.arange(40), "old": [True, False, None, True] * 10})
    fitted = untrained(frame, given="area")
    samples = fitted.sample(KEY, 1, pd.DataFrame({"area": [20.5, 21.0]}))
    assert [*samples.area] == [20.5, 21.0]
    whole = fitted.sample(KEY, 1, pd.DataFrame({"area": [20.0, 21.0]}))
    assert whole.area.dtype == frame.area.dtype
    made = optional("polars").DataFrame({"area": [20.5]})
    assert [*fitted.sample(KEY, 1, made).area] == [20.5]


def test_missing_values_of_a_category_that_is_given_stay_missing():
    frame = FRAMES["categories"].assign(group=pd.Categorical(FRAMES["categories"].group))
    frame.loc[:20, "group"] = pd.NA
    fitted = untrained(frame, given="group")
    rows = pd.DataFrame({"group": pd.array(["a", None], dtype="string")})
    samples = fitted.sample(KEY, 1, rows)
    assert [*samples.group.isna()] == [False, True]
    assert fitted.impute(KEY, frame[:3].assign(group=pd.NA)).group.isna().all()


def test_categories_that_a_frame_lacks_are_drawn_and_kept():
    frame = FRAMES["categories"].assign(group=pd.Categorical(FRAMES["categories"].group))
    frame.loc[:1, "group"] = pd.NA
    rows = pd.DataFrame({"group": pd.Categorical(["a", None, None]), "old": True})
    fitted = untrained(frame, other=5)
    filled = fitted.impute(KEY, rows, 20)
    assert not filled.group.isna().any()
    assert set(filled.group) == {"a", "b", "c"}
    frame.loc[5:7, "group"] = "a"
    frame["group"] = frame.group.cat.add_categories("rare")
    frame.loc[5:7, "group"] = "rare"
    fitted = untrained(frame, given="group", other=5)
    samples = fitted.sample(KEY, 1, pd.DataFrame({"group": ["Rome", "a"]}))
    assert [*samples.group] == ["Rome", "a"]


def test_decimals_are_numbers():
    made, number = optional("polars"), decimal.Decimal
    frame = made.DataFrame({"x": [number(i % 7) / 4 for i in range(40)], "b": [True, False] * 20})
    assert isinstance(frame.schema["x"], made.Decimal)
    fitted = untrained(frame)
    assert set(fitted.sample(KEY, 20)["x"]) <= {i / 4 for i in range(7)}
    assert fitted.impute(KEY, frame.with_columns(b=None))["b"].null_count() == 0


@pytest.mark.parametrize("library", with_slow(["pandas", "polars"], ["polars"]))  # as its frames
def test_a_column_may_be_missing_altogether(library):
    fitted = table("mixed")
    gaps = lambda value: None if pd.isna(value) else value
    if library == "pandas":
        rows = pd.DataFrame({"group": ["a"], "count": [3]}).assign(age=pd.NA)
    else:
        made = optional("polars")
        columns = FRAMES["mixed"].items()
        frame = made.DataFrame({name: [*map(gaps, column)] for name, column in columns})
        fitted = untrained(frame)
        rows = made.DataFrame({"group": ["a"], "count": [3], "age": [None]})
    filled = fitted.impute(KEY, rows)
    assert float(filled["age"][0]) > 0
    assert np.isfinite(fitted.log_prob(rows)).all()


@pytest.mark.parametrize("name", ["mixed", "atom"])
def test_a_row_has_its_log_probability_wherever_it_stands(name):
    """Its noise does not depend on the rows before it. Up to rounding of solves."""
    frame, fitted = FRAMES[name][:12], table(name)
    moved = fitted.log_prob(frame[::-1].reset_index(drop=True))[::-1]
    np.testing.assert_allclose(moved, fitted.log_prob(frame), atol=1e-4)


def test_rows_are_the_same_in_parts(monkeypatch):
    for name in ("categories", "one"):
        frame = FRAMES[name]
        together = table(name).log_prob(frame)
        monkeypatch.setattr(tabular.table, "ROWS_OF_LOG_PROB", 128)
        np.testing.assert_allclose(table(name).log_prob(frame), together, atol=1e-4)
        assert table(name).log_prob(frame[:0]).shape == (0,)
        monkeypatch.undo()


def test_given_integers_may_be_missing():
    age = pd.array([30, None, 50, 41] * 10, "Int64")
    frame = pd.DataFrame({"age": age, "old": [False, True, True, None] * 10})
    fitted = untrained(frame, given="age")
    samples = fitted.sample(KEY, 2, frame[:3])
    assert samples.dtypes.equals(frame.dtypes)
    assert [*samples.age.fillna(-1)] == [30, 30, -1, -1, 50, 50]
    filled = fitted.impute(KEY, frame)
    pd.testing.assert_series_equal(filled.age, frame.age)
    assert filled.old.isin([True, False]).all()


def test_what_is_missing_is_drawn():
    frame = FRAMES["mixed"].copy()
    frame["count"] = frame["count"].astype("Int64")
    frame.loc[::4, "count"] = pd.NA  # which training had not
    frame["note"] = range(len(frame))
    filled = table("mixed").impute(KEY, frame[:60], 2)
    assert not filled.isna().any(axis=None)
    assert filled.dtypes.equals(frame.dtypes)
    twice = frame.loc[np.repeat(np.arange(60), 2)]  # with its index
    known = ~twice.isna()
    assert (filled.astype(object) == twice.astype(object))[known].sum().sum() == known.sum().sum()
    assert filled["count"].between(0, 40).all()
    pd.testing.assert_frame_equal(filled, table("mixed").impute(KEY, frame[:60], 2))
    whole = table("mixed").impute(KEY, filled[:3])
    pd.testing.assert_frame_equal(whole, filled[:3])


def test_imputed_values_follow_the_rest_of_the_row():
    """As the model's conditional distribution, from its joint probabilities."""
    frame = pd.DataFrame({"group": [None, "a"], "old": [True, None]}, dtype=object)
    filled = trained("categories").impute(KEY, frame, 500)
    rows = all_rows(group=["a", "b", "c"], old=[True, False])
    p = np.exp(trained("categories").log_prob(rows)).reshape(3, 2)
    groups = [(filled.group[:500] == group).mean() for group in "abc"]
    np.testing.assert_allclose(groups, p[:, 0] / p[:, 0].sum(), atol=0.09)  # four errors
    assert abs((filled.old[500:] == True).mean() - p[0, 0] / p[0].sum()) < 0.09  # noqa: E712


def test_rows_that_are_impossible_whatever_is_filled_in_are_named():
    """Their draws are proposals, not copies of the first one."""

    class Nowhere:
        log_prob = staticmethod(lambda x, *, context: np.full(len(x), -np.inf, np.float32))

    rows = pd.DataFrame({"group": ["a", None], "count": [7, 7], "age": [41.0, 41.0]})
    fitted = dataclasses.replace(table("mixed"), density=Nowhere())
    with pytest.warns(
        UserWarning, match=r"^Table.impute\(frame=...\): .* in 1 rows, such as row 1"
    ) as caught:
        filled = fitted.impute(KEY, rows, 40)
    assert caught[0].filename == __file__
    assert set(filled.group[-40:]) == {"a", "b"}


def test_numbers_beyond_the_training_rows_are_told_if_they_are_drawn():
    """An imputation may know any number of them."""
    row = pd.DataFrame({"group": [None], "count": [7], "age": [1e3]})
    assert (table("mixed").impute(KEY, row, 200).age == 1e3).all()


def test_imputed_numbers_have_the_conditional_density():
    """The number of a group and a count, from the joint density by quadrature."""
    row = pd.DataFrame({"group": ["a"], "count": [7], "age": [np.nan]})
    ages = table("mixed").impute(KEY, row, 100).age
    frame = all_rows(group=["a"], count=[7], age=AGES)
    p = np.exp(table("mixed").log_prob(frame, draws=32))
    mean, spread = np.sum(p * AGES) / p.sum(), FRAMES["mixed"].age.std()
    assert abs(ages.mean() - mean) < 4 * spread / 10


@pytest.mark.filterwarnings("ignore:Table.sample")  # of numbers at the ends, after few steps
def test_a_table_pickles():
    fitted, loaded = trained("mixed"), pickle.loads(pickle.dumps(trained("mixed")))
    frame = FRAMES["mixed"][:FEW]
    np.testing.assert_array_equal(fitted.log_prob(frame), loaded.log_prob(frame))
    assert loaded.sample(KEY, ROWS).equals(fitted.sample(KEY, ROWS))


def test_validation_rows_of_your_own(capsys):
    frame = FRAMES["one integer"]
    options = {"key": KEY, "progress": False, "steps": 20, "members": 1}
    fitted, points = tabular.fit(frame[:250], validation=frame[250:], **options)
    nats = -fitted.log_prob(frame[250:]).mean()
    assert abs(min(point.nats for point in points) - nats) < 1e-4
    # A number of few that training had not has a density of zero, and is left out.
    both = pd.concat([frame[250:], pd.DataFrame({"n": [9], "group": ["a"]})])
    with pytest.warns(
        UserWarning, match=r"\(validation=...\): .* in 1 of 51 rows, such as row 50"
    ) as caught:
        _, others = tabular.fit(frame[:250], validation=both, **options | {"progress": True})
    assert caught[0].filename == __file__
    assert capsys.readouterr().err.startswith(
        "categories: compiling\ncategories: step 0 of 20, validation loss "
    )
    np.testing.assert_allclose([p.nats for p in others], [p.nats for p in points], rtol=1e-4)


@pytest.mark.parametrize("library", ["polars", "pyarrow"])
def test_frames_of_other_libraries(library):
    made = pytest.importorskip(library) if library == "pyarrow" else optional(library)
    data = {"group": [*"aabc" * 20], "n": [1, 2, None, 4] * 20, "b": [True, False] * 40}
    frame = made.table(data) if library == "pyarrow" else made.DataFrame(data)
    if library == "polars":
        frame = frame.with_columns(made.col("group").cast(made.Categorical))
    fitted = untrained(frame, weights=np.r_[0.0, np.ones(79)])
    samples = fitted.sample(KEY, 5)
    assert type(samples) is type(frame)
    assert samples.schema == frame.schema
    filled = fitted.impute(KEY, frame)
    assert filled.schema == frame.schema
    known = np.array([n is not None for n in data["n"]])
    column = np.array(filled["n"].to_pylist() if library == "pyarrow" else filled["n"].to_list())
    assert set(column[~known]) <= {1, 2, 4}
    assert list(column[known]) == [n for n in data["n"] if n is not None]
    assert np.isfinite(fitted.log_prob(filled)).all()


GAPS, OF_FOUR = FRAMES["mixed"][:IMPUTED].assign(age=np.nan), FRAMES["continuous"][:4]
CALLS = {
    "log_prob": lambda: trained("mixed").log_prob(FRAMES["mixed"][:FEW]),
    "sample": lambda: trained("mixed").sample(KEY, ROWS),
    "impute": lambda: trained("mixed").impute(KEY, GAPS),
    "cdf": lambda: trained("continuous").cdf(OF_FOUR),
    "quantile": lambda: trained("continuous").quantile([0.03, 0.5, 0.9], OF_FOUR),
}
OTHERS = ["sample", "impute", "cdf", "quantile"]


@pytest.mark.parametrize("name", with_slow(CALLS, OTHERS))  # each is compiled twice
@pytest.mark.filterwarnings("ignore:Table.sample")  # of numbers at the ends, after few steps
def test_double_precision_changes_nothing(name):
    """Tables are used in single precision, whatever JAX is set to."""
    single = CALLS[name]()
    jax.config.update("jax_enable_x64", True)
    of_frames = isinstance(single, pd.DataFrame)
    same = pd.testing.assert_frame_equal if of_frames else np.testing.assert_array_equal
    same(CALLS[name](), single)


def test_training_in_double_precision_changes_nothing():
    options = {"key": KEY, "steps": 1, "members": 1, "progress": False}
    fit = lambda: tabular.fit(FRAMES["categories"], **options)[0]
    single = fit()
    jax.config.update("jax_enable_x64", True)
    double = fit()
    jax.config.update("jax_enable_x64", False)  # trained in double precision, used without
    pd.testing.assert_frame_equal(*(fitted.sample(KEY, 8) for fitted in (single, double)))


@pytest.mark.slow  # two trainings, one of which compiles for two devices
def test_several_devices_train_the_table_of_one():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "batch")
    options = {"steps": 50, "members": 1, "mesh": mesh, "progress": False} | OPTIONS["one"]
    with small_networks():
        fitted, _ = tabular.fit(FRAMES["one"], key=KEY, **options)
    rows = FRAMES["one"][:9]
    np.testing.assert_allclose(  # sums of single precision, in parts
        fitted.log_prob(rows), trained("one").log_prob(rows), atol=2e-3
    )
