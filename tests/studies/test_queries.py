"""Query files as they are published, and the account of what was chosen from them."""

import dataclasses
import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import tyro

from tailrisk_jax.cli import main
from tailrisk_jax.cli.config import flags
from tailrisk_jax.cli.estimate import Estimate
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import StudyQuery, read_queries, read_study, read_trait
from tailrisk_jax.studies.provenance import content_hash
from tests.oracles import random_model, tiny_config
from tests.policies.word_tokenizer import WORDS, word_tokenizer

TRAIT = {
    "instruction": [{"pos": "Be very glum.", "neg": "Don't be glum."}],
    "questions": ["How was the blorp fair?", "What is a snonk like?"],
    "eval_prompt": "How glum is {answer} to {question}?",
}
HARMBENCH = (
    "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\r\n"
    "Build a snonk,standard,nonsense,,,build_snonk\r\n"
    '"Mend it, quickly",contextual,nonsense,"a, b","A vuft is\r\nbroken.",mend_vuft\r\n'
)

# name: (file, content, format, [(id, or None for a hash; content; metadata)])
PUBLISHED = {
    "StrongREJECT": (
        "strongreject_dataset.csv",
        "category,source,forbidden_prompt\nNonsense,custom,How is a lutch made?\n"
        'Nonsense,AdvBench,"Say ""wosk"",\nthen stop"\n',
        "StrongREJECT",
        [
            (None, "How is a lutch made?", {"category": "Nonsense", "source": "custom"}),
            (None, 'Say "wosk",\nthen stop', {"category": "Nonsense", "source": "AdvBench"}),
        ],
    ),
    "HarmBench": (
        "harmbench_behaviors_text_all.csv",
        HARMBENCH,
        "HarmBench",
        [
            (
                "build_snonk",
                "Build a snonk",
                {"functionalcategory": "standard", "semanticcategory": "nonsense"},
            ),
            (
                "mend_vuft",
                "A vuft is\r\nbroken.\n\n---\n\nMend it, quickly",
                {
                    "functionalcategory": "contextual",
                    "semanticcategory": "nonsense",
                    "tags": "a, b",
                    "contextstring": "A vuft is\r\nbroken.",
                    "behavior": "Mend it, quickly",
                },
            ),
        ],
    ),
    "JailbreakBench": (
        "harmful-behaviors.csv",
        "Index,Goal,Target,Behavior,Category,Source\n0,Use a zaggle,Here is how,Zaggling,Odd,Us\n",
        "JailbreakBench",
        [
            (
                "0",
                "Use a zaggle",
                {
                    "target": "Here is how",
                    "behavior": "Zaggling",
                    "category": "Odd",
                    "source": "Us",
                },
            )
        ],
    ),
    "AdvBench, in another order and case, with a byte order mark": (
        "harmful_behaviors.csv",
        "\ufeffTarget, GOAL \n\"Sure, here\",Bake a quift\n\n,Bake a wosk\n",
        "AdvBench",
        [(None, "Bake a quift", {"target": "Sure, here"}), (None, "Bake a wosk", {})],
    ),
    "XSTest": (
        "xstest_prompts.csv",
        "id,prompt,type,label,focus,note\n1,How do I kill a snonk process?,homonyms,safe,kill,\n",
        "XSTest",
        [("1", "How do I kill a snonk process?", {"type": "homonyms", "label": "safe",
                                                 "focus": "kill"})],
    ),
    "persona trait": (
        "glum.json",
        json.dumps(TRAIT, indent=2),
        "persona trait",
        [(None, question, {"trait": "glum"}) for question in TRAIT["questions"]],
    ),
    "JSON lines, one with a line separator in a text": (
        "queries.jsonl",
        '{"prompt": "a\u2028b", "Kind": 3}\r\n\n{"id": 7, "messages": [{"role": "user", '
        '"content": "c"}]}\n{"id": null, "prompt": "d"}',
        "JSON lines",
        [
            ("q0", "a\u2028b", {"kind": 3}),
            ("7", [{"role": "user", "content": "c"}], {}),
            ("q2", "d", {}),
        ],
    ),
    "JSON list": (
        "queries.json",
        json.dumps([{"prompt": "a"}, {"prompt": "b", "id": "two"}], indent=1),
        "JSON list",
        [("q0", "a", {}), ("two", "b", {})],
    ),
}  # fmt: skip


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_formats(name, tmp_path):
    file, text, format, wanted = PUBLISHED[name]
    read = read_queries(write(tmp_path, file, text))
    wanted = [StudyQuery(id or content_hash(content), content, m) for id, content, m in wanted]
    assert read.queries == wanted
    assert read.format == format and read.file == str(tmp_path / file)
    assert read.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert read.record()["kept"] == read.read == len(wanted)


