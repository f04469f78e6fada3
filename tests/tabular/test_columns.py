"""What is a mode of a column, and where the cells of its numbers are."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxode.tabular import frames
from jaxode.tabular.columns.column import Column
from jaxode.tabular.columns.modes_of_column import categorical, numeric, spread

RNG = np.random.default_rng(1)
N = 600


def column_of(series, other=None, kind=None) -> tuple[Column, np.ndarray, np.ndarray]:
    values, missing, text = frames.read(
        "frame", frames.as_frame("frame", pd.DataFrame({"x": series})), "x"
    )
    if text or kind == "categorical":
        return categorical("x", values, missing, other, text), values, missing
    kind = kind or ("integer" if (values[~missing] % 1 == 0).all() else "continuous")
    return numeric("x", kind, values, missing, -np.inf, np.inf), values, missing


def holes(x):
    return np.where(RNG.random(N) < 0.1, np.nan, x)


INCOME = np.round(RNG.gamma(2, 900, N))  # dollars, often round
INCOME = np.where(RNG.random(N) < 0.5, np.round(INCOME / 100) * 100, INCOME)
INCOME = np.where(RNG.random(N) < 0.2, np.round(INCOME / 50) * 50, INCOME)
NUMBERS = {
    "integers": RNG.poisson(50, N),
    "negative integers": RNG.poisson(50, N) - 60,
    "floats with holes": holes(RNG.normal(size=N)),
    "nullable integers": pd.array(
        np.where(RNG.random(N) < 0.1, np.nan, RNG.poisson(50, N)), "Int64"
    ),
    "hundredths": np.round(RNG.normal(size=N), 2),
    "hundredths in float32": np.round(RNG.normal(size=N), 2).astype(np.float32),
    "an atom": np.where(RNG.random(N) < 0.4, 0.5, RNG.normal(size=N)),
    "an atom among integers": np.where(RNG.random(N) < 0.4, 48, RNG.poisson(50, N)),
    "grids": INCOME,
    "few values": RNG.choice([1 / 3, 2.0, -7.0], N),
    "a constant": np.full(N, np.pi),
    "unsigned": RNG.poisson(50, N).astype(np.uint8),
}
CATEGORIES = {
    "strings": RNG.choice(["a", "b", "c"], N),
    "booleans": RNG.random(N) < 0.3,
    "nullable booleans": pd.array(RNG.choice([True, False, None], N), "boolean"),
    "unused categories": pd.Categorical(RNG.choice(["a", "b"], N), ["b", "z", "a"], ordered=True),
    "holes": np.where(RNG.random(N) < 0.1, None, RNG.choice(["a", "b"], N)),
}


@pytest.mark.parametrize("name", [*NUMBERS, *CATEGORIES])
def test_values_come_back(name):
    column, values, missing = column_of({**NUMBERS, **CATEGORIES}[name])
    assert column.missing == missing.any()
    assert column.kind == "categorical" or name not in CATEGORIES
    mode, x = column.encode(values, missing)
    assert (mode >= 0).all()
    assert ((mode == column.modes - 1) == missing).all() or not column.missing
    back = column.decode(mode, column.scaled(x), np.random.default_rng(0))
    assert (np.equal(back, None) == missing).all()
    if name in CATEGORIES:
        assert (back == values)[~missing].all()
    else:
        np.testing.assert_allclose(back[~missing].astype(float), values[~missing], rtol=1e-12)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_with_noise_come_back(name):
    """Also at the very ends of the cell, and exactly unless they are continuous."""
    column, values, missing = column_of(NUMBERS[name])
    mode, x = column.encode(values, missing)
    if not column.grids:
        return
    low, width, fill = column.cells(mode, x)
    assert (fill == ~column.is_number(mode)).all()
    assert (width[~fill] > 0).all() == bool(column.grids[-1])
    for noise in (1e-6, 0.3, 1 - 1e-6):
        back = column.decode(mode, low + noise * width, np.random.default_rng(0))
        exact = ~missing if column.grids[-1] else fill & ~missing
        np.testing.assert_array_equal(back[exact].astype(float), values[exact])


def test_what_is_a_mode():
    of = lambda name: column_of({**NUMBERS, **CATEGORIES}[name])[0]
    assert of("an atom").values == (0.5,)
    assert of("an atom").grids == (0.0,)
    assert 48.0 in of("an atom among integers").values
    assert of("an atom among integers").grids == (1.0,)
    assert of("grids").grids == (100.0, 50.0, 1.0)
    assert of("hundredths").resolution == of("hundredths in float32").resolution == 0.01
    assert of("few values").values == (-7.0, 1 / 3, 2.0)
    assert of("few values").grids == ()
    assert of("a constant").modes == 1
    assert of("unused categories").values == ("a", "b")  # unseen ones have no rows to learn from


@pytest.mark.parametrize("name", ["integers", "hundredths", "an atom among integers", "grids"])
def test_cells_fill_the_line(name):
    """On each grid, a cell begins where the one before it ends, and each holds its number."""
    column, *_ = column_of(NUMBERS[name])
    for i in range(len(column.grids)):
        at = np.linspace(-300, 300, 7001) * column.grids[-1]
        low, width = column.cell(at, i)
        assert ((low <= at + 1e-9) & (at < low + width + 1e-9)).all()
        starts, first = np.unique(low, return_index=True)
        np.testing.assert_allclose(np.diff(starts), width[first][:-1], rtol=1e-9)
        mode, _ = column.encode(starts, np.zeros(len(starts), bool))
        assert (mode == len(column.values) + i).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-3000, 3000), min_size=1, max_size=8, unique=True),
    st.sampled_from([(100, 50, 1), (10, 1), (1,), (0.5, 0.1), (0.01,), (1000, 100)]),
    st.floats(1e-6, 1 - 1e-6),
)
def test_any_noise_decodes_to_its_number(multiples, grids, noise):
    atoms = (0.0, grids[-1] * 7)
    column = Column(
        "x", "continuous", atoms, tuple(map(float, grids)), False, center=3.0, scale=40.0
    )
    multiples = np.array(multiples)
    x = multiples / round(1 / grids[-1]) if grids[-1] < 1 else multiples * float(grids[-1])
    mode, number = column.encode(x, np.zeros(len(x), bool))
    low, width, _ = column.cells(mode, number)
    back = column.decode(mode, low + noise * width, np.random.default_rng(0))
    np.testing.assert_array_equal(back.astype(float), x)


def test_cells_stay_within_bounds():
    column = Column(
        "x", "integer", (), (100.0, 1.0), False, low=0.0, high=150.0, center=75.0, scale=40.0
    )
    x = np.array([0.0, 100.0, 149.0, 150.0])
    low, width, _ = column.cells(*column.encode(x, np.zeros(4, bool)))
    low, high = low * 40 + 75, (low + width) * 40 + 75
    np.testing.assert_allclose(low, x, atol=1e-3)
    np.testing.assert_allclose(high, [100, 151, 150, 151], atol=1e-3)
    # In single precision, too, for noise that rounds to zero and to one.
    low, width, _ = column.cells(*column.encode(x, np.zeros(4, bool)))
    first, last = np.float32(column.bounds_with_noise)
    for v in np.float32([0.0, 1.0]):
        noisy = np.float32(low) + v * np.float32(width)
        assert ((first < noisy) & (noisy < last)).all()


@pytest.mark.parametrize(
    ("rows", "number", "other", "warns"),
    [
        (60, 20, None, False), (60, 21, None, True), (300, 30, None, False), (300, 31, None, True),
        (300, 31, 10, False), (6000, 500, None, False), (6000, 501, None, True),
    ],
)  # fmt: skip
def test_too_many_categories_warn(rows, number, other, warns):
    """More than 20, and than a tenth of the rows; or more than 500."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        column_of((np.arange(rows) % number).astype(str), other)
    assert [f"got {number} of them in {rows} rows" in str(w.message) for w in caught] == [
        True
    ] * warns


