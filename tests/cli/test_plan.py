"""`tailrisk plan`: by formula, from every way of naming a model; what is wrong in one line."""

import importlib.util
import json

import pytest

from tailrisk_jax.cli import main
from tailrisk_jax.models.hf_config import to_hf
from tests.oracles import tiny_config
from tests.studies.runs import refused

SMALL = ["--queries", "4", "--samples", "20", "--new-tokens", "8", "--prompt-tokens", "16"]


def planned(capsys, model, where="h100:1", *more):
    main(
        ["plan", "--model", str(model), "--topology", where, "--analytic", "--json", *SMALL, *more]
    )
    return json.loads(capsys.readouterr().out)


def test_the_record(capsys):
    record = planned(capsys, "Llama-3.1-8B", "v5e:2x4", "--price-per-hour", "2")
    assert record["parameters"] == 8_030_261_248
    assert (record["topology"], record["chips"], record["by"]) == ("v5e:2x4", 8, "formula")
    names = [phase["name"] for phase in record["phases"]]
    assert names == ["prefill", "decode", "prefill to score", "score"]
    total = 0.0
    for phase in record["phases"]:
        chip, work = record["chip"], phase["work"]
        parts = {
            "compute": work["flops"] / chip["flops"],
            "memory": work["bytes"] / chip["bandwidth"],
            "links": work["sent"] / chip["links"],
        }
        assert phase["limit"] == max(parts, key=lambda name: parts[name])
        assert phase["seconds"] == pytest.approx(phase["runs"] * max(parts.values()))
        assert phase["compiled"] is None
        total += phase["seconds"]
    assert record["seconds"] == pytest.approx(total)
    assert record["chip_hours"] == pytest.approx(8 * total / 3600)
    assert record["chip_hours_per_1000_queries"] == pytest.approx(record["chip_hours"] * 250)
    assert record["cost_per_1000_queries"] == 2 * record["chip_hours_per_1000_queries"]
    # 20 answers to each of 4 queries: decoding reads the parameters again for every token.
    decode = record["phases"][1]
    assert decode["limit"] == "memory" and decode["work"]["weights"] > decode["work"]["bytes"] / 2


def test_a_model_is_a_file_a_folder_a_name_or_the_organism(capsys, tmp_path):
    config = tiny_config(max_positions=64)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    (tmp_path / "other.json").write_text(json.dumps(to_hf(config)))
    found = [planned(capsys, tmp_path / name) for name in ("", "config.json", "other.json")]
    assert [record["model"] for record in found] == [tmp_path.name, "config", "other"]
    assert len({record["parameters"] for record in found}) == 1
    assert planned(capsys, "meta-llama/Llama-3.2-1B-Instruct")["parameters"] == 1_235_814_400
    assert planned(capsys, "organism")["parameters"] > 1e5


def test_a_given_mesh_and_batch(capsys):
    record = planned(
        capsys, "gemma-2b", "v5e:2x2", "--mesh", "data=2, fsdp=2", "--batch-size", "32"
    )
    assert record["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert (record["draw_rows"], record["score_rows"]) == (32, 32)
    assert len(record["meshes"]) == 1


def test_the_tables(capsys):
    main(["plan", "--model", "Llama-3.1-8B", "--topology", "v5e:4x4", "--analytic", *SMALL])
    said = capsys.readouterr().out
    assert "8.03 billion parameters in bfloat16, on v5e:4x4: 16 chips of 16 GiB" in said
    assert "Meshes, the best first" in said and "By formula" in said
    assert "Decoding is limited by memory bandwidth" in said


BAD = {
    "unknown topology": ("--topology v5e:5x5", ["'v5e:5x5'", "v5e: 1x1, 2x2", "h100: 1, 2"]),
    "unknown model": ("--model Llama-9", ["'Llama-9'", "Llama-3.1-8B", "gemma-2b"]),
    "not on the hub": ("--model nobody/nothing", ["'nobody/nothing'", "hub"]),
    "not JSON": ("--model {tmp}/broken.json", ["broken.json", "not valid JSON"]),
    "no config": ("--model {tmp}", ["config.json is missing"]),
    "too large": ("--model Llama-3.1-70B --topology v5e:2x2", ["does not fit", "v5e:4x4"]),
    "too large for all": ("--model Llama-3.1-405B --topology a100:8", ["no a100 topology"]),
    "no queries": ("--queries 0", ["queries=0", "at least 1"]),
    "one token": ("--new-tokens 1", ["new_tokens=1", "at least 2"]),
    "too long": ("--model Llama-2-7B --prompt-tokens 4090", ["4090", "4096 positions"]),
    "negative price": ("--price-per-hour -1", ["price_per_hour=-1"]),
    "odd mesh": ("--mesh 2x8", ["'2x8'", "data=1,tensor=1"]),
    "unknown axis": ("--mesh model=1", ["'model=1'", "data, fsdp and tensor"]),
    "small mesh": ("--mesh data=2", ["has 2 devices", "h100:1 has 1"]),
    "type": ("--dtype int8", ["'int8'"]),
    "nothing": ("--policies two", ["--policies", "'two'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, capsys, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    words, said = BAD[name]
    base = ["plan", "--model", "Llama-3.2-1B", "--topology", "h100:1", *SMALL]
    line = refused([*base, *words.format(tmp=tmp_path).split()], capsys)
    assert all(one in line for one in said), line
    assert str(tmp_path) in line or "{tmp}" not in words


def test_without_libtpu_it_says_how_to_get_it(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "libtpu" else find(name)
    )
    line = refused(["plan", "--model", "gemma-2b", "--topology", "v5e:2x2", *SMALL], capsys)
    assert "pip install 'tailrisk_jax[plan]'" in line and "--analytic" in line
