"""The zoo against a real HTTP server: search, compare, load and mix."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelInfo
from processes import WorkerError
from samples import BASE, save_adapter, save_base, tiny_record

from rlora_trl import zoo as zoo_module
from rlora_trl.reading import AdapterCheckError
from rlora_trl.zoo import AdapterInfo, Comparison
from rlora_trl.zoo.search import split_revision


OTHER_BASE = "user/other-llama"
SEARCHED = 1000
HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of one base model and one of another, with different tasks and scores."""
    root = tmp_path_factory.mktemp("zoo")
    save_base(root / "base")
    for seed, name, options in (
        (1, "words", {}),
        (2, "colours", {"tasks": ["colour"], "r": 2}),
        (3, "elsewhere", {"base": OTHER_BASE}),
    ):
        save_adapter(root / name, seed=seed, **options)
    record = tiny_record()
    record.tasks = [record.task("colour")]
    record.tasks[0].metrics = {"accuracy": 0.8, "base_accuracy": 0.5, "loss": 0.3}
    record.mixtures = None
    record.save(root / "colours")
    record = tiny_record(OTHER_BASE)
    record.save(root / "elsewhere")
    return root


@pytest.fixture
def zoo(hub, worker, folders):
    for base in (BASE, OTHER_BASE):
        hub.commit(base, folders / "base")
    source = "from rlora_trl import push_adapter\nfor folder, repo in pushes: push_adapter(folder, repo)"
    repos = [("words", "user/words"), ("colours", "user/colours"), ("elsewhere", "org/elsewhere")]
    worker.run(source, pushes=[(str(folders / name), repo) for name, repo in repos])
    hub.commit("user/unrelated", {"README.md": f"---\ntags: [lora]\nbase_model: {BASE}\n---\nPlain LoRA"})
    hub.repo("user/colours").downloads = 9
    hub.repo("user/words").downloads = 5

    def run(expression, **variables):
        source = f"import sys; sys.path[:0] = paths\nfrom rlora_trl import zoo\nresult = {expression}"
        return worker.run(source, paths=PATHS, **variables)

    return run


def test_search(zoo):
    def results(arguments=""):
        return zoo(f"[info.repo_id for info in zoo.search({arguments})]")

    assert results() == ["user/colours", "user/words", "org/elsewhere"], "those most downloaded first"
    assert results(f"base_model={BASE!r}") == ["user/colours", "user/words"]
    assert results(f"base_model={BASE!r}, task='first'") == ["user/words"]
    assert results("author='org'") == ["org/elsewhere"]
    assert results("task='nothing'") == [] and results("limit=1") == ["user/colours"]
    assert results("task=' first '") == ["user/words", "org/elsewhere"], "tags have tasks on one line"
    assert results("sort='updated'")[0] == "org/elsewhere" and results("sort='updated', limit=1") == ["org/elsewhere"]
    assert results("sort='accuracy'")[0] == "user/colours"
    with pytest.raises(WorkerError, match="one of downloads, updated, accuracy"):
        results("sort='likes'")
    with pytest.raises(WorkerError, match="at least 1"):
        results("limit=0")


def test_search_does_not_believe_tags(hub, zoo):
    card = "---\ntags: [rlora, 'task:colour']\nrlora: {format: 1, tasks: [poems]}\n---\nHas no such task"
    hub.commit("user/liar", {"README.md": card})
    assert "user/liar" not in zoo("[info.repo_id for info in zoo.search(task='colour')]")


def test_what_is_known_without_a_download(hub, zoo):
    hub.requests.clear()
    info = zoo("zoo.show('user/colours').to_dict()")
    assert info["base_model"] == BASE and info["tasks"] == ["colour"] and info["r"] == 2 and info["num_heads"] == 3
    assert info["metrics"] == {"colour": {"accuracy": 0.8, "base_accuracy": 0.5, "loss": 0.3}}
    assert info["sha"] == hub.head("user/colours") and info["downloads"] == 9 and info["last_modified"]
    assert info["digest"].startswith("sha256:")
    assert hub.downloaded_bytes() == 0
    with pytest.raises(WorkerError, match="not an R-LoRA adapter"):
        zoo("zoo.show('user/unrelated')")


