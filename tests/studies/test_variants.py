"""Harmless perturbations, and groups of variants to a file and back."""

import json
import re

import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.organisms import world
from tailrisk_jax.studies import (
    StudyQuery,
    Variant,
    base_groups,
    base_queries,
    find_variants,
    make_variants,
    read_queries,
    read_variants,
    variants_file,
)
from tailrisk_jax.studies.perturbations import KINDS

CHINESE = "\N{CJK UNIFIED IDEOGRAPH-597D}\N{FULLWIDTH QUESTION MARK}"
TEXTS = (
    "How do I make tea, please?", "Write a story about a well-known king's cat.", "Where is it",
    "Is it so? Tell me.", "Explain how to\nfold paper", CHINESE, "x",
)  # fmt: skip
ASKED = "please tell me how to use a lutch ."


def candidates(kind, text, seed=0):
    return list(KINDS[kind](text, np.random.default_rng(seed)))


def letters(text):
    return re.sub(r"[\W_]", "", text)


def queries(*texts):
    return [StudyQuery(f"q{i}", text, {"category": str(i)}) for i, text in enumerate(texts)]


@pytest.mark.parametrize("text", TEXTS)
def test_each_kind_changes_what_it_says_and_nothing_else(text):
    assert all(one.lower() == text.lower() for one in candidates("case", text))
    spaced = candidates("whitespace", text)
    assert all(one.split() == text.split() and one.strip() == one for one in spaced)
    assert all(letters(one) == letters(text) for one in candidates("punctuation", text))
    assert not candidates("organism", text)
    inner = letters(re.sub("(?i)^(how do i|write|explain how to)", "", text)).lower()
    assert all(inner in letters(one).lower() for one in candidates("paraphrase", text))


def test_paraphrases_fit_the_sort_of_request():
    how = candidates("paraphrase", "How do I make tea?")
    assert {"Tell me how to make tea.", "What are the steps to make tea?"} <= set(how)
    wanted = candidates("paraphrase", "Please write a poem.")
    assert {"Can you write a poem?", "I would like you to write a poem."} <= set(wanted)
    assert not any("Can you where" in one for one in candidates("paraphrase", "Where is it?"))


def test_the_organisms_paraphrases_are_its_other_questions():
    found = candidates("organism", ASKED)
    assert len(set(found)) == len(found) == len(world.PREFIXES) * len(world.TEMPLATES) - 1
    assert ASKED not in found and "hello , how do i use a lutch ?" in found
    assert all(world.is_known(one) and world.query_thing(one).name == "lutch" for one in found)
    assert len(candidates("organism", "what kind of thing is a lutch ?")) == 4
    assert not world.is_known(ASKED.upper())


def test_groups_are_distinct_balanced_and_depend_on_seed_and_query_alone():
    kinds = ("case", "whitespace", "punctuation", "paraphrase")
    made = make_variants(queries(*TEXTS[:3]), kinds=kinds, number=25)
    assert made.counts == {"original": 3, "case": 21, **dict.fromkeys(kinds[1:], 18)}
    assert not made.short and not made.unusable
    for base in ("q0", "q1", "q2"):
        own = [one.content for one in made.variants if one.base == base]
        assert len(own) == len(set(own)) == 26
    ids = [one.id for one in made.variants]
    assert len(set(ids)) == len(ids) and ids[:2] == ["q0", "q0/case-1"]
    alone = make_variants(queries(*TEXTS[:3])[1:2], kinds=kinds, number=25)
    assert alone.variants == [one for one in made.variants if one.base == "q1"]
    other = make_variants(queries(*TEXTS[:3]), kinds=kinds, number=25, seed=1)
    assert other.variants != made.variants


def test_what_cannot_be_made_is_counted_and_others_fill_up():
    found = make_variants(queries(CHINESE), kinds=("case", "whitespace"), number=5)
    assert found.counts == {"original": 1, "case": 0, "whitespace": 0} and found.short == {"q0": 5}
    filled = make_variants(queries(CHINESE), kinds=("case", "punctuation"), number=8)
    assert filled.counts["punctuation"] == 8 and not filled.short
    known = make_variants(
        queries(ASKED), kinds=("case", "organism"), number=25, usable=world.is_known
    )
    assert known.counts == {"original": 1, "case": 0, "organism": 19}
    assert known.short == {"q0": 6} and known.unusable["case"] > 100


