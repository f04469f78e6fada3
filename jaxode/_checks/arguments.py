"""Checks of types, shapes and dtypes: each error names function, argument, rule and remedy."""

import inspect
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from jaxode._checks.caller import arg, caller
from jaxode._checks.rules import NOT_NAN, Rule, is_eager, is_known
from jaxode._jax.sharding import AxisName, axes_of, unmapped

Time = float | Real[Array, ""]

PYTHON_NUMBERS = float | int | complex | bool


def is_list_of_numbers(value: Any) -> bool:
    """Whether it is a list, also of lists, of Python's numbers. Each would be a leaf."""
    numbers = (isinstance(leaf, PYTHON_NUMBERS) for leaf in jax.tree.leaves(value))
    return isinstance(value, list) and all(numbers)


def as_array(value: Any, dtype: jnp.dtype) -> Any:
    """The number as an input of a compiled program. NumPy converts Python numbers at no cost."""
    return (np if isinstance(value, int | float) else jnp).asarray(value, dtype)


def integer(name: str, value: Any, least: int = 1, rule: str = "", cure: str = "") -> int:
    """The value as an `int` of at least `least`. NumPy integers are accepted."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        rule = rule or ("a positive integer" if least == 1 else f"an integer of at least {least}")
        raise ValueError(f"{arg(name)} must be {rule}; got {value!r}.{cure}")
    return number


def is_number(value: Any) -> bool:
    """Whether it is a real number of Python or NumPy, which True is not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def non_negative(
    name: str, value: Any, rule: str = "a Python number, finite and at least 0"
) -> float:
    """The value, if it is a finite Python number of at least zero."""
    if not is_number(value) or not 0 <= value < float("inf"):
        raise ValueError(f"{arg(name)} must be {rule}; got {value!r}.")
    return float(value)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless the value is one of the choices: words, integers and None."""
    kind = isinstance(value, str | int | None) and not isinstance(value, bool)  # True == 1
    if not kind or value not in choices:
        *words, last_word = map(repr, choices)
        raise ValueError(f"{arg(name)} must be {', '.join(words)} or {last_word}; got {value!r}.")


def check_number(name: str, value: Any, *rules: Rule, kind: str = "number") -> None:
    """Raise unless the value is a real scalar that is not known to break one of the rules."""
    if not isinstance(value, float):  # Most are floats and need no array.
        check_real(name, value, f"real {kind}")
        if np.shape(value) != ():
            scalar, shape = f"scalar {kind}".removesuffix(" number"), np.shape(value)
            raise ValueError(f"{arg(name)} must be a {scalar}; got shape {shape}.")
    for rule in rules:
        rule.check(value, name=name)


def check_real(name: str, value: Any, kind: str = "real number") -> None:
    """Raise unless JAX accepts the value as an array of real numbers."""
    dtype = numeric_dtype(value)
    if dtype is None or not jnp.issubdtype(dtype, jnp.number):
        raise TypeError(f"{arg(name)} must be a {kind}; got {value!r}.")
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{arg(name)} must be a {kind}; got a complex number.")


def check_real_times(name: str, value: Any) -> None:
    """Raise unless JAX accepts the value as an array of times."""
    check_real(name, value, "vector of real times")


def check_bool(name: str, value: Any) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{arg(name)} must be True or False; got {value!r}.")


def numbers(name: str, x: Any, real: bool = True) -> Any:
    """An array of numbers, `real` or not. Raises for text, objects and masked arrays."""
    if is_known(x) and not isinstance(x, jax.Array | np.ndarray):
        try:
            x = np.asarray(x)
        except ValueError:
            raise TypeError(
                f"{arg(name)} must be an array of numbers; got a {type(x).__name__} whose entries "
                "differ in shape. Fill or cut them to one shape."
            ) from None
    x = native(x)
    if isinstance(x, np.ndarray) and numeric_dtype(x) is None:
        raise TypeError(
            f"{arg(name)} must be an array of numbers; got {described(x)}. Encode text as numbers "
            "or leave it out, fill what is masked, and convert with .astype(np.float32)."
        )
    if real and jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        raise TypeError(f"{arg(name)} must be real; got {x.dtype}. Pass real and imaginary parts.")
    return x


def check_scalar(name: str, value: Any, rule: str, cure: str) -> Float[Array, ""]:
    """Check that the user's function, argument `name`, returned a floating scalar."""
    dtype = numeric_dtype(value) if jax.tree_util.all_leaves([value]) else None
    if dtype is None or jnp.shape(value) != () or not jnp.issubdtype(dtype, jnp.floating):
        got = type(value).__name__ if dtype is None else f"{dtype} of shape {jnp.shape(value)}"
        raise ValueError(f"{arg(name)} {rule}; got {got}. {cure}")
    return jnp.asarray(value)


