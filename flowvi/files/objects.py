"""Objects in files: what a fit returns, families, and trees of parameters.

Objects are written by their fields: arrays, numbers, strings, containers, and frozen dataclasses of
this package. What a file cannot hold, such as a network of another library or a log density, is
described, and `load` takes it from what it is given.
"""

import dataclasses
import enum
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.checks import require
from flowvi.files.container import Arrays, Json, Path, damaged, digest_of, read, write
from flowvi.params import Fixed, Origin, PerRow, PyTree, is_key, named_leaves

Node = dict[str, Json]

#: Whose functions are written by their names.
FUNCTIONS = (jax.nn, jnp, jax.lax)

#: Fields of classes of ours that are no dataclasses.
FIELDS: dict[type, tuple[str, ...]] = {Fixed: ("value",), PerRow: ("value",), Origin: ("family",)}


def save(path: Path, value: PyTree) -> None:
    """Writes what a fit returned, a family, or any tree of parameters to one file.

    Reading it executes nothing. It is written beside its place and renamed when it is whole, so a
    file that was there before survives whatever goes wrong.

    Args:
        path: where to; an existing file is replaced.
        value: a fitted density, posterior or model; a family; or a pytree of arrays.

    Raises:
        ValueError: if a parameter is NaN.

    Example:
        >>> import jax, pathlib, tempfile
        >>> import flowvi as fv
        >>> family = fv.maf(2, num_layers=1, hidden_sizes=[8])
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "moons.flowvi"
        >>> fv.save(path, family.init(jax.random.key(0)))
        >>> family.sample(fv.load(path), jax.random.key(1), 3).shape
        (3, 2)
    """
    for name, leaf in named_leaves("params", getattr(value, "params", value)).items():
        require(not _has_nan(leaf), f"`{name}` must not be NaN to be saved", "NaN", say=str)
    arrays: Arrays = {}
    write(path, _Encoder(arrays, keep=True).encode(value, "value"), arrays)


def load(path: Path, *, like: object = None) -> PyTree:
    """Reads what `save` wrote.

    Args:
        path: the file.
        like: what the file cannot hold: a family or a model with networks of another library, the
            target of a posterior, or any tree that holds these. Where it is given for nothing, it
            must be configured as what was saved.

    Returns:
        What was saved: it has all but the optimizer's state.

    Raises:
        ValueError: if it is damaged, another program's, holds parameters that do not fit to their
            family or are NaN, or needs something that `like` does not have; the message names it.

    Example:
        >>> import flowvi as fv
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "family.flowvi"
        >>> fv.save(path, fv.maf(2))
        >>> fv.load(path) == fv.maf(2)
        True
    """
    about, arrays = read(path)
    _check_like(path, _comparable(about, arrays), like)
    return _Decoder(path, arrays, like).decode(about, "value", None)


def _check_like(path: Path, about: Json, like: object) -> None:
    """Checks that an object that was handed over is configured as one of its type in the file."""
    if not (dataclasses.is_dataclass(like) and _is_ours(type(like))):
        return
    own = _comparable(_Encoder({}).encode(like, ""), {})
    alike = [node for node in _nodes(about) if node.get("type") == own["type"]]
    where = f"{os.fspath(path)!r}"
    require(alike, f"`like` must be of a type that {where} holds", like)
    if own not in alike:
        differs = difference(dict(_flat("like", alike[0])), dict(_flat("like", own)))
        raise ValueError(f"`like` must be configured as what was saved in {where}, but {differs}.")


