"""Numbers and data that break a rule, which a program finds out when it runs.

A row is `(input, exception, words, start)`: what differs from good inputs, and what a call outside
of any program raises, as in `ode.py`; then the start of what a program says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import jaxode
from inputs.calls import KEY, call, decay
from jaxode.coupling import Coupling

NAN, INF = np.nan, np.inf
FAR = 1e8 + np.array([1.0, 2.0, 3.0])  # in float32, times there are 8 apart


def told(rows, start=None, kind=ValueError):
    """Rows `(input, words)`. By default, a program tells all but the value."""
    by_row = lambda words: words if "{rows}" in words else words.split("; got")[0]
    return [(given, kind, words, start or by_row(words)) for given, words in rows]


def each(names, values, words):
    return told([({name: x}, words.format(x)) for name in names.split() for x in values])


POSITIVE = "must be positive and finite; got {}."
ORDERED = [
    ([0.5, 0.2, 0.8], {}, "increase from t0=0.0 to t1=1.0; got 0.5 before 0.2. Sort them, or"),
    ([0.2, 0.5, 0.8], {"t1": -1.0}, "decrease from t0=0.0 to t1=-1.0; got t0=0.0 before 0.2"),
    ([0.2, 0.5, 0.8], {"t1": 0.7}, "increase from t0=0.0 to t1=0.7; got 0.8~ before t1=0.7"),
    ([0.2, NAN, 0.8], {}, "increase from t0=0.0 to t1=1.0; got 0.2 before nan"),
]
SOLVE = [
    *told(
        [
            ({"t0": NAN}, "must be a finite time; got nan."),
            *(({"t1": t1}, f"must be a finite time; got {t1}.") for t1 in (INF, NAN)),
            ({"t0": 1e9, "t1": 1e9 + 1, "ts": 1e9 + np.array([0.2, 0.5, 0.8])}, "^solve(t0=..., "
             "t1=...): the span from 1000000000.0 to 1000000001.0 is lost in the precision of flo"),
        ],
        "^solve(t0=..., t1=...): must be finite times, whose span is not lost in the precision",
    ),
    *told(
        [({"ts": np.array(ts)} | ends, f"times must {words}") for ts, ends, words in ORDERED]
        + [
            ({"ts": FAR, "t0": 1e8, "t1": 1e8 + span}, "times are lost in the precision of ~32, "
             "in which the state is solved; got [")
            for span in (16.0, 8000.0)
        ],
        "^solve(ts=...): times must be in order from t0 to t1, and not be lost in the precision",
    ),
    *each("rtol atol", [NAN, -1e-3, INF], "must be a finite tolerance of at least 0; got {}."),
    *told(
        [
            ({"rtol": 0.0, "atol": atol}, f"^solve(rtol=0, atol={atol:g}): at least one tolerance")
            for atol in (0.0, 1e-60)
        ],
        "^solve(rtol=..., atol=...): at least one tolerance must be positive in the dtype",
    ),
    *each("first_step max_step", [NAN, -0.1, 0.0, INF], POSITIVE),
    *told([({"breakpoints": np.array([0.5, NAN])}, "must not be NaN; got [")]),
    *told(
        [({"y0": np.array([1, NAN])}, "must be finite; got NaN or inf. Fix its source.")],
        "must be finite; got NaN or inf. Fix its source.", jaxode.SolveError,
    ),
]  # fmt: skip
JUMPS = [
    row
    for later, rows in {
        "be in order from t0 to t1. Sort them. Pad a row with infinity": [
            ([2.0, 1.0], "got 2.0 before 1.0. Sort them"), ([INF, 1.0], "got 4.0 before 1.0"),
            ([NAN, 1.0], "got 4.0 before 1.0"),
        ],
        "lie between t0 and t1. Extend the solve": [
            ([-1.0, 1.0], "got t0=0.0 before -1.0"), ([-INF, 1.0], "got t0=0.0 before -inf"),
            ([1.0, 5.0], "got 5.0 before t1=4.0"),
        ],
    }.items()
    for times, got in rows
    for row in told(
        [({"jumps": np.array(times)}, f"times must increase from t0=0.0 to t1=4.0; {got}")],
        f"times must {later}",
    )
]  # fmt: skip
DATA = {
    "x": np.array([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]]),
    "context": np.array([[0.1], [0.2], [0.3]]),
    "weights": np.array([1.0, 2.0, 3.0]),
}
START = np.array([[1.0, 0.2], [0.3, -1.4], [-0.5, 1.6]])


def in_rows(first, count=1):
    """`{rows}` and `{at}` are the rows of a batch, or of several under `jax.vmap`."""
    return f"{count} of {{rows}} rows, first in row {{at[{first}]}}"


def finite(name, data, first, value=NAN, count=1):
    """A row for data with `count` rows that are not finite."""
    data = data.copy()
    data[first : first + count] = value
    words = f"must be finite; got NaN or inf in {in_rows(first, count)}. Leave those rows out"
    return told([({name: data}, words)], kind=jaxode.SolveError)


WEIGHTS = [([1, NAN, 3], 1), ([1, 2, INF], 2), ([1, -1, 3], 1), ([0, 0, 0], 0, 3)]
OF_DATA = [
    *finite("x", DATA["x"], 1), *finite("x", DATA["x"], 0, -INF),
    *finite("x", DATA["x"], 1, NAN, 2), *finite("context", DATA["context"], 2),
    *told([
        ({"weights": np.array(weights, float)}, "must be finite, at least 0, and not all zero; "
         f"got ~values in {in_rows(*where)}. To leave a row out, give it the weight 0.")
        for weights, *where in WEIGHTS
    ]),
]  # fmt: skip
MATCHING = [
    *OF_DATA, *finite("x0", START, 2), *each("time_power", [0.0, -1.0, INF, NAN], POSITIVE),
    *told(
        [
            ({"t0": 0.5, "t1": 0.5}, "^matching_loss(t0=..., t1=...): must be finite times that d"),
            ({"t1": INF}, "^cnf(t1=...): must be a finite time; got inf"),
            ({"t0": 1e9, "t1": 1e9 + 1}, "^matching_loss(t0=..., t1=...): the span from 100000000"),
        ],
        "^matching_loss(t0=..., t1=...): must be finite times that differ in the precision of the",
    ),
    *told(
        [({"x": np.array([[0, 0], [1e30, 0], [0, 0]])}, "squared differences to the vector field ~"
          f"be finite; got an overflow in {in_rows(1)}, where the field is finite.")],
        kind=jaxode.SolveError,
    ),
]  # fmt: skip
PAIRED = told([
    ({"rows": np.array(rows)}, "^matching_loss(coupling=...): must return a permutation of the row~"
     f"got numbers that are out of range or repeated in {in_rows(*where)}. Return each row number")
    for rows, *where in (([0, 1, 1], 1, 2), ([1, 2, 3], 2), ([-1, 0, 1], 0))
])  # fmt: skip
NOISE = "(t0=..., t1=...): a probability flow runs from its noise, the base, at 1 to its data at 0"
DIFFUSION = told(
    [({"t0": t0, "t1": t1}, "^cnf" + NOISE) for t0, t1 in ((1e-3, 1.0), (1000.0, 0.0))],
    "^cnf" + NOISE,
)


class Values(NamedTuple):
    """A call, its good inputs, and rows of wrong ones."""

    run: Callable[..., Any]
    good: dict[str, Any]
    """The gradient by the first is NaN where a rule is broken."""
    rows: list[Any]
    ways: tuple[str, ...] = ("jit", "vmap", "grad")


def solve(y0, t0, t1, throw, jumps=None, **given):
    jumps = None if jumps is None else jaxode.Jumps(jumps, lambda t, y, args, i: y)
    s = jaxode.solve(decay, y0, t0, t1, throw=throw, jumps=jumps, **given)
    return {"result": s.result, "y1": s.y1, "ys": s.ys}


def paired(rows, **given):
    return call(
        "matching_loss", None, {"coupling": Coupling(lambda key, z, x, context: rows), **given}
    )


def method(name, f=lambda t, z, args: args[1] - args[0] * z, **usual):
    return lambda **given: call(name, None, {"f": f, "rtol": 1e-3, "atol": 1e-3, **usual} | given)


OF_SOLVE = {
    "y0": np.ones(2, "f4"), "t0": 0.0, "t1": 1.0, "ts": np.array([0.2, 0.5, 0.8]), "rtol": 1e-3,
    "atol": 1e-3, "first_step": 0.1, "max_step": 0.5, "breakpoints": np.array([0.3, 0.6]),
}  # fmt: skip
RATE, CONTEXT = {"params": np.array(0.7)}, {"context": DATA["context"]}
IN_FLOAT32 = {name: x.astype("f4") for name, x in {**RATE, **DATA, "x0": START}.items()}
VALUES = {
    "solve": Values(solve, OF_SOLVE, SOLVE),
    "solve with jumps": Values(
        solve, {"y0": np.ones(2), "t0": 0.0, "t1": 4.0, "jumps": np.array([1.0, 2.0])}, JUMPS,
        ("jit", "vmap"),
    ),
    "nll": Values(method("nll"), {**RATE, **DATA}, OF_DATA),
    "matching_loss": Values(
        method("matching_loss", key=KEY),
        {**IN_FLOAT32, "t0": 0.0, "t1": 1.0, "time_power": 1.0}, MATCHING,
    ),
    "matching_loss of pairs": Values(
        paired, {"params": 1.0, "x": DATA["x"], "rows": np.array([2, 0, 1])}, PAIRED, ("jit",)
    ),
    "log_prob of a model": Values(
        method("log_prob", jaxode.probability_flow(decay, jaxode.VariancePreserving())),
        {"params": 1.0, "x": DATA["x"], "t0": 1.0, "t1": 1e-3}, DIFFUSION, ("jit",),
    ),
    **{
        name: Values(
            method(name), {**RATE, **CONTEXT, argument: DATA["x"]}, finite(argument, DATA["x"], 1),
            ("jit",),
        )
        for name, argument in {
            "log_prob": "x", "log_prob_and_error": "x", "to_base": "x", "from_base": "z",
        }.items()
    },
    **{
        name: Values(
            method(name, key=KEY, n=3), {**RATE, **CONTEXT}, finite("context", DATA["context"], 1),
            ("jit",),
        )
        for name in ("sample", "sample_and_log_prob")
    },
}  # fmt: skip
