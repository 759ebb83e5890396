"""Formulas, against published counts, closed forms and what XLA compiles for a CPU."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from tailrisk_jax.models import ModelConfig
from tailrisk_jax.planning import Layout, Workload, parameter_count, phases, published
from tailrisk_jax.planning.analytic import AXES, parameters
from tailrisk_jax.planning.compiled import Compiler
from tests.oracles import random_model, tiny_config

COUNTS = {  # of the released checkpoints
    "Llama-2-7B": 6_738_415_616, "Llama-2-13B": 13_015_864_320, "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248, "Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800, "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824, "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896,
}  # fmt: skip
PREFIXES = 2 * 128 * 2 * 3 * 2 * 32 * 4  # Q P (keys, values) L H_kv d bytes
DRAWN = 128 * 32 * 128 * 2 * 4  # rows, turns, T, (tokens, log-probs), bytes
SCORED = 128 * 128 * (4 + 1 + 2 * 4)  # rows, T, (a token, its mask, K log-probs)
STUDY = Workload(queries=3, samples=40, prompt=24, length=9, policies=2, itemsize=4)


def model(name: str) -> ModelConfig:
    config = published(name)
    assert config is not None
    return config


@pytest.mark.parametrize("name", COUNTS)
def test_published_models_have_their_parameters(name):
    assert parameter_count(model(name)) == COUNTS[name]


def test_names_of_tuned_versions_and_of_nothing():
    assert published("meta-llama/Meta-Llama-3.1-8B-Instruct") == model("llama-3.1-8b")
    assert published("google/gemma-2b-it") == model("gemma-2b")
    assert published("Llama-9") is None


def test_parameters_are_counted_as_they_are_laid_out():
    """A tiny model's own arrays; then Llama 3.1 8B over 2 x 8: all but the norms is split."""
    tiny = tiny_config()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(random_model(tiny).params))
    assert parameters(tiny, Layout(), 4).resident == held

    config = model("Llama-3.1-8B")
    norms = (2 * config.num_layers + 1) * config.width
    split = parameter_count(config) - norms
    assert parameters(config, Layout(2, 1, 8), 2).resident == 2 * (split / 8 + norms)
    by_width = parameters(config, Layout(1, 2, 8), 2)
    assert by_width.resident == 2 * (split / 8 + norms) / 2
    assert by_width.head == 2 * config.vocab_size * config.width / 8


def test_work_in_closed_form():
    """Operations of Llama 3.1 8B, by hand, from the published sizes."""
    study = Workload(queries=8, samples=64, prompt=256, length=150, policies=2, itemsize=2)
    alone = phases(model("Llama-3.1-8B"), study, Layout(), draw_rows=512, score_rows=512)
    kernels = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    head = 4096 * 128256

    def attention(context):
        return 32 * 4 * 32 * 128 * context

    row = 2 * kernels + 2 * head + attention(256 + 149 + 1)
    assert alone[1].work.flops == pytest.approx(149 * 512 * row)
    scored = 149 * (2 * kernels + attention(256 + 149)) + 150 * 2 * head
    assert alone[3].work.flops == pytest.approx(2 * 512 * scored)
    prompts = 8 * 256 * (2 * kernels + attention(256))
    assert alone[0].work.flops == pytest.approx(prompts)
    assert alone[2].work.flops == pytest.approx(2 * prompts)
    assert alone[1].memory.caches == pytest.approx(131072 * (8 * 256 + 512 * 160))

    shared = phases(model("Llama-3.1-8B"), study, Layout(2, 1, 8), draw_rows=512, score_rows=512)
    for whole, part, split in zip(alone, shared, (8, 16, 8, 16), strict=True):
        assert part.work.flops == pytest.approx(whole.work.flops / split)


def test_every_sample_is_drawn_and_scored():
    for rows in (1, 64, 100, 4096):
        study = dataclasses.replace(STUDY, queries=13, samples=500)
        _, draw, _, score = phases(tiny_config(), study, Layout(), draw_rows=rows, score_rows=rows)
        assert score.queries * score.rows * score.runs >= 13 * 500
        turns = draw.steps / (study.length - 1)
        assert draw.queries * draw.rows * draw.runs * turns >= 13 * 500


@pytest.mark.parametrize(
    "parts", [pytest.param(slice(0, 2), marks=pytest.mark.slow), slice(2, 4)], ids=["draw", "score"]
)
def test_formulas_against_the_compiler(parts):
    """As XLA compiles a small model for one CPU: operations within 10%, what is held within 2%.

    Temporaries are those of a TPU's compiler: test_compiled.py.
    """
    config = tiny_config(
        vocab_size=512, num_layers=3, width=128, num_heads=4, num_kv_heads=2, head_dim=32,
        mlp_width=512,
    )  # fmt: skip
    study = Workload(queries=2, samples=64, prompt=128, length=128, policies=2, itemsize=4)
    mesh = jax.make_mesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    compiler = Compiler(config, study, mesh, "float32")
    for phase in phases(config, study, Layout(), draw_rows=128, score_rows=128)[parts]:
        seen = compiler.compile(phase)
        assert seen.flops is not None
        assert phase.work.flops / seen.flops == pytest.approx(1, abs=0.1), phase.name
        held = phase.memory.parameters + (phase.policies or 1) * PREFIXES
        held += {"decode": DRAWN, "score": SCORED}.get(phase.name, 0)
        assert held / (seen.memory - seen.temporaries) == pytest.approx(1, abs=0.02), phase.name