def test_a_negative_zero_is_zero():
    for x in (np.array([-0.0, 0.0, 1.0] * 200), np.r_[[-0.0, 0.0] * 100, RNG.normal(size=400)]):
        column, *_ = column_of(x)
        assert not np.signbit([value for value in column.values if value == 0]).any()
    categories, *_ = column_of(np.array([-0.0, 0.0] * 300), kind="categorical")
    assert str(categories.values) == "(0.0,)"


def test_rare_categories_share_a_mode():
    values = np.array(["a"] * 50 + ["b"] * 30 + ["r"] * 3 + ["q"])
    column, values, missing = column_of(values, other=5)
    assert column.modes == 3
    mode, log_share = column.encode(values, missing)
    assert mode[0] != mode[60] != mode[80] == mode[83]
    np.testing.assert_allclose(np.exp(log_share[[0, 60, 80, 83]]), [1, 1, 0.75, 0.25])
    unseen, log_share = column.encode(np.array(["new"], object), np.zeros(1, bool))
    assert (unseen[0], log_share[0]) == (mode[80], -np.inf)
    back = column.decode(np.repeat(mode[80], 4000), np.zeros(4000), np.random.default_rng(0))
    assert set(back) == {"r", "q"}
    assert abs((back == "r").mean() - 0.75) < 0.03  # four standard errors