def test_compare(hub, zoo):
    hub.requests.clear()
    table = zoo("zoo.compare(['user/words', 'user/colours']).to_dict()")
    assert hub.downloaded_bytes() == 0, "cards were downloaded, or more"
    assert table["rows"] == [
        {"task": "first", "user/words": 0.9, "user/colours": None},
        {"task": "colour", "user/words": 0.75, "user/colours": 0.8},
        {"task": "same", "user/words": 0.5, "user/colours": None},
        {"task": "mean of 1 shared", "user/words": 0.75, "user/colours": 0.8},
    ]
    text = zoo("str(zoo.compare(['user/words', 'user/colours']))")
    assert "| colour | 75.0% | 80.0% (+30.0) |" in text and "| first | 90.0% | - |" in text
    with pytest.raises(WorkerError, match="Name one of these"):
        zoo("zoo.compare(['user/words'], metric='f1')")


def test_compare_revisions_of_one_repository(hub, zoo, folders):
    old = hub.head("user/colours")
    table = zoo("zoo.compare(places).to_dict()", places=[f"user/colours@{old}", "user/colours"])
    assert set(table["rows"][0]) == {"task", f"user/colours@{old}", "user/colours"}
    assert table["gains"][0]["user/colours"] == pytest.approx(0.3)


def raw_entry(name, card=None, **changes):
    """What the Hub's list says about a repository with a card."""
    card = {"tags": ["rlora"], "base_model": BASE, "rlora": {"tasks": ["colour"]}} | (card or {})
    entry = {"id": name, "sha": "a" * 40, "downloads": 1, "private": False, "tags": ["rlora"], "cardData": card}
    return entry | {"lastModified": "2026-01-01T00:00:00.000Z"} | changes


DEEP = json.loads("[" * 100 + "]" * 100)
BAD_ENTRIES = {
    "self": raw_entry("user/bad", {"self": "x"}),
    "ignore": raw_entry("user/bad", {"ignore_metadata_errors": True}),
    "tags": raw_entry("user/bad", {"tags": 5}),
    "source": raw_entry("user/bad", {"model-index": [{"name": "x", "results": [{"source": "text"}]}]}),
    "deep": raw_entry("user/bad", {"model-index": DEEP}),
    "nan": raw_entry("user/bad", {"x": float("nan")}),
    "huge": raw_entry("user/bad", {"x": 10**100}),
    "card is a text": raw_entry("user/bad", cardData="text"),
    "card is a list": raw_entry("user/bad", cardData=[1]),
    "sha": raw_entry("user/bad", sha="../../x"),
    "sha is a number": raw_entry("user/bad", sha=5),
    "downloads": raw_entry("user/bad", downloads="many"),
    "downloads are true": raw_entry("user/bad", downloads=True),
    "time": raw_entry("user/bad", lastModified="yesterday"),
    "time is a number": raw_entry("user/bad", lastModified=5),
    "private": raw_entry("user/bad", private="no"),
    "tags of the entry": raw_entry("user/bad", tags={"rlora": 1}),
    "name": raw_entry("../../x"),
    "long name": raw_entry("user/" + "x" * 200),
    "name is a list": raw_entry(["user/bad"]),
    "no name": {"sha": "a" * 40},
    "no entry": 5,
    "null": None,
}
LENIENT = {
    "names": {"base_model": [1, {}], "rlora": {"tasks": [None, "colour"], "r": "x", "num_heads": -1}},
    "index": {"model-index": 5},
    "results": {"model-index": [{"results": [5, {"dataset": 5, "metrics": [{"value": "x"}]}]}]},
    "block": {"rlora": 5},
}


