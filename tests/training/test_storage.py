import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.training import fit_density
from tests.training.helpers import assert_trees_equal

KEY = jax.random.key(0)
FAMILY = fv.maf(2, num_layers=2, hidden_sizes=[8], transformer="affine")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.flowvi"


def test_round_trip_of_a_fitted_density(path):
    x = 3.0 + jax.random.normal(jax.random.key(1), (200, 2))
    params = fit_density(FAMILY, x, key=KEY, num_steps=3, progress=False).params
    fv.save(path, params)
    loaded = fv.load(path, like=FAMILY)
    assert_trees_equal(loaded, params)
    np.testing.assert_array_equal(FAMILY.log_prob(loaded, x[:3]), FAMILY.log_prob(params, x[:3]))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            fv.maf(2, num_layers=3, hidden_sizes=[8], transformer="affine"),
            r"transform.num_layers is 2 there and 3 here",
        ),
        (fv.iaf(2, num_layers=2, hidden_sizes=[8], transformer="affine"), "density_first is True"),
        (
            fv.maf(2, num_layers=2, hidden_sizes=[8], transformer="affine", activation="relu"),
            "activation is silu there and relu here",
        ),
        (
            fv.maf(2, num_layers=2, hidden_sizes=[16], transformer="affine"),
            r"hidden_sizes is \(8,\) there and \(16,\) here",
        ),
        (fv.full_rank(2), "transform is Layers there and LocationTriangular here"),
    ],
)
def test_another_family_is_refused_by_what_differs(path, like, message):
    fv.save(path, FAMILY.init(KEY))
    with pytest.raises(ValueError, match=message):
        fv.load(path, like=like)


def test_other_shapes_are_refused_where_there_is_no_family(path):
    fv.save(path, {"w": jnp.ones(3), "b": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"params\['w'\] is float32\[3\] there and float32\[4\]"):
        fv.load(path, like={"w": jnp.ones(4), "b": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"params\['b'\] is float32\[1\] there and absent here"):
        fv.load(path, like={"w": jnp.ones(3)})


def test_every_kind_of_node_and_leaf(path):
    tree = {
        "tuple": (jnp.ones(2), [jnp.zeros((0, 3)), None]),
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "key": fv.Fixed(jax.random.key(7)),
        "flag": fv.Fixed(jnp.array(True)),
        "scalar": 2.5,
        "named": jax.tree_util.Partial(len, jnp.ones(2)),
    }
    fv.save(path, tree)
    loaded = fv.load(path, like=tree)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert loaded["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["half"], tree["half"])
    assert jax.random.key_data(loaded["key"].value).tolist() == [0, 7]
    assert loaded["tuple"][1][0].shape == (0, 3)


def test_leaves_that_fitting_added_come_back(path):
    fv.save(path, {"w": jnp.ones(2), "units": fv.Fixed({"scale": jnp.ones(3)})})
    loaded = fv.load(path, like={"w": jnp.ones(2)})
    assert isinstance(loaded["units"], fv.Fixed)


def test_a_file_executes_nothing(path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="is damaged or another program's"):
        fv.load(path, like=FAMILY)
    np.savez(path.with_suffix(".npz"), about=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match="is damaged or another program's"):
        fv.load(path.with_suffix(".npz"), like=FAMILY)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(path, keep):
    fv.save(path, FAMILY.init(KEY))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="is damaged or another program's"):
        fv.load(path, like=FAMILY)


def test_changed_bytes_are_refused(path):
    fv.save(path, FAMILY.init(KEY))
    content = bytearray(path.read_bytes())
    middle = content.index(b"\x93NUMPY") + 140
    content[middle] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or another program's"):
        fv.load(path, like=FAMILY)


def test_what_was_there_survives_a_failure(path):
    fv.save(path, {"w": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"`params\['w'\]` must be an array of numbers; got 'text'"):
        fv.save(path, {"w": "text"})
    assert list(path.parent.iterdir()) == [path]
    np.testing.assert_array_equal(fv.load(path, like={"w": jnp.zeros(2)})["w"], 1)


def test_double_precision_without_it(path):
    with jax.enable_x64(True):
        fv.save(path, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"float64\[2\] there and float32\[2\] here"):
        fv.load(path, like={"w": jnp.zeros(2)})


def test_missing_file(path):
    with pytest.raises(FileNotFoundError):
        fv.load(path, like=FAMILY)


def test_file_holds_plain_arrays_and_json(path):
    fv.save(path, FAMILY.init(KEY))
    with zipfile.ZipFile(path) as file:
        assert all(name.endswith(".npy") for name in file.namelist())
