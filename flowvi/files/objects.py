"""Objects in files: what a fit returns, families, and trees of parameters.

Objects are written by their fields: arrays, numbers, strings, containers, and frozen dataclasses of
this package. What a file cannot hold, such as a network of another library or a log density, is
described, and `load` takes it from what it is given.
"""

import dataclasses
import enum
import os
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.files.container import Arrays, Json, Path, damaged, digest_of, read, write
from flowvi.params import Fixed, Origin, PerRow, PyTree

Node = dict[str, Json]

#: Whose functions are written by their names.
FUNCTIONS = (jax.nn, jnp, jax.lax)


def save(path: Path, value: PyTree) -> None:
    """Writes what a fit returned, a family, or any tree of parameters to one file.

    Reading it executes nothing. It is written beside its place and renamed when it is whole, so a
    file that was there before survives whatever goes wrong.

    Args:
        path: where to; an existing file is replaced.
        value: a fitted density, posterior or model; a family; or a pytree of arrays.

    Raises:
        TypeError: if a leaf is neither an array nor a number.
        ValueError: if a parameter is NaN.
        OSError: if the file cannot be written.

    Example:
        >>> import jax, pathlib, tempfile
        >>> import flowvi as fv
        >>> family = fv.maf(2, num_layers=1, hidden_sizes=[8])
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "moons.flowvi"
        >>> fv.save(path, family.init(jax.random.key(0)))
        >>> family.sample(fv.load(path), jax.random.key(1), 3).shape
        (3, 2)
    """
    check_numbers("params", getattr(value, "params", value))
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
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, another program's, holds parameters that do not fit to their
            family or are NaN, or needs something that `like` does not have; the message names it.

    Example:
        See `save`.
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
    if own in alike:
        return
    where = f"{os.fspath(path)!r}"
    if not alike:
        raise ValueError(f"`like` must be of a type that {where} holds; got {like!r}.")
    differs = difference(dict(_flat("like", alike[0])), dict(_flat("like", own)))
    raise ValueError(f"`like` must be configured as what was saved in {where}, but {differs}.")


