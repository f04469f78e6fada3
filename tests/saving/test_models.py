"""Models as files: the same numbers in another process, and a sentence for each broken file."""

import functools
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import optional

import jaxode
from jaxode.nn import Ensemble, Residual
from jaxode.saving import registry
from jaxode.saving.container import DESCRIPTION, VERSION
from jaxode.saving.reader import Reader
from jaxode.saving.writer import Writer

KEY = jax.random.key(0)
DATA = np.random.default_rng(0).gamma(4.0, 250.0, (60, 2))
FLOW = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), steps=2)
KEPT = Path(__file__).parent / "files"


def decay(t, y, params):
    return -params["k"] * y


def bound(params, flow=FLOW, **options):
    return jaxode.bind(flow, params, standardize=DATA, support=(0.0, jnp.inf), **options)


def small(key, size=2, **options):
    return Residual(size, 4, 1, key=key, **options)


class Own(eqx.Module):
    """A network of a user."""

    weight: jax.Array
    activation: object

    def __call__(self, t, y):
        return self.activation(self.weight @ y)


def bent(x):
    """An activation of the user, which JAX takes for static."""
    return jnp.tanh(x)


OWN = Own(jnp.eye(2), bent)


@functools.cache
def estimate():
    ts = jnp.linspace(0.1, 2.0, 5)
    start = {"k": jnp.array([0.9])}
    return jaxode.estimate(decay, jnp.ones(1), ts, jnp.exp(-0.7 * ts)[:, None], start, noise=0.1)


def equal(a, b):
    return bool(eqx.tree_equal(a, b)) and jax.tree.structure(a) == jax.tree.structure(b)


def reloaded(path, model, like=None):
    jaxode.save(path / "model", model)
    return jaxode.load(path / "model", like)


NETWORKS = {
    "MLP": lambda: jaxode.nn.MLP(2, (3,), key=KEY),
    "Concat": lambda: jaxode.nn.Concat(2, (3,), key=KEY),
    "ConcatSquash": lambda: jaxode.nn.ConcatSquash(2, (3,), activation=jnp.sin, key=KEY),
    "PotentialGradient": lambda: jaxode.nn.PotentialGradient(2, (3,), key=KEY),
    "Residual": lambda: small(KEY),
    "Ensemble": lambda: Ensemble(small, 2, key=KEY),
    "Mixer": lambda: jaxode.nn.Mixer((4, 4), 2, 3, 1, key=KEY),
    "DeepSet": lambda: jaxode.nn.DeepSet(2, 3, key=KEY),
    "Lattice": lambda: jaxode.nn.Lattice((4, 4), key=KEY),
    "Particles": lambda: jaxode.nn.Particles(3, 2, key=KEY),
}
FLOWS = {
    "solver, adjoint and tolerances": {
        "solver": diffrax.Dopri8(), "adjoint": jaxode.BacksolveAdjoint(), "rtol": 1e-3,
        "atol": 0.1,
    },
    "stiff": {"solver": jaxode.Rodas5P(), "adjoint": jaxode.ForwardMode()},
    "divergence and costs": {
        "divergence": jaxode.divergence.hutchinson(2, "gaussian"),
        "regularizers": (
            jaxode.regularizers.kinetic_energy(0.1), jaxode.regularizers.jacobian_frobenius(0.2),
        ),
    },
    "breakpoints": {"breakpoints": (0.5,), "steps": None, "max_steps": np.int64(99)},
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, tmp_path):
    network = NETWORKS[name]()
    assert equal(reloaded(tmp_path, network), network)


@pytest.mark.parametrize("name", FLOWS)
def test_options_of_flows(name, tmp_path):
    base = jax.tree.map(lambda leaf: leaf + 0.5, jaxode.diagonal_normal(2))
    density = bound(small(KEY), jaxode.cnf(jaxode.nn.field, base, t1=2.0, **FLOWS[name]))
    assert equal(reloaded(tmp_path, density), density)