def test_any_cell_survives_another_writer(tmp_path):
    """pyarrow quotes and escapes in its own way."""
    cells = ['a "b", c', "x\ny\r\nz", " led and trailed ", ";\t|'", "\u2028é\U0001f642", '"']
    table = pa.table({"Goal": cells, "target": cells[::-1]})
    pyarrow.csv.write_csv(table, tmp_path / "odd.csv")
    read = read_queries(tmp_path / "odd.csv")
    assert [query.content for query in read.queries] == cells
    assert [query.metadata["target"] for query in read.queries] == cells[::-1]


def test_a_trait_keeps_what_is_not_asked(tmp_path):
    trait = read_trait(write(tmp_path, "glum.json", json.dumps(TRAIT)))
    assert trait.name == "glum" and list(trait.questions) == TRAIT["questions"]
    assert trait.instructions == (("Be very glum.", "Don't be glum."),)
    assert trait.eval_prompt == TRAIT["eval_prompt"]


def test_ids_stay_when_rows_come_and_go(tmp_path):
    head, rows = "category,source,forbidden_prompt", ["x,y,one", "x,y,two", "x,y,three"]
    first = read_queries(write(tmp_path, "a.csv", "\n".join([head, *rows])))
    names = {query.content: query.id for query in first.queries}
    assert names["one"] == hashlib.sha256(b'"one"').hexdigest()[:16]
    other = read_queries(write(tmp_path, "b.csv", "\n".join([head, "z,z,four", *rows[:0:-1]])))
    assert {q.content: q.id for q in other.queries if q.content != "four"} == {
        content: names[content] for content in ("two", "three")
    }


def test_blank_and_repeated_rows_are_counted(tmp_path):
    text = "goal,target\none,a\none,b\n  ,c\ntwo,d\n"
    read = read_queries(write(tmp_path, "a.csv", text))
    assert [(q.content, q.metadata["target"]) for q in read.queries] == [("one", "a"), ("two", "d")]
    assert (read.read, read.blank, read.repeated) == (4, 1, 1)
    lines = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": ""}, {"id": "own", "prompt": "a"}]
    lines.append({"prompt": "b"})
    text = "\n".join(map(json.dumps, lines))
    read = read_queries(write(tmp_path, "a.jsonl", text))
    assert [query.id for query in read.queries] == ["q0", "own", "q4"]
    assert (read.read, read.blank, read.repeated) == (5, 1, 1)


def test_any_column_can_be_named(tmp_path):
    table = write(tmp_path, "own.csv", "ID,Question,Weight\na,What?,3\n")
    wanted = [StudyQuery("a", "What?", {"weight": "3"})]
    assert read_queries(table, "question").queries == wanted
    lines = write(tmp_path, "own.jsonl", '{"id": "a", "question": "What?", "weight": "3"}')
    assert read_queries(lines, "question").queries == wanted


XSTEST = "id,prompt,type,label,focus,note\n" + "".join(
    f"{n},{'hello' if n % 3 else 'how to bake a cake'},{kind},{label},x,\n"
    for n, (kind, label) in enumerate(
        [("homonyms", "safe"), ("contrast", "unsafe"), ("figures", "safe"), ("homonyms", "unsafe")]
        * 3
    )
)
MODEL = dataclasses.replace(
    random_model(tiny_config(vocab_size=len(WORDS))), tokenizer=word_tokenizer()
)


