"""Reading a checkpoint: slices, memory, progress, fp8, and the cache of converted weights."""

import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.torch import load_file, save_file

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import load_model, loading, quantise, save_model, shard, weights_cache
from tailrisk_jax.models.tensor_files import TensorFile, open_tensors
from tailrisk_jax.policies import Policy, logits
from tests.models import loading_worker
from tests.models.test_checkpoint import assert_same_tree
from tests.models.torch_models import make
from tests.oracles import random_model, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint, in several files."""
    folder = tmp_path_factory.mktemp("saved")
    save_model(random_model(tiny_config(num_layers=5)), folder, shard_bytes=3000)
    return folder


@pytest.mark.parametrize("family", ["phi3", "gpt2"])  # fused and transposed, fused and not
def test_a_part_of_a_leaf_is_read_as_the_whole_is(tmp_path, family):
    make(family).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    rng = np.random.default_rng(0)
    leaves = loading._leaves(tmp_path, model.config)
    for path, whole in traverse_util.flatten_dict(model.params).items():
        bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in whole.shape]
        index = tuple(slice(int(start), int(stop)) for start, stop in bounds)
        part = leaves[path].read(index, np.dtype(np.float32))
        np.testing.assert_array_equal(part, whole[index], err_msg=str(path))


def test_pieces_make_the_same_tree(saved, monkeypatch):
    wanted = load_model(saved, dtype="bfloat16")
    monkeypatch.setattr(loading, "PIECE_BYTES", 2 * 2 * 8 * 12)  # two layers of an MLP's kernel
    assert_same_tree(load_model(saved, dtype="bfloat16").params, wanted.params)


def test_host_memory_is_a_few_tensors(tmp_path, monkeypatch):
    """Of what numpy and safetensors hold; a leaf of the tree is 24 such tensors."""
    sizes = dict(num_layers=24, width=64, mlp_width=1024, num_heads=1, num_kv_heads=1)
    save_model(random_model(tiny_config(**sizes)), tmp_path)
    tensor = 64 * 1024 * 4
    load_model(tmp_path)  # what is imported and compiled isn't counted

    def peak() -> int:
        tracemalloc.start()
        load_model(tmp_path)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    assert peak() > 24 * tensor
    monkeypatch.setattr(loading, "PIECE_BYTES", tensor)
    load_model(tmp_path)
    assert peak() < 4 * tensor


def test_progress_is_told_to_the_last_byte(saved, monkeypatch):
    monkeypatch.setattr(loading, "PIECE_BYTES", 500)
    told: list[tuple[int, int]] = []
    model = load_model(saved, on_progress=lambda *now: told.append(now))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    done = [now for now, _ in told]
    assert {total for _, total in told} == {size} and done[-1] == size
    assert done == sorted(set(done)) and len(done) > len(jax.tree.leaves(model.params))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_cast(tmp_path, kind):
    """As torch casts it; a shard of a device as the whole."""
    save_model(random_model(tiny_config()), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {
        key: x.to(kind) if x.ndim == 2 and "embed" not in key else x
        for key, x in load_file(path).items()
    }
    save_file(tensors, path)
    small = load_model(tmp_path, dtype="bfloat16")
    save_file({key: x.to(torch.bfloat16) for key, x in tensors.items()}, path)
    assert_same_tree(small.params, load_model(tmp_path, dtype="bfloat16").params)
    save_file(tensors, path)
    key, index = "model.layers.1.mlp.up_proj.weight", (slice(3, 7), slice(2, 5))
    part = open_tensors(tmp_path)[key].read(index)
    np.testing.assert_array_equal(np.float32(part), tensors[key].float()[index].numpy())


def test_fp8_with_scales_is_refused_by_name(tmp_path):
    save_model(random_model(tiny_config()), tmp_path)
    path, key = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    tensors |= {key: tensors[key].to(torch.float8_e4m3fn), key + "_scale_inv": torch.ones(1, 1)}
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"up_proj\.weight_scale_inv"):
        load_model(tmp_path)


def test_a_file_is_mapped_anew_after_so_many_bytes(saved, monkeypatch):
    file = TensorFile(sorted(saved.glob("*.safetensors"))[0])
    first = file._file
    for tensor in file.tensors().values():
        tensor.read()
    assert file._file is first
    monkeypatch.setattr("tailrisk_jax.models.tensor_files._MAPPED_BYTES", 0)
    for tensor in file.tensors().values():
        tensor.read()
    assert file._file is not first


def test_a_mesh_is_loaded_onto(saved):
    """The one given, or the current one; on one device, and see below for more."""
    wanted = load_model(saved)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        current = load_model(saved)
    for model in (load_model(saved, mesh=mesh), current):
        assert_same_tree(model.params, wanted.params)
        laid_out = jax.tree.leaves(shard(wanted, mesh).params)
        for ours, theirs in zip(jax.tree.leaves(model.params), laid_out, strict=True):
            assert ours.sharding == theirs.sharding


def start(folder, out, place, port=0, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    words = (loading_worker.__file__, folder, out / "cache", out, place, str(port))
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-W", "error", *words], env=os.environ | environment)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Kernels, heads and vocabulary that two devices share; norms are on both."""
    folder = tmp_path_factory.mktemp("wide")
    model = random_model(tiny_config(num_layers=5, num_heads=4, num_kv_heads=2))
    save_model(model, folder, shard_bytes=3000)
    norms = 0
    for path, leaf in traverse_util.flatten_dict(model.params).items():
        norms += leaf.nbytes if "scale" in path else 0
    split = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) - norms
    return folder, model, split, norms


