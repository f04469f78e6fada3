"""Build a model from its description and its arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._checks.caller import arg
from jaxode._jax.closure import constant, unwrap_constants
from jaxode.saving import frame_types
from jaxode.saving.registry import class_of_name, function_of_name
from jaxode.saving.writer import fields

ABSENT = object()
"""The place in a template of what the template lacks."""


class UnreadableError(Exception):
    """What is wrong with a description."""


class Reader:
    """Builds objects from descriptions. What is the user's comes from `like`."""

    def __init__(self, arrays: list[np.ndarray], by_name: dict[str, Any]):
        self.arrays = arrays
        self.by_name = by_name
        self._jax: dict[int, jax.Array] = {}

    def build(self, node: Any, like: Any = ABSENT, place: str = "") -> Any:
        """The object of a description. `like` is what the template has in this place."""
        if node is None or isinstance(node, bool | str | int | float):
            return node
        if isinstance(node, list):
            return tuple(self._items(node, like, place))
        if not isinstance(node, dict):
            raise UnreadableError(f"a {type(node).__name__} at {place or 'its top'}")
        for kind, build in KINDS.items():
            if kind in node:
                return build(self, node, like, place)
        raise UnreadableError(f"{sorted(node)} at {place or 'its top'}")

    def _items(self, nodes: list[Any], like: Any, place: str) -> list[Any]:
        same = isinstance(like, tuple | list) and len(like) == len(nodes)
        parts = like if same else [ABSENT] * len(nodes)
        pairs = enumerate(zip(nodes, parts, strict=True))
        return [self.build(node, part, f"{place}[{i}]") for i, (node, part) in pairs]

    def _list(self, node: Any, like: Any, place: str) -> Any:
        return self._items(node["list"], like, place)

    def _dict(self, node: Any, like: Any, place: str) -> Any:
        parts = like if isinstance(like, dict) else {}
        keys = [(self.build(key), value) for key, value in node["dict"]]
        return {
            key: self.build(value, parts.get(key, ABSENT), f"{place}[{key!r}]")
            for key, value in keys
        }

    def _number(self, node: Any, *_: Any) -> float:
        return float(node["number"])

    def _dtype(self, node: Any, *_: Any) -> Any:
        return jnp.dtype(node["dtype"])

    def _array(self, node: Any, like: Any, place: str) -> Any:
        number, kind = node["array"], node.get("of")
        if not (isinstance(number, int) and 0 <= number < len(self.arrays)):
            raise UnreadableError(f"no array {number}, which {place or 'the model'} refers to")
        values, dtype = self.arrays[number], jnp.dtype(node["dtype"])
        if values.dtype != dtype:
            if values.dtype.kind != "u" or values.dtype.itemsize != dtype.itemsize:
                raise UnreadableError(f"numbers of {values.dtype} for {dtype} at {place}")
            values = values.view(dtype)
        if kind == "number":
            return values[()]
        if kind == "numpy":
            return values
        if number not in self._jax:
            self._jax[number] = _of_jax(values, place)
        made = self._jax[number]
        return jax.random.wrap_key_data(made, impl=node["key"]) if kind == "key" else made

    def _class(self, node: Any, like: Any, place: str) -> Any:
        name, parts = node["class"], node["fields"]
        if (cls := class_of_name(name)) is None:
            raise UnreadableError(
                f"a {name}, which this version of jaxode does not know, at {place}"
            )
        if set(parts) != set(fields(cls)):
            differ = sorted(set(parts) ^ set(fields(cls)))
            raise UnreadableError(f"a {name} whose {differ} this version does not know, at {place}")
        same = type(like) is cls
        values = {
            field: self.build(
                parts[field], getattr(like, field, ABSENT) if same else ABSENT, f"{place}.{field}"
            )
            for field in fields(cls)
        }
        if issubclass(cls, tuple):
            return cls(**values)
        made = object.__new__(cls)
        for field, value in values.items():
            object.__setattr__(made, field, value)
        return made

    def _function(self, node: Any, *_: Any) -> Any:
        function = function_of_name(node["function"])
        if function is None:
            raise UnreadableError(
                f"the function {node['function']}, which this version does not have"
            )
        return function

    def _frame(self, node: Any, *_: Any) -> Any:
        try:
            return frame_types.build(node["frame"], node["columns"])
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{arg('path')} holds a table of a frame of {node['frame']}: {error}. Install it."
            ) from None

    def _like(self, node: Any, like: Any, place: str) -> Any:
        name, kept = node["like"], node.get("leaves")
        made = self.by_name.get(name, like)
        if made is ABSENT:
            raise UnreadableError(
                f"an object of yours, {name}, which like= does not have at {place}"
            )
        if kept is None:
            return made
        leaves, structure = jax.tree_util.tree_flatten_with_path(unwrap_constants(made))
        places = [jax.tree_util.keystr(path) for path, _ in leaves]
        if missing := sorted({*kept, *node["constants"]} - set(places)):
            raise UnreadableError(f"{name}{missing[0]}, which like= lacks")
        new = []
        for at, (_, leaf) in zip(places, leaves, strict=True):
            value = self.build(kept[at], place=name + at) if at in kept else leaf
            _check_alike(name + at, unwrap_constants(value), leaf, at in kept)
            new.append(constant(value) if at in node["constants"] else value)
        return jax.tree.unflatten(structure, new)


# An array also has a dtype.
KINDS = {
    "list": Reader._list,
    "dict": Reader._dict,
    "number": Reader._number,
    "array": Reader._array,
    "dtype": Reader._dtype,
    "class": Reader._class,
    "function": Reader._function,
    "frame": Reader._frame,
    "like": Reader._like,
}


def _of_jax(values: np.ndarray, place: str) -> jax.Array:
    made = (
        jnp.asarray(values) if jax.dtypes.canonicalize_dtype(values.dtype) == values.dtype else None
    )
    if made is None:
        raise ValueError(
            f"{arg('path')} holds {values.dtype} at {place}, which JAX would make "
            f"{jax.dtypes.canonicalize_dtype(values.dtype)}. Load it after "
            'jax.config.update("jax_enable_x64", True).'
        )
    return made


def _check_alike(place: str, value: Any, leaf: Any, is_kept: bool) -> None:
    """Raise unless an array of the file fits that of the template."""
    numeric = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not is_kept:
        if numeric:
            raise UnreadableError(f"no array for {place} of like=, which has {_shaped(leaf)}")
        return
    if numeric and (np.shape(value), value.dtype) != (np.shape(leaf), leaf.dtype):
        raise UnreadableError(f"{_shaped(value)} for {place}, where like= has {_shaped(leaf)}")


def _shaped(x: Any) -> str:
    return f"{x.dtype}{list(np.shape(x))}"


def missing_names(node: Any) -> list[str]:
    """The names of the user's objects in a description, in order."""
    if isinstance(node, list):
        parts = node
    elif isinstance(node, dict):
        parts = list(node.values())
    else:
        return []
    own = [node["like"]] if isinstance(node, dict) and isinstance(node.get("like"), str) else []
    return [*dict.fromkeys([*own, *(name for part in parts for name in missing_names(part))])]
