"""`tabular.fit` as estimators of scikit-learn: for pipelines, cross-validation and grid searches.

`X` is an array `[rows, columns]` of numbers, in which NaN is missing and the columns are called
"x0", "x1" and so on; or a frame of pandas, polars or pyarrow, which may also hold text.
"""

from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Float

try:
    import narwhals as nw
    import pandas as pd
    from sklearn.base import BaseEstimator, DensityMixin, RegressorMixin
    from sklearn.utils.validation import (
        check_array,
        check_consistent_length,
        check_is_fitted,
        check_random_state,
        column_or_1d,
        validate_data,
    )
except ImportError:
    raise ImportError(
        "jaxode.sklearn needs scikit-learn 1.6 or newer, pandas and narwhals. Install them: "
        "pip install 'jaxode[sklearn]'."
    ) from None

from jaxode import tabular
from jaxode._checks.caller import arg, public
from jaxode.training.dataset import MIN_ROWS

__all__ = ["FlowDensity", "FlowRegressor"]

TARGET = "target"  # the name of `y` in frames
FLOATS: Any = [np.float64, np.float32]  # dtypes that are not converted


class _Flow(BaseEstimator):
    """What both estimators share: options, training and the conversion of rows to frames."""

    def __init__(
        self,
        *,
        seconds: float | None = None,
        steps: int | None = None,
        members: int | None = None,
        kinds: dict[str, Any] | None = None,
        bounds: dict[str, tuple[float | None, float | None]] | None = None,
        other: int | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.seconds = seconds
        self.steps = steps
        self.members = members
        self.kinds = kinds
        self.bounds = bounds
        self.other = other
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.non_deterministic = self.seconds is not None or self.steps is None
        return tags

    def _train(self, frame: Any, sample_weight: Any, given_names: Any = ()) -> Self:
        """Fit the table of a frame."""
        options = self.get_params()
        key, progress = _key(options.pop("random_state")), options.pop("verbose")
        weights = None if sample_weight is None else np.asarray(sample_weight)
        self.table_, self.history_ = tabular.fit(
            frame, key=key, given=given_names, weights=weights, progress=progress, **options
        )
        return self

    def _frame(self, X: Any, fitting: bool = False) -> Any:
        """`X` as a frame. One whose columns have names is not converted, so that types stay."""
        if not fitting:
            check_is_fitted(self, "table_")
        if _has_names(X) and (fitting or hasattr(self, "feature_names_in_")):
            validate_data(self, X, reset=fitting, skip_check_array=True)
            return X
        rules = {"dtype": FLOATS, "ensure_all_finite": "allow-nan"}
        least = MIN_ROWS if fitting else 1
        X = validate_data(self, X, reset=fitting, ensure_min_samples=least, **rules)
        names = getattr(self, "feature_names_in_", [f"x{i}" for i in range(X.shape[1])])
        return pd.DataFrame(X, columns=names)


class FlowDensity(DensityMixin, _Flow):
    """The density of rows, by `jaxode.tabular.fit`, as an estimator of scikit-learn.

    Args:
        seconds: wall-clock time of training, as of `tabular.fit`; one minute by default.
        steps: end after this many steps. Without `seconds`, the result is a function of
            `random_state`.
        members, kinds, bounds, other: as for `tabular.fit`.
        random_state: an int, a `numpy.random.RandomState`, or None for NumPy's own.
        verbose: show the progress of training on stderr.

    Attributes:
        table_: the `tabular.Table`.
        history_: the validations in training.
        n_features_in_, feature_names_in_: columns of `X`, and their names if it is a frame.
    """

    @public("FlowDensity.fit")
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Train on the rows of `X`, at least 10; `y` is ignored.

        Raises:
            TypeError, ValueError: as `tabular.fit`, and for what scikit-learn refuses.
        """
        return self._train(self._frame(X, fitting=True), sample_weight)

    def score_samples(self, X: Any) -> Float[np.ndarray, " rows"]:
        """The log-density of each row, in nats: `tabular.Table.log_prob`."""
        frame = self._frame(X)
        return self.table_.log_prob(frame)

    def score(self, X: Any, y: Any = None) -> float:
        """The mean log-density, as of `GaussianMixture`, so that folds of any size compare."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Any:
        """Draw rows: an array, or a frame like that of training."""
        check_is_fitted(self, "table_")
        rows = self.table_.sample(_key(random_state), n_samples)
        return rows if hasattr(self, "feature_names_in_") else rows.to_numpy()


class FlowRegressor(RegressorMixin, _Flow):
    """The distribution of `y` given `X`, by `jaxode.tabular.fit`, as a regressor of scikit-learn.

    Args:
        seconds, steps, members, kinds, bounds, other, random_state, verbose: as for `FlowDensity`;
            `y` is the column "target".

    Attributes:
        table_, history_, n_features_in_, feature_names_in_: as for `FlowDensity`.
    """

    @public("FlowRegressor.fit")
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on the rows of `X`, at least 10, and their numbers `y`, `[rows]`.

        Raises:
            TypeError, ValueError: as `FlowDensity.fit`, and for a column "target" in `X`.
        """
        frame = self._frame(X, fitting=True)
        if TARGET in (names := nw.from_native(frame, eager_only=True).columns):
            raise ValueError(
                f"{arg('X')} must have no column {TARGET!r}, which is the name of y; got one. "
                "Rename it."
            )
        return self._train(_with_target(frame, y), sample_weight, names)

    def predict(self, X: Any) -> Float[np.ndarray, " rows"]:
        """The mean of `y` in each row; about 50 times slower than a quantile."""
        frame = self._frame(X)
        return self.table_.mean(frame)

    def predict_interval(self, X: Any, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """The central prediction interval, `(low, high)`, each `[rows]`."""
        frame = self._frame(X)
        return self.table_.interval(level, frame)

    def predict_quantile(self, X: Any, q: Any) -> Float[np.ndarray, "..."]:
        """Quantiles at levels `q`: `[rows]` of a number, `[rows, levels]` of a list."""
        frame = self._frame(X)
        return self.table_.quantile(q, frame)

    @public("FlowRegressor.log_prob")
    def log_prob(self, X: Any, y: Any) -> Float[np.ndarray, " rows"]:
        """The log-density of each `y` given its row, in nats: `tabular.Table.log_prob`."""
        frame = _with_target(self._frame(X), y)
        return self.table_.log_prob(frame)


def _key(random_state: Any) -> Any:
    """A key of JAX from a random state of scikit-learn."""
    return jax.random.key(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def _has_names(X: Any) -> bool:
    """Whether `X` is a frame whose columns all have strings as names."""
    frame = nw.from_native(X, eager_only=True, pass_through=True)
    return isinstance(frame, nw.DataFrame) and all(isinstance(c, str) for c in frame.columns)


def _with_target(frame: Any, y: Any) -> Any:
    """The frame with `y` as another column."""
    if y is None:
        raise ValueError(f"{arg('y')} requires y to be passed, but the target y is None.")
    y = check_array(column_or_1d(y, warn=True), dtype=FLOATS, ensure_2d=False, input_name="y")
    check_consistent_length(frame, y)
    frame = nw.from_native(frame, eager_only=True)
    target = nw.new_series(TARGET, y, backend=frame.implementation)
    return frame.with_columns(target).to_native()