def check_not_traced(does: str, *values: PyTree) -> None:
    """Raise if a value is traced, for a function that `does` what a program cannot."""
    if not is_eager(values):
        raise ValueError(
            f"{caller()}: {does}, so it runs outside jax.jit, jax.grad and jax.vmap; got arguments "
            "that are traced. Call it between training steps."
        )


def takes(function: Any, *args: Any) -> bool:
    """Whether the function accepts these arguments, as far as Python knows."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:
        return True  # not known
    return True


def native(tree: PyTree) -> PyTree:
    """The tree with NumPy arrays in native byte order, the only one that JAX accepts."""
    if not any(map(_is_foreign, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(
        lambda x: x.astype(x.dtype.newbyteorder("=")) if _is_foreign(x) else x, tree
    )


def _is_foreign(x: Any) -> bool:
    """Whether it is a NumPy array in another byte order."""
    return isinstance(x, np.ndarray | np.generic) and not x.dtype.isnative


def described(value: Any) -> str:
    """Describe a value for the message that refuses it."""
    if isinstance(value, np.ma.MaskedArray):
        return "a masked array, whose entries may have no value"
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return f"an array of {value.dtype}"
    return type(value).__name__


def check_integers(name: str, value: Any) -> None:
    """Raise for integers of NumPy that JAX would wrap, since its dtype does not hold them."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "iu" and value.size:
        dtype = jax.dtypes.canonicalize_dtype(value.dtype)
        if dtype != value.dtype:
            held = jnp.iinfo(dtype)
            if value.min() < held.min or value.max() > held.max:
                raise ValueError(
                    f"{arg(name)} integers must fit {dtype}; got {value.min()} to {value.max()}. "
                    "Convert them with .astype(np.float32), or set jax_enable_x64."
                )


def check_args(name: str, args: PyTree) -> PyTree:
    """The arguments. Raises for NumPy arrays whose dtype JAX does not have."""
    args = native(args)
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, np.ndarray | np.generic) and numeric_dtype(leaf) is None:
            raise TypeError(
                f"{arg(name)} arrays must be numeric; got {described(leaf)}. "
                "Encode it as numbers, or let the vector field close over it."
            )
        check_integers(name, leaf)
    return args


def floating(x: Any) -> Array:
    """A floating array of at least float32. Integers get the default floating dtype."""
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    # Cast first: JAX wraps integers that are too large for int32.
    return jnp.asarray(x.astype(floating_dtype(x.dtype)))


def floating_dtype(dtype: Any) -> Any:
    """The dtype of `floating` for an array of this dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = float
    elif jnp.finfo(dtype).bits < 32:
        dtype = jnp.float32
    # `jnp.result_type` warns of a float64 that JAX does not have.
    return jax.dtypes.canonicalize_dtype(dtype)


def state_dtype(y0: PyTree) -> jnp.dtype:
    """The dtype in which a state is solved: common to its leaves, at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        # By dtype: a weakly typed float64 would otherwise lose to float32.
        return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(y0)))


