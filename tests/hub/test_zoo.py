"""The zoo against a real HTTP server: search, compare, load, mix, and pinned sets."""

from pathlib import Path

import pytest
from processes import WorkerError
from samples import BASE, save_adapter, save_base, tiny_record


OTHER_BASE = "user/other-llama"
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
    def found(arguments=""):
        return zoo(f"[info.repo_id for info in zoo.search({arguments})]")

    assert found() == ["user/colours", "user/words", "org/elsewhere"], "those most downloaded first"
    assert found(f"base_model={BASE!r}") == ["user/colours", "user/words"]
    assert found(f"base_model={BASE!r}, task='first'") == ["user/words"]
    assert found("author='org'") == ["org/elsewhere"]
    assert found("task='nothing'") == [] and found("limit=1") == ["user/colours"]
    assert found("task=' first '") == ["user/words", "org/elsewhere"], "tags have tasks on one line"
    assert found("sort='updated'")[0] == "org/elsewhere" and found("sort='updated', limit=1") == ["org/elsewhere"]
    assert found("sort='accuracy'")[0] == "user/colours"
    with pytest.raises(WorkerError, match="one of downloads, updated, accuracy"):
        found("sort='likes'")
    with pytest.raises(WorkerError, match="at least 1"):
        found("limit=0")


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
    assert "| colour | 75.0 % | 80.0 % (+30.0) |" in text and "| first | 90.0 % | - |" in text
    with pytest.raises(WorkerError, match="Name one of these"):
        zoo("zoo.compare(['user/words'], metric='f1')")


def test_compare_revisions_of_one_repository(hub, zoo, folders):
    old = hub.head("user/colours")
    table = zoo("zoo.compare(places).to_dict()", places=[f"user/colours@{old}", "user/colours"])
    assert set(table["rows"][0]) == {"task", f"user/colours@{old}", "user/colours"}
    assert table["gains"][0]["user/colours"] == pytest.approx(0.3)


def test_names_of_strangers_stay_in_their_cells():
    from rlora_trl.zoo import AdapterInfo, Comparison

    info = AdapterInfo("user/x", metrics={"a|b\nc": {"accuracy": 0.5}})
    assert str(Comparison((info,), ("a|b\nc",))).splitlines()[2] == r"| a\|b c | 50.0 % |"


def test_load_switches_and_mixes(zoo):
    result = zoo("__import__('zoo_check').check(['user/words', 'user/colours'])")
    assert result["names"] == ["words", "colours"] and result["active"] == "words"
    assert result["switched"] > 1e-3, "both adapters give the same logits"
    assert result["single"] < 1e-6, "a weight of one is the adapter as it is"
    assert result["sum"] < 1e-5, "deltas of a mixed layer are not the weighted sum"
    assert result["zero"] < 1e-6, "weights of zero are not the base model"
    assert result["back"] < 1e-6 and result["other"] < 1e-6, "scales of a mix are left on one adapter"


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
    from rlora_trl.zoo.names import split_revision

    (tmp_path / "run@2").mkdir()
    assert split_revision(str(tmp_path / "run@2")) == (str(tmp_path / "run@2"), None)
    assert split_revision("user/name@next") == ("user/name", "next")
    assert split_revision("user/name") == ("user/name", None)


def test_manifest(hub, zoo, tmp_path):
    path = str(tmp_path / "zoo.yaml")
    zoo("str(zoo.Manifest.pin(['user/words', 'user/colours'], base_model=base).save(path))", path=path, base=BASE)
    text = Path(path).read_text()
    assert hub.head("user/words") in text and "sha256:" in text
    pinned = hub.head("user/words")
    hub.commit("user/words", {"README.md": "---\ntags: [rlora]\n---\nNewer"})
    folders = zoo("zoo.Manifest.load(path).install()", path=path)
    assert Path(folders["words"]).name == pinned and set(folders) == {"words", "colours"}
    hub.requests.clear()
    assert zoo("zoo.Manifest.load(path).install(local_files_only=True)", path=path) == folders
    assert hub.requests == []


def test_pinned_names_are_those_of_adapters(hub, zoo, folders, tmp_path):
    path = str(tmp_path / "zoo.yaml")
    source = (
        "from rlora_trl import push_adapter; push_adapter(folder, 'org/v1.words'); push_adapter(folder, 'org/words')"
    )
    zoo("exec(source, {'folder': folder})", source=source, folder=str(folders / "words"))
    zoo("str(zoo.Manifest.pin(['user/words', 'org/words', 'org/v1.words']).save(path))", path=path)
    manifest = zoo("[zoo.Manifest.load(path).base_model, list(zoo.Manifest.load(path).install())]", path=path)
    assert manifest == [BASE, ["words", "words_2", "v1_words"]]


def test_command_line(hub, zoo, folders, tmp_path):
    def rlora(*words):
        return zoo("__import__('zoo_check').rlora(words)", words=[str(word) for word in words])

    code, told, _ = rlora("push", folders / "words", "user/again")
    assert code == 0 and told.startswith("Published") and hub.head("user/again") in told
    code, told, _ = rlora("push", folders / "words", "user/again")
    assert code == 0 and told.startswith("Unchanged") and hub.head("user/again") in told
    code, told, remarks = rlora("zoo", "pin", "user/again", "--output", tmp_path / "own.yaml")
    assert code == 0 and hub.head("user/again") in told and "rlora zoo install" in remarks
    code, told, _ = rlora("pull", "user/again")
    assert code == 0 and told.splitlines()[0].split() == ["Repository", "user/again"]
    assert rlora("zoo", "compare", "user/again", "--metric", "f1")[2].strip().endswith("one of these with `--metric`.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: 2\nadapters: []", "format: 1"),
        ("- a", "mapping"),
        ("format: 1\nadapters: [{repo_id: a/b, revision: main}]", "40 hexadecimal"),
        ("format: 1\nadapters: [{repo_id: a/b, revision: main, colour: red}]", "may have"),
        ("format: 1\nadapters: 3", "list of mappings"),
        ("format: [", "no YAML"),
        (f"format: 1\nadapters: [{{repo_id: a/b, revision: {'a' * 40}, digest: x}}]", "sha256"),
        (f"format: 1\nadapters: [{{repo_id: a/b, revision: {'a' * 40}, name: v1.2}}]", "letters, digits"),
        ("format: 1\nadapters: [" + f"{{repo_id: a/b, revision: '{'a' * 40}'}}, " * 2 + "]", "more than one"),
    ],
)
def test_manifests_that_are_none(tmp_path, text, message):
    from rlora_trl import zoo

    (tmp_path / "zoo.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        zoo.Manifest.load(tmp_path / "zoo.yaml")


def test_manifest_refuses_another_digest(hub, zoo, tmp_path):
    path = tmp_path / "zoo.yaml"
    head = hub.head("user/words")
    entry = f"{{repo_id: user/words, revision: {head}, digest: 'sha256:{'0' * 64}'}}"
    path.write_text(f"format: 1\nadapters: [{entry}]\n")
    with pytest.raises(WorkerError, match="Do not use it") as caught:
        zoo("zoo.Manifest.load(path).install()", path=str(path))
    assert caught.value.type == "AdapterCheckError"