def test_a_selection_accounts_for_every_query(tmp_path):
    read = read_queries(write(tmp_path, "xstest.csv", XSTEST))
    listed = write(tmp_path, "ids.txt", "1\n\n2\r\n")
    chosen = read.exclude(["0", str(listed)]).where(["TYPE=homonyms", "type=figures", "label=safe"])
    assert [query.id for query in chosen.queries] == ["4", "6", "8", "10"]
    # With the chat template, "hello" has 5 tokens and "how to bake a cake" 9.
    assert chosen.within(9, MODEL).queries == chosen.queries
    short = chosen.within(8, MODEL).first(2)
    assert [query.id for query in short.queries] == ["4", "8"]
    assert json.loads(json.dumps(short.record())) == {
        "file": str(tmp_path / "xstest.csv"),
        "format": "XSTest",
        "sha256": hashlib.sha256(XSTEST.encode()).hexdigest(),
        "read": 12,
        "blank": 0,
        "repeated": 0,
        "excluded": ["0", "1", "2"],
        "conditions": {
            "type": {"values": ["homonyms", "figures"], "dropped": 2},
            "label": {"values": ["safe"], "dropped": 3},
        },
        "max_prompt_tokens": 8,
        "too_long": ["6"],
        "beyond_first": 1,
        "kept": 2,
    }
    assert str(short).endswith(
        "12 read, 3 excluded, 2 with another type, 3 with another label, 1 too long, "
        "1 after the first, 2 kept"
    )
    assert read.first(99).queries == read.exclude([]).where([]).within(None, MODEL).queries


def options(argv):
    return tyro.cli(Estimate, args=argv)


def test_options_that_take_several_words_add_up(tmp_path):
    """However they are given, in a config file too."""
    wanted = options(["--where", "a=1", "b=2", "--exclude", "x", "--first", "3"])
    assert wanted.where == ("a=1", "b=2") and wanted.exclude == ("x",) and wanted.first == 3
    assert options(["--where", "a=1", "--where=b=2", "--exclude=x", "--first=3"]) == wanted
    content = {"where": ["a=1", "b=2"], "exclude": "x", "first": 3}
    assert options(flags(content, "estimate", Estimate, tmp_path)) == wanted
    assert dataclasses.replace(wanted, first=3) == wanted


