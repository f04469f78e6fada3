"""Rules of many arguments: the wrong value, the exception, the rule, and where it holds."""

import jax
import jax.numpy as jnp
import numpy as np

from inputs.calls import KEY, TABLE, X

OF_SAMPLES = ("nll", "log_prob", "log_prob_and_error", "to_base", "matching_loss", "audit")
DRAWING = ("sample", "sample_and_log_prob", "matching_loss", "reverse_kl_loss", "fit", "audit")
NETWORKS, OF_X = (
    ("MLP", "Residual", "Mixer", "Particles", "Lattice"),
    dict.fromkeys(OF_SAMPLES, "x"),
)
SAMPLED = {**OF_X, "from_base": "z"}
LOSSES = "nll", "matching_loss"
DENSITIES = tuple(f"{name} of a density" for name in ("log_prob", "sample", "cdf", "quantile"))
A_KEY, INTEGER = "must be a key of jax.random; got ~. Pass jax.random.key(0).", "a positive integer"
KEYS = dict.fromkeys((*NETWORKS, "dequantize", "nll", "log_prob", "log_prob_and_error"), "key")
KEYS |= dict.fromkeys(DRAWING, "key")


class Columns:
    """As a DataFrame of pandas: with a shape and a way to become an array."""

    shape, dtype, ndim = (3, 2), np.dtype(float), 2

    def __array__(self, dtype=None, copy=None):
        return np.ones(self.shape)


def must(value, kind, rule, where, got=None):
    """Rows for the arguments in `where`, the names of calls with those of arguments."""
    got = f"must be {rule}; got {value!r}." if got is None else got
    return [
        (name, {argument: value}, kind, got)
        for name, arguments in where.items()
        for argument in arguments.split()
    ]


