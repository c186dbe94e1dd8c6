"""Parameters in a file: arrays and their names, nothing that could be executed."""

import json
import os
import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.params import Fixed, Origin
from flowvi.training import fingerprint

FORMAT = "flowvi.params 1"


def save(path: Any, params: Any) -> None:
    """Writes parameters to a file.

    The file is a zip archive of plain arrays with a description in JSON: of the tree, and of the
    configuration of the families that the parameters belong to. Reading it executes nothing. It is
    written beside its place and renamed when it is whole, so a file that was there before survives
    whatever goes wrong.

    Of a network of another library, the configuration is its name, the shape of its input and the
    shapes of its parameters, and of a module of `flax.linen` also its attributes. What is inside of
    a function, such as an activation or a rate of dropout, cannot be told and is not compared.

    Args:
        path: where to; an existing file is replaced.
        params: a pytree of arrays, such as `FitResult.params`.

    Raises:
        TypeError: if a leaf is no array.
        OSError: if the file cannot be written.

    Example:
        >>> import jax, pathlib, tempfile
        >>> import flowvi as fv
        >>> family = fv.maf(2, num_layers=1, hidden_sizes=[8])
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "moons.flowvi"
        >>> fv.save(path, family.init(jax.random.key(0)))
        >>> params = fv.load(path, like=family)
        >>> family.sample(params, jax.random.key(1), 3).shape
        (3, 2)
    """
    _check_leaves(params)
    path = pathlib.Path(path)
    arrays: dict[str, np.ndarray] = {}
    about = {
        "format": FORMAT,
        "fingerprint": _fingerprint(params),
        "tree": _encode(params, arrays),
    }
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Any, *, like: Any) -> Any:
    """Reads parameters that `save` wrote.

    Args:
        path: the file.
        like: the family or the model that they are for, or a pytree of their structure.

    Returns:
        The parameters. They may have `Fixed` leaves that fresh ones have not, such as the units of
        the data that a density was fitted to.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or another program's, or belongs to a family that is configured
            in another way; the message says what differs.

    Example:
        See `save`.
    """
    path = pathlib.Path(path)
    try:
        # Opened here, because numpy leaves a file open that is no archive.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays.pop("about").tobytes())
        known = about["format"] == FORMAT
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`path` must be a file that `flowvi.save` wrote; {str(path)!r} is damaged or another "
            f"program's: {error}."
        ) from None
    if not known:
        raise ValueError(
            f"`path` must be a file of format {FORMAT!r}; {str(path)!r} is of format "
            f"{about['format']!r}."
        )
    template = like
    # A family or a model of several: whatever makes parameters.
    if callable(getattr(like, "init", None)):
        template = jax.eval_shape(like.init, jax.random.key(0))
    here = _fingerprint(template)
    different = fingerprint.difference(_without_fixed(about["fingerprint"], here), here)
    if different is not None:
        raise ValueError(
            f"`like` must be configured as what was saved in {str(path)!r}, but {different}."
        )
    return _decode(about["tree"], arrays, template)


def _check_leaves(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # A random key is no number, but has numbers.
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if not is_key and np.asarray(leaf).dtype.kind in "OSUMm":
            where = "params" + jax.tree_util.keystr(path)
            raise TypeError(f"`{where}` must be an array of numbers; got {leaf!r}.")


def _fingerprint(params: Any) -> fingerprint.Fingerprint:
    # Families first: "another number of layers" says more than another shape of some array.
    whole = fingerprint.of_tree("params", params)
    families = {name: value for name, value in whole.items() if not name.startswith("params")}
    return families | whole


def _without_fixed(saved: fingerprint.Fingerprint, here: fingerprint.Fingerprint) -> dict[str, str]:
    """`saved` without leaves that fitting added."""
    return {name: value for name, value in saved.items() if name in here or ".value" not in name}


def _encode(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    if node is None or isinstance(node, Origin):
        return {"kind": "none" if node is None else "origin"}
    if isinstance(node, Fixed):
        return {"kind": "fixed", "value": _encode(node.value, arrays)}
    if isinstance(node, dict) and all(isinstance(name, str) for name in node):
        named = {name: _encode(each, arrays) for name, each in node.items()}
        return {"kind": "dict", "items": named}
    if type(node) in (tuple, list):
        items = [_encode(each, arrays) for each in node]
        return {"kind": type(node).__name__, "items": items}
    children = jax.tree.leaves(node, is_leaf=lambda n: n is not node)
    # A node without children is no leaf either.
    if not (len(children) == 1 and children[0] is node):
        # A type of somebody else: only its children are written, `load` finds the type in `like`.
        items = [_encode(each, arrays) for each in children]
        return {"kind": "node", "items": items}
    return _encode_leaf(node, arrays)


def _encode_leaf(leaf: Any, arrays: dict[str, np.ndarray]) -> Any:
    about: dict[str, Any] = {"kind": "leaf", "name": f"array_{len(arrays)}"}
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        about["key"] = str(jax.random.key_impl(leaf))
        leaf = jax.random.key_data(leaf)
    # A Python number has no precision of its own, but one in JAX.
    array = np.asarray(jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf)
    about["dtype"] = array.dtype.name
    # Types that numpy has not are written as their bits.
    arrays[about["name"]] = array if array.dtype.kind in "biufc" else array.view(_bits(array.dtype))
    return about


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


def _decode(node: Any, arrays: dict[str, np.ndarray], template: Any) -> Any:
    kind = node["kind"]
    if kind in ("none", "origin"):
        return template if kind == "origin" else None
    if kind == "fixed":
        inner = template.value if isinstance(template, Fixed) else None
        return Fixed(_decode(node["value"], arrays, inner))
    if kind == "dict":
        named = template if isinstance(template, dict) else {}
        return {k: _decode(each, arrays, named.get(k)) for k, each in node["items"].items()}
    if kind == "leaf":
        return _decode_leaf(node, arrays)
    if kind in ("tuple", "list"):
        has: Any = template if isinstance(template, tuple | list) else [None] * len(node["items"])
        items = [_decode(each, arrays, t) for each, t in zip(node["items"], has, strict=True)]
        return tuple(items) if kind == "tuple" else items
    children, structure = jax.tree.flatten(template, is_leaf=lambda n: n is not template)
    items = [_decode(each, arrays, t) for each, t in zip(node["items"], children, strict=True)]
    return jax.tree.unflatten(structure, items)


def _decode_leaf(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    array = arrays[node["name"]]
    dtype = jnp.dtype(node["dtype"])
    if array.dtype != dtype:
        array = array.view(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"`path` must hold types that JAX has; it holds {dtype.name}. Perhaps turn on 64-bit "
            "types with `jax.config.update('jax_enable_x64', True)`?"
        )
    if "key" in node:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=node["key"])
    return jnp.asarray(array)
