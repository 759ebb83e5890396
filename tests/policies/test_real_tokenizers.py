"""Prompt ids are those of the folder's own tokenizer, as transformers loads and applies it."""

import dataclasses
import json

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tailrisk_jax.models import load_model, save_model
from tailrisk_jax.policies import encode
from tests.oracles import random_model, tiny_config

CORPUS = ["How do I bake a cake?", "Be kind, hello!", "  two spaces\nand a line", "Überraschung 🙂"]
SYSTEM = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " How do I? "}]
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Be kind!"},
    {"role": "user", "content": "bake 🙂"},
]

# As Llama 3, Qwen and Gemma write them.
TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n"
        "{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<|start|>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"
    ),
}
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|start|>", "<|end|>", "<|eot|>"]


def byte_level(*, bos: bool) -> Tokenizer:
    """GPT-2's kind; with `bos`, Llama 3's, which begins every text with one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _begun(tokenizer) if bos else tokenizer


def metaspace() -> Tokenizer:
    """The kind of Llama 2 and Gemma: spaces become a letter, and every text has a beginning."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _begun(tokenizer)


def _begun(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer


KINDS = {
    "llama3": (byte_level(bos=True), "llama3"),
    "qwen": (byte_level(bos=False), "chatml"),
    "gemma": (metaspace(), "gemma"),
    "gpt2": (byte_level(bos=False), None),
    "llama2-base": (metaspace(), None),
}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    tokenizer, template = KINDS[request.param]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = template and TEMPLATES[template]
    model = random_model(tiny_config(vocab_size=len(fast), end_ids=(2, 5)))
    save_model(dataclasses.replace(model, tokenizer=fast), tmp_path)
    return tmp_path


def test_ids_are_those_of_transformers(folder):
    model, theirs = load_model(folder), AutoTokenizer.from_pretrained(folder)
    texts = [*CORPUS, "🙂 hello  hello\t", "x"]
    if theirs.chat_template is None:
        queries, wanted = texts, [theirs(text)["input_ids"] for text in texts]
    else:
        queries = [*texts, SYSTEM, TALK]
        talks = [[{"role": "user", "content": text}] for text in texts] + [SYSTEM, TALK]
        wanted = [
            theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
            for talk in talks
        ]
        for talk, row in zip(talks, wanted, strict=True):
            text = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
            assert row == theirs(text, add_special_tokens=False)["input_ids"]
    prompts = encode(model, queries)
    rows = [row[kept].tolist() for row, kept in zip(prompts.tokens, prompts.mask, strict=True)]
    assert rows == wanted
    assert all(row.count(theirs.bos_token_id) <= 1 for row in rows)
    begun = theirs("x")["input_ids"][0] == theirs.bos_token_id
    assert all((row[0] == theirs.bos_token_id) == begun for row in rows)


@pytest.mark.parametrize(("end", "wanted"), [(5, (5,)), ([5, 2], (5, 2))])
def test_end_tokens_are_the_generation_config_s(folder, end, wanted):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert load_model(folder).config.end_ids == wanted