MAPS = {
    "whitened": lambda: jaxode.bind(FLOW, small(KEY), standardize=jaxode.standardize.whiten(DATA)),
    "normal": lambda: jaxode.bind(FLOW, small(KEY), standardize=jaxode.standardize.normal(DATA)),
    "contexts": lambda: bound(
        small(KEY, context_size=3), context_shape=(3,), embed=None
    ),
    "on a circle": lambda: jaxode.bind(
        jaxode.cnf(jaxode.nn.field, jaxode.torus(2), steps=2), small(KEY, period=2 * np.pi)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_densities(name, tmp_path):
    density = MAPS[name]()
    assert equal(reloaded(tmp_path, density), density)


def test_a_density_gives_the_same_numbers(tmp_path):
    density = bound(small(KEY))
    again = reloaded(tmp_path, density)
    assert (again.log_prob(DATA) == density.log_prob(DATA)).all()
    assert (again.sample(KEY, (3,)) == density.sample(KEY, (3,))).all()


def test_a_state_of_a_training(tmp_path):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    params = {"network": small(KEY), "scale": jnp.float32(3.0), "half": jnp.bfloat16(1.5)}
    arrays = eqx.filter(params, eqx.is_inexact_array)
    state = params, optimizer.init(arrays), jax.random.key(7), 12, [float("inf"), None, "a"]
    again = reloaded(tmp_path, state)
    assert equal(again[:2] + again[3:], state[:2] + state[3:])
    assert again[0]["half"].dtype == jnp.bfloat16
    assert (jax.random.normal(again[2]) == jax.random.normal(state[2])).all()


def test_an_estimate(tmp_path):
    model = estimate()
    again = reloaded(tmp_path, model, decay)
    assert equal(again, model)
    assert repr(again) == repr(model)
    assert equal(again.predict(jnp.array([0.3])), model.predict(jnp.array([0.3])))


def test_a_population(tmp_path):
    """Its field is passed again, and predicts a new subject."""
    ts, factors = jnp.linspace(0.2, 1.0, 4), jnp.array([[0.8], [1.0], [1.1], [1.3]])
    ys = jnp.exp(-0.7 * factors * ts[None]) + jnp.array([[0.01, -0.02, 0.02, -0.01]])
    start, vary = {"k": 0.7}, {"k": 0.2}
    model = jaxode.estimate_population(
        decay, jnp.ones((4, 1)), ts, ys[..., None], start, vary, pool=False
    )
    again = reloaded(tmp_path, model, decay)
    assert equal(again, model)
    assert repr(again) == repr(model)
    subject = {"y0": jnp.full(1, 2.0)}
    assert equal(again.predict(ts, **subject), model.predict(ts, **subject))


LIKES = {
    "alone": OWN,
    "by name": {"Own": OWN},
    "as a template": bound(Own(jnp.zeros((2, 2)), bent)),
}


@pytest.mark.parametrize("way", LIKES)
def test_a_network_of_the_user(way, tmp_path):
    density = bound(Own(jnp.array([[1.0, 2.0], [3.0, 4.0]]), bent))
    assert equal(reloaded(tmp_path, density, LIKES[way]), density)


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_the_types_of_a_table(library, tmp_path):
    """Frames without rows, which samples of a table are made like."""
    import narwhals as nw

    pytest.importorskip(library) if library == "pyarrow" else optional(library)
    types = {
        "i": nw.Int32(), "x": nw.Float32(), "s": nw.String(), "b": nw.Boolean(),
        "t": nw.Datetime("us", "Europe/Berlin"), "c": nw.Categorical(),
    }  # fmt: skip
    frame = nw.from_dict({name: [] for name in types}, schema=types, backend=library)
    again = Reader([], {}).build(json.loads(json.dumps(Writer().describe(frame))))
    assert again.schema == frame.schema
    assert again.implementation == frame.implementation


def test_categories_of_pandas_keep_their_order():
    import narwhals as nw
    import pandas

    column = pandas.Categorical([], categories=["low", "high"], ordered=True)
    frame = nw.from_native(pandas.DataFrame({"a": column}), eager_only=True)
    again = Reader([], {}).build(json.loads(json.dumps(Writer().describe(frame)))).to_native()
    assert again.dtypes["a"] == column.dtype


def test_the_same_model_gives_the_same_file_and_a_failure_leaves_the_old_one(tmp_path):
    for name in ("a", "b"):
        jaxode.save(tmp_path / name, bound(small(KEY)))
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes()
    with pytest.raises(TypeError, match=r"save\(model=...\).* got a object at \['x'\]"):
        jaxode.save(tmp_path / "a", {"x": object()})
    assert (tmp_path / "a").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_names_of_classes_and_functions():
    for name in registry.CLASSES:
        assert registry.name_of_class(registry.class_of_name(name)) == name
    for name in registry.FUNCTIONS:
        function = registry.function_of_name(name)
        assert function is None or registry.name_of_function(function) is not None
    forbidden = "os.system", "jax.nn.os", "jax.numpy.save", "numpy.load"
    for name in (*forbidden, "optax.adam", "diffrax.diffeqsolve", ""):
        assert registry.class_of_name(name) is None
        assert registry.function_of_name(name) is None


@pytest.mark.parametrize("path", sorted(KEPT.glob("*")), ids=lambda path: path.name)
def test_files_of_earlier_versions(path, default_settings):
    """Each holds a model in float32, a method, its inputs, and what it returned."""
    like = {"decay": decay} if path.name.startswith("estimate") else None
    model, method, inputs, expected = jaxode.load(path, like)
    if path.name.startswith("table"):
        inputs = (pytest.importorskip("pandas").DataFrame(inputs[0]),)
    returned = getattr(model, method)(*inputs)
    for a, b in zip(jax.tree.leaves(returned), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4)  # rounding differs between processors


WRITE = """
import sys, jax, jaxode
density = jaxode.load(sys.argv[1])
x = density.sample(jax.random.key(1), (4,))
jaxode.save(sys.argv[2], (x, density.log_prob(x)))
"""


@pytest.mark.slow  # starts a process
def test_another_process_computes_the_same_bits(tmp_path):
    density = bound(small(KEY))
    jaxode.save(tmp_path / "a", density)
    subprocess.run(
        [sys.executable, "-c", WRITE, tmp_path / "a", tmp_path / "b"], check=True,
        env={**os.environ, "JAX_ENABLE_X64": "1"},
    )  # fmt: skip
    x, log_prob = jaxode.load(tmp_path / "b")
    assert (x == density.sample(jax.random.key(1), (4,))).all()
    assert (log_prob == density.log_prob(x)).all()


def edited(**changes):
    """The file of a small model with another description."""

    def edit(path):
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        header = json.loads(parts[DESCRIPTION]) | changes
        parts[DESCRIPTION] = json.dumps(header).encode()
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, data)

    return edit


def replaced(name, data):
    """The file with another member, or without it."""

    def edit(path):
        with zipfile.ZipFile(path) as archive:
            parts = {member: archive.read(member) for member in archive.namelist()}
        parts[name] = data
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in parts.items():
                if content is not None:
                    archive.writestr(member, content)

    return edit


def npy(array, **options):
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"\x93NUMPY") + 130] ^= 255
    path.write_bytes(data)


