"""Checkpoint folders: every format in, bit for bit out, and damaged ones refused by name."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import load_config, load_model, mapping, save_model
from tailrisk_jax.models.transformer import parameter_shapes
from tailrisk_jax.policies import Policy, logits
from tests.models import torch_llama
from tests.models.torch_models import MODELS
from tests.oracles import random_model, tiny_config

GROUPED = torch_llama.CONFIGS["grouped"]
ROWS = torch_llama.texts(0, 61, [9, 9])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def our_logits(model) -> np.ndarray:
    tokens, mask = torch_llama.padded(ROWS, "left")
    return np.asarray(logits(Policy(model), tokens, mask))


def assert_same_tree(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def tensors_of(folder) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that transformers wrote, by (dtype, layout); all three dtypes of one model."""
    folders = {}
    for name, dtype in DTYPES.items():
        model = torch_llama.llama(**GROUPED).to(dtype)
        for layout, limit in {"single": "5GB", "indexed": "10KB"}.items():
            folder = tmp_path_factory.mktemp(f"{name}-{layout}")
            model.save_pretrained(folder, max_shard_size=limit)
            folders[name, layout] = folder
    return folders


@pytest.mark.parametrize("layout", ["single", "indexed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_every_dtype_and_layout_compute_the_same(saved, dtype, layout):
    folder = saved[dtype, layout]
    assert (folder / "model.safetensors.index.json").exists() == (layout == "indexed")
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = np.stack(torch_llama.logits(theirs, ROWS))
    np.testing.assert_allclose(
        our_logits(load_model(folder)), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layout", "shard_bytes"), [("single", 5 * 10**9), ("indexed", 10**4)])
@pytest.mark.parametrize(
    "name", ["grouped", "multi-query-tied", "llama3-rope", "gemma-multi-query"]
)
def test_export_is_bit_identical(tmp_path, name, layout, shard_bytes, dtype):
    model = MODELS[name]().to(DTYPES[dtype])
    model.save_pretrained(tmp_path / "in")
    ours = load_model(tmp_path / "in", dtype=jnp.dtype(dtype))
    save_model(ours, tmp_path / "out", shard_bytes=shard_bytes)

    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (layout == "single")
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)

    again = load_model(tmp_path / "out", dtype=jnp.dtype(dtype))
    assert again.config == ours.config
    assert_same_tree(again.params, ours.params)
    original, theirs = (type(model).from_pretrained(tmp_path / name) for name in ("in", "out"))
    assert theirs.dtype == original.dtype == DTYPES[dtype]
    wanted, got = torch_llama.logits(original, ROWS), torch_llama.logits(theirs, ROWS)
    np.testing.assert_array_equal(got, wanted)


def test_our_own_model_loads_in_transformers_with_equal_logits(tmp_path):
    model = random_model(tiny_config(vocab_size=61, num_heads=4, num_kv_heads=2, end_ids=(3, 5)))
    save_model(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    wanted = np.stack(torch_llama.logits(theirs, ROWS))
    np.testing.assert_allclose(our_logits(model), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert theirs.generation_config.eos_token_id == [3, 5]


def test_shards_hold_at_most_what_was_asked(tmp_path):
    model = random_model(tiny_config())
    save_model(model, tmp_path, shard_bytes=1000)
    sizes = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 3
    assert all(sum(t.nbytes for t in shard.values()) <= 1000 for shard in sizes)


@pytest.mark.parametrize("order", ["indexed-then-single", "single-then-indexed"])
def test_saving_over_another_checkpoint_leaves_nothing_of_it(tmp_path, order):
    old, new = random_model(tiny_config(), seed=0), random_model(tiny_config(), seed=1)
    limits = {"indexed": 1000, "single": 10**9}
    for model, layout in zip((old, new), order.split("-then-"), strict=True):
        save_model(model, tmp_path, shard_bytes=limits[layout])
    assert_same_tree(load_model(tmp_path).params, new.params)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(
        theirs.model.embed_tokens.weight.detach().numpy(), new.params["embedding"]
    )


@pytest.mark.parametrize("tie", [False, True])
def test_mapping_is_a_bijection(tie):
    config = tiny_config(tie_embeddings=tie, num_layers=3)
    entries = mapping.entries(config)
    leaves = traverse_util.flatten_dict(nn.meta.unbox(parameter_shapes(config)))
    assert sorted(leaf for entry in entries for leaf in entry.leaves) == sorted(leaves)
    keys = [key for entry in entries for key in mapping.checkpoint_keys(entry, config)]
    assert len(set(keys)) == len(keys)
    theirs = torch_llama.llama(
        tie_word_embeddings=tie, vocab_size=4, hidden_size=8, intermediate_size=12, head_dim=6,
        num_attention_heads=2, num_key_value_heads=1,
    ).state_dict()  # fmt: skip
    if tie:
        del theirs["lm_head.weight"]
    assert sorted(keys) == sorted(theirs)
    for entry in entries:
        stack = [
            mapping.TRANSFORMS[entry.transform](theirs[key].numpy())
            for key in mapping.checkpoint_keys(entry, config)
        ]
        shape = np.stack(stack).shape if mapping.is_stacked(entry) else stack[0].shape
        assert shape == leaves[entry.leaves[0]].shape


def test_old_keys_that_are_computed_are_passed_over(tmp_path):
    model = random_model(tiny_config())
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_tree(load_model(tmp_path).params, model.params)


def test_tied_model_may_repeat_its_embedding_as_head_but_not_another(tmp_path):
    model = random_model(tiny_config(tie_embeddings=True))
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_tree(load_model(tmp_path).params, model.params)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config_end", "generation_end", "wanted"),
    [(2, None, (2,)), (2, [4, 5], (4, 5)), ([6, 7], None, (6, 7)), (None, None, ())],
)
def test_end_tokens_come_from_the_generation_config_first(
    tmp_path, config_end, generation_end, wanted
):
    torch_llama.config(eos_token_id=config_end).save_pretrained(tmp_path)
    if generation_end is not None:
        content = json.dumps({"eos_token_id": generation_end})
        (tmp_path / "generation_config.json").write_text(content)
    assert load_config(tmp_path).end_ids == wanted


# Damage: what is done to a folder (single file, or indexed), and what the message must name.

KEY = "model.layers.1.mlp.up_proj.weight"


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _missing_tensor(folder):
    _edit(folder, lambda tensors: tensors.pop(KEY))


def _extra_tensor(folder):
    _edit(folder, lambda tensors: tensors.update({"model.layers.1.extra.weight": np.ones(2)}))


def _wrong_shape(folder):
    _edit(folder, lambda tensors: tensors.update({KEY: np.ones((12, 9), np.float32)}))


def _transposed(folder):
    _edit(folder, lambda tensors: tensors.update({KEY: np.ones((8, 12), np.float32)}))


def _integers(folder):
    _edit(folder, lambda tensors: tensors.update({KEY: np.ones((12, 8), np.int8)}))


def _truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _one_byte_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _bytes_behind(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"0")


def _header(folder, change):
    """A file with another header before the same bytes."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length])
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def _header_garbage(folder):
    _header(folder, lambda header: b"{" + header)


def _header_not_text(folder):
    _header(folder, lambda header: bytes(range(128, 256)))


def _header_longer_than_the_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes((10**9).to_bytes(8, "little") + file.read_bytes()[8:])


def _tensors_overlap(folder):
    def change(header):
        entries = json.loads(header)
        entries[KEY]["data_offsets"] = entries["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
        return json.dumps(entries).encode()

    _header(folder, change)


def _shape_without_its_bytes(folder):
    def change(header):
        entries = json.loads(header)
        entries[KEY]["shape"] = [24, 8]
        return json.dumps(entries).encode()

    _header(folder, change)


def _other_dtype(folder):
    """Half as many bytes each, twice as many numbers."""

    def change(header):
        entries = json.loads(header)
        entries[KEY] |= {"dtype": "F16", "shape": [12, 16]}
        return json.dumps(entries).encode()

    _header(folder, change)


def _lfs_pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _config_not_json(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def _config_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def _no_config(folder):
    (folder / "config.json").unlink()


def _generation_config_not_json(folder):
    (folder / "generation_config.json").write_text("{")


def _missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def _half_downloaded(folder):
    file = folder / "model-00002-of-00003.safetensors"
    part = folder / ".cache" / "huggingface" / "download" / "model-2.incomplete"
    part.parent.mkdir(parents=True)
    file.rename(part)


def _dangling_link(folder):
    """As the hub's cache has it before a blob is there."""
    file = folder / "model-00002-of-00003.safetensors"
    file.unlink()
    file.symlink_to("blob")


def _truncated_shard(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def _index_not_json(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def _index_without_map(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": null}')


def _index_names_no_files(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')


def _tensor_in_another_shard(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][KEY] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def _index_names_unknown_tensor(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


DAMAGE = {
    _missing_tensor: ("single", KEY),
    _extra_tensor: ("single", "model.layers.1.extra.weight"),
    _wrong_shape: ("single", KEY),
    _transposed: ("single", KEY),
    _integers: ("single", KEY),
    _truncated: ("single", "model.safetensors"),
    _empty_file: ("single", "model.safetensors"),
    _one_byte_short: ("single", "is cut off"),
    _bytes_behind: ("single", "model.safetensors"),
    _header_garbage: ("single", "model.safetensors"),
    _header_not_text: ("single", "model.safetensors"),
    _header_longer_than_the_file: ("single", "model.safetensors"),
    _tensors_overlap: ("single", "model.safetensors"),
    _shape_without_its_bytes: ("single", "model.safetensors"),
    _other_dtype: ("single", KEY),
    _lfs_pointer: ("single", "Git LFS"),
    _no_weights: ("single", "model.safetensors"),
    _config_not_json: ("single", "config.json"),
    _config_is_a_list: ("single", "config.json"),
    _no_config: ("single", "config.json"),
    _generation_config_not_json: ("single", "generation_config.json"),
    _missing_shard: ("indexed", "model-00002-of-00003.safetensors"),
    _half_downloaded: ("indexed", "model-2.incomplete"),
    _dangling_link: ("indexed", "model-00002-of-00003.safetensors"),
    _truncated_shard: ("indexed", "model-00002-of-00003.safetensors"),
    _index_not_json: ("indexed", "model.safetensors.index.json"),
    _index_without_map: ("indexed", "model.safetensors.index.json"),
    _index_names_no_files: ("indexed", "model.safetensors.index.json"),
    _tensor_in_another_shard: ("indexed", KEY),
    _index_names_unknown_tensor: ("indexed", "ghost.weight"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    model = random_model(tiny_config())
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in ("single", "indexed")}
    save_model(model, folders["single"])
    save_model(model, folders["indexed"], shard_bytes=2000)
    return folders


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__.strip("_"))
def test_damaged_checkpoints_are_refused_by_name(sound, tmp_path, damage):
    layout, name = DAMAGE[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(sound[layout], folder)
    load_model(folder)
    damage(folder)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert name in message.replace(str(folder), "")
    assert "\n" not in message
    with pytest.raises(InputError):
        load_model(folder, cache=tmp_path / "cache")


def test_a_damaged_tokenizer_is_refused_by_name(tmp_path):
    save_model(random_model(tiny_config()), tmp_path)
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (tmp_path / "tokenizer_config.json").write_text(settings)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}')
    with pytest.raises(InputError, match=f"the tokenizer in {tmp_path} can't be read"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["no/such/folder", "nosuchfolder"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        load_model(name)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(tmp_path / "model.safetensors")
