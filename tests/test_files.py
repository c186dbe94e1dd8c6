"""Files: what is saved comes back to the bit, and what is damaged is refused by name."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import threading
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowvi as fv
from flowvi import files
from flowvi.files import container, objects
from flowvi.params import PerRow
from tests.training.helpers import assert_trees_equal

KEY = jax.random.key(0)
FAMILY = fv.maf(2, num_layers=2, hidden_sizes=[8], transformer="affine")
SMALL = {"num_layers": 1, "hidden_sizes": [4]}


@functools.cache
def params(family=FAMILY):
    return jax.jit(family.init)(KEY)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.flowvi"


def round_trip(path, value, **options):
    fv.save(path, value)
    return fv.load(path, **options)


# ------------------------------------------------------------------------------------ round trips


def test_parameters_of_a_family(path):
    loaded = round_trip(path, params())
    assert_trees_equal(loaded, params())
    assert loaded["origin"].family == FAMILY
    x = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(FAMILY.log_prob(loaded, x), FAMILY.log_prob(params(), x))
    # Those of a training form too, and a family beside its parameters.
    assert round_trip(path, {"family": FAMILY, "params": params()})["family"] == FAMILY


FAMILIES = {
    "maf": FAMILY,
    "iaf": fv.iaf(2, **SMALL, context_size=3, activation="relu"),
    "coupling": fv.coupling(3, **SMALL),
    "mixing": fv.maf(3, **SMALL, mixing="lu"),
    "householder": fv.maf(3, **SMALL, mixing="householder"),
    "adjacency": fv.maf(2, **SMALL, adjacency=[[0, 1], [0, 0]]),
    "umnn": fv.maf(2, **SMALL, transformer="umnn"),
    "planar": fv.planar(3, context_size=2),
    "torus": fv.torus(2, num_layers=1, hidden_sizes=[4]),
    "bnaf": fv.bnaf(2, num_layers=1, hidden_sizes=[4]),
    "radial": fv.radial(3),
    "sylvester": fv.sylvester(3, rank=2),
    "base": fv.maf(2, **SMALL, base=fv.mixture(2, 3)),
    "mean_field": fv.mean_field(3),
    "full_rank": fv.full_rank(3),
    "standard_normal": fv.standard_normal((2, 3)),
    "bernoulli": fv.bernoulli((2, 2)),
    "continuous_bernoulli": fv.continuous_bernoulli(4),
    "categorical": fv.categorical(2, 3),
    "one hot": fv.categorical(2, 3, one_hot=True),
    "gaussian": fv.gaussian(2),
    "full gaussian": fv.gaussian(2, scale="full"),
    "scale": fv.gaussian(2, scale=0.5),
    "laplace": fv.laplace(2),
    "logistic": fv.logistic(2),
    "gumbel": fv.gumbel(2),
    "mixture": fv.mixture(2, 3),
    "joint": fv.joint(fv.gaussian(2), fv.bernoulli(2)),
    "labelled": fv.labelled(
        fv.joint(
            fv.conditional(fv.categorical((), 3, one_hot=True), fv.networks.MLP(4, [], 3)),
            fv.mean_field(2),
        )
    ),
    "residual": fv.residual(2, num_layers=1, hidden_sizes=[4], log_det="roulette"),
    "transformer_flow": fv.transformer_flow(2, width=4, num_heads=2),
    "continuous": fv.continuous(2, hidden_sizes=[4], trained_by="likelihood"),
    "relaxed": fv.relaxed(fv.categorical(2, 3, one_hot=True), 0.5),
    "annealed": fv.relaxed(fv.bernoulli(2), fv.Annealing(1.0, 0.1, 100)),
    "conditional": fv.conditional(fv.gaussian(2), fv.networks.MLP(3, [4], 4)),
    "unconditional": fv.unconditional(fv.gaussian(2)),
    "local": fv.local(fv.gaussian(2), 5),
    "whitened": fv.whitened(FAMILY),
    "standardized": fv.standardized(fv.mixture(2, 2), ["positive", (0, None)]),
    "gaussianized": fv.gaussianized(fv.mixture(2, 2), ["positive", None], num_bins=4),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(path, name):
    family = FAMILIES[name]
    loaded = round_trip(path, family)
    assert loaded == family and hash(loaded) == hash(family)
    assert repr(loaded) == repr(family)
    assert type(loaded) is type(family)


def test_families_are_all_there():
    """Every public function that makes a family is in the table."""
    named = {
        name
        for name in fv.__all__
        if callable(getattr(fv, name))
        and getattr(fv, name).__module__.startswith("flowvi.families")
    }
    other = {"Family", "Annealing", "custom", "from_distrax"}  # of foreign functions: below
    assert {name for name in named if name.islower()} - other <= {
        name if name in FAMILIES else "?" for name in FAMILIES
    }


def test_every_kind_of_node_and_leaf(path):
    tree = {
        "tuple": (np.ones(2), [np.zeros((0, 3), np.float32), None, "word", True, 3, 2.5]),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "key": fv.Fixed(jax.random.key(7, impl="rbg")),
        "flag": fv.Fixed(jnp.array(True)),
        "rows": PerRow({"z": np.arange(6, dtype=np.int8).reshape(3, 2)}),
        "scalar": np.float64(2.5),
        "infinite": np.array([np.inf, -np.inf], np.float32),
        "strided": np.arange(12.0).reshape(3, 4).T,
        "complex": np.array([1 + 2j], np.complex64),
        "nested": {"a b'c": {"": jnp.ones(())}},
    }
    loaded = round_trip(path, tree)
    assert_trees_equal(loaded, tree)
    assert loaded["half"].dtype == jnp.bfloat16
    assert jax.random.key_impl(loaded["key"].value) == "rbg"
    assert isinstance(loaded["rows"], PerRow) and isinstance(loaded["key"], fv.Fixed)
    assert isinstance(loaded["strided"], np.ndarray) and isinstance(loaded["flag"].value, jax.Array)
    # Also where the arrays are loaded: they may be written to.
    loaded["strided"][0] = 1


def test_double_precision(path):
    # Of numpy it needs no 64-bit types of JAX, of JAX it does.
    tree = {"w": np.arange(3) + 1e-12, "n": np.int64(2**40)}
    assert_trees_equal(round_trip(path, tree), tree)
    with jax.enable_x64(True):
        fv.save(path, {"w": jnp.asarray(tree["w"])})
        assert_trees_equal(fv.load(path), {"w": tree["w"]})
    with pytest.raises(
        ValueError, match=r"`value\['w'\]` in .* is float64. Perhaps turn on 64-bit"
    ):
        fv.load(path)


def test_a_file_for_a_path_of_any_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a file", tmp_path / "other", os.fspath(tmp_path / "no.suffix")):
        assert round_trip(path, {"w": 1.5}) == {"w": 1.5}


# -------------------------------------------------------------------- what a file cannot hold


def network(size=4):
    nnx = pytest.importorskip("flax.linen")

    class Module(nnx.Module):
        size: int = 4

        @nnx.compact
        def __call__(self, x):
            h = nnx.Dense(self.size)(x)
            return nnx.Dense(4)(h)

    return Module(size)


@functools.cache
def foreign(size=4):
    return fv.conditional(fv.gaussian(2), fv.networks.as_network(network(size), 3))


def test_foreign_networks_are_handed_over(path):
    family = foreign()
    fv.save(path, params(family))
    with pytest.raises(
        ValueError, match=r"`like` must be given for .*which a file cannot hold"
    ) as caught:
        fv.load(path)
    assert "Module" in str(caught.value) and len(str(caught.value)) < 300
    for like in (
        family,
        {"some": [family]},
        family.network if hasattr(family, "network") else family,
    ):
        assert_trees_equal(fv.load(path, like=like), params(family))
    with pytest.raises(ValueError, match="size is 4 there and 5 here"):
        fv.load(path, like=foreign(5))
    with pytest.raises(ValueError, match=r"of a type that .* holds; got maf"):
        fv.load(path, like=FAMILY)


def log_density(event):
    return -0.5 * jnp.sum(event**2)


def test_functions_of_others_are_handed_over(path):
    family = fv.custom(log_density, 2)
    fv.save(path, family)
    with pytest.raises(ValueError, match=r"`like` must be given for .* log_density, which a file"):
        fv.load(path)
    assert fv.load(path, like=family) == family
    # One of ours and of JAX is known by its name.
    assert round_trip(path, fv.maf(2, **SMALL, activation=jax.nn.relu)) == fv.maf(
        2, **SMALL, activation=jax.nn.relu
    )


def test_a_like_that_is_configured_otherwise(path):
    with pytest.raises(ValueError, match=r"`like` must .*num_layers is 2 there and 3 here"):
        round_trip(
            path, params(), like=fv.maf(2, num_layers=3, hidden_sizes=[8], transformer="affine")
        )
    assert_trees_equal(round_trip(path, params(), like=FAMILY), params())


def test_states_of_optimizers_are_handed_over(path):
    state = jax.jit(optax.adam(0.1).init)({"w": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="`like` must be given"):
        round_trip(path, state)


# ------------------------------------------------------------------------------------- refusals


def rewritten(path, change):
    """The file with another description of a right digest, and the same arrays."""
    content = path.read_bytes()
    start = len(container.MAGIC) + 40
    length = int.from_bytes(content[len(container.MAGIC) :][:8], "little")
    header = json.loads(content[start : start + length])
    header = json.dumps(change(header) or header).encode()
    digest = hashlib.sha256(header).digest()
    path.write_bytes(
        container.MAGIC
        + len(header).to_bytes(8, "little")
        + digest
        + header
        + content[start + length :]
    )


TREE = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "v": np.ones((2, 3), np.float32)}
DAMAGED = "`path` must be a file that flowvi wrote; .* is damaged or another program's: "
W = r"value\['w'\]"


def refused(path, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        fv.load(path, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("place", [0, 14, 20, 22, 40, 60, 200, -1, -25, -30])
def test_changed_bytes_are_refused(path, place):
    fv.save(path, TREE)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    expected = {-1: r"the array .value\['v'\]", -25: f"the array .{W}", -30: f"the array .{W}"}
    refused(path, DAMAGED + f".*{expected.get(place, '')}")


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.1, 0.5, 0.97])
def test_truncated_files_are_refused(path, keep):
    fv.save(path, TREE)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    refused(path, DAMAGED + (r".*the array .value\['v'\]. does not fit" if keep > 0.9 else ""))


def test_a_length_of_terabytes_takes_no_memory(path):
    fv.save(path, TREE)
    content = bytearray(path.read_bytes())
    content[len(container.MAGIC) : len(container.MAGIC) + 8] = (2**42).to_bytes(8, "little")
    path.write_bytes(content)
    refused(path, DAMAGED)


def set_row(index, name, value):
    """A change of an entry of the table: [name, dtype, shape, start, digest]."""

    def change(header):
        row = next(row for row in header["arrays"] if row[0] == f"value[{name!r}]")
        row[index] = value

    return change


def set_node(name, /, **fields):
    def change(header):
        header["about"]["items"][name].update(fields)

    return change


def swap_digests(header):
    first, second = header["arrays"]
    first[3:], second[3:] = second[3:], first[3:]


def swap_names(header):
    first, second = (header["about"]["items"][name] for name in TREE)
    first["name"], second["name"] = second["name"], first["name"]


def rename(header):
    del header["about"]["items"]["w"]["name"]


LIES = {
    "swapped": (swap_digests, f"the array .{W}. is not what was written"),
    "terabytes": (set_row(2, "w", [2**40, 3]), f"the array .{W}. does not fit into the file"),
    "overflowing": (set_row(2, "w", [2**33, 2**33]), f"the array .{W}. does not fit"),
    "negative": (set_row(2, "w", [-2, -3]), f"the array .{W}. does not fit into the file"),
    "before the start": (set_row(3, "w", -8), f"the array .{W}. does not fit into the file"),
    "shape": (set_row(2, "w", [3, 2]), f"the array .{W}. is not what was written"),
    "dtype": (set_row(1, "w", "int32"), f"the array .{W}. is not what was written"),
    "objects": (set_row(1, "w", "object"), f"the array .{W}. does not fit"),
    "unknown dtype": (set_row(1, "w", "float99"), "float99"),
    "said shape": (set_node("w", shape=[3, 2]), f"the array .{W}. is not of the type that is said"),
    "said dtype": (set_node("w", dtype="int32"), f"the array .{W}. is not of the type that is"),
    "no such array": (set_node("w", name="other"), f"{W}: KeyError 'other'"),
    "no name": (rename, f"{W}: KeyError 'name'"),
    "kind": (set_node("w", kind="magic"), f"`like` must be given for .* with {W}"),
    "no type": (
        set_node("w", kind="object", type="os:system", fields={}),
        f"{W} is of the unknown type 'os:system'",
    ),
    "not ours": (
        set_node("w", kind="object", type="subprocess:Popen", fields={}),
        f"{W} is of the unknown type",
    ),
    "function": (
        set_node("w", kind="function", name="os:system"),
        "`path` must hold functions that there are; got 'os:system'",
    ),
    "module of ours": (
        set_node("w", kind="object", type="flowvi.files:os", fields={}),
        f"{W} is of the unknown type",
    ),
    "another function through ours": (
        set_node("w", kind="function", name="flowvi.files:os"),
        "`path` must hold functions that there are",
    ),
    "no table": (lambda header: {"about": None}, DAMAGED),
    "no dict": (lambda header: [1, 2], DAMAGED),
}


@pytest.mark.parametrize("name", LIES)
def test_descriptions_that_lie_are_refused(path, name):
    change, message = LIES[name]
    fv.save(path, TREE)
    rewritten(path, change)
    refused(path, message)


def changed(leaf):
    """Parameters with another leaf in the place of the first one, and its name."""
    (place, old), *_ = jax.tree_util.tree_leaves_with_path(params())
    tree = jax.tree_util.tree_map_with_path(
        lambda own, each: leaf(np.asarray(old)) if own == place else each, params()
    )
    return tree, "value" + jax.tree_util.keystr(place)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (lambda old: old[..., :1], r"is float32\[.*\], and the family has float32\["),
        (lambda old: old.astype(np.float16), r"is float16\[.*\], and the family has float32\["),
    ],
    ids=["shape", "dtype"],
)
def test_parameters_that_do_not_fit_to_their_family(path, leaf, message):
    tree, name = changed(leaf)
    fv.save(path, tree)
    refused(path, f"hold parameters as their family makes them; in .* `{_escaped(name)}` {message}")


def _escaped(name):
    return name.replace("[", r"\[").replace("]", r"\]")


def test_parameters_that_are_missing_or_too_many(path):
    fv.save(path, {**params(), "more": np.ones(2)})
    refused(path, r"`value\['more'\]` is float\d+\[2\], and the family has absent")
    fv.save(path, {name: each for name, each in params().items() if name != "transform"})
    refused(path, r"`value\['transform'\].*` is absent, and the family has float32\[")


def test_nan_parameters(path, monkeypatch):
    tree, name = changed(lambda old: np.full_like(old, np.nan))
    with pytest.raises(ValueError, match=r"`params.*` must not be NaN to be saved; got NaN"):
        fv.save(path, tree)
    assert not path.exists()
    with monkeypatch.context() as patch:
        patch.setattr(objects, "_has_nan", lambda leaf: False)
        fv.save(path, tree)
    refused(path, f"hold parameters as their family makes them; in .* `{_escaped(name)}` has NaN")


def test_files_of_other_programs_execute_nothing(path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("params.npy", bytes(2**26))  # 64 MB of zeros in 64 kB
    arrays = io.BytesIO()
    np.savez(arrays, about=np.array([Evil()], dtype=object))
    for content in (pickle.dumps(Evil()), arrays.getvalue(), archive.getvalue(), b"", b"{}"):
        path.write_bytes(content)
        refused(path, DAMAGED + "it does not begin as such a file does")
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError):
        fv.load(path.with_suffix(".other"))


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([None]), object(), print])
def test_what_cannot_be_saved(path, value):
    with pytest.raises(TypeError, match=r"`value\['w'\]` must be an array of numbers; got"):
        fv.save(path, {"w": value})
    assert not list(path.parent.iterdir())


# -------------------------------------------------------------------------------------- writing


def test_what_was_there_survives_a_failure(path, monkeypatch):
    fv.save(path, {"w": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fv.save(path, {"w": 2})
    assert list(path.parent.iterdir()) == [path]
    assert fv.load(path) == {"w": 1}


def test_a_planted_link_is_not_followed(path, monkeypatch):
    # At every name that might be a temporary one, and at the file's own.
    victim = path.parent / "victim"
    victim.write_text("precious")
    for name in (path.name, f"{path.name}.part", f".{path.name}.part", f"{path.name}.tmp"):
        (path.parent / name).symlink_to(victim)
    fv.save(path, {"w": 1})
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert fv.load(path) == {"w": 1}


def test_threads_that_save_to_one_path(path):
    trees = [{"w": np.full(10_000, float(i))} for i in range(4)]
    errors = []

    def work(tree):
        try:
            for _ in range(10):
                fv.save(path, tree)
                assert len(set(fv.load(path)["w"])) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(tree,)) for tree in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert list(path.parent.iterdir()) == [path]


def test_a_new_file_is_readable_as_others_are(path):
    before = os.umask(0o022)
    try:
        fv.save(path, {"w": 1})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


# ------------------------------------------------------------------------------------ descriptions


@dataclasses.dataclass(frozen=True)
class Loss:
    """A user's own."""

    power: float
    weights: tuple = ()

    def __call__(self, params, key, batch):
        return jnp.sum(params)


def test_descriptions_name_what_differs():
    describe = functools.partial(files.describe, "it")
    cases = {
        "it.transform.num_layers is 2 there and 3 here": (
            FAMILY,
            fv.maf(2, num_layers=3, hidden_sizes=[8], transformer="affine"),
        ),
        "it.power is 2 there and 2.5 here": (Loss(2), Loss(2.5)),
        "it.weights[1] is 2 there and 3 here": (Loss(2, (1, 2)), Loss(2, (1, 3))),
        "it is Loss there and flowvi.files.objects:describe here": (Loss(2), files.describe),
        "it['a'] is absent there and 3 here": ({}, {"a": 3}),
    }
    for message, (one, other) in cases.items():
        assert files.difference(describe(one), describe(other)) == message
        assert files.difference(describe(one), describe(one)) is None
    arrays = [describe(np.arange(3.0) + i)["it"] for i in (0, 1)]
    assert all(text.startswith("float64[3] with digest ") for text in arrays)
    assert arrays[0] != arrays[1]