def _nodes(node: Json) -> Iterator[Node]:
    """All descriptions in a description."""
    if isinstance(node, dict):
        yield node
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(each)


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
        match value:
            case enum.Enum():
                return self._object(value, {"value": value.value}, where)
            case None | bool() | str():
                return value
            case int() | float():
                return {"kind": "number", "value": value}
            case Fixed():
                return {"kind": "fixed", "value": self.encode(value.value, f"{where}.value")}
            case PerRow() if value.rows is None:
                return {"kind": "rows", "value": self.encode(value.value, f"{where}.value")}
            case Origin():
                return {"kind": "origin", "family": self.encode(value.family, f"{where}.family")}
            case dict() if all(isinstance(name, str) for name in value):
                items = {n: self.encode(each, f"{where}[{n!r}]") for n, each in value.items()}
                return {"kind": "dict", "items": items}
            case tuple() | list() if type(value) in (tuple, list):
                each = [self.encode(each, f"{where}[{i}]") for i, each in enumerate(value)]
                return {"kind": type(value).__name__, "items": each}
        if _is_array(value):
            return self._array(value, where)
        is_object = dataclasses.is_dataclass(value) and not isinstance(value, type)
        if is_object and (self.others or _is_ours(type(value))):
            fields = {
                field.name: getattr(value, field.name)
                for field in dataclasses.fields(value)  # type: ignore[arg-type]
                if field.init and field.metadata.get("file", True)
            }
            return self._object(value, fields, where)
        if (name := _function_name(value)) is not None:
            return {"kind": "function", "name": name}
        children = jax.tree_util.tree_leaves_with_path(
            value, is_leaf=lambda node: node is not value
        )
        if not (len(children) == 1 and children[0][1] is value):
            # A container of another library: its children are written, its type is not.
            each = [
                self.encode(child, where + jax.tree_util.keystr(place)) for place, child in children
            ]
            return {"kind": "node", "type": type(value).__qualname__, "items": each}
        if self.keep and not self.inside:
            raise TypeError(f"`{where}` must be an array of numbers; got {value!r}.")
        # Its inside is not ours to read.
        node = {"kind": "foreign", "name": getattr(value, "__qualname__", type(value).__qualname__)}
        # But a module that is a dataclass, as those of Flax and Equinox, shows its settings.
        return {**node, "settings": dict(describe("", value))} if is_object else node

    def _object(self, value: object, fields: dict[str, object], where: str) -> Json:
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        inner = dataclasses.replace(self, inside=True)
        encoded = {n: inner.encode(each, f"{where}.{n}") for n, each in fields.items()}
        return {"kind": "object", "type": name, "fields": encoded}

    def _array(self, leaf: object, where: str) -> Json:
        node: Node = {"kind": "array", "numpy": not isinstance(leaf, jax.Array), "name": where}
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            node["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.dtype.kind in "OSUMm":
            raise TypeError(f"`{where}` must be an array of numbers; got dtype {array.dtype}.")
        node["dtype"], node["shape"] = array.dtype.name, list(array.shape)
        if self.keep:
            self.arrays[where] = array
        else:
            node["digest"] = digest_of("", array)
        return node


@dataclasses.dataclass
class _Decoder:
    """Turns JSON and arrays into objects again.

    Attributes:
        path: the file, for messages.
        arrays: its arrays by name.
        like: what has the things that a file cannot hold.
    """

    path: Path
    arrays: Arrays
    like: object

    def decode(self, node: Json, where: str, template: PyTree) -> PyTree:
        """The value of some JSON; `template` has the types of foreign containers."""
        if not isinstance(node, dict):
            return node
        if self._is_foreign(node):
            found = self._of_like(node)
            if found is not None:
                return found
        try:
            return self._decode(node, where, template)
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(self.path, f"{where}: {type(error).__name__} {error}") from None

    def _decode(self, node: Node, where: str, template: PyTree) -> PyTree:
        match node["kind"]:
            case "number":
                return node["value"]
            case "fixed":
                return Fixed(self.decode(node["value"], f"{where}.value", _value(template)))
            case "rows":
                return PerRow(self.decode(node["value"], f"{where}.value", _value(template)))
            case "origin":
                return Origin(self.decode(node["family"], f"{where}.family", None))
            case "dict":
                return self._dict(node["items"], where, template)
            case "tuple" | "list" as kind:
                parts = (
                    template if isinstance(template, tuple | list) else [None] * len(node["items"])
                )
                items = self._items(node["items"], where, parts)
                return tuple(items) if kind == "tuple" else items
            case "array":
                return self._array(node, where)
            case "object":
                return self._object(node, where)
            case "function":
                return _function(node["name"])
            case "node" if template is not None:
                parts, structure = jax.tree.flatten(template, is_leaf=lambda n: n is not template)
                return jax.tree.unflatten(structure, self._items(node["items"], where, parts))
        raise ValueError(
            f"`like` must be given for {os.fspath(self.path)!r}, with {where}, a "
            f"{node.get('name', node.get('type'))}, which a file cannot hold"
            f"{'' if self.like is None else '; what was given has none that is configured alike'}."
        )

    def _items(self, nodes: list[Json], where: str, parts: PyTree) -> list[PyTree]:
        pairs = enumerate(zip(nodes, parts, strict=True))
        return [self.decode(node, f"{where}[{i}]", part) for i, (node, part) in pairs]

    def _dict(self, items: dict[str, Json], where: str, template: PyTree) -> dict[str, PyTree]:
        origins = {n: each for n, each in items.items() if _kind(each) == "origin"}
        result = {
            name: self.decode(node, f"{where}[{name!r}]", None) for name, node in origins.items()
        }
        if result:
            # Parameters of a family: these must be as those it makes.
            (origin,) = result.values()
            template = jax.eval_shape(origin.family.init, jax.random.key(0))
        known = template if isinstance(template, dict) else {}
        for name, node in items.items():
            if name not in result:
                result[name] = self.decode(node, f"{where}[{name!r}]", known.get(name))
        if origins:
            self._check_params(result, template, where)
        return {name: result[name] for name in items}

    def _check_params(self, params: PyTree, template: PyTree, where: str) -> None:
        named = [
            {where + jax.tree_util.keystr(path): leaf for path, leaf in leaves}
            for leaves in map(jax.tree_util.tree_leaves_with_path, (params, template))
        ]
        for name in [*named[1], *named[0]]:
            got, want = (_described(leaves.get(name)) for leaves in named)
            if got != want:
                raise ValueError(
                    f"`path` must hold parameters as their family makes them; in "
                    f"{os.fspath(self.path)!r} `{name}` is {got}, and the family has {want}."
                )
            if _has_nan(named[0][name]):
                raise ValueError(
                    f"`path` must hold parameters that are numbers; in {os.fspath(self.path)!r} "
                    f"`{name}` has NaN."
                )

    def _array(self, node: Node, where: str) -> object:
        array, dtype = self.arrays[node["name"]], jnp.dtype(node["dtype"])
        if (array.dtype, list(array.shape)) != (dtype, node["shape"]):
            raise damaged(self.path, f"the array {where!r} is not of the type that is said")
        if node["numpy"]:
            return array
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"`path` must hold types that JAX has; `{where}` in {os.fspath(self.path)!r} is "
                f"{dtype.name}. Perhaps turn on 64-bit types with "
                "`jax.config.update('jax_enable_x64', True)`?"
            )
        if "key" in node:
            return jax.random.wrap_key_data(jnp.asarray(array), impl=node["key"])
        return jnp.asarray(array)

    def _object(self, node: Node, where: str) -> object:
        module, _, name = str(node["type"]).partition(":")
        kind: object = sys.modules.get(module)
        for part in name.split("."):
            kind = getattr(kind, part, None)
        if not (isinstance(kind, type) and _is_ours(kind)):
            raise damaged(self.path, f"{where} is of the unknown type {node['type']!r}")
        fields = node["fields"]
        if issubclass(kind, enum.Enum):
            return kind(fields["value"])
        return kind(**{n: self.decode(each, f"{where}.{n}", None) for n, each in fields.items()})

    def _is_foreign(self, node: Json) -> bool:
        return any(each.get("kind") == "foreign" for each in _nodes(node))

    def _of_like(self, node: Node) -> object | None:
        """The part of `like` whose description is that of a node."""
        wanted = _comparable(node, self.arrays)
        for part in _parts(self.like):
            if _comparable(_Encoder({}).encode(part, ""), {}) == wanted:
                return part
        return None


