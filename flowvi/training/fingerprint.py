"""What a tree of arrays and a configuration look like, in words, to tell two of them apart."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.networks import ForeignNetwork
from flowvi.params import Origin

Fingerprint = dict[str, str]


def of_tree(name: str, tree: Any) -> Fingerprint:
    """Name of each leaf -> its dtype and shape, and the configuration of families within."""
    result: Fingerprint = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda n: isinstance(n, Origin))
    for path, leaf in leaves:
        where = name + jax.tree_util.keystr(path)
        if isinstance(leaf, Origin):
            result |= of_configuration(
                f"the family of {name}{jax.tree_util.keystr(path[:-1])}", leaf.family
            )
        else:
            shape = ", ".join(map(str, jnp.shape(leaf)))
            result[where] = f"{jnp.result_type(leaf)}[{shape}]"
    return result


def of_configuration(name: str, value: Any) -> Fingerprint:
    """Name of each field, and of fields in it -> its value."""
    if isinstance(value, ForeignNetwork):
        # Its inside is not ours to read; the shapes of its parameters are compared as well.
        return {name: repr(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {name: type(value).__name__}
        for field in dataclasses.fields(value):
            result |= of_configuration(f"{name}.{field.name}", getattr(value, field.name))
        return result
    if callable(value):
        value = getattr(value, "__qualname__", type(value).__qualname__)
    elif isinstance(value, jax.Array | np.ndarray):
        value = np.asarray(value).tolist()
    return {name: str(value)}


def difference(saved: Fingerprint, here: Fingerprint) -> str | None:
    """The first difference in words; None if there is none."""
    for name in [*saved, *here]:
        there, own = saved.get(name), here.get(name)
        if there != own:
            own, there = ("absent" if each is None else each for each in (own, there))
            return f"{name} is {there} there and {own} here"
    return None