def test_beyond_500_the_rarest_categories_are_pooled():
    values = np.array([f"c{i % 600:03}" for i in range(1300)])  # the first 100 thrice
    with pytest.warns(
        UserWarning, match=r"got 600 of them in 1300 rows\. .* The 100 rarest are po"
    ):
        column, *_ = column_of(values)
    assert column.modes == 501
    assert sum(column.pool.values()) == pytest.approx(1.0)
    assert {f"c{i:03}" for i in range(100)} < set(column.values)
    with pytest.warns(UserWarning, match="With so many, the model is large"):
        assert column_of(values, other=2)[0].modes == 600


def test_given_categories_of_many_are_points_that_lie_apart():
    values = np.array([f"c{i % 300}" for i in range(900)], object)
    column = categorical("x", values, np.zeros(900, bool), None, True, is_given=True)
    features = column.features(*column.encode(values, np.zeros(900, bool)))
    assert features.shape == (900, column.width) == (900, 64)
    np.testing.assert_array_equal(features[:300], features[300:600])
    apart = np.linalg.norm(features[:300, None] - features[None, :300], axis=2)
    assert apart[~np.eye(300, dtype=bool)].min() > 5  # of about 11


def test_numbers_as_categories():
    column, values, missing = column_of(RNG.choice([10, 2, 33], N), kind="categorical")
    mode, _ = column.encode(values, missing)
    assert column.modes == 3
    assert (column.decode(mode, values, RNG) == values).all()


def test_draws_beyond_the_training_rows_are_told_as_a_part_of_all_draws():
    column, *_ = column_of(np.r_[np.zeros(900), RNG.normal(size=100)])
    mode, x = np.zeros(1000, int), np.full(1000, 99.0)
    mode[:40] = 1
    assert column.decode(mode, x, RNG).max() == column.seen[1]  # without a warning
    mode[:60] = 1
    with pytest.warns(UserWarning, match="6% of the rows have a number of column 'x' beyond"):
        column.decode(mode, x, RNG)


def test_floats_beyond_their_own_decimals_have_no_grid():
    for size in (2e30, 1e19, 3.7e9):
        values = size * RNG.normal(1.0, 0.1, 500)
        values[1::2] = values[::2]  # repeated, as of joined tables
        column = numeric("x", "continuous", values, np.zeros(500, bool))
        assert column.grids == (0.0,)
        np.testing.assert_array_equal(column.round_down(values, 0), values)


def test_a_constant_has_a_scale_of_one():
    for n in (300, 777, 1000):
        assert spread("x", np.full(n, 0.1)) == 1.0


@pytest.mark.parametrize("size", [1.65e9, 1.65e12])
def test_large_integers_keep_their_digits(size):
    values = size + RNG.integers(0, 10**8, 500)
    column = numeric("t", "integer", values, np.zeros(500, bool), -np.inf, np.inf)
    assert column.grids == (1.0,)
    np.testing.assert_array_equal(column.round_down(values, 0), values)


def test_a_number_far_away_is_named_and_leaves_the_scale_of_the_others():
    values = np.append(RNG.normal(size=200), 1e12)
    with pytest.warns(UserWarning, match="'x' has numbers far from all others, such as 1e"):
        column = numeric("x", "continuous", values, np.zeros(201, bool), -np.inf, np.inf)
    assert 0.5 < column.scale < 2.0


def test_a_repeated_number_is_found_beside_its_rounding():
    """Such as one that is computed in training and read from a file later."""
    column, *_ = column_of(np.where(RNG.random(N) < 0.4, 0.3, RNG.normal(size=N)))
    assert column.values == (0.3,)
    near = np.array([0.1 + 0.2, 0.3, 0.3 + 1e-12])
    mode, _ = column.encode(near, np.zeros(3, bool))
    assert mode.tolist() == [0, 0, 1]