ROWS = [
    *must(0, ValueError, INTEGER, {
        "solve": "steps max_steps", "hutchinson": "probes", "exact": "chunk", "Particles": "dim",
        "Residual": "width blocks", "Mixer": "patch width blocks features",
        "optimal_transport": "group", "fit": "steps batch_size",
        "bits_per_dimension": "size", **dict.fromkeys(DENSITIES, "batch_size"),
    }),
    *must(2.5, ValueError, INTEGER, {"solve": "max_steps", "optimal_transport": "group"}),
    *must(None, ValueError, INTEGER, {"solve": "max_steps"}),
    *must(True, ValueError, INTEGER, {"hutchinson": "probes"}),
    *must((8, 8), ValueError, INTEGER, {"Residual": "width"}),
    *must((4, 0), ValueError, "", {"Concat": "widths"}, f"must be {INTEGER}; got 0."),
    *must(0, ValueError, "positive integers", {
        **dict.fromkeys(["MLP", "Residual", "standard_normal", "diagonal_normal"], "event_shape"),
        "Lattice": "shape",
    }),
    *must(2.7, ValueError, "positive integers", {"MLP": "event_shape"}),
    *must(-1, ValueError, "an integer of at least 0", dict.fromkeys(NETWORKS, "context_size")),
    *must(1, ValueError, "an integer of at least 2", {"DiscreteAdjoint": "checkpoints"}),
    *must(1, ValueError, "~ at least 2", {"dequantize": "levels", "centered_normal": "n"}),
    *must(-1, ValueError, "a number of samples", {"sample": "n", "sample_and_log_prob": "n"}),
    *must(-1, ValueError, "a number of steps", {"fit": "likelihood"}),
    *must("no", TypeError, "True or False", {
        **dict.fromkeys(["cnf", "solve", "flow"], "throw"), **dict.fromkeys(DENSITIES, "progress"),
        "fit": "progress", "plot.density": "colorbar", "Lattice": "odd",
    }),
    *must("each", ValueError, "'joint' or 'per_sample'", {"flow": "batch", "cnf": "batch"}),
    *must("each", ValueError, "None, 'joint' or 'per_sample'", {"solve": "batch"}),
    *must("low", ValueError, "None, 'highest'~", {"solve": "precision"}),
    *must("x", ValueError, "'score' or 'noise'", {"probability_flow": "predicts"}),
    *must("no", ValueError, "'uniform', 'normal' or a tuple~", {"dequantize": "noise"}),
    *must("no", ValueError, "True, False, 'uniform', 'normal' or a tuple~", {"fit": "dequantize"}),
    *must("x", ValueError, "'rademacher', 'gaussian' or 'ortho~", {"hutchinson": "distribution"}),
    *(
        row for direction in (2, True, 1.0)
        for row in must(direction, ValueError, "-1, 0 or 1", {"Event": "direction"})
    ),
    *must(-1, ValueError, "~finite and at least 0", {
        "kinetic_energy": "weight", "jacobian_frobenius": "weight",
        "optimal_transport": "condition_weight", "fit": "seconds",
    }),
    *must("a", ValueError, "a Python number, finite and at least 0", {"kinetic_energy": "weight"}),
    *must(np.nan, ValueError, "~finite~", {"optimal_transport": "condition_weight"}),
    *must("a", TypeError, "a real number", {"solve": "rtol", "matching_loss": "time_power"}),
    *must(None, TypeError, "a real number", {"matching_loss": "time_power"}),
    *must(10**30, TypeError, "a real number", {"solve": "rtol"}),
    *must(10**30, TypeError, "a real time", {"solve": "t1"}),
    *must("1", TypeError, "a real time", {"solve": "t0 t1", "cnf": "t0 t1"}),
    *must("ab", TypeError, "~real times", {"solve": "ts breakpoints", "Jumps": "times"}),
    *must(-1, ValueError, "a finite tolerance of at least 0", {
        "solve": "rtol atol", "flow": "rtol", "cnf": "rtol", "odeint": "rtol atol",
    }),
    *must(-1, ValueError, "None or a finite tolerance of at least 0", {"BacksolveAdjoint": "rtol"}),
    *must(np.inf, ValueError, "a finite time", {"solve": "t0 t1", "cnf": "t0 t1"}),
    *must(None, TypeError, "a function~", {
        "solve": "f", "flow": "f", "odeint": "func", "cnf": "f", "probability_flow": "model",
        "reverse_kl_loss": "log_density", "Jumps": "change",
    }),
    *must(lambda y, t, *args: y, TypeError, "", {
        "solve": "f", "flow": "f", "cnf": "f", "probability_flow": "model", "Jumps": "change",
        "Event": "condition",
    }, "must be a function ~, called by position; got one of (y, t), in another order. Exchange"),
    *must(lambda time, state: state, TypeError, "", {"odeint": "func"},
          "must be a function func(y, t, *args), called by position; got one of (time, state)"),
    *must(2.0, TypeError, "a function~", {"Rodas5P": "jacobian", "MLP": "activation"}),
    *must(0, TypeError, "", KEYS, A_KEY),
    *must(None, TypeError, "", dict.fromkeys(DRAWING, "key"), A_KEY),
    *must(jnp.zeros(3, "u4"), TypeError, "", {"nll": "key"}, A_KEY),
    *must(jnp.uint32(3), TypeError, "", {"nll": "key"}, A_KEY),
    *must(jax.random.split(KEY, 3), ValueError, "", KEYS, "must be one key; got keys of shape (3,"),
    *must(jnp.zeros((3, 2), "u4"), ValueError, "", {"nll": "key"}, "must be one key; got keys of"),
    *must(jnp.ones((4, 3)), ValueError, "", SAMPLED, "must have shape [batch, 2]; got (4, 3)."),
    *must(X[:, :1], ValueError, "", {"matching_loss": "x0"}, "must have shape [batch, 2]; got (3,"),
    *must(X[0], ValueError, "", SAMPLED, "must have shape [batch, 2]; got (2,). Pass ~[None]"),
    *must(jnp.ones((3, 2), int), TypeError, "", SAMPLED, "must have a floating dtype; got int64."),
    *must(X.astype(complex), TypeError, "", SAMPLED, "must have a floating dtype; got complex128."),
    *must([[0.0, 1.0]], TypeError, "", SAMPLED, "must be an array of numbers; got list. Convert"),
    *must(X[:0], ValueError, "", {**dict.fromkeys(LOSSES, "x"), "audit": "x"}, "must have at leas"),
    *must(jnp.ones((1, 4)), ValueError, "", dict.fromkeys([*SAMPLED, *DRAWING[:2]], "context"),
          "leaves must have a leading axis of 3, one row per sample; got shape (1, 4). To give al"),
    *must(1.0, TypeError, "", dict.fromkeys(OF_SAMPLES, "context"), "~arrays of numbers; got floa"),
    *must(jax.random.split(KEY, 3), TypeError, "", {"nll": "context"}, "~; got an array of key<fr"),
    *must(jnp.ones(2), ValueError, "", dict.fromkeys(LOSSES, "weights"), "must have one ~; got (2"),
    *must(X[:, :1], ValueError, "", dict.fromkeys(LOSSES, "weights"), "must have one ~; got (3, 1"),
    *must("abc", TypeError, "", dict.fromkeys(LOSSES, "weights"), "must be real numbers; got str."),
    *must(jnp.ones(3, complex), TypeError, "", dict.fromkeys(LOSSES, "weights"), "must be real nu"),
    *must(["1"], TypeError, "", dict.fromkeys(LOSSES, "weights"), "must be real numbers; got list"),
]  # fmt: skip
TAKEN = {"nll": "x context", "from_base": "z", "matching_loss": "x0", "audit": "x"}
ARRAYS = {**TAKEN, "matching_loss": "x0 params", "solve": "args y0"}
for value, got, where in (
    (np.ones((3, 2), np.longdouble), "an array of ", ARRAYS),
    (np.zeros((3, 2), "datetime64[s]"), "an array of datetime64[s]", ARRAYS),
    (np.zeros((3, 2), [("a", float)]), "an array of ", ARRAYS),
    (np.ma.masked_array(np.ones((3, 2)), np.eye(3, 2)), "a masked array", ARRAYS),
    (np.ones((3, 2), object), "an array of object", ARRAYS),
    (np.array([["a", "b"]] * 3), "an array of <U1", ARRAYS),
    (Columns(), "Columns", TAKEN), ("abc", "str", TAKEN),
    (np.ma.masked_array(TABLE, TABLE > 0), "", {"dequantize": "x", "logit": "u"}),
):  # fmt: skip
    ROWS += must(value, TypeError, "", where, f"~; got {got}" if got else "~fill what is masked")
