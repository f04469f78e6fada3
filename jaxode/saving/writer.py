"""Describe a model in JSON, which refers to its arrays by number.

null, true, 3, 0.1, "text"              themselves
{"number": "inf"}, {"complex": "1j"}    numbers that JSON lacks
[...]                                   a tuple
{"list": [...]}, {"dict": [[k, v]...]}  other containers
{"array": 0, "dtype", "of": "jax"}      array 0; or of NumPy, a number of it, or a random key
{"class": "Density", "fields": {...}}   an object of a class in `registry.CLASSES`
{"function": "jax.nn.silu"}             a function of JAX or of jaxode
{"frame": "pandas", "columns": [...]}   the columns of a frame without rows
{"pandas": "Interval", "fields": [...]} a category of pandas that is no text or number
{"like": "MLP", "at", "leaves": {...}}  an object of the user, and its leaves that a file can hold;
                                        "constants" are leaves that JAX takes for static
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._checks.caller import arg
from jaxode._checks.rules import is_known
from jaxode._jax.closure import is_constant, unwrap_constants
from jaxode.saving import frame_types
from jaxode.saving.reader import Reader
from jaxode.saving.registry import fields, is_of_numpy, name_of_class, name_of_function


class Writer:
    """Describes objects, and collects their arrays. An array that occurs twice is kept once."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self._numbers: dict[int, int] = {}
        self._names: dict[str, list[Any]] = {}
        self._alive: list[Any] = []

    def describe(self, x: Any, place: str = "") -> Any:
        """The description of an object, which stands at this place of the model."""
        if x is None or isinstance(x, bool | str) or type(x) is int:
            return x
        if type(x) is float:
            return x if math.isfinite(x) else {"number": repr(x)}
        if type(x) is complex:
            return {"complex": repr(x)}
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            return self._array(x, place)
        if type(x) is tuple:
            return self._items(x, place)
        if type(x) is list:
            return {"list": self._items(x, place)}
        if type(x) is dict:
            items = [(key, self.describe(x[key], f"{place}[{key!r}]")) for key in x]
            return {"dict": [[self.describe(key, place), node] for key, node in items]}
        if isinstance(x, np.dtype):
            return {"dtype": x.name}
        if (name := name_of_class(type(x))) is not None:
            nodes = {f: self.describe(getattr(x, f), f"{place}.{f}") for f in fields(type(x))}
            return {"class": name, "fields": nodes}
        if (frame := frame_types.describe(x, self.describe)) is not None:
            again = Reader(self.arrays, {}).build(frame)
            frame_types.check_types(x, again)
            return frame
        if (scalar := frame_types.describe_scalar(x, self.describe)) is not None:
            return scalar
        if callable(x) and (name := name_of_function(x)) is not None:
            return {"function": name}
        return self._of_user(x, place)

    def _items(self, x: Any, place: str) -> list[Any]:
        return [self.describe(item, f"{place}[{i}]") for i, item in enumerate(x)]

    def _array(self, x: Any, place: str) -> Any:
        """Describe an array or a number of an array library. Raises if a file cannot hold it."""
        if not is_known(x):
            raise ValueError(
                f"{arg('model')} must not be traced: a file is written once, when a program is "
                f"traced; got a traced array at {place or 'its top'}. Save outside of jax.jit."
            )
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            node = self._numbered(x, np.asarray(jax.random.key_data(x)))
            return node | {"of": "key", "key": str(jax.random.key_impl(x))}
        values = np.asarray(x)
        if values.dtype == object or values.dtype.type is np.void or np.ma.isMaskedArray(x):
            fault = "a mask" if np.ma.isMaskedArray(x) else f"the dtype {values.dtype}"
            raise TypeError(
                f"{arg('model')} must hold arrays of numbers, times or text; got one with {fault} "
                f"at {place or 'its top'}. Convert it."
            )
        node = self._numbered(x, values)
        if isinstance(x, jax.Array):
            return node | {"of": "jax"} | ({"weak": True} if x.weak_type else {})
        return node | {"of": "number" if isinstance(x, np.generic) else "numpy"}

    def _numbered(self, x: Any, values: np.ndarray) -> dict[str, Any]:
        """The node of an array, which is added to `arrays` if it is not among them."""
        is_readable = is_of_numpy(values.dtype)
        if id(x) not in self._numbers:
            self._numbers[id(x)] = len(self.arrays)
            self._alive.append(x)  # so that no other object gets the same id
            self.arrays.append(values if is_readable else values.view(f"u{values.dtype.itemsize}"))
        dtype = values.dtype.str if is_readable else values.dtype.name
        return {"array": self._numbers[id(x)], "dtype": dtype}

    def _of_user(self, x: Any, place: str) -> Any:
        """Describe an object of the user: its name, and the leaves that a file can hold."""
        leaves = jax.tree_util.tree_leaves_with_path(x, is_leaf=is_constant)
        is_pytree = not (len(leaves) == 1 and leaves[0][1] is x)
        if not (is_pytree or callable(x)):
            raise TypeError(
                f"{arg('model')} must be made of models, networks, arrays, numbers, text and "
                f"functions; got a {type(x).__name__} at {place or 'its top'}. Leave it out."
            )
        node: dict[str, Any] = {"like": self._name(x), "at": place}
        if is_pytree:
            node["leaves"], node["constants"] = {}, []
            for path, leaf in leaves:
                at = jax.tree_util.keystr(path)
                if _is_writable(unwrap_constants(leaf)):
                    node["leaves"][at] = self.describe(leaf, place + at)
                elif is_constant(leaf):
                    node["constants"].append(at)
        return node

    def _name(self, x: Any) -> str:
        """The name of an object of the user, with a number if another one has the same."""
        name = getattr(x, "__name__", None) or type(x).__name__
        same = self._names.setdefault(name, [])
        if not any(x is other for other in same):
            same.append(x)
        number = next(i for i, other in enumerate(same) if other is x)
        return name if number == 0 else f"{name} {number + 1}"


def _is_writable(leaf: Any) -> bool:
    """Whether a file can hold a leaf of an object of the user."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex | str):
        return True
    return callable(leaf) and name_of_function(leaf) is not None