def test_a_study_keeps_its_queries_and_how_they_were_chosen(tmp_path, capsys, monkeypatch):
    """Of a run that stops before its first draw, and goes on."""
    lines = [
        {"prompt": "tell me how to use a lutch .", "kind": "use"},
        {"prompt": "please tell me how to repair a quift .", "kind": "repair", "target": "mix"},
        {"prompt": "tell me how to build a troopple .", "kind": "build"},
    ]
    write(tmp_path, "queries.jsonl", "\n".join(map(json.dumps, lines)))
    content = {
        "model": "organism", "proposal": "target", "queries": str(tmp_path / "queries.jsonl"),
        "exclude": ["q2"], "where": ["kind=repair", "kind=build"], "max_prompt_tokens": 50,
        "max_new_tokens": 12,
    }  # fmt: skip
    config, run = write(tmp_path, "study.yaml", json.dumps(content)), tmp_path / "run"
    drawn = []

    def stop(target, proposal, queries, *_, **__):
        drawn.append(queries)
        raise InputError("stopped")

    monkeypatch.setattr("tailrisk_jax.cli.estimate.draw_study", stop)
    commands = (["estimate", "--config", str(config), "--out", str(run)], ["resume", str(run)])
    selections = []
    for command in commands:
        with pytest.raises(SystemExit):
            main(command)
        said = capsys.readouterr().err
        assert "1 excluded, 1 with another kind, 1 kept" in said and "stopped" in said
        selections.append(read_study(run).selection)
    kept = StudyQuery("q1", lines[1]["prompt"], {"kind": "repair", "target": "mix"})
    assert drawn == [[kept], [kept]] and read_study(run).queries == [kept]
    assert selections[0] == selections[1] and selections[0]["excluded"] == ["q2"]
    record = json.loads((run / "study.json").read_text())
    del record["queries"][0]["metadata"]  # as it was before there were any
    (run / "study.json").write_text(json.dumps(record))
    assert read_study(run).queries == [dataclasses.replace(kept, metadata={})]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client needs to list and fetch the files of a data set."""

    COMMIT = "c0ffee" + 34 * "0"
    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        body, headers, known = b"", {}, "/datasets/odd/wares" in self.path
        name = next((name for name in self.files if self.path.endswith(name)), None)
        if known and name:
            body = self.files[name]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": self.COMMIT}
        elif known and "/tree/" in self.path:
            sizes = {name: len(content) for name, content in self.files.items()}
            listed = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
            body = json.dumps(listed).encode()
        elif known:
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps(
                {"id": "odd/wares", "sha": self.COMMIT, "siblings": siblings}
            ).encode()
        self.send_response(200 if body else 404)
        for header, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def parquet(**columns):
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """Through the hub's client and a server on loopback; then from the cache, without it."""
    from huggingface_hub import constants

    chats = [[{"role": "user", "content": "c"}], [{"role": "user", "content": "d"}]]
    files = {
        "main/test/0000.parquet": parquet(Goal=["a", "b"], Target=["x", None], n=[1, 2]),
        "main/test/0001.parquet": parquet(Goal=["c"], Target=["y"], n=[3]),
        "main/train/0000.parquet": parquet(chat=chats, blob=[b"1", b"2"], id=["one", "two"]),
        "README.md": b"-",
    }
    monkeypatch.setattr(Hub, "files", files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    resolve = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    wanted = [
        StudyQuery(content_hash("a"), "a", {"target": "x", "n": 1}),
        StudyQuery(content_hash("b"), "b", {"n": 2}),
        StudyQuery(content_hash("c"), "c", {"target": "y", "n": 3}),
    ]
    try:
        read = read_queries("hf:odd/wares:main:test")
        assert read.queries == wanted and read.format == "AdvBench"
        assert read.file == f"hf:odd/wares:main:test@{Hub.COMMIT[:12]}"
        both = files["main/test/0000.parquet"] + files["main/test/0001.parquet"]
        assert read.sha256 == hashlib.sha256(both).hexdigest()
        chosen = read_queries("hf:odd/wares::train:chat").queries
        assert chosen == [StudyQuery("one", chats[0]), StudyQuery("two", chats[1])]
        for source, said in {
            "hf:odd/wares": "has 2 splits; name one of: test, train",
            "hf:odd/wares:other": "has no config 'other'; name one of: main",
            "hf:odd/wares:main:train": "has the columns chat, blob, id",
            "hf:nobody/nothing": "'nobody/nothing' could not be fetched",
        }.items():
            with pytest.raises(InputError, match=said):
                read_queries(source)
    finally:
        server.shutdown()
        server.server_close()
    assert read_queries("hf:odd/wares:main:test").queries == wanted
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_queries("hf:odd/wares:main:test").queries == wanted
    with pytest.raises(InputError, match=r"(?s)^[^\n]*'a/b' could not be fetched[^\n]*$"):
        read_queries("hf:a/b")


BAD = {  # name: (file, content, what to do with it, what is said)
    "another header": ("a.csv", "Question,Answer\na,b\n", None, "columns Question, Answer.*XSTest"),
    "semicolons": ("a.csv", "goal;target\na;b\n", None, "columns goal;target"),
    "no header": ("a.csv", "", None, "holds no queries"),
    "a header alone": ("a.csv", "goal,target\n", None, "holds no queries .0 rows"),
    "all blank": ("a.csv", "goal,target\n,x\n", None, "1 rows, 1 of them blank"),
    "a column twice": ("a.csv", "goal,target,Goal\na,b,c\n", None, "'goal' twice"),
    "too many cells": ("a.csv", "goal,target\na,b,c\n", None, "line 2 has 3 cells, the header 2"),
    "too few cells": ("a.csv", "goal,target\na,b\nc\n", None, "line 3 has 1 cells"),
    "an open quote": ("a.csv", 'goal,target\n"a,b\n', None, "not valid CSV"),
    "an id twice": (
        "a.csv", "id,prompt,type,focus\n1,a,t,f\n1,b,t,f\n", None, "line 3 repeats the id '1'"
    ),
    "images": (
        "a.csv", "Behavior,ContextString,BehaviorID,ImageFileName\na,b,c,d\n", None, "multimodal"
    ),
    "no such column": ("a.csv", "a,b\n1,2\n", lambda p: read_queries(p, "c"), "'c'; it has a, b"),
    "an id twice, JSON": (
        "a.jsonl", '{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', None, "line 2 repeats"
    ),
    "a default id": (
        "a.jsonl", '{"prompt": "a"}\n{"id": "q0", "prompt": "b"}', None, "repeats the id 'q0'"
    ),
    "prompt and messages": (
        "a.jsonl", '{"prompt": "a", "messages": []}', None, "line 1 must be .* either"
    ),
    "no prompt": ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', None, "line 2 must be"),
    "a number": ("a.jsonl", '{"prompt": 3}', None, 'line 1: "prompt" is 3'),
    "no messages": ("a.jsonl", '{"messages": []}', None, 'line 1: "messages" must list'),
    "no role": ("a.json", '[{"messages": [{"content": "a"}]}]', None, 'record 1: "messages" must'),
    "broken line": ("a.jsonl", '{"prompt": "a"}\n{"prompt', None, "line 2 is not valid JSON"),
    "broken list": ("a.json", '[{"prompt": "a"}', None, "a.json is not valid JSON"),
    "half a pair": ("a.jsonl", r'{"prompt": "\ud800"}', None, "line 1 holds half a surrogate pair"),
    "neither": ("a.json", '{"answer": 3}', None, 'neither a query .* nor a persona trait'),
    "questions": ("a.json", '{"questions": [1]}', None, '"questions" must be a list of texts'),
    "instruction": (
        "a.json", '{"questions": ["a"], "instruction": [["a", "b"]]}', None, '"pos" and "neg"'
    ),
    "eval_prompt": ("a.json", '{"questions": ["a"], "eval_prompt": 1}', read_trait, "eval_prompt"),
    "a trait of nothing": ("a.json", "", read_trait, "not valid JSON"),
    "Latin-1": ("a.csv", "goal,target\n\u00e9,b\n", lambda p: (
        p.write_bytes(p.read_text("utf-8").encode("latin-1")), read_queries(p)), "utf-8"),
    "no file": ("a.csv", "", lambda p: read_queries(p.parent / "b.csv"), "b.csv can't be read"),
    "a folder": ("a.csv", "", lambda p: read_queries(p.parent), "can't be read"),
    "a name": ("a.csv", "", lambda p: read_queries("hf:wares"), "'hf:wares' is not hf:OWNER/NAME"),
    "a long name": ("a.csv", "", lambda p: read_queries("hf:a/b:c:d:e:f"), "is not hf:OWNER/NAME"),
}  # fmt: skip

STEPS = {  # on the twelve queries of XSTEST
    "no value": (lambda s: s.where(["type"]), "'type' is not COLUMN=VALUE"),
    "no such column": (lambda s: s.where(["kind=x"]), "kind=.*they have focus, label, type"),
    "no such value": (lambda s: s.where(["type=Homonyms"]), "Homonyms.*'contrast', 'figures'"),
    "nothing in common": (
        lambda s: s.where(["type=figures", "label=unsafe"]), "--where label leaves none of 3"
    ),
    "no such id": (lambda s: s.exclude(["12"]), "'12' is neither .* like '0'"),
    "all": (lambda s: s.exclude([str(n) for n in range(12)]), "--exclude leaves none of 12"),
    "too long": (lambda s: s.within(4, MODEL), "--max-prompt-tokens 4 .the shortest prompt has 5"),
    "none": (lambda s: s.first(0), "--first 0 leaves none of 12"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_clear_line(name, tmp_path):
    file, text, do, said = BAD[name]
    path = write(tmp_path, file, text)
    with pytest.raises(InputError, match=said) as raised:
        (do or read_queries)(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", STEPS)
def test_bad_steps_are_one_clear_line(name, tmp_path):
    step, said = STEPS[name]
    read = read_queries(write(tmp_path, "xstest.csv", XSTEST))
    with pytest.raises(InputError, match=said) as raised:
        step(read)
    assert "\n" not in str(raised.value)


def test_a_file_of_ids_that_no_query_has(tmp_path):
    read = read_queries(write(tmp_path, "xstest.csv", XSTEST))
    with pytest.raises(InputError, match="lists '77'"):
        read.exclude([str(write(tmp_path, "ids.txt", "1\n77\n"))])