ARRAY = {"array": 0, "dtype": "<f4", "of": "jax"}
BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "was not written by jaxode.save: it starts with"),
    "text": (lambda path: path.write_text("a,b"), "it starts with b'a,b'"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(1)), "it starts with"),
    "cut": (cut, "is a part of a file"),
    "a bit flipped": (flipped, "is damaged .*Bad CRC-32"),
    "of NumPy": (replaced(DESCRIPTION, None), "it has no model.json"),
    "another description": (edited(format="other"), "it has another model.json"),
    "no JSON": (replaced(DESCRIPTION, b"{"), "is damaged .JSONDecodeError"),
    "a list": (replaced(DESCRIPTION, b"[]"), "it has another model.json"),
    "too deep": (replaced(DESCRIPTION, b"[" * 100_000), "is damaged .RecursionError"),
    "no version": (edited(version="new"), "the version 'new'"),
    "a version of no kind": (edited(version=True), "the version True"),
    "later": (edited(version=VERSION + 1), "Update jaxode"),
    "an array less": (replaced("0.npy", None), "has no array 0|is damaged"),
    "objects": (replaced("0.npy", npy(np.array([{}]), allow_pickle=True)), "is damaged"),
    "half an array": (replaced("0.npy", npy(np.ones(9))[:-8]), "is damaged"),
    "half a header": (replaced("0.npy", npy(np.ones(9))[:40]), "is damaged"),
    "another dtype": (replaced("0.npy", npy(np.ones(2, int))), "numbers of int64 for float64"),
    "no number": (edited(model={"number": "many"}), "is damaged .ValueError"),
    "a class": (edited(model={"class": "Popen", "fields": {}}), "a Popen, which this version"),
    "a function": (edited(model={"function": "os.system"}), "the function os.system, which"),
    "other fields": (edited(model={"class": "Affine", "fields": {"a": 1}}), "whose .*'a'"),
    "no such array": (edited(model=ARRAY | {"array": 9}), "no array 9"),
    "no node": (edited(model={"what": 1}), "has \\['what'\\] at its top"),
    "half a node": (edited(model={"class": "Affine"}), "is damaged .KeyError: 'fields'"),
    "another frame": (edited(model={"frame": "os", "columns": []}), "is damaged .ValueError: os"),
    "a network": (edited(model={"like": "Own"}), "Pass like=..., your Own"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_gets_a_sentence(name, tmp_path):
    damage, sentence = BROKEN[name]
    jaxode.save(tmp_path / "model", jnp.ones(2))
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=sentence):
        jaxode.load(tmp_path / "model")


