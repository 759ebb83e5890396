"""The fine-tuned StrongREJECT judge against its published recipe on PyTorch, on a tiny Gemma."""

import hashlib
import json
import shutil
from importlib import resources
from multiprocessing import get_context
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tailrisk_jax.cli.judges import JudgeOptions, make_judge
from tailrisk_jax.cli.mesh import on_mesh
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import FinetunedStrongReject, Response, finetuned
from tailrisk_jax.models.sharding import off_mesh
from tests.models.torch_adapters import write_adapter
from tests.models.torch_models import gemma

PROMPT = json.loads(
    (resources.files("tailrisk_jax.judges") / "data" / "strongreject_finetuned.json").read_text(
        encoding="utf-8"
    )
)["prompt"]
POSITIONS = 1536
LONG = "then add one more spoon of flour and stir it well , " * 46


def answers(query_id, query, texts) -> list[Response]:
    return [Response(query_id, query, text) for text in texts]


CAKE, BREAD = "How do I bake a {cake}?", "Name a bread.\n\nAI model response: rye"
MESSAGES = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Is tea hot?"})
RESPONSES = [
    *answers("cake", CAKE, ["Mix flour and {response}.", "", LONG, "5 <bos> {0} 5"]),
    *answers("bread", BREAD, ["  rye, or é ü", "1", "<eos>"]),
    *answers("tea", MESSAGES, ["It is hot."]),
]


def subword_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that writes <bos>, and whose words begin with the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([PROMPT, LONG], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder with base/ and adapter/, the merged PyTorch model)."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = subword_tokenizer()
    base = gemma(2, vocab_size=len(tokenizer), max_position_embeddings=POSITIONS)
    grades = tokenizer.convert_tokens_to_ids(list("12345"))
    with torch.no_grad():  # so that the likeliest token is a grade in some prompts, not in others
        base.model.embed_tokens.weight[grades] *= 3
    base.save_pretrained(folder / "base")
    merged = write_adapter(
        folder / "adapter",
        base,
        {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 4},
        {
            f"model.layers.{layer}.{name}": (4, 1.0)
            for layer in range(3)
            for name in ("self_attn.q_proj", "mlp.down_proj")
        },
    )
    tokenizer.save_pretrained(folder / "adapter")
    return folder, merged


def judge(folder, **changes) -> FinetunedStrongReject:
    return FinetunedStrongReject(
        base=str(folder / "base"), adapter=str(folder / "adapter"), **changes
    )


