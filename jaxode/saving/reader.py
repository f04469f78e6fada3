"""Build a model from its description and its arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._jax.closure import constant, unwrap_constants
from jaxode._jax.precision import weakly_typed
from jaxode.saving import frame_types
from jaxode.saving.container import UnreadableError
from jaxode.saving.registry import (
    RENAMED_FIELDS,
    class_of_name,
    fields,
    function_of_name,
    is_of_numpy,
)

ABSENT = object()
"""Stands for what a template does not have."""


class Reader:
    """Builds objects from descriptions. Objects of the user come from a template, `like`."""

    def __init__(self, arrays: list[np.ndarray], by_name: dict[str, Any]):
        self.arrays = arrays
        self.by_name = by_name
        self._jax: dict[int, jax.Array] = {}

    def build(self, node: Any, like: Any = ABSENT, place: str = "") -> Any:
        """The object of a description.

        Args:
            node: the description.
            like: what the template has in the place of the object.
            place: where the object stands in the model, for messages.
        """
        if node is None or isinstance(node, bool | str | int | float):
            return node
        if isinstance(node, list):
            return tuple(self._items(node, like, place))
        if not isinstance(node, dict):
            raise UnreadableError(f"has a {type(node).__name__} at {place or 'its top'}")
        for kind, build in BUILDERS.items():
            if kind in node:
                return build(self, node, like, place)
        raise UnreadableError(f"has {sorted(node)} at {place or 'its top'}")

    def _items(self, nodes: list[Any], like: Any, place: str) -> list[Any]:
        fits = isinstance(like, tuple | list) and len(like) == len(nodes)
        templates = like if fits else [ABSENT] * len(nodes)
        pairs = enumerate(zip(nodes, templates, strict=True))
        return [self.build(node, template, f"{place}[{i}]") for i, (node, template) in pairs]

    def _list(self, node: Any, like: Any, place: str) -> Any:
        return self._items(node["list"], like, place)

    def _dict(self, node: Any, like: Any, place: str) -> Any:
        templates = like if isinstance(like, dict) else {}
        items = [(self.build(key), value) for key, value in node["dict"]]
        return {
            key: self.build(value, templates.get(key, ABSENT), f"{place}[{key!r}]")
            for key, value in items
        }

    def _number(self, node: Any, *_: Any) -> float:
        return float(node["number"])

    def _complex(self, node: Any, *_: Any) -> complex:
        return complex(node["complex"])

    def _dtype(self, node: Any, *_: Any) -> Any:
        return jnp.dtype(node["dtype"])

    def _array(self, node: Any, like: Any, place: str) -> Any:
        number, kind = node["array"], node.get("of")
        if not (isinstance(number, int) and 0 <= number < len(self.arrays)):
            raise UnreadableError(f"has no array {number}, which {place or 'the model'} refers to")
        values, dtype = self.arrays[number], jnp.dtype(node["dtype"])
        if values.dtype != dtype:
            alike = values.dtype.kind == "u" and values.dtype.itemsize == dtype.itemsize
            if is_of_numpy(dtype) or not alike:
                raise UnreadableError(f"has numbers of {values.dtype} for {dtype} at {place}")
            values = values.view(dtype)
        if kind == "number":
            return values[()]
        if kind == "numpy":
            return values
        if number not in self._jax:
            self._jax[number] = _as_jax(values, node.get("weak", False), place)
        made = self._jax[number]
        return jax.random.wrap_key_data(made, impl=node["key"]) if kind == "key" else made

    def _class(self, node: Any, like: Any, place: str) -> Any:
        name, nodes = node["class"], node["fields"]
        if (cls := class_of_name(name)) is None:
            raise UnreadableError(
                f"a {name}, which this version of jaxode does not know, at {place}"
            )
        renamed = RENAMED_FIELDS.get(name, {})
        nodes = {str(renamed.get(field, field)): node for field, node in nodes.items()}
        if set(nodes) != set(fields(cls)):
            differ = sorted(set(nodes) ^ set(fields(cls)))
            raise UnreadableError(
                f"has a {name} whose {differ} this version does not know, at {place}"
            )
        template = like if type(like) is cls else ABSENT
        values = {
            field: self.build(nodes[field], getattr(template, field, ABSENT), f"{place}.{field}")
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
            return frame_types.build(node["frame"], node["columns"], self.build)
        except ImportError as error:
            raise UnreadableError(
                f"holds a table of a frame of {node['frame']}: {error}. Install it"
            ) from None

    def _pandas(self, node: Any, *_: Any) -> Any:
        return frame_types.build_scalar(node["pandas"], node["fields"], self.build)

    def _like(self, node: Any, like: Any, place: str) -> Any:
        name, leaf_nodes = node["like"], node.get("leaves")
        made = self.by_name.get(name, like)
        if made is ABSENT:
            raise UnreadableError(
                f"an object of yours, {name}, which like= does not have at {place}"
            )
        if leaf_nodes is None:
            return made
        leaves, structure = jax.tree_util.tree_flatten_with_path(unwrap_constants(made))
        places = [jax.tree_util.keystr(path) for path, _ in leaves]
        if missing := sorted({*leaf_nodes, *node["constants"]} - set(places)):
            raise UnreadableError(f"has {name}{missing[0]}, which like= lacks")
        built = []
        for at, (_, leaf) in zip(places, leaves, strict=True):
            in_file = at in leaf_nodes
            value = self.build(leaf_nodes[at], place=name + at) if in_file else leaf
            _check_alike(name + at, unwrap_constants(value), leaf, in_file)
            built.append(constant(value) if at in node["constants"] else value)
        return jax.tree.unflatten(structure, built)


# By the key that tells a kind of description. The order counts: that of an array has "dtype", too.
BUILDERS = {
    "list": Reader._list,
    "dict": Reader._dict,
    "number": Reader._number,
    "array": Reader._array,
    "dtype": Reader._dtype,
    "class": Reader._class,
    "function": Reader._function,
    "frame": Reader._frame,
    "pandas": Reader._pandas,
    "complex": Reader._complex,
    "like": Reader._like,
}


def _as_jax(values: np.ndarray, weak: bool, place: str) -> jax.Array:
    """An array of JAX. Raises if JAX would change its dtype."""
    dtype = jax.dtypes.canonicalize_dtype(values.dtype)
    if dtype != values.dtype:
        raise UnreadableError(
            f"holds {values.dtype} at {place or 'its top'}, which JAX would make {dtype}. Load it "
            'after jax.config.update("jax_enable_x64", True)'
        )
    return weakly_typed(jnp.asarray(values)) if weak else jnp.asarray(values)


def _check_alike(place: str, value: Any, leaf: Any, in_file: bool) -> None:
    """Raise if the template has an array, and the file none of its shape and dtype."""
    numeric = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    if not numeric:
        return
    if not in_file:
        raise UnreadableError(f"has no array for {place} of like=, which has {_shaped(leaf)}")
    if not hasattr(value, "dtype"):
        raise UnreadableError(f"has {value!r} for {place}, where like= has {_shaped(leaf)}")
    if (np.shape(value), value.dtype) != (tuple(leaf.shape), leaf.dtype):
        raise UnreadableError(f"has {_shaped(value)} for {place}, where like= has {_shaped(leaf)}")


def _shaped(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def missing_names(node: Any) -> dict[str, str]:
    """The names of the user's objects in a description, and the place of the first of each."""
    if isinstance(node, list):
        nodes = node
    elif isinstance(node, dict):
        nodes = list(node.values())
    else:
        return {}
    names = {}
    if isinstance(node, dict) and isinstance(node.get("like"), str):
        names[node["like"]] = str(node.get("at"))
    for inner in nodes:
        names = missing_names(inner) | names
    return names
