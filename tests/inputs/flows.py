"""Wrong inputs of flows, densities and what is around, in rows as those of `ode.py`."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from scipy import stats

import jaxode
from inputs.calls import CONTEXTS, FLOW, KEY, NETWORK, ONE, TABLE, X, decay
from jaxode import divergence, nn
from jaxode.coupling import Coupling, optimal_transport
from jaxode.regularizers import Regularizer, jacobian_frobenius, kinetic_energy
from jaxode.standardize import affine, normal, whiten

ALIKE = SimpleNamespace(init=lambda key, z: None, apply=divergence.exact().apply)
OWN = divergence.Divergence(ALIKE.init, ALIKE.apply)
OF_EACH = "must return one number of a sample; got float64 of shape (2,). Sum over the event"
PER_PROBE = divergence.Divergence(ALIKE.init, lambda g, z, probe: (g(z), z))
COST, PER_NUMBER = kinetic_energy(0.1), Regularizer("kinetic", 0.1, lambda dz, norm: dz**2)
MODEL = jaxode.probability_flow(decay, jaxode.VariancePreserving())


class Closed:
    """A field with a divergence that is no scalar."""

    def __call__(self, t, z, args):
        return -z

    def value_and_divergence(self, t, z, args):
        return -z, -z


class Base:
    """Of other shapes than a density of vectors has."""

    def __init__(self, draw, log_prob=FLOW.base.log_prob, **attributes):
        self.event_shape, self.draw, self.log_prob = (2,), draw, log_prob
        vars(self).update(attributes)

    def sample(self, key, sample_shape):
        return jnp.ones(self.draw(sample_shape))


def pairing(rows):
    return {"coupling": Coupling(lambda key, z, x, context: rows)}


def with_row(x, row, value):
    return np.where(np.arange(len(x))[:, None] == row, value, x)


OF_COORDINATES = Base(lambda shape: (*shape, 2), lambda z: -(z**2))
HUTCHINSON, CLOSED_FORM = divergence.hutchinson(), divergence.closed_form()
CENTRED = jaxode.cnf(decay, jaxode.centered_normal(3, 2))
PAIRED = "must be left out with a coupling that pairs rows, for which all rows count the same; got "
ROWS_OF = "must return one row number per sample, integers of shape (3,); got "
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
FLOWS = {
    ("cnf", TypeError): [
        ({"f": nn.MLP}, "must be a function f(t, z, params); got the class MLP."),
        ({"base": 2}, "must have event_shape, log_prob and sample; got 2."),
        ({"divergence": "exact"}, "must be a Divergence; got 'exact'. Use a function of jaxode.di"),
        ({"divergence": ALIKE}, "must be a Divergence; got namespace(~ Use a function of"),
        ({"regularizers": COST}, "must be a tuple of jaxode.regularizers; got Regularizer("),
        ({"regularizers": ("a",)}, "must be a tuple of jaxode.regularizers; got ('a',)."),
        ({"tolerance": 1}, "^cnf: unknown options ['tolerance']. The solve options are ['adjoint', "
         "'atol', 'axis_name', 'breakpoints', 'first_step', 'max_step', 'max_steps', 'precision', "
         "'rtol', 'solver', 'steps']."),
        ({"axis_name": 3}, "~; got 3."), ({"axis_name": ("x", 3)}, "~; got ('x', 3)."),
    ],
    ("cnf", ValueError): [
        ({"base": Base(tuple, event_shape=(), batch_shape=(3,))}, "~; got a batch of shape (3,)"),
        ({"regularizers": (COST, COST)}, "their names must differ; got ['kinetic_energy', 'kineti"),
        ({"solver": jaxode.Rosenbrock23(decay)},
         "integrates more than the field; got Rosenbrock23(jacobian=...). Leave jacobian out."),
        ({"adjoint": jaxode.BacksolveAdjoint(), "solver": jaxode.Rodas5P()},
         "BacksolveAdjoint needs an explicit Runge-Kutta solver; got Rodas5P. Use jaxode.Discrete"),
        ({"steer": 2, "t0": 1.0, "t1": -1.0}, "must be less than the span |t1 - t0| = 2.0; got 2."),
        ({"axis_name": "batch", "batch": "per_sample"}, "^cnf(axis_name='batch'): joins the~"
         "a batch that is split over devices; with batch='per_sample' each sample has its own."),
        ({"atol": [1e-5, 1e-5]}, "must be a scalar; got shape (2,)."),
        *(
            ({"f": MODEL, "t0": t0, "t1": t1}, "^cnf(t0=..., t1=...): a probability flow~"
             f"noise, the base, at 1 to its data at 0; got t0={float(t0)} and t1={float(t1)}.")
            for t0, t1 in ((0.0, 1.0), (0.1, 0.9), (1000, 0), (1.0, -0.1))
        ),
    ],
    ("probability_flow", TypeError): [
        ({"model": nn.MLP}, "must be a function model(t, z, args); got the class MLP. Pass an ins"),
        ({"path": 3}, "must have functions of time drift, diffusion, mean_scale and std; got 3 ~"
         "drift, diffusion, mean_scale, std. Use jaxode.VariancePreserving()."),
        ({"path": jaxode.VariancePreserving}, "must be a path; got the class VariancePreserving."),
    ],
    ("VariancePreserving", ValueError): [
        ({"beta_min": least, "beta_max": 1}, "^VariancePreserving(beta_min=..., beta_max=...): ~"
         f"at least 0, finite and in rising order; got {least!r} and 1.")
        for least in (2.0, True, "a", None)
    ],
    ("VarianceExploding", ValueError): [
        ({"sigma_min": 0.0}, "^VarianceExploding(sigma_min=..., sigma_max=...): must be positive, "
         "finite and in rising order; got 0.0 and 50.0."),
    ],
    ("nll", ValueError): [
        ({"divergence": HUTCHINSON}, "^hutchinson: a stochastic divergence needs random numbers;"),
        ({"divergence": divergence.hutchinson(3, "orthogonal"), "key": KEY}, "^hutchinson(~"
         "distribution='orthogonal'): at most one probe per dimension; got 3 for 2 dimensions."),
        ({"divergence": PER_PROBE}, f"^cnf(divergence=...): {OF_EACH}"),
        ({"regularizers": (PER_NUMBER,)}, f"^cnf(regularizers=...): {OF_EACH}"),
        ({"steer": 0.1}, "^nll: steer=0.1 needs random numbers; got key=None. Pass key=jax.random"),
        *(
            ({"divergence": given, "regularizers": (jacobian_frobenius(0.1),)}, "^nll: a ~"
             f"needs the norm of the Jacobian, which the divergence ({called}) does not provide")
            for given, called in ((OWN, "a custom divergence"), (CLOSED_FORM, "closed form"))
        ),
        ({"divergence": CLOSED_FORM},
         "^closed_form: the vector field offers no value_and_divergence(t, z, args) for these arg"),
        ({"f": Closed()}, "^value_and_divergence(t, z, args): must return the derivative and a ~"
         "divergence of one sample; got shapes ((2,), (2,))."),
        ({"base": OF_COORDINATES}, "^~ one number per sample, shape (3,); got (3, 2)"),
    ],
    ("log_prob", ValueError): [
        ({"base": OF_COORDINATES}, "^~ one number per sample, shape (3,); got (3, 2)"),
        ({"divergence": PER_PROBE}, f"^cnf(divergence=...): {OF_EACH}"),
        ({"f": nn.field, "params": nn.MLP(2, key=KEY, context_size=3)}, "^MLP(context_size=3): the "
         "context of a sample must be a vector of this size, and None for size 0; got shape None."),
    ],
    ("log_prob_and_error", ValueError): [
        ({"divergence": HUTCHINSON, "key": KEY}, "^~ needs a divergence with at least two probes"),
    ],
    ("sample", TypeError): [
        ({"key": NETWORK, "params": KEY}, "must be a key of jax.random; got MLP. Pass jax.random"),
    ],
    ("matching_loss", TypeError): [
        ({"coupling": optimal_transport}, "must be a Coupling; got <function optimal_transport at"),
        ({"coupling": Coupling(None)}, "must be a Coupling; got ~. Use a function of jaxode.co"),
        ({"coupling": Coupling(optimal_transport)}, "must be a Coupling; got Coupling(pair=<funct"),
        *(
            (pairing(rows), f"must return an array of row numbers~; got {type(rows).__name__}.")
            for rows in ([0, 1, 2], (0, 1, 2), "012")
        ),
    ],
    ("matching_loss", ValueError): [
        ({"x0": X[:2]}, "must have one start sample for each of the 3 rows of x; got 2."),
        ({"base": Base(lambda shape: (3, 2))}, "^cnf(base=...): sample(key, ()) must have the sha"),
        ({"weights": jnp.ones(3), "coupling": optimal_transport(8)}, f"{PAIRED}weights with _Opti"),
        ({"context": X, "coupling": optimal_transport(8)},
         "^optimal_transport(condition_weight=...): must be given with a context; got None. Pass"),
        (pairing(jnp.arange(2)), f"{ROWS_OF}int64 of shape (2,)."),
        (pairing(jnp.ones(3)), f"{ROWS_OF}float64 of shape (3,)."),
        ({"time_power": ONE}, "must be a scalar; got shape (2,)."),
        ({"t1": 1e8 + 5, "t0": 1e8, "x": X.astype("f4")},
         "^matching_loss(t0=..., t1=...): the span from 100000000.0 to 100000005.0 is lost"),
    ],
    ("optimal_transport of a batch", ValueError): [
        ({"context": None, "condition_weight": 1.0},
         "^matching_loss(context=...): must be given where its distance counts; got None"),
    ],
    ("reverse_kl_loss", ValueError): [
        ({"log_density": lambda x: x}, "must return a floating scalar~; got float64 of shape (2,)"),
        ({"log_density": lambda x: 1}, "must return a floating scalar~; got int"),
        ({"n": 0}, "must have at least one row; got shape (0, 2)"),
    ],
    **{
        (f"log_prob of a {base}", ValueError): [
            ({"z": jnp.ones(shape), "n": event}, "must have shape (..., *event)")
            for event, shape in ((3, (4, 2)), (1, (4, 3)), ((2, 3), (3,)), (1, ()))
        ]
        for base in ("base", "learned base")
    },
    ("MLP of a sample", ValueError): [({"context": ONE}, "^MLP(context_size=0): ~; got shape (2,")],
    ("MLP of a sample", TypeError): [
        ({"context": NETWORK}, "^MLP(t, y, context): the context must be a vector; got a network."),
    ],
    ("Residual of a sample", ValueError): [
        ({"context": ONE}, "^Residual(context_size=3): ~; got shape (2,). Pass such a context"),
    ],
    ("Residual of a sample", TypeError): [
        ({"context": NETWORK}, "^Residual(t, y, context): the context must be a vector; got a net"),
        ({"y": CONTEXTS[0], "context": CONTEXTS[0]}, "^Residual(event_shape=...): ~; got a sample"),
    ],
    ("Particles of a sample", TypeError): [
        ({"y": jnp.ones(4)}, "^Particles(n, dim=...): ~6 numbers"),
        ({"y": jnp.ones((2, 3))}, "^Particles(n, dim=...): ~(2, 3)"),
    ],
    ("Lattice of a sample", TypeError): [({"y": jnp.ones((2, 3))}, "^Lattice(shape=...): ~(2, 3)")],
    ("MLP", TypeError): [({"widths": 8}, "must be a sequence, one size for each hidden~; got 8.")],
    ("Particles", ValueError): [
        ({"n": 1}, "must be ~ at least 2; got 1."), ({"reach": 0.0}, "~; got 0.0."),
    ],
    ("Lattice", ValueError): [({"shape": (2,) * 4}, "~one to three axes")],
}  # fmt: skip
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
DENSITIES = {
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
        ({"support": (-9.0, 9.0), "flow": CENTRED}, "needs a base with"),
        ({"standardize": (0.0, 3.0), "flow": CENTRED}, "needs a base with"),
    ],
    ("with_flow", ValueError): [({"flow": CENTRED}, "needs a base with")],
    ("bind", TypeError): [
        *(({"standardize": given}, words) for given, words in STANDARDIZE[TypeError]),
        ({"flow": NETWORK}, "must be made by jaxode.cnf"),
        ({"params": nn.MLP}, "must be a pytree of parameters; got the class MLP. Call it"),
        ({"standardize_context": {"a": np.full(40, "a")}}, "must be an array of numbers; got an a"),
        ({"standardize_context": {"a": 3.0}}, "must be the data, or (mean, scale); got 3.0. Pass"),
        ({"standardize_context": {"a": normal(TABLE)}}, "a context has affine maps only; ~ Pass t"),
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