WRONG_LIKES = {
    "shape": (Own(jnp.eye(3), jnp.tanh), r"\[2, 2\] for Own.weight, where like= has .*\[3, 3\]"),
    "dtype": (Own(jnp.eye(2, dtype=int), jnp.tanh), "float64.* where like= has int64"),
    "fewer": ({"Own": jnp.tanh}, r"Own\.\w+, which like= lacks"),
    "kind": ([OWN], "must be a dictionary of .*'Own'.*, or like the model"),
    "another density": (bound(small(KEY)), "like= lacks|does not have"),
}


@pytest.mark.parametrize("name", WRONG_LIKES)
def test_a_template_that_does_not_fit_gets_a_sentence(name, tmp_path):
    jaxode.save(tmp_path / "model", bound(OWN))
    like, sentence = WRONG_LIKES[name]
    with pytest.raises(ValueError, match=sentence):
        jaxode.load(tmp_path / "model", like)


def test_numbers_of_64_bits_need_them(tmp_path):
    jaxode.save(tmp_path / "model", jnp.ones(2))
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        jaxode.load(tmp_path / "model")
    with jax.enable_x64(False):
        jaxode.save(tmp_path / "model", jnp.ones(2))
    assert jaxode.load(tmp_path / "model").dtype == jnp.float32


REFUSED = {
    "of objects": (lambda: np.array([{}]), "with the dtype object"),
    "masked": (lambda: np.ma.masked_array([1.0], [True]), "with a mask"),
    "structured": (lambda: np.zeros(1, [("a", float)]), "with the dtype"),
    "a file": (lambda: io.BytesIO(), "got a BytesIO at its top"),
    "in itself": (lambda: LOOP, "must not hold itself"),
    "in a dictionary": (lambda: {1: object(), "a": 2}, r"got a object at \[1\]"),
}
LOOP: list[object] = []
LOOP.append(LOOP)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_file_can_hold_is_refused(name, tmp_path):
    make, sentence = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=sentence):
        jaxode.save(tmp_path / "model", make())
    assert not list(tmp_path.iterdir())


def test_a_traced_model_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"outside of jax\.jit"):
        jax.jit(lambda x: jaxode.save(tmp_path / "model", x))(1.0)
    with pytest.raises(FileNotFoundError, match="Make the folder"):
        jaxode.save(tmp_path / "none" / "model", 1.0)


def test_numbers_of_every_kind(tmp_path):
    model = {
        "weak": jnp.asarray(0.7), "strong": jnp.array([0.7]), "small": jnp.float8_e5m2(0.5),
        "complex": 1 - 2j, "number": np.float32(3), "time": np.datetime64("2020-01-01"),
        "list": [np.int8(1), -0.0], "text": np.array(["a", "bc"]),
    }  # fmt: skip
    again = reloaded(tmp_path, model)
    assert again["weak"].weak_type
    assert not again["strong"].weak_type
    assert jax.tree.map(type, again) == jax.tree.map(type, model)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(model)))
    assert reloaded(tmp_path, {("a", 1): 2, "b": ()}) == {("a", 1): 2, "b": ()}


def test_categories_of_pandas_that_are_intervals_and_times(tmp_path):
    pandas = pytest.importorskip("pandas")
    import narwhals as nw

    values = pandas.cut([1.0, 5.0], [0, 2, 6])
    frame = pandas.DataFrame({"size": values, "day": pandas.Categorical([pandas.Timestamp(0)] * 2)})
    writer = Writer()
    node = json.loads(json.dumps(writer.describe(nw.from_native(frame[:0], eager_only=True))))
    again = Reader(writer.arrays, {}).build(node).to_native()
    assert (again.dtypes == frame.dtypes).all()
    for value in (values[0], pandas.Timestamp("2020-01-01", tz="Europe/Berlin")):
        assert reloaded(tmp_path, value) == value