def _parts(value: object) -> Iterator[object]:
    """A value, and all that is in it."""
    yield value
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        return
    for each in inner:
        yield from _parts(each)


def _comparable(node: Json, arrays: Arrays) -> Json:
    """A description without names of arrays, which tell where they stand."""
    if isinstance(node, list):
        return [_comparable(each, arrays) for each in node]
    if not isinstance(node, dict):
        return node
    if node.get("kind") == "array" and "digest" not in node:
        node = {**node, "digest": digest_of("", arrays[str(node["name"])])}
    drop = ("name", "numpy") if node.get("kind") == "array" else ()
    return {key: _comparable(each, arrays) for key, each in node.items() if key not in drop}


def _kind(node: Json) -> Json:
    return node.get("kind") if isinstance(node, dict) else None


def _value(template: PyTree) -> PyTree:
    return template.value if isinstance(template, Fixed | PerRow) else None


def _is_array(value: object) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __name__.split(".")[0]


def _function_name(value: object) -> str | None:
    """The name of a public function of JAX, or of one of this package."""
    name = getattr(value, "__name__", None)
    if not callable(value) or not isinstance(name, str):
        return None
    for module in FUNCTIONS:
        if getattr(module, name, None) is value:
            return f"{module.__name__}:{name}"
    module_name = getattr(value, "__module__", None) or ""
    if (
        module_name.startswith("flowvi.")
        and getattr(sys.modules.get(module_name), name, None) is value
    ):
        return f"{module_name}:{name}"
    return None


def _function(name: str) -> Callable[..., object]:
    module, _, own = name.partition(":")
    known = {each.__name__: each for each in FUNCTIONS}
    owner = known.get(module) or (sys.modules.get(module) if module.startswith("flowvi.") else None)
    function = getattr(owner, own, None)
    if not callable(function):
        raise ValueError(f"`path` must hold functions that there are; got {name!r}.")
    return function


def _described(leaf: PyTree) -> str:
    if leaf is None:
        return "absent"
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _has_nan(leaf: object) -> bool:
    dtype = leaf.dtype if _is_array(leaf) else jnp.result_type(leaf)  # type: ignore[attr-defined]
    if not jnp.issubdtype(dtype, jnp.floating):
        return False
    return bool(np.isnan(np.asarray(leaf, np.float64)).any())


def check_numbers(name: str, params: PyTree) -> None:
    """Checks that no parameter is NaN.

    Raises:
        ValueError: if one is; it names the leaf.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if _is_array(leaf) and _has_nan(leaf):
            where = name + jax.tree_util.keystr(path)
            raise ValueError(f"`{where}` must not be NaN to be saved; got NaN.")


def describe(name: str, value: object) -> dict[str, str]:
    """A configuration in words: the name of each field, and of fields in it -> its value."""
    return dict(_flat(name, _Encoder({}, others=True).encode(value, "")))


def _flat(name: str, node: Json) -> Iterator[tuple[str, str]]:
    if not isinstance(node, dict):
        yield name, str(node)
        return
    match node.get("kind"):
        case "object":
            yield name, str(node["type"]).rpartition(":")[2]
            for field, each in node["fields"].items():
                yield from _flat(f"{name}.{field}", each)
        case "dict" | "tuple" | "list" | "node":
            items = node["items"]
            pairs = items.items() if isinstance(items, dict) else enumerate(items)
            for key, each in pairs:
                yield from _flat(f"{name}[{key!r}]", each)
        case "number":
            yield name, str(node["value"])
        case "fixed" | "rows":
            yield from _flat(name, node["value"])
        case "origin":
            yield from _flat(f"the family of {name}", node["family"])
        case "array":
            digest = str(node["digest"])[:12]
            yield name, f"{node['dtype']}{node['shape']} with digest {digest}"
        case _:
            yield name, str(node.get("name"))


def difference(saved: dict[str, str], here: dict[str, str]) -> str | None:
    """The first difference between two configurations, in words; None if there is none."""
    # A digest tells least, so it comes last.
    for name in sorted(saved | here, key=lambda name: name.startswith("the digest of ")):
        there, own = (each.get(name, "absent") for each in (saved, here))
        if there != own:
            return f"{name} is {there} there and {own} here"
    return None