def test_one_card_does_not_break_a_search(hub, zoo):
    hub.fake.listed = list(BAD_ENTRIES.values())
    hub.fake.page_size = 4
    result = zoo("__import__('zoo_check').search(sort='downloads')")
    assert result["found"] == ["user/colours", "user/words", "org/elsewhere"]
    count = f"{len(BAD_ENTRIES)} of {len(BAD_ENTRIES) + 3}"
    (message,) = result["messages"]
    assert message.startswith(f"{count} listed adapters were skipped because their cards can't be read: ")
    assert message.endswith(f"and {len(BAD_ENTRIES) - 2} more.")
    assert set(zoo("__import__('zoo_check').search(sort='accuracy')")["found"]) == set(result["found"])

    hub.fake.claims = {"user/bad": BAD_ENTRIES["self"]}
    for call in ("show('user/bad')", "compare(['user/words', 'user/bad'])"):
        with pytest.raises(WorkerError, match="user/bad can't be shown, as its card.*a key is `self`") as caught:
            zoo(f"zoo.{call}")
        assert caught.value.type == "AdapterCheckError"


def test_pages_that_repeat(hub, zoo):
    hub.fake.listed = [raw_entry(f"user/n{index}") for index in range(3)]
    hub.fake.page_size = 2
    assert len(zoo("__import__('zoo_check').search()")["found"]) == 6
    hub.fake.first_page_again = True
    with pytest.raises(WorkerError, match="does not end: its pages repeat"):
        zoo("zoo.search()")


def test_an_answer_without_end(zoo):
    small = "setattr(__import__('rlora_trl.zoo.listing', fromlist=['x']), '_MAX_ANSWER', 100)"
    for call in ("search()", "show('user/words')"):
        with pytest.raises(WorkerError, match="answer has more than 100 bytes"):
            zoo(f"{small} or zoo.{call}")


def test_the_error_of_an_answer_is_that_of_huggingface_hub(hub, zoo):
    hub.fail("GET", "/api/models$", status=404)
    with pytest.raises(WorkerError, match="404"):
        zoo("zoo.search()")


def test_a_token_stays_with_its_hub(hub, zoo):
    """The next page may be on any host."""
    hub.fake.listed = [raw_entry(f"user/n{index}") for index in range(4)]
    hub.fake.page_size = 6
    hub.fake.next_host = hub.storage_url
    hub.requests.clear()
    assert len(zoo("__import__('zoo_check').search()")["found"]) == 7
    first, second = (record for record in hub.requests if record.path == "/api/models")
    assert first.authorization and not first.storage and second.storage and not second.authorization


def test_a_search_is_linear(hub, zoo):
    results = [
        {
            "task": {"type": "x"},
            "dataset": {"type": "d", "name": f"t{i}"},
            "metrics": [{"type": "accuracy", "value": 0.5}],
        }
        for i in range(10)
    ]
    card = {"model-index": [{"name": "x", "results": results}]}
    hub.fake.listed = [raw_entry(f"user/n{index}", card) for index in range(SEARCHED)]
    for sort in ("downloads", "accuracy"):
        result = zoo("__import__('zoo_check').search(sort=sort)", sort=sort)
        assert len(result["found"]) == SEARCHED + 3 and not result["messages"]
        assert result["seconds"] < SEARCHED / 200, f"{SEARCHED} adapters took {result['seconds']} s"


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_a_bad_entry_is_an_error_of_one_type(name):
    with pytest.raises(AdapterCheckError):
        AdapterInfo.from_json(json.dumps(BAD_ENTRIES[name]).encode())


@pytest.mark.parametrize("name", LENIENT)
def test_values_of_unexpected_types_are_left_out(name):
    info = AdapterInfo.from_json(json.dumps(raw_entry("user/odd", LENIENT[name])).encode())
    assert info.repo_id == "user/odd" and info.metrics == {} and info.r is None and info.num_heads is None


def test_from_model_info():
    entry = raw_entry("user/a", {"rlora": {"tasks": ["colour"], "r": 4}})
    assert AdapterInfo.from_model_info(ModelInfo(**entry)) == AdapterInfo.from_json(json.dumps(entry).encode())


def test_what_is_not_a_repository_is_named(tmp_path):
    for compared in (str(tmp_path), "a/b/c", "user/name name", ""):
        with pytest.raises(ValueError, match="name of a repository.*user/name or user/name@revision") as caught:
            zoo_module.compare([compared])
        assert ("a folder" in str(caught.value)) == (compared == str(tmp_path))