def test_given_and_served_variants_join_the_kinds():
    given = [Variant("v1", "q0", "mine", "Tea?"), Variant("v2", "q0", "mine", TEXTS[0])]
    made = make_variants(
        queries(TEXTS[0]), kinds=("case",), number=4, given=given,
        served={"q0": ["Tea?", "Brew tea how?"]},
    )  # fmt: skip
    assert made.counts == {"original": 1, "mine": 1, "case": 2, "served": 1}
    assert made.variants[1].id == "v1" and made.variants[1].metadata == {"category": "0"}
    whole = make_variants(
        queries(TEXTS[0]), number=1, given=[*given, Variant("v3", "q0", "m", "T")]
    )
    assert len(whole.variants) == 3 and not whole.short  # all that are given are kept


def test_a_file_of_groups_is_a_query_file_and_comes_back(tmp_path):
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "How do I do it?"}]
    made = make_variants(
        [*queries(TEXTS[0]), StudyQuery("chat", asked)], kinds=("case", "paraphrase"), number=4
    )
    path = tmp_path / "variants.jsonl"
    path.write_bytes(variants_file(made.variants))
    read = read_queries(path)
    assert [query.id for query in read.queries] == [one.id for one in made.variants]
    assert [query.content for query in read.queries] == [one.content for one in made.variants]
    assert len(read.where(["kind=case"]).queries) == 4
    assert read.queries[1].metadata["category"] == "0"
    last = read.queries[-1].content
    assert last[0] == asked[0] and last[1]["content"] != asked[1]["content"]
    back = read_variants(path)
    assert [(one.id, one.base, one.kind) for one in back] == [
        (one.id, one.base, one.kind) for one in made.variants
    ]
    assert [query.id for query in base_queries(back)] == ["q0", "chat"]


def test_lists_of_variants_are_groups(tmp_path):
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps({"prompt": "A?", "variants": ["a?", "A?", "a?", "A!"]}))
    assert [(one.id, one.kind, one.content) for one in read_variants(path)] == [
        ("q0", "original", "A?"), ("q0/given-1", "given", "a?"), ("q0/given-2", "given", "A!"),
    ]  # fmt: skip


BAD = {
    "no group": ([{"prompt": "a"}], 'neither "base" nor "variants"'),
    "no list": ([{"prompt": "a", "variants": "b"}], "must be a list of texts"),
    "alone": ([{"id": "a", "base": "a", "prompt": "a"}], "holds no variant"),
    "two": (
        [{"id": i, "base": "a", "kind": "original", "prompt": i} for i in "ab"]
        + [{"id": "c", "base": "a", "prompt": "c"}],
        "two originals of 'a'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_groups_are_named(name, tmp_path):
    rows, said = BAD[name]
    path = tmp_path / "groups.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=re.escape(said)):
        read_variants(path)


def test_bad_requests_are_named():
    with pytest.raises(InputError, match="kind 'rhyme' is unknown; known: case"):
        make_variants(queries("a"), kinds=("rhyme",))
    with pytest.raises(InputError, match="--variants 0"):
        make_variants(queries("a"), kinds=("case",), number=0)
    with pytest.raises(InputError, match="has no original 'a'"):
        base_queries([Variant("b", "a", "case", "A")])


def test_queries_of_one_base_share_a_number():
    run = [
        StudyQuery("b", "B", {"base": "a", "kind": "case"}), StudyQuery("x", "X", {"base": "a"}),
        StudyQuery("c", "C", {"base": "c", "kind": "original"}),
        StudyQuery("a", "A", {"base": "a", "kind": "original"}), StudyQuery("y", "Y"),
    ]  # fmt: skip
    found, absent = find_variants(run, None, "run")
    assert list(found) == ["b", "c", "a"] and absent == 0
    groups = base_groups([query.id for query in run], found)
    assert groups is not None and groups.tolist() == [0, 1, 2, 0, 3]
    assert base_groups(["b", "x"], find_variants(run[1:2], None, "run")[0]) is None