def check_state(name: str, y0: PyTree) -> PyTree[Array]:
    """The state as floating arrays."""
    y0 = native(y0)
    leaves = jax.tree.leaves(y0)
    if not leaves:
        raise ValueError(f"{arg(name)} must hold at least one array; got {y0!r}.")
    if is_list_of_numbers(y0):
        raise TypeError(
            f"{arg(name)} must be an array or a pytree of arrays; got a list of numbers, "
            "which the vector field would get as a list. Pass jnp.array of it."
        )
    for leaf in leaves:
        array = isinstance(leaf, jax.Array | np.ndarray | np.generic | PYTHON_NUMBERS)
        dtype = numeric_dtype(leaf) if array else None
        if dtype is None:
            cure = "Pass things that are not part of the state in args."
            if isinstance(leaf, np.ndarray | np.generic) and np.issubdtype(leaf.dtype, np.number):
                cure = "Convert it to a JAX array, and fill what is masked."
            raise TypeError(
                f"{arg(name)} leaves must be floating arrays; got {described(leaf)}. {cure}"
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            cure = "Write 1.0 for 1, or convert with .astype(jnp.float32)."
            if jnp.issubdtype(dtype, jnp.complexfloating):
                cure = "Pass real and imaginary parts, such as (y.real, y.imag)."
            raise TypeError(f"{arg(name)} leaves must have a floating dtype; got {dtype}. {cure}")
    return jax.tree.map(jnp.asarray, y0)


def shape_of(leading: str, event: tuple[int, ...]) -> str:
    """A shape for messages, such as [n, 13]."""
    return f"[{', '.join(map(str, (leading, *event)))}]"


def check_batch(name: str, z: PyTree) -> PyTree[Array]:
    """The states as arrays with a common leading axis."""
    z = check_state(name, z)
    shapes = [leaf.shape for leaf in jax.tree.leaves(z)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"{arg(name)} leaves must share a leading batch axis; got shapes {shapes}. "
            "Use solve without batch for a single system."
        )
    return z


def check_axis(axis_name: AxisName | None) -> None:
    """Raise unless the call is mapped over `axis_name`."""
    if missing := unmapped(axis_name):
        raise ValueError(
            f"{arg('axis_name', axis_name)} must name axes that jax.shard_map or jax.vmap maps "
            f"around this call; got {missing}, which none does here. Use the name in the mesh, or, "
            "outside, leave axis_name out: the parameters stay the same."
        )


def check_same_times(times: PyTree, axis_name: AxisName | None) -> None:
    """Raise if devices that take the same steps have different times."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    differ = sorted(axes_of(times).intersection(names))
    if differ:
        raise ValueError(
            f"{arg('axis_name', axis_name)} the devices take the same steps, so times and step "
            f"sizes must be the same on all; got some that vary over {differ}. Compute them from "
            "what all devices share."
        )


def check_derivative(
    y: PyTree,
    dy: PyTree,
    hint: str = "",
    name: str = "f",
    call: str = "f(t, y, args)",
    casts: bool = False,
) -> None:
    """Raise unless what a `call` returned has the structure, shapes and precision of the state.

    The `hint` follows the message for a wrong shape. If the caller `casts`, numbers without a
    precision of their own, as Python's, will do.
    """
    must = f"{arg(name)} {call} must"
    if jax.tree.structure(dy) != jax.tree.structure(y):
        structure, got, cure = jax.tree.structure(y), jax.tree.structure(dy), ""
        if jax.tree_util.treedef_is_leaf(structure):
            structure, got, cure = (
                "an array",
                type(dy).__name__,
                " Return one array: join numbers by jnp.stack.",
            )
        if dy is None:
            got, cure = "None", " End it with return."
        raise ValueError(f"{must} return the structure of y, {structure}; got {got}.{cure}")
    for expected, actual in zip(jax.tree.leaves(y), jax.tree.leaves(dy), strict=True):
        if not isinstance(actual, jax.Array | np.ndarray | np.generic | float | int | complex):
            raise TypeError(f"{must} return arrays; got {type(actual).__name__}.")
        if expected.shape != jnp.shape(actual):
            raise ValueError(
                f"{must} return the shapes of y; got {jnp.shape(actual)} where y has "
                f"{expected.shape}. {call.partition('(')[0]} sees one sample of a batch.{hint}"
            )
        dtype = jnp.result_type(actual)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{must} return floating arrays; got {dtype}.")
        if casts:  # what is weakly typed takes the precision that it meets
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.result_type(actual, expected.dtype)
        if jnp.finfo(dtype).bits > max(jnp.finfo(expected.dtype).bits, 32):
            raise TypeError(
                f"{must} not return more precision than y has; got {dtype} where y is "
                f"{expected.dtype}. Convert args, or y (the parameters of a flow, or its data), to "
                "the other dtype."
            )


def check_jacobian(n: int, jacobian: Any) -> None:
    """Raise unless what `jacobian(t, y, args)` returned is a real matrix for `n` numbers."""
    must = f"{arg('solver')} jacobian(t, y, args) must return"
    dtype = numeric_dtype(jacobian) if isinstance(jacobian, Array | np.ndarray) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = type(jacobian).__name__ if dtype is None else dtype
        raise TypeError(f"{must} a floating array; got {got}. Stack numbers by jnp.array.")
    if jnp.shape(jacobian) != (n, n):
        raise ValueError(
            f"{must} the shape {(n, n)}, for the {n} numbers in the state of one sample; got "
            f"{jnp.shape(jacobian)}. Entry [i, j] is the derivative of number i of f by number j "
            "of y."
        )


def check_breakpoints(value: Any) -> None:
    """Raise unless the value holds times, shared or of each row, that are not known to be NaN."""
    check_real_times("breakpoints", value)
    shape = jnp.asarray(value).shape
    if len(shape) not in (1, 2):
        raise ValueError(
            f"{arg('breakpoints')} must be a vector of times, or one for each row; got shape "
            f"{shape}. Pad shorter rows with infinity."
        )
    NOT_NAN.check(value, name="breakpoints")


def numeric_dtype(value: Any) -> Any:
    """The dtype of a value that JAX accepts as an array. None for anything else."""
    # JAX would read a string as the name of a dtype, and rejects masked arrays.
    if isinstance(value, str | np.ma.MaskedArray):
        return None
    try:
        return jnp.result_type(value if hasattr(value, "dtype") else jnp.asarray(value))
    except (TypeError, ValueError, OverflowError):
        return None