def test_names_of_strangers_stay_in_their_cells():
    info = AdapterInfo("user/x", metrics={"a|b\nc": {"accuracy": 0.5}})
    assert str(Comparison((info,), ("a|b\nc",))).splitlines()[2] == r"| a\|b c | 50.0% |"


def test_load_switches_and_mixes(zoo):
    result = zoo("__import__('zoo_check').check(['user/words', 'user/colours'])")
    assert result["names"] == ["words", "colours"] and result["active"] == "words"
    assert result["switched"] > 1e-3, "both adapters give the same logits"
    assert result["single"] < 1e-6, "a weight of one is the adapter as it is"
    assert result["sum"] < 1e-5, "deltas of a mixed layer are not the weighted sum"
    assert result["zero"] < 1e-6, "weights of zero are not the base model"
    assert result["back"] < 1e-6 and result["other"] < 1e-6, "scales of a mix are left on one adapter"


def test_names_of_loaded_adapters(zoo, folders, tmp_path):
    for name in ("v1.words", "deep/words"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folders / "words")
    places = ["user/words", str(tmp_path / "deep" / "words"), str(tmp_path / "v1.words")]
    assert zoo("list(zoo.load(places).peft_config)", places=places) == ["words", "words_2", "v1_words"]
    assert zoo("list(zoo.load({'mine': places[0]}).peft_config)", places=places) == ["mine"]
    with pytest.raises(WorkerError, match="at least one adapter"):
        zoo("zoo.load([])")


def test_load_refuses_different_bases(zoo):
    with pytest.raises(WorkerError, match="do not share one base model"):
        zoo("zoo.load(['user/words', 'org/elsewhere'])")
    for base in (f"{BASE!r}", f"__import__('zoo_check').base_model({BASE!r})"):
        with pytest.raises(WorkerError, match="was trained on '?user/other-llama'?, and is being loaded on") as caught:
            zoo(f"zoo.load(['user/words', 'org/elsewhere'], base={base})")
        assert caught.value.type == "AdapterCheckError"


def test_load_refuses_different_revisions_of_a_base(hub, zoo, tmp_path):
    places = {}
    for name, revision in (("old", "a" * 40), ("new", "b" * 40)):
        save_adapter(tmp_path / name)
        record = tiny_record()
        record.base_model_revision = revision
        record.save(tmp_path / name)
        places[name] = str(tmp_path / name)
    with pytest.raises(WorkerError, match=f"different revisions of {BASE}"):
        zoo("zoo.load(places)", places=places)
    loaded = zoo("list(zoo.load(places, revision='main').peft_config)", places=places)
    assert loaded == ["old", "new"]


def test_a_folder_may_have_an_at_sign_in_its_name(tmp_path):
    (tmp_path / "run@2").mkdir()
    assert split_revision(str(tmp_path / "run@2")) == (str(tmp_path / "run@2"), None)
    assert split_revision("user/name@next") == ("user/name", "next")
    assert split_revision("user/name") == ("user/name", None)


def test_command_line(hub, zoo, folders):
    def rlora(*words):
        return zoo("__import__('zoo_check').rlora(words)", words=[str(word) for word in words])

    code, output, _ = rlora("push", folders / "words", "user/again")
    assert code == 0 and output.startswith("Published") and hub.head("user/again") in output
    code, output, _ = rlora("push", folders / "words", "user/again")
    assert code == 0 and output.startswith("Unchanged") and hub.head("user/again") in output
    code, output, _ = rlora("pull", "user/again")
    assert code == 0 and output.splitlines()[0].split() == ["Repository", "user/again"]
    assert rlora("zoo", "compare", "user/again", "--metric", "f1")[2].strip().endswith("`--metric`.")


@pytest.mark.parametrize("name", ["Manifest", "PinnedAdapter"])
def test_manifests_are_gone(name):
    with pytest.raises(
        ImportError, match=r"removed together with `zoo.yaml`.*`pull_adapter\(repo_id, revision=...\)`"
    ):
        exec(f"from rlora_trl.zoo import {name}")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zoo_module.nothing