@pytest.mark.slow
def test_two_devices_get_what_one_does(wide, tmp_path):
    folder, model, split, norms = wide
    assert start(folder, tmp_path, "0/1", devices=2).wait(200) == 0
    facts = json.loads((tmp_path / "0.json").read_text())
    assert facts["devices"] == 2 and facts["own"] == split / 2 + norms
    assert facts["read"] == split + norms and facts["told"] == [split + norms] * 2
    assert facts["as shard"] and facts["first equal"] and facts["second equal"]
    assert (facts["first read"], facts["second read"]) == (1, 0)
    for name in ("made on the mesh", "laid out"):
        assert facts[f"layout {name}"] == [[None, None, "tensor"], [None, "tensor"]]
    with np.load(tmp_path / "0.npz") as arrays:
        for path, leaf in traverse_util.flatten_dict(model.params, sep="/").items():
            np.testing.assert_array_equal(arrays[path], leaf)
        tokens, mask = np.array([[1, 2, 3, 0]]), np.ones((1, 4), bool)
        for wanted, names in (
            (model, ("plain", "current mesh")),
            (quantise(model), ("made on the mesh", "laid out")),
        ):
            logit = logits(Policy(wanted), tokens, mask)
            for name in names:
                np.testing.assert_allclose(arrays[f"logits {name}"], logit, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_each_of_two_processes_reads_what_it_needs(wide, tmp_path):
    folder, _, split, norms = wide
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [start(folder, tmp_path, f"{index}/2", port) for index in range(2)]
    assert [process.wait(200) for process in started] == [0, 0]
    for index in range(2):
        facts = json.loads((tmp_path / f"{index}.json").read_text())
        assert facts["devices"] == 2 and facts["own"] == facts["read"] == split / 2 + norms
        assert facts["first equal"] and facts["second equal"]
        assert (facts["first read"], facts["second read"]) == (1, 0)


# The cache.


@pytest.fixture
def cached(saved, tmp_path, monkeypatch):
    """A function that loads through a cache, and says whether the checkpoint was read."""
    reads = []
    original = load_model.__globals__["load_params"]
    monkeypatch.setitem(
        load_model.__globals__, "load_params", lambda *a, **k: reads.append(a) or original(*a, **k)
    )

    def load(**how):
        reads.clear()
        model = load_model(saved, cache=tmp_path / "cache", **how)
        return model, bool(reads)

    return load


def entry_of(tmp_path):
    [entry] = (tmp_path / "cache").iterdir()
    return entry


def test_the_cache_gives_what_was_read(saved, cached, tmp_path):
    wanted = load_model(saved, dtype="bfloat16").params
    for read in (True, False):
        model, was_read = cached(dtype="bfloat16")
        assert was_read == read
        assert_same_tree(model.params, wanted)
    assert cached(dtype="float32")[1] and not cached(dtype="bfloat16")[1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_checkpoint_that_changed_is_read_again(saved, cached):
    cached()
    file = sorted(saved.glob("*.safetensors"))[-1]
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert cached()[1] and not cached()[1]


def _flip_a_byte(entry):
    file = max((f for f in entry.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _other_weights(entry):
    """Whole, but not what was written."""
    kept = json.loads((entry / "cache.json").read_text())
    kept["checksums"]["embedding"] ^= 1
    (entry / "cache.json").write_text(json.dumps(kept))


DAMAGE = {
    "unfinished": lambda entry: (entry / "cache.json").unlink(),
    "no checksums": lambda entry: (entry / "cache.json").write_text("{}"),
    "not JSON": lambda entry: (entry / "cache.json").write_text("{"),
    "other weights": _other_weights,
    "a flipped byte": _flip_a_byte,
    "a missing file": lambda entry: (entry / "params" / "manifest.ocdbt").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_anew(saved, cached, tmp_path, damage):
    wanted = cached()[0].params
    DAMAGE[damage](entry_of(tmp_path))
    model, was_read = cached()
    assert was_read
    assert_same_tree(model.params, wanted)
    assert not cached()[1]


def test_any_changed_bit_changes_the_checksum():
    rng = np.random.default_rng(0)
    for kind, bits in ((np.float32, np.uint32), (jnp.bfloat16, np.uint16)):
        x = rng.normal(size=(3, 5)).astype(kind)
        changed = {int(weights_cache._checksum(x))}
        for place in range(x.size):
            for bit in range(8 * x.itemsize):
                other = x.copy()
                other.view(bits).flat[place] ^= bits(1 << bit)
                changed.add(int(weights_cache._checksum(other)))
        assert int(weights_cache._checksum(x[::-1])) not in changed
        assert len(changed) > x.size * x.itemsize * 8 // 2
        assert int(weights_cache._checksum(x)) == _checksum(x.view(bits))


def _checksum(bits) -> int:
    return sum((2 * i + 1) * int(word) for i, word in enumerate(bits.ravel())) % 2**32


def test_a_cache_that_cannot_be_written_is_named(saved, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        load_model(saved, cache=tmp_path / "cache")