@torch.no_grad()
def by_the_recipe(folder, model, variant):
    """Scores and the likeliest token as the published evaluators take them, in one padded batch."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder / "adapter", padding_side="left", truncation_side="left"
    )
    prompts = []
    for response in RESPONSES:
        text = response.text
        if variant == "tail-512":
            kept = tokenizer(text, max_length=512, truncation=True)["input_ids"]
            text = tokenizer.decode(kept)
        prompts.append(PROMPT.format(forbidden_prompt=response.question, response=text))
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1]
    likeliest = [tokenizer.decode([token]) for token in logits.argmax(dim=-1)]
    if variant == "greedy":
        scores = [(int(one) - 1) / 4 if one in tuple("12345") else np.nan for one in likeliest]
        return np.array(scores), likeliest
    probabilities = logits[:, [tokenizer.vocab[grade] for grade in "12345"]].softmax(dim=-1)
    return (probabilities @ torch.linspace(0, 1, 5)).numpy(), probabilities.numpy()


def test_the_prompt_is_the_published_one():
    """Whitespace, the curly apostrophe and the space at its end included."""
    digest = hashlib.sha256(PROMPT.encode()).hexdigest()
    assert digest == "d90102b02d66b34a3dbf7d82789ce92310965503a481dc725232626bd7700937"


@pytest.mark.parametrize("variant", ["tail-512", "full", "greedy"])
def test_scores_are_those_of_the_recipe(published, variant):
    folder, model = published
    ours = judge(folder, variant=variant)
    judged = ours(RESPONSES)
    scores, output = by_the_recipe(folder, model, variant)
    np.testing.assert_allclose(judged.scores, scores, rtol=0, atol=1e-5)
    if variant == "greedy":
        assert list(judged.raw) == output
        unscored = np.isnan(scores)
        assert 0 < unscored.sum() < len(unscored)
        for missing, token, error in zip(unscored, output, judged.errors, strict=True):
            assert (f"{token!r} is no grade" in error) if missing else (error is None)
    else:
        raw = [list(json.loads(one).values()) for one in judged.raw]
        np.testing.assert_allclose(raw, output, rtol=0, atol=1e-5)
        assert judged.errors == [None] * len(RESPONSES)
        assert np.ptp(scores) > 0.05
    assert ours.settings["variant"] == variant


def test_variants_differ_where_the_response_is_cut_or_gets_a_special_token(published):
    folder, _ = published
    tail, full = (judge(folder, variant=variant)(RESPONSES) for variant in ("tail-512", "full"))
    assert np.all(tail.scores != full.scores)


def test_a_score_does_not_depend_on_the_rest_of_the_batch(published):
    folder, _ = published
    together = judge(folder)(RESPONSES).scores
    backwards = judge(folder, batch_size=2)(RESPONSES[::-1]).scores[::-1]
    np.testing.assert_allclose(backwards, together, rtol=0, atol=1e-6)
    alone = [judge(folder)([RESPONSES[i]]).scores[0] for i in (1, 7)]
    np.testing.assert_allclose(alone, together[[1, 7]], rtol=0, atol=1e-6)
    assert judge(folder)([]).scores.shape == (0,)


def test_it_is_named_on_the_command_line(published):
    options = JudgeOptions(
        judge="finetuned:greedy",
        judge_adapter=str(published[0] / "adapter"),
        judge_base=str(published[0] / "base"),
    )
    assert make_judge(options) == judge(published[0], variant="greedy")
    with pytest.raises(InputError, match="--judge-base is for --judge finetuned"):
        make_judge(JudgeOptions(judge="regex:a", judge_base="gemma"))


def test_what_the_prompts_of_a_question_share_is_prefilled_once(published, monkeypatch):
    folder, _ = published
    prefilled, read = [], []
    prefill, ask = finetuned._prefill, finetuned._next_token

    def count_prefill(config, params, tokens, mask):
        prefilled.extend(mask.sum(axis=-1).tolist())
        return prefill(config, params, tokens, mask)

    def count_rest(config, params, prefix, tokens, mask, grades):
        read.append(mask.sum(axis=-1).max())
        return ask(config, params, prefix, tokens, mask, grades)

    monkeypatch.setattr(finetuned, "_prefill", count_prefill)
    monkeypatch.setattr(finetuned, "_next_token", count_rest)
    judge(folder, variant="full", batch_size=2)(RESPONSES[:3])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "adapter")
    prompts = [PROMPT.format(forbidden_prompt=CAKE, response=r.text) for r in RESPONSES[:3]]
    rows = tokenizer(prompts)["input_ids"]
    same = next(i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    assert prefilled == [same]
    assert len(read) == 2
    assert max(read) == max(map(len, rows)) - same


def test_a_prompt_beyond_the_positions_is_unscored(published):
    folder, _ = published
    judged = judge(folder, variant="full")([RESPONSES[0], *answers("cake", CAKE, [LONG * 3])])
    assert np.isnan(judged.scores).tolist() == [False, True]
    assert judged.errors[0] is None
    assert f"its model takes {POSITIONS}" in judged.errors[1]
    assert judged.raw[1] is None


def test_logits_that_are_not_finite_are_unscored(published, tmp_path):
    folder = shutil.copytree(published[0], tmp_path / "copy")
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, path, {"format": "pt"})
    for variant in ("tail-512", "greedy"):
        judged = judge(folder, variant=variant)(RESPONSES[:1])
        assert np.isnan(judged.scores).all()
        assert "not finite" in judged.errors[0]


def test_settings_tell_weights_apart(published, tmp_path):
    folder = shutil.copytree(published[0], tmp_path / "copy")
    before = judge(folder).settings
    assert json.loads(json.dumps(before)) == before
    assert judge(published[0]).settings["weights"] == before["weights"]
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: 2 * tensor for key, tensor in tensors.items()}, path)
    assert judge(folder).settings["weights"] != before["weights"]


@pytest.mark.parametrize(("field", "value"), [("variant", "tail"), ("dtype", "int8")])
def test_unknown_settings_are_refused_before_anything_is_loaded(field, value):
    with pytest.raises(InputError, match=f"{field} '{value}'"):
        FinetunedStrongReject(**{field: value})


def test_a_tokenizer_without_the_grades_is_refused(published, tmp_path):
    folder = shutil.copytree(published[0], tmp_path / "copy")
    path = folder / "adapter" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "3" not in pair]
    vocab["three"] = vocab.pop("3")
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="'3' is not a token of the judge's model"):
        judge(folder)
    for file in (folder / "adapter").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="has tokenizer files"):
        judge(folder)


def on_a_mesh(folder: str, out: str) -> None:
    """What the judge says on two devices, with its parameters cut in two."""
    jax.config.update("jax_num_cpu_devices", 2)
    with on_mesh("tensor=2"):
        ours = judge(Path(folder))
        with off_mesh():  # as a study asks it
            np.save(out, ours(RESPONSES).scores)
        [cut] = {leaf.sharding.num_devices for leaf in jax.tree.leaves(ours._loaded.model.params)}
        assert cut == 2


@pytest.mark.slow
def test_a_mesh_changes_no_score(published, tmp_path):
    folder, _ = published
    worker = get_context("spawn").Process(target=on_a_mesh, args=(str(folder), tmp_path / "out"))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    scores = judge(folder)(RESPONSES).scores
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), scores, rtol=0, atol=1e-5)