@dataclasses.dataclass
class _Encoder:
    """Turns objects into JSON, and collects their arrays.

    Attributes:
        arrays: the arrays so far, by name.
        keep: whether to collect arrays; else they are told by their digests alone.
        inside: whether this is inside of an object, where there may be what a file cannot hold.
        others: whether to look into the dataclasses of others too, such as a user's loss.
    """

    arrays: Arrays
    keep: bool = False
    inside: bool = False
    others: bool = False

    def encode(self, value: object, where: str) -> Json:
        """The JSON of a value, which is called `where` in messages and names of arrays."""
        kind = type(value)
        if isinstance(value, enum.Enum):
            return self._object(value, ["value"], where)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            return self._array(value, where)
        if kind in FIELDS:
            return self._object(value, FIELDS[kind], where)
        if kind is dict and all(isinstance(name, str) for name in value):  # type: ignore[attr-defined]
            return {"kind": "dict", "items": self._items(value.items(), where)}  # type: ignore[attr-defined]
        if kind in (tuple, list):
            items = self._items(enumerate(value), where)  # type: ignore[arg-type]
            return {"kind": kind.__name__, "items": list(items.values())}
        is_object = dataclasses.is_dataclass(value) and not isinstance(value, type)
        if is_object and (self.others or _is_ours(kind)):
            fields = dataclasses.fields(kind)  # type: ignore[arg-type]
            names = [each.name for each in fields if each.init and each.metadata.get("file", True)]
            return self._object(value, names, where)
        if (name := _function_name(value)) is not None:
            return {"kind": "function", "name": name}
        children = jax.tree.leaves(value, is_leaf=lambda node: node is not value)
        if not (len(children) == 1 and children[0] is value):
            # A container of another library: its children are written, its type is not.
            items = self._items(enumerate(children), where)
            return {"kind": "node", "type": kind.__qualname__, "items": list(items.values())}
        is_known = not self.keep or self.inside
        require(is_known, f"`{where}` must be an array of numbers", value, error=TypeError)
        # Its inside is not ours to read; but a dataclass, as a module of Flax, shows its settings.
        settings = describe("", value) if is_object else None
        name = getattr(value, "__qualname__", kind.__qualname__)
        return {"kind": "foreign", "name": name, "settings": settings}

    def _items(self, items: Iterable[tuple[object, object]], where: str) -> dict[str, Json]:
        return {str(name): self.encode(each, f"{where}[{name!r}]") for name, each in items}

    def _object(self, value: object, names: Iterable[str], where: str) -> Json:
        kind, inner = type(value), dataclasses.replace(self, inside=True)
        fields = {name: inner.encode(getattr(value, name), f"{where}.{name}") for name in names}
        type_name = f"{kind.__module__}:{kind.__qualname__}"
        return {"kind": "object", "type": type_name, "fields": fields}

    def _array(self, leaf: Any, where: str) -> Json:
        node: Node = {"kind": "array", "numpy": not isinstance(leaf, jax.Array), "name": where}
        if is_key(leaf):
            node["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        rule, got = f"`{where}` must be an array of numbers", f"dtype {array.dtype}"
        require(array.dtype.kind not in "OSUMm", rule, got, error=TypeError, say=str)
        node["dtype"], node["shape"] = array.dtype.name, list(array.shape)
        if self.keep:
            self.arrays[where] = array
        else:
            node["digest"] = digest_of("", array)
        return node


@dataclasses.dataclass
class _Decoder:
    """Turns JSON and arrays into objects again, with the help of `like`."""

    path: Path
    arrays: Arrays
    like: object

    def decode(self, node: Json, where: str, template: PyTree = None) -> PyTree:
        """The value of some JSON; `template` has the types of containers of other libraries."""
        if not isinstance(node, dict):
            return node
        if any(each.get("kind") == "foreign" for each in _nodes(node)):
            wanted = _comparable(node, self.arrays)
            for part in _parts(self.like):
                if _comparable(_Encoder({}).encode(part, ""), {}) == wanted:
                    return part
        try:
            return self._decode(node, where, template)
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(self.path, f"{where}: {type(error).__name__} {error}") from None

    def _decode(self, node: Node, where: str, template: PyTree) -> PyTree:
        match node["kind"]:
            case "array":
                return self._array(node, where)
            case "function":
                return _function(node["name"])
            case "object":
                return self._object(node, where, template)
            case "dict":
                return self._dict(node["items"], where, template)
            case "tuple" | "list" as kind:
                known = isinstance(template, tuple | list)
                parts = template if known else [None] * len(node["items"])
                items = self._items(node["items"], where, parts)
                return tuple(items) if kind == "tuple" else items
            case "node" if template is not None:
                parts, structure = jax.tree.flatten(template, is_leaf=lambda n: n is not template)
                return jax.tree.unflatten(structure, self._items(node["items"], where, parts))
        rule = f"`like` must be given for {os.fspath(self.path)!r}, with {where}"
        what = f"a {node.get('name', node.get('type'))}, which a file cannot hold"
        more = "" if self.like is None else "; what was given has none that is configured alike"
        raise ValueError(f"{rule}, {what}{more}.")

    def _items(self, nodes: list[Json], where: str, parts: PyTree) -> list[PyTree]:
        pairs = enumerate(zip(nodes, parts, strict=True))
        return [self.decode(node, f"{where}[{i}]", part) for i, (node, part) in pairs]

    def _dict(self, items: dict[str, Json], where: str, template: PyTree) -> dict[str, PyTree]:
        origin = self.decode(items.get("origin"), f"{where}['origin']")
        if isinstance(origin, Origin):
            # Parameters of a family: these must be as those it makes.
            template = jax.eval_shape(origin.family.init, jax.random.key(0))
        known = template if isinstance(template, dict) else {}
        result = {
            name: self.decode(node, f"{where}[{name!r}]", known.get(name))
            for name, node in items.items()
        }
        if isinstance(origin, Origin):
            self._check_params(result, template, where)
        return result

    def _check_params(self, params: PyTree, template: PyTree, where: str) -> None:
        got, want = named_leaves(where, params), named_leaves(where, template)
        for name in [*want, *got]:
            own, other = _described(got.get(name)), _described(want.get(name))
            if own != other or _has_nan(got[name]):
                rule = f"is {own}, and the family has {other}" if own != other else "has NaN"
                what = f"in {os.fspath(self.path)!r} `{name}` {rule}"
                raise ValueError(f"`path` must hold parameters as their family makes them; {what}.")

    def _array(self, node: Node, where: str) -> object:
        array, dtype = self.arrays[node["name"]], jnp.dtype(node["dtype"])
        if (array.dtype, list(array.shape)) != (dtype, node["shape"]):
            raise damaged(self.path, f"the array {where!r} is not of the type that is said")
        if node["numpy"]:
            return array
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            what = f"`{where}` in {os.fspath(self.path)!r} is {dtype.name}"
            fix = "Perhaps turn on 64-bit types by `jax_enable_x64`?"
            raise ValueError(f"`path` must hold types that JAX has; {what}. {fix}")
        if "key" in node:
            return jax.random.wrap_key_data(jnp.asarray(array), impl=node["key"])
        return jnp.asarray(array)

    def _object(self, node: Node, where: str, template: PyTree) -> object:
        module, _, name = str(node["type"]).partition(":")
        kind: object = sys.modules.get(module)
        for part in name.split("."):
            kind = getattr(kind, part, None)
        if not (isinstance(kind, type) and _is_ours(kind)):
            raise damaged(self.path, f"{where} is of the unknown type {node['type']!r}")
        fields = {
            name: self.decode(each, f"{where}.{name}", getattr(template, name, None))
            for name, each in node["fields"].items()
        }
        return kind(**fields)


def _parts(value: object) -> Iterator[object]:
    """A value, and all that is in it."""
    yield value
    if isinstance(value, dict | list | tuple):
        inner = list(value.values()) if isinstance(value, dict) else list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        return
    for each in inner:
        yield from _parts(each)


def _nodes(node: Json) -> Iterator[Node]:
    """All descriptions in a description."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    for each in node if isinstance(node, list) else ():
        yield from _nodes(each)


def _comparable(node: Json, arrays: Arrays) -> Json:
    """A description with digests of arrays in the place of their names."""
    if isinstance(node, list):
        return [_comparable(each, arrays) for each in node]
    if not isinstance(node, dict):
        return node
    if node.get("kind") == "array":
        array = arrays.get(str(node.get("name")))
        digest = node.get("digest") if array is None else digest_of("", array)
        return {"kind": "array", "digest": digest} | {n: node.get(n) for n in ("dtype", "shape")}
    return {key: _comparable(each, arrays) for key, each in node.items()}


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def _function_name(value: object) -> str | None:
    """The name of a public function of JAX, or of one of this package."""
    name, module = (getattr(value, each, None) for each in ("__name__", "__module__"))
    if not (callable(value) and isinstance(name, str) and isinstance(module, str)):
        return None
    ours = [sys.modules.get(module)] if module.startswith("flowvi.") else []
    for owner in [*FUNCTIONS, *ours]:
        if owner is not None and getattr(owner, name, None) is value:
            return f"{owner.__name__}:{name}"
    return None


def _function(name: str) -> Any:
    module, _, own = name.partition(":")
    known = module.startswith("flowvi.") or module in [each.__name__ for each in FUNCTIONS]
    function = getattr(sys.modules.get(module), own, None) if known else None
    require(callable(function), "`path` must hold functions that there are", name)
    return function


def _described(leaf: PyTree) -> str:
    return "absent" if leaf is None else f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _has_nan(leaf: PyTree) -> bool:
    is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return bool(is_float and np.isnan(np.asarray(leaf, np.float64)).any())


def describe(name: str, value: object) -> dict[str, str]:
    """A configuration in words: the name of each field, and of fields in it -> its value."""
    return dict(_flat(name, _Encoder({}, others=True).encode(value, "")))


def _flat(name: str, node: Json) -> Iterator[tuple[str, str]]:
    if not isinstance(node, dict):
        yield name, str(node)
    elif node["kind"] == "object":
        yield name, str(node["type"]).rpartition(":")[2]
        for field, each in node["fields"].items():
            yield from _flat(f"{name}.{field}", each)
    elif "items" in node:
        items = node["items"]
        for key, each in items.items() if isinstance(items, dict) else enumerate(items):
            yield from _flat(f"{name}[{key!r}]", each)
    elif node["kind"] == "array":
        yield name, f"{node['dtype']}{node['shape']} with digest {str(node['digest'])[:12]}"
    else:
        yield name, str(node["name"])
        for field, each in (node.get("settings") or {}).items():
            yield name + field, each


def difference(saved: dict[str, str], here: dict[str, str]) -> str | None:
    """The first difference between two configurations, in words; None if there is none."""
    # A digest tells least, so it comes last.
    for name in sorted(saved | here, key=lambda name: name.startswith("the digest of ")):
        there, own = (each.get(name, "absent") for each in (saved, here))
        if there != own:
            return f"{name} is {there} there and {own} here"
    return None
