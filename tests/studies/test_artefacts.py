"""Files of other projects, written by PyTorch itself, and what is refused in them."""

import json
import os
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Policy, ablate, logits, steer
from tailrisk_jax.studies import parse_proposal
from tailrisk_jax.studies.artefacts import read_array, read_direction
from tests.oracles import random_model, tiny_config

RNG = np.random.default_rng(0)
DIFFS = torch.tensor(RNG.normal(size=(3, 5, 8)))  # positions, layers, width

TENSORS = {
    "a view, as Arditi's pipeline saves it": DIFFS[-2, 3],
    "all of it": DIFFS,
    "float32, transposed": DIFFS[0].float().T,
    "float16, every second": DIFFS[1].half()[:, ::2],
    "bfloat16": DIFFS[2].bfloat16(),
    "a number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_as_pytorch_has_it(tmp_path, name):
    tensor = TENSORS[name]
    torch.save(tensor, tmp_path / "x.pt")
    ours = read_array(tmp_path / "x.pt")
    wanted = torch.load(tmp_path / "x.pt", weights_only=True)
    assert ours.dtype == jnp.dtype(str(tensor.dtype).removeprefix("torch."))
    np.testing.assert_array_equal(ours.astype(np.float64), wanted.double().numpy())


def rewritten(source, target, change_pickle=lambda data: data, *, drop="", compression=0):
    """A copy of an archive with another pickle."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = change_pickle(data)
            if not drop or not entry.filename.endswith(drop):
                new.writestr(entry.filename, data)


def test_a_tensor_of_a_gpu_is_read_without_one(tmp_path):
    torch.save(DIFFS[0, 1], tmp_path / "cpu.pt")
    cpu, cuda = (b"X" + len(d).to_bytes(4, "little") + d for d in (b"cpu", b"cuda:0"))

    def tag(data):
        assert data.count(cpu) == 1
        return data.replace(cpu, cuda)

    rewritten(tmp_path / "cpu.pt", tmp_path / "cuda.pt", tag)
    np.testing.assert_array_equal(read_array(tmp_path / "cuda.pt"), DIFFS[0, 1].numpy())


class Runs:
    """Unpickles by running a command, or any other function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save(DIFFS, tmp_path / "plain.pt")
    trace = tmp_path / "trace"
    calls = [
        ((os.system, f"touch {trace}"), r"asks for posix\.system"),
        ((eval, f"open({str(trace)!r}, 'w')"), r"builtins\.eval"),
        ((torch._utils._rebuild_parameter, 0, 0, 0), r"torch\._utils\._rebuild_parameter"),
    ]
    for call, named in calls:
        attack = pickle.dumps(Runs(*call))
        rewritten(tmp_path / "plain.pt", tmp_path / "bad.pt", lambda _, attack=attack: attack)
        with pytest.raises(InputError, match=named):
            read_array(tmp_path / "bad.pt")
    assert not trace.exists()


def damaged(path, kind):
    """A file that is no tensor of ours, or isn't whole."""
    tensor = DIFFS.float()
    torch.save(tensor, path)
    whole = path.read_bytes()
    source = path.with_suffix(".source")
    source.write_bytes(whole)
    match kind:
        case "cut off":
            path.write_bytes(whole[: len(whole) // 2])
        case "flipped bit":
            at = whole.index(tensor.numpy().tobytes()) + 40
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        case "old format":
            torch.save(tensor, path, _use_new_zipfile_serialization=False)
        case "text":
            path.write_text("a direction")
        case "no storage":
            rewritten(source, path, drop="data/0")
        case "no pickle":
            rewritten(source, path, drop="data.pkl")
        case "compressed":
            rewritten(source, path, compression=zipfile.ZIP_DEFLATED)
        case "garbage":
            rewritten(source, path, lambda data: data[:-4])
        case "longer than its storage":  # 120 numbers, announced as 8 more in one dimension
            rewritten(
                source, path, lambda data: data.replace(b"K\x03K\x05K\x08", b"K\x03K\x05K\x10")
            )
        case "another count":
            rewritten(source, path, lambda data: data.replace(b"Kxt", b"Kwt"))
        case "dictionary":
            torch.save({"direction": tensor}, path)
        case "whole numbers":
            torch.save(tensor.int(), path)
        case "parameter":
            torch.save(torch.nn.Parameter(tensor), path)


DAMAGE = {
    "cut off": "cut off or damaged", "flipped bit": "CRC", "old format": "before PyTorch 1.6",
    "text": "no file of torch.save", "no storage": "lacks its storage 0",
    "no pickle": "no data.pkl", "compressed": "is compressed", "garbage": "is damaged",
    "longer than its storage": r"doesn't lie within its storage of 120",
    "another count": "480 bytes where 119", "dictionary": "holds a dict, not one tensor",
    "whole numbers": r"torch\.IntStorage", "parameter": r"_rebuild_parameter",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_no_tensor_or_not_whole_is_refused(tmp_path, kind):
    damaged(tmp_path / "x.pt", kind)
    with pytest.raises(InputError, match=DAMAGE[kind]) as refused:
        read_array(tmp_path / "x.pt")
    assert "x.pt" in str(refused.value) and "\n" not in str(refused.value)


def arditi_folder(folder, pos=-2, layer=3):
    """The files that Arditi's pipeline leaves."""
    folder.mkdir()
    torch.save(DIFFS, folder / "mean_diffs.pt")
    torch.save(DIFFS[pos, layer], folder / "direction.pt")
    (folder / "direction_metadata.json").write_text(json.dumps({"pos": pos, "layer": layer}))
    return folder


def test_the_folder_of_another_pipeline_says_where_its_direction_is_from(tmp_path):
    folder = arditi_folder(tmp_path / "arditi")
    for path in (folder, folder / "direction.pt", folder / "mean_diffs.pt"):
        found = read_direction(path)
        np.testing.assert_array_equal(found.vector, DIFFS[-2, 3].numpy())
        assert (found.pos, found.layer) == (-2, 3)
    (folder / "direction_metadata.json").write_text('{"pos": -4, "layer": 3}')
    with pytest.raises(InputError, match=r"pos=-4 and layer=3"):
        read_direction(folder / "mean_diffs.pt")
    (folder / "direction_metadata.json").write_text('{"pos": -1}')
    with pytest.raises(InputError, match="'layer'"):
        read_direction(folder)
    (folder / "direction_metadata.json").unlink()
    assert read_direction(folder).pos is None
    with pytest.raises(InputError, match=r"put direction_metadata\.json beside"):
        read_direction(folder / "mean_diffs.pt")
    with pytest.raises(InputError, match="holds none of"):
        read_direction(tmp_path)


def test_files_and_folders_are_proposals(tmp_path):
    target = Policy(random_model(tiny_config()))
    folder, persona = arditi_folder(tmp_path / "arditi"), tmp_path / "kind_response_avg_diff.pt"
    rows = RNG.normal(size=(3, 8)).astype(np.float32)
    torch.save(torch.tensor(rows), persona)
    ours = tmp_path / "persona"
    ours.mkdir()
    save_file({"prompt_avg": 0 * rows, "response_avg": rows}, ours / "persona.safetensors")
    tokens = np.array([[1, 2, 3]])
    for text, wanted in (
        (f"ablation:{folder}:0.5", ablate(target, DIFFS[-2, 3].numpy(), 0.5)),
        (f"ablation:{folder}/direction.pt:1", ablate(target, DIFFS[-2, 3].numpy(), 1.0)),
        (f"addition:{persona}:1:2", steer(target, rows[2], 1, 2.0)),
        (f"addition:{ours}:0:2", steer(target, rows[1], 0, 2.0)),
    ):
        proposal = parse_proposal(text, target)
        assert all(path.is_file() for path in proposal.files.values())
        of = [logits(policy, tokens, tokens > 0) for policy in (proposal.policy, wanted)]
        np.testing.assert_array_equal(*of)
    with pytest.raises(InputError, match="layer=2 is out of range"):
        parse_proposal(f"addition:{persona}:2:1", target)
    with pytest.raises(InputError, match=r"have 3 rows; those of a model of 4 layers have 5"):
        parse_proposal(f"addition:{persona}:0:1", Policy(random_model(tiny_config(num_layers=4))))


def test_several_arrays_need_a_name(tmp_path):
    save_file({"a": np.ones(8), "b": np.ones(8)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match=r"2 tensors \(a, b\)"):
        read_array(tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="absent"):
        read_array(tmp_path / "absent.pt")
