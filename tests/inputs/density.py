"""Wrong inputs of densities, their training and what is around, in rows as those of `ode.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import stats

import jaxode
from inputs.calls import CONTEXTS, FLOW, NETWORK, TABLE, X, decay
from jaxode import nn
from jaxode.standardize import affine, normal, whiten


def with_row(x, row, value):
    return np.where(np.arange(len(x))[:, None] == row, value, x)


CENTRED = jaxode.cnf(decay, jaxode.centered_normal(3, 2))
CONSTANT = np.stack([TABLE[:, 0], np.full(40, 2.0)], 1)
EVEN = stats.norm.ppf((np.arange(40) + 0.5) / 40)
PLANE = np.stack([EVEN + EVEN**2, 3 * (EVEN + EVEN**2) - 1], 1)
INSIDE = "the data must lie strictly inside; got values on or outside it in "
FAR, BETWEEN = np.finfo(np.float32), "the distance between bounds must be a normal number of float"
HOLDS = "data must fit float32; got larger numbers in "
CONTEXT_OF = "must be one of shape (3,), or one for each of the samples (4,); got shape "
STRUCTURE = "must have the structure of bind's context, ~'r'"
OF_VALIDATION = "must be a pair (x, context), with a context as in training, of shape (1,); got "
COUNTED = np.stack([np.arange(40) % 8, TABLE[:, 1]], 1)
STANDARDIZE = {
    ValueError: [
        *((make(CONSTANT), "must vary; got column 1 (counting from 0),~ constant in float64.")
          for make in (affine, normal, whiten, np.asarray)),
        *((make(with_row(TABLE, 3, np.nan)), "must be finite; got NaN or inf in 1 of 40 rows, ")
          for make in (affine, normal, whiten)),
        ((0.0, 0.0), "the scale must be positive ~; got 0.0"),
        ((np.nan, 1.0), "the mean must be finite ~; got nan"),
        (np.float32(1e7) + np.eye(4, 2, dtype="f4"), "~ column 0 ~ constant in float32. ~ subtrac"),
        (np.ones((4, 3)), "data must have shape [n, 2]~; got (4, 3)."),
        (normal(CONSTANT[:1]), "~ with at least two rows; got (1, 2)."),
        (whiten(EVEN), "~ with at least two rows; got (40,)."),
        (whiten(PLANE), "whitening needs columns that do not depend on each other linearly, and~"
         "rows than columns; got 40 rows, and a singular covariance of columns 0, 1 (counting fro"),
        (whiten(TABLE[:2]), "whitening needs ~; got 2 rows, and a singular covariance of columns "),
        ((TABLE, TABLE), "~ shape (2,); got (40, 2). Pass data as an array"),
        ((TABLE,) * 3, "must be data, or (mean, scale); got 3"),
    ],
    TypeError: [
        ([TABLE.mean(0), TABLE.std(0)], "~ mean and scale a tuple; got a list"),
        (TABLE.astype(str), "must be an array of numbers; got an array of <U32. Encode text as nu"),
        (np.ma.masked_less(TABLE, 0), "must be an array of numbers; got a masked array"),
        ((np.ma.array([1.0, 2.0], mask=[0, 1]), 1.0), "must be an array of numbers; got a masked"),
        (True, "~; got True. Pass your data, an array [n, 2]"),
        (normal, "must be the data, or (mean, scale); got <function normal"),
    ],
}  # fmt: skip
ROWS = {
    ("bind", ValueError): [
        *(({"standardize": given}, words) for given, words in STANDARDIZE[ValueError]),
        ({"support": (0.0, 9.0), "standardize": TABLE}, INSIDE + "40 of 40 rows"),
        ({"standardize_context": (TABLE, TABLE)}, "must be (mean, scale), ~; got a tuple of 2 par"),
        ({"support": (1.0, 0.0)}, "each lower bound must be less"),
        ({"support": (np.zeros(3), 1.0)}, "~the shape of an event, (2,)"),
        ({"support": (-1.7e308, 1.7e308)}, BETWEEN + "64; got"),
        ({"support": (0.0, 5e-324)}, BETWEEN + "64; got"),
        ({"context_shape": (), "standardize_context": TABLE},
         "must end in that of the rows of standardize_context, ((2,),); got ((),)."),
        ({"support": (-9.0, 9.0), "flow": CENTRED}, "would move the angles or the centre"),
        ({"standardize": (0.0, 3.0), "flow": CENTRED}, "would move the angles or the centre"),
    ],
    ("with_flow", ValueError): [({"flow": CENTRED}, "needs a base ")],
    ("bind", TypeError): [
        *(({"standardize": given}, words) for given, words in STANDARDIZE[TypeError]),
        ({"flow": NETWORK}, "must be made by jaxode.cnf"),
        ({"params": nn.MLP}, "must be a pytree of parameters; got the class MLP. Call it"),
        ({"standardize_context": {"a": np.full(40, "a")}}, "must be an array of numbers; got an a"),
        ({"standardize_context": {"a": 3.0}}, "must be the data, or (mean, scale); got 3.0. Pass"),
        ({"standardize_context": {"a": normal(3.0)}}, "must be the data, or (mean, scale); got 3"),
        ({"support": "positive"}, "must be bounds (low, high)~; got 'positive'"),
        ({"support": (0j, 1.0)}, "bounds must be real numbers; got 0j"),
        *(({"context_shape": x}, f"must be a shape, ~; got {x!r}.") for x in (3, [3], "a", (-1,))),
    ],
    ("bind in float32", ValueError): [
        ({"support": (FAR.min, FAR.max)}, BETWEEN + "32; got"),
        ({"support": (0.0, 1e-45)}, BETWEEN + "32; got"),
        ({"standardize": 1e300 * TABLE}, HOLDS + "40 of 40 rows, ~ Rescale the data"),
        ({"standardize": np.abs(1e300 * TABLE), "support": (0.0, np.inf)}, HOLDS + "40 of 40 rows"),
        ({"standardize": 1e-300 * TABLE}, "~ constant in float32. ~ and rescale it"),
        ({"standardize": (0.0, 1e300)}, "the scale must be positive and finite in float32; got 1e"),
        ({"standardize": (0.0, np.float32(1e-39))}, "the scale must be positive and finite in flo"),
        ({"standardize": (1e300, 1.0)}, "the mean must be finite in float32; got 1e+300"),
        ({"standardize": (1.7e9, 10.0)},
         "the scale must be more than the rounding of the mean; got 10.0 beside 1700000000.0"),
    ],
    ("log_prob of a density", ValueError): [
        ({"x": jnp.ones((4, 3))}, "must have shape [..., 2]; got (4, 3)."),
        ({"batch_size": 2, "flow": jaxode.cnf(decay, FLOW.base, axis_name="i")}, "needs steps of"),
        ({"progress": True, "flow": jaxode.cnf(decay, FLOW.base, axis_name="i")}, "needs steps of"),
    ],
    ("log_prob of a density", TypeError): [
        ({"x": TABLE + 1j}, "must be real; got complex128."),
        ({"x": [[1.0, 2.0], [3.0]]}, "~; got a list whose entries differ in shape."),
    ],
    ("cdf of a density", ValueError): [
        ({"flow": FLOW}, "^cdf: needs events of one number; got events of shape (2,). Take the"),
        ({"x": TABLE}, "must have shape [..., 1]; got (40, 2)."),
        ({"context": CONTEXTS, "context_shape": (2,)}, "must be one of shape (2,), or one for ea"),
    ],
    ("cdf of a density", TypeError): [({"x": "a"}, "must be an array of numbers; got an array of")],
    ("quantile of a density", ValueError): [
        ({"flow": FLOW}, "^quantile: needs events of one number; got events of shape (2,). Take"),
        *(({"q": q}, f"levels must lie strictly between 0 and 1; got {q}. Leave out 0 and 1, whic")
          for q in (0.0, 1.0, -0.5, np.nan, np.array([0.5, 1.0]))),
        ({"context": None, "context_shape": (2,)}, "must be given, with arrays of shape (2,), as"),
    ],
    ("quantile of a density", TypeError): [({"q": 1j}, "must be real; got complex128.")],
    ("to_flow of a density", TypeError): [
        ({"x": TABLE.astype(object)}, "must be an array of numbers; got an array of object"),
    ],
    ("log_prob of a density with names", ValueError): [
        ({"context": None}, "must be given, with arrays of shape (), (), as bind was told; got No"),
        ({"context": {"p": jnp.ones(3), "r": 2.0}}, STRUCTURE),
        ({"context": {"p": 1.0, "r": 2.0}}, STRUCTURE),
    ],
    ("log_prob of a density with names", TypeError): [
        ({"context": [[1.0, 2.0]]}, "~; got a list of numbers. Pass np.asarray of it"),
    ],
    **{
        (f"{name} of a density with contexts", ValueError): [
            ({"context": CONTEXTS[:5]}, CONTEXT_OF + "(5, 3)"),
            ({"context": CONTEXTS[0, :2]}, CONTEXT_OF + "(2,)"),
        ]
        for name in ("log_prob", "to_flow")
    },
    ("sample of a density with contexts", ValueError): [
        ({"context": (CONTEXTS[:4],) * 2}, "must have 1 arrays; got 2"),
    ],
    ("importance", ValueError): [
        ({"log_weights": jnp.ones(())}, "~; got ~shape ()"),
        ({"log_weights": jnp.zeros(1)}, "~; got ~shape (1,)"),
    ],
    ("importance", TypeError): [
        ({"log_weights": np.arange(3)}, "~; got ~int64"), ({"log_weights": "a"}, "~; got ~str"),
    ],
    ("fit", TypeError): [
        ({"density": FLOW}, "must be made by jaxode.bind; got CNF. Pass jaxode.bind(flow, params)"),
        ({"x": TABLE.astype(str)}, "must be an array of numbers; got an array of <U32"),
        ({"optimizer": "adam"}, "must be an optimizer of Optax; got 'adam'. Pass optax.adam(1e-3)"),
        ({"mesh": 2}, "must be a mesh of JAX, or None; got int. Pass jax.sharding.Mesh(jax"),
        ({"params": {"size": 3}}, "^fit(density=...): its parameters must hold floating arrays~;"),
    ],
    ("fit", ValueError): [
        *(({"x": x}, f"must have shape [rows, 2], with at least 10 rows; got {x.shape}.")
          for x in (TABLE[:, :1], TABLE[:9], TABLE[0])),
        ({"x": with_row(TABLE, 3, np.nan)}, "must be finite; got NaN or inf in 1 of 40 rows, firs"),
        ({"validation": with_row(TABLE, 5, np.inf)}, "must be finite; got NaN or inf in 1 of 40 r"),
        ({"validation": TABLE[:, 0]}, "must have shape [rows, 2], with at least 1 row; got (40,)."),
        *(({"validation": value}, f"must be between 0 and 1; got {value}.")
          for value in (0, 1.0, -0.1, float("nan"))),
        ({"validation": (TABLE, None, None)},
         "must be a part, rows of x, or a pair (x, context); got 3 parts."),
        ({"time_power": -1.0}, "must be positive and finite; got -1.0."),
        ({"mesh": Mesh(np.array(jax.devices()[:3]), "a"), "batch_size": 64},
         "^fit(mesh=...): must have a number of devices that divides the 64 rows of a batch; ~"
         "got 3. Pass batch_size=63."),
        ({"params": {"a": jnp.ones(2), "b": jnp.array([1.0, np.nan])}},
         "^fit(density=...): its parameters must be finite; got NaN or inf in params['b']. Start"),
        ({"context": CONTEXTS[:3]}, "leaves must have a leading axis of 40~; got shape (3, 3)."),
        ({"context": TABLE[:, :1], "context_shape": (2,)},
         "must be one of shape (2,), or one for each of the samples (40,); got shape (40, 1)."),
        ({"context": None, "context_shape": (2,)},
         "must be given, with arrays of shape (2,), as bind was told; got None."),
        ({"validation": TABLE, "context": TABLE[:, :1]}, OF_VALIDATION + "None. "),
        ({"validation": (TABLE, TABLE), "context": TABLE[:, :1]}, OF_VALIDATION + "(2,). "),
        ({"support": (-9.0, np.inf), "x": with_row(TABLE, 3, -9.0)},
         INSIDE + "1 of 40 rows, first in row 3. Widen the support, or leave those rows out."),
        *(({"support": ((0.0, -9.0), (high, 9.0)), "x": COUNTED, "dequantize": True}, INSIDE)
          for high in (7.0, 7.75)),  # where the noise crosses it
    ],
    ("fit in float32", ValueError): [({"x": 1e39 * TABLE}, HOLDS)],
    ("audit", TypeError): [
        ({"flow": max}, "must be a flow made by jaxode.cnf; got builtin"),
        ({"flow": jaxode.bind(FLOW, None)}, "~ Pass density.flow, density.params"),
    ],
    ("audit", ValueError): [({"x": X * jnp.inf}, "must be finite; got NaN or inf in 3 of 3 rows")],
    ("dequantize", ValueError): [
        ({"x": np.array([[0.0, 0.5]])}, "must be integers from 0 to 255; got 0.5. Pass the levels"),
        ({"x": np.array([[300]])}, "must be integers from 0 to 255; got 300."),
        ({"x": np.array([[-1]]), "levels": 2}, "must be integers from 0 to 1; got -1"),
        ({"x": np.array([[np.nan]]), "levels": 2}, "must be integers from 0 to 1; got nan"),
    ],
    ("quantize", ValueError): [({"levels": 2.5}, "must be ~ at least 2; got 2.5.")],
    ("logit", ValueError): [
        ({"margin": 0.5}, "~; got 0.5."), ({"u": np.array([[-0.02]])}, "must be in [0, 1]; got -0"),
        ({"u": np.array([[0.5, 1.02]])}, "must be in [0, 1]; got 1.02. Use dequantize for levels."),
    ],
    ("inverse_logit", ValueError): [({"margin": -0.1}, "~; got -0.1.")],
    ("plot.samples", ValueError): [({"x": np.zeros((4, 3))}, "~ shape (n, 2)~; got (4, 3)")],
    ("plot.trajectories", ValueError): [({"ys": TABLE}, "~ shape (times, n, 2); got (40, 2)")],
    ("plot.history", ValueError): [({"losses": TABLE}, "must have shape (steps,); got (40, 2)")],
}  # fmt: skip
