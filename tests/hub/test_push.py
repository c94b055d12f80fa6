"""`push_adapter` against a real HTTP server: what is published, what never is, and what faults leave behind."""

import json
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from processes import WorkerError
from samples import BASE, TASKS, save_adapter, save_base, tiny_record

from rlora_trl.files.card_text import CARD_LIMIT
from rlora_trl.files.head_weights import HeadWeights
from rlora_trl.files.record import AdapterRecord, TaskRecord
from rlora_trl.hub import adapter_digest
from rlora_trl.hub.card_reading import read_card_info


REPO = "user/words"
PUSH = """
from rlora_trl import push_adapter
commit = push_adapter(folder, repo, **options)
result = {"oid": commit.oid, "pr": commit.pr_url}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def push(hub, worker, base):
    hub.commit(BASE, base)

    def run(folder, repo=REPO, **options):
        return worker.run(PUSH, folder=str(folder), repo=repo, options=options)

    return run


def card_of(hub, revision="main", repo=REPO):
    return ModelCard(hub.files(repo, revision)["README.md"].decode())


def test_everything_is_in_one_commit_and_nothing_else(hub, push, folder):
    commit = push(folder)
    assert len(hub.commits(REPO)) == 2, "more than one commit after the initial one"
    assert hub.head(REPO) == commit["oid"]
    files = hub.files(REPO)
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "figures/head_similarity.png",
        "figures/routing.png",
        "rlora_record.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def test_nothing_private_is_uploaded(hub, push, tmp_path, base):
    """No token, no path of this machine, no pickle: neither in the files nor in anything that went over the wire."""
    folder = save_adapter(tmp_path / "adapter")
    record = json.loads((folder / "rlora_record.json").read_text())
    record["hyperparameters"]["output_dir"] = "kept"  # records are made from a list of fields; this one is a text
    (folder / "rlora_record.json").write_text(json.dumps(record))
    push(folder, token=hub.token)
    for path, content in hub.files(REPO).items():
        assert not re.search(rb"hf_[a-z]{3,}", content), path
        assert not re.search(rb"/(home|root|tmp|work|Users)/", content), path
        assert str(tmp_path).encode() not in content and hub.url.encode() not in content, path
        assert not path.endswith((".bin", ".pt", ".txt"))


def test_card(hub, push, folder):
    push(folder, license="apache-2.0", tags=["mine"], metrics={"same": {"accuracy": 0.55}})
    data = card_of(hub).data
    assert data.library_name == "peft" and data.base_model == BASE and data.license == "apache-2.0"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert {"rlora", "multi-task", "lora", "mine", *(f"task:{task}" for task in TASKS)} <= set(data.tags)
    results = {result.dataset_name: result.metric_value for result in data.eval_results}
    assert results == {"first": 0.9, "colour": 0.75, "same": 0.55}
    digest = adapter_digest(folder)
    assert data.to_dict()["rlora"]["digest"] == digest
    assert digest in card_of(hub).text
    # The client has every card validated before a commit.
    assert [r.status for r in hub.requests if r.path == "/api/validate-yaml"] == [200]


def test_license_of_the_base_is_looked_up(hub, push, folder):
    assert "cc-by-4.0" not in hub.files(BASE).get("README.md", b"").decode()
    hub.commit(BASE, {"README.md": "---\nlicense: cc-by-4.0\n---\nA base model"})
    push(folder)
    assert json.loads(hub.files(REPO)["rlora_record.json"])["base_model_license"] == "cc-by-4.0"
    assert "cc-by-4.0" in card_of(hub).content and card_of(hub).data.license is None


def test_handwritten_text_is_kept(hub, push, folder, tmp_path):
    push(folder)
    card = hub.files(REPO)["README.md"].decode()
    mine = card.replace("tags:\n", "tags:\n- by-hand\n", 1) + "\n## Known problems\n\nNone so far.\n"
    hub.commit(REPO, {"README.md": mine})
    push(save_adapter(tmp_path / "newer", seed=5))
    updated = card_of(hub)
    assert "## Known problems\n\nNone so far.\n" in updated.content
    assert "by-hand" in updated.data.tags
    assert adapter_digest(tmp_path / "newer") in updated.content and adapter_digest(folder) not in updated.content


def test_local_text_is_published_once_and_the_text_on_the_hub_stays(hub, push, tmp_path):
    folder = save_adapter(tmp_path / "adapter")
    (folder / "README.md").write_text("# Notes\n\nMade on Monday.\n\nSecond paragraph.\n")
    push(folder)
    card = hub.files(REPO)["README.md"].decode()
    assert card.endswith("# Notes\n\nMade on Monday.\n\nSecond paragraph.\n")

    hub.commit(REPO, {"README.md": card.replace("Monday", "Tuesday").replace("\n", "\r\n")})
    (folder / "README.md").write_text("# Notes\n\nMade on Wednesday.\n")
    push(save_adapter(tmp_path / "newer", seed=5))
    push(folder)
    text = hub.files(REPO)["README.md"].decode()
    assert text.endswith("# Notes\r\n\r\nMade on Tuesday.\r\n\r\nSecond paragraph.\r\n")
    assert "Monday" not in text and "Wednesday" not in text


def test_card_of_an_earlier_version(hub, push, folder):
    """Its metadata had digests of the hand-written text, and its generated part other words."""
    push(folder, exports=["first"])
    card = hub.files(REPO)["README.md"].decode()
    older = card.replace(
        "  digest: sha256:", "  text: 0123456789abcdef\n  local_text: 89abcdef01234567\n  digest: sha256:", 1
    )
    hub.commit(REPO, {"README.md": older.replace("## Adapter", "## Former heading") + "\nMine.\n"})
    push(folder, metrics={"same": {"f1": 0.25}})
    updated = card_of(hub)
    block = updated.data.to_dict()["rlora"]
    assert not {"text", "local_text"} & set(block) and block["exports"] == {"first": "exports/first"}
    assert updated.content.endswith("\nMine.\n") and "Former heading" not in updated.content
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in updated.data.eval_results}
    assert results["first", "accuracy"] == 0.9 and results["same", "f1"] == 0.25


def test_other_peoples_files_stay(hub, push, folder, tmp_path):
    push(folder)
    mine = {"figures/my_curve.png": b"\x89PNG\r\n\x1a\n", "exports/mine/adapter_config.json": "{}", "notes.md": "x"}
    hub.commit(REPO, mine)
    push(save_adapter(tmp_path / "newer", seed=6))
    assert set(mine) <= set(hub.files(REPO))


def test_exports_of_the_same_weights_stay_and_of_others_go(hub, push, folder, tmp_path):
    push(folder, exports=["first"])
    first = hub.files(REPO)
    assert "exports/first/adapter_model.safetensors" in first
    push(folder, tags=["more"])
    assert (
        hub.files(REPO)["exports/first/adapter_model.safetensors"] == first["exports/first/adapter_model.safetensors"]
    )
    assert "exports/first" in hub.files(REPO)["README.md"].decode()
    push(save_adapter(tmp_path / "newer", seed=6))
    assert not any(path.startswith("exports/") for path in hub.files(REPO))
    assert "exports/first" not in hub.files(REPO)["README.md"].decode()


def test_a_recorded_export_is_no_export_in_the_repository(hub, push, folder, tmp_path):
    """What was pulled has a record of the exports that were published with it, and only that."""
    push(folder, exports=["first"])
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "rlora_record.json"):
        (pulled / name).write_bytes(hub.files(REPO)[name])

    push(pulled, repo="user/other")
    assert "exports/first" not in hub.files("user/other")["README.md"].decode()
    push(pulled, tags=["more"])  # where they are, they stay
    assert "exports/first/adapter_model.safetensors" in hub.files(REPO)
    assert 'subfolder="exports/first"' in hub.files(REPO)["README.md"].decode()


def test_exports_of_unknown_tasks(hub, push, folder):
    with pytest.raises(WorkerError, match="'frist'.*colour, first, same"):
        push(folder, exports=["frist"])
    assert REPO not in hub.repos


def test_repository_of_a_stock_trainer(hub, push, folder):
    """Its pickles go, beside which the adapter can't be pulled; other code is left to its owner."""
    hub.commit(
        REPO, {"training_args.bin": b"\x80", "adapter_model.bin": b"\x80", "checkpoint-5/optimizer.pt": b"\x80"}
    )
    push(folder)
    assert not any(path.endswith((".bin", ".pt")) for path in hub.files(REPO))
    hub.commit(REPO, {"modeling.py": "import os"})
    with pytest.raises(WorkerError, match="modeling.py") as caught:
        push(folder)
    assert caught.value.type == "AdapterCheckError"


def test_pushing_again_transfers_nothing(hub, push, folder):
    first = push(folder)
    sent = hub.uploaded_bytes()
    again = push(folder)
    assert again["oid"] == first["oid"] and len(hub.commits(REPO)) == 2
    assert hub.uploaded_bytes() == sent


def test_listed_contents_are_compared(hub, push, folder):
    """What the commit lists is compared with what was uploaded, and another content is an error."""

    def alter():
        repo, name = hub.repo(REPO), "adapter_model.safetensors"
        commit = repo.resolve("main")
        files = {**commit.files, name: replace(commit.files[name], sha256="0" * 64)}
        repo.commits[commit.oid] = replace(commit, files=files)

    hub.before("POST", "/paths-info/", alter)
    with pytest.raises(WorkerError, match="differ from those of this push: adapter_model.safetensors") as caught:
        push(folder)
    assert caught.value.type == "AdapterCheckError"


def test_weights_that_changed_since_they_were_checked(hub, worker, base, tmp_path):
    hub.commit(BASE, base)
    folder, other = save_adapter(tmp_path / "adapter"), save_adapter(tmp_path / "other", seed=5)
    source = """
        import shutil
        from rlora_trl import push_adapter
        from rlora_trl.hub import check_adapter
        checked = check_adapter(folder)
        shutil.copyfile(f"{other}/adapter_model.safetensors", f"{folder}/adapter_model.safetensors")
        push_adapter(checked, repo)
    """
    with pytest.raises(WorkerError, match="have changed since they were checked.*Nothing was published") as caught:
        worker.run(source, folder=str(folder), other=str(other), repo=REPO)
    assert caught.value.type == "AdapterCheckError" and REPO not in hub.repos


SWAP = """
from unittest.mock import patch
from rlora_trl import publish, push_adapter

original = getattr(publish, function)
def swap_and_call(*args, **options):
    Path(swapped or args[0].folder, name).write_bytes(Path(content).read_bytes())
    return original(*args, **options)

from pathlib import Path
with patch.object(publish, function, swap_and_call):
    result = push_adapter(folder, repo).oid
"""


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json"])
def test_files_that_are_swapped_before_the_copy(hub, worker, base, tmp_path, name):
    """The copy is what is checked and uploaded: what replaced a file after the folder was listed is refused, too."""
    hub.commit(BASE, base)
    folder = save_adapter(tmp_path / "adapter")
    evil = tmp_path / "evil"
    evil.write_text('{"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}')
    values = {"swapped": str(folder), "name": name, "content": str(evil), "folder": str(folder), "repo": REPO}
    with pytest.raises(WorkerError) as caught:
        worker.run(SWAP, function="check_regular_file", **values)
    assert caught.value.type == "AdapterCheckError" and REPO not in hub.repos


def test_other_weights_of_the_same_shape_are_checked_before_they_are_published(hub, worker, base, tmp_path):
    hub.commit(BASE, base)
    folder, other = save_adapter(tmp_path / "adapter"), save_adapter(tmp_path / "other", seed=5)
    name = "adapter_model.safetensors"
    values = {"swapped": str(folder), "name": name, "content": str(other / name), "folder": str(folder), "repo": REPO}
    worker.run(SWAP, function="check_regular_file", **values)
    assert hub.files(REPO)[name] == (other / name).read_bytes()
    assert adapter_digest(other) in card_of(hub).content


def test_weights_that_change_between_check_and_upload(hub, worker, base, tmp_path):
    hub.commit(BASE, base)
    folder, other = save_adapter(tmp_path / "adapter"), save_adapter(tmp_path / "other", seed=5)
    name = "adapter_model.safetensors"
    values = {"swapped": None, "name": name, "content": str(other / name), "folder": str(folder), "repo": REPO}
    with pytest.raises(WorkerError, match="changed since it was checked. Nothing was published"):
        worker.run(SWAP, function="_stage_figures", **values)
    assert set(hub.files(REPO)) == {".gitattributes"}


# What others wrote into the repository that is pushed to


def test_large_files_of_the_repository_are_not_downloaded(hub, push, folder):
    hub.commit(REPO, {"README.md": "x" * (CARD_LIMIT + 1)})
    with pytest.raises(
        WorkerError, match=rf"README.md of user/words has {CARD_LIMIT + 1} bytes.*Nothing was published"
    ) as caught:
        push(folder)
    assert caught.value.type == "AdapterCheckError" and not hub.count("GET", "/resolve/.*README.md")
    assert set(hub.files(REPO)) == {".gitattributes", "README.md"}

    hub.commit(REPO, {"README.md": "Text by hand.", "rlora_record.json": b"[" * (16 * 2**20 + 1)})
    push(folder)
    assert not hub.count("GET", "/resolve/.*rlora_record.json") and "Text by hand." in card_of(hub).content
    assert json.loads(hub.files(REPO)["rlora_record.json"])["base_model"] == BASE


UNREADABLE = (b"\xff\xfe\x00", b"---\na: &a [1]\nb: *a\n---\n", b"---\na: " + b"[" * 50 + b"]" * 50 + b"\n---\n")


@pytest.mark.parametrize("card", UNREADABLE)
def test_cards_that_can_not_be_read_stay(hub, push, folder, tmp_path, card):
    hub.commit(REPO, {"README.md": card})
    with pytest.raises(WorkerError) as caught:
        push(folder)
    assert caught.value.type == "AdapterCheckError" and hub.files(REPO)["README.md"] == card
    local = save_adapter(tmp_path / "local")
    (local / "README.md").write_bytes(card)
    with pytest.raises(WorkerError) as caught:
        push(local, repo="user/other")
    assert caught.value.type == "AdapterCheckError" and "user/other" not in hub.repos


HOSTILE_RECORDS = {
    "path": {"exports": [{"path": "../../etc"}, {"path": "."}, {"path": "figures"}, {"path": ""}]},
    "kinds": {"exports": 5, "tasks": {"a": 1}},
    "many": {"tasks": [{"name": str(i)} for i in range(20_000)]},
    "other": [],
}


@pytest.mark.parametrize("record", HOSTILE_RECORDS.values(), ids=HOSTILE_RECORDS)
def test_a_hostile_record_in_the_repository(hub, push, folder, record):
    push(folder)
    hub.commit(REPO, {"rlora_record.json": json.dumps(record)})
    before = hub.files(REPO)
    push(folder)
    assert set(hub.files(REPO)) == set(before)
    assert "exports" not in json.loads(hub.files(REPO)["rlora_record.json"])


@pytest.mark.parametrize(
    "metadata", ["self: x", "ignore_metadata_errors: true", "tags: 5", "license: [1]", "model-index: 3"]
)
def test_a_hostile_card_of_the_base(hub, push, folder, metadata):
    hub.commit(BASE, {"README.md": f"---\n{metadata}\n---\nA base model"})
    push(folder)
    assert "base_model_license" not in json.loads(hub.files(REPO)["rlora_record.json"])


# Many tasks


def test_push_of_many_tasks(hub, worker, base, tmp_path):
    """Time and memory hardly grow with tasks, and what was pushed can be pulled and pushed again."""
    names = [f"task-{i}" for i in range(2000)]
    folder = save_adapter(tmp_path / "adapter", tasks=names)
    layers = tiny_record().mixtures.layers
    record = AdapterRecord(
        base_model=BASE,
        tasks=[TaskRecord(name, rows=40, metrics={"accuracy": 0.5, "base_accuracy": 0.25}) for name in names],
        mixtures=HeadWeights(layers, dict.fromkeys(names, torch.full((6, 3), 1 / 3)), dict.fromkeys(names, 100)),
    )
    record.save(folder)
    hub.commit(BASE, base)
    source = """
        import resource, time
        from rlora_trl import pull_adapter, push_adapter
        from rlora_trl.hub import check_adapter

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before, start = peak(), time.perf_counter()
        push_adapter(folder, repo)
        result = {"seconds": time.perf_counter() - start, "megabytes": peak() - before}
        commit = push_adapter(folder, repo).oid
        checked = check_adapter(pull_adapter(repo))
        result |= {"commit": commit, "tasks": [task.name for task in checked.record.tasks]}
    """
    result = worker.run(source, folder=str(folder), repo=REPO)
    assert result["tasks"] == names and result["commit"] == hub.head(REPO) and len(hub.commits(REPO)) == 2
    assert result["seconds"] < 60, "takes about 5 s"
    assert result["megabytes"] < 700, "takes about 100 MB"
    card = card_of(hub)
    assert "The first 100 of 2000 tasks" in card.content and len(read_card_info(card.data)["tasks"]) == 500


def test_a_full_disk_publishes_nothing(hub, worker, base, tmp_path):
    hub.commit(BASE, base)
    folder, temporary = save_adapter(tmp_path / "adapter"), tmp_path / "temporary"
    temporary.mkdir()
    source = """
        import resource, tempfile
        from unittest.mock import patch
        from rlora_trl import push_adapter
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        result = []
        for size in sizes:
            try:
                with patch.object(tempfile, "tempdir", temporary):
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
                    push_adapter(folder, repo)
            except OSError as error:
                result.append(str(error))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    """
    weights = (folder / "adapter_model.safetensors").stat().st_size
    sizes = [500, weights - 1, weights + 1000]  # configuration, weights, figures
    messages = worker.run(source, folder=str(folder), repo=REPO, temporary=str(temporary), sizes=sizes)
    assert len(messages) == len(sizes)
    for message in messages:
        assert "no room for a copy of the adapter. Nothing was published." in message and "TMPDIR" in message
    assert REPO not in hub.repos and not list(temporary.iterdir())


def test_nothing_is_downloaded(hub, push, folder):
    push(folder)
    assert not hub.count("GET", "/resolve/.*safetensors") and not hub.count("GET", "/cdn/")


COUNT = """
import contextlib, sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch
import rlora_trl.hub.commit as commit
from rlora_trl import push_adapter
from rlora_trl.hub import AdapterRecord, check_adapter

def counting(function, calls, only=""):
    def call(path, *args, **options):
        if str(path).endswith(only):
            calls[sys._getframe(1).f_globals["__name__"]] += 1
        return function(path, *args, **options)
    return call

@contextlib.contextmanager
def counted():
    reads, writes = Counter(), Counter()
    with contextlib.ExitStack() as stack:
        weights = "adapter_model.safetensors"
        stack.enter_context(patch("builtins.open", counting(open, reads, weights)))
        for name, module in list(sys.modules.items()):
            if name.startswith("rlora_trl") and hasattr(module, "safe_open"):
                stack.enter_context(patch.object(module, "safe_open", counting(module.safe_open, reads, weights)))
        stack.enter_context(patch.object(commit, "render_card", counting(commit.render_card, writes)))
        stack.enter_context(patch.object(AdapterRecord, "save", counting(AdapterRecord.save, writes)))
        yield reads, writes

with counted() as (reads, _):
    checked = check_adapter(folder)
once = dict(reads)
with counted() as (reads, writes):
    push_adapter(checked if is_checked else folder, repo, **options)
reads = {name: count for name, count in reads.items() if not name.startswith("huggingface_hub")}
result = {"once": once, "reads": reads, "writes": dict(writes)}
"""


@pytest.mark.parametrize("is_checked", [False, True])
def test_weights_are_checked_once_and_the_card_is_rendered_once(hub, worker, base, folder, is_checked):
    hub.commit(BASE, base)
    hub.fail("POST", "/commit/", status=500, times=2)  # attempts onto the same head have the same files
    counts = worker.run(COUNT, folder=str(folder), repo=REPO, options={}, is_checked=is_checked)
    # Besides: the copy, read and written, and the figure of the heads, which reads B alone. The copy is checked even
    # if the folder was: it may have changed since.
    expected = {"shutil": 2, "rlora_trl.analysis.heads": 1, **counts["once"]}
    assert counts["once"] and counts["reads"] == expected
    assert counts["writes"] == {"rlora_trl.hub.commit": 2}  # card and record


def test_exports_check_nothing_again(hub, worker, base, folder):
    hub.commit(BASE, base)
    counts = [
        worker.run(COUNT, folder=str(folder), repo=REPO, options=options, is_checked=False)
        for options in ({"exports": ["first"]}, {"exports": ["first", "colour", "same"]})
    ]
    assert counts[0]["reads"] == counts[1]["reads"] and counts[1]["writes"] == {"rlora_trl.hub.commit": 2}


def test_revision_private_and_pull_request(hub, push, folder):
    push(folder, private=True, revision="experiment")
    assert hub.repo(REPO).private
    assert "adapter_config.json" not in hub.files(REPO)
    assert "adapter_config.json" in hub.files(REPO, "experiment")
    answer = push(folder, create_pr=True)
    assert answer["pr"].endswith("/discussions/1")
    assert "adapter_config.json" in hub.files(REPO, "refs/pr/1") and "adapter_config.json" not in hub.files(REPO)


def test_organisation_and_rights(hub, push, folder):
    push(folder, repo="org/words")
    assert "adapter_config.json" in hub.files("org/words")
    with pytest.raises(WorkerError) as caught:
        push(folder, repo="org/other", token=hub.other_token)
    assert "403" in caught.value.message
    with pytest.raises(WorkerError) as caught:
        push(folder, token="hf_wrong")
    assert "401" in caught.value.message


@pytest.mark.parametrize("name", ["../secret/base", "C:\\Users\\jane\\base", "~/models/base", "a/b/base", None])
def test_names_that_are_no_names(hub, push, tmp_path, name):
    folder = save_adapter(tmp_path / "adapter", base=name)
    (folder / "rlora_record.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    with pytest.raises(WorkerError, match="as `base_model`"):
        push(folder)
    assert REPO not in hub.repos


def test_base_model_in_a_local_folder(hub, push, tmp_path):
    local = save_base(tmp_path / "local-base")
    folder = save_adapter(tmp_path / "adapter", base=str(local))
    (folder / "rlora_record.json").unlink()
    with pytest.raises(WorkerError, match="as `base_model`") as caught:
        push(folder)
    assert "local folder" in caught.value.message and REPO not in hub.repos
    push(folder, base_model=BASE)
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert str(tmp_path).encode() not in b"".join(hub.files(REPO).values())


def test_damaged_adapters_are_not_published(hub, push, tmp_path):
    folder = save_adapter(tmp_path / "adapter")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(WorkerError) as caught:
        push(folder)
    assert caught.value.type == "AdapterCheckError" and REPO not in hub.repos


def test_adapter_of_another_name_from_a_model(hub, worker, base, push):
    hub.commit(BASE, base)
    worker.run(
        """
        import sys
        sys.path[:0] = paths
        from samples import tiny_adapter
        from rlora_trl import RLoraConfig, push_adapter
        model = tiny_adapter()
        model.add_adapter("second", RLoraConfig(task_type="CAUSAL_LM", r=2))
        push_adapter(model, repo, adapter_name="second", tasks=["poems"])
        """,
        repo=REPO,
        paths=_test_paths(),
    )
    config = json.loads(hub.files(REPO)["adapter_config.json"])
    assert config["r"] == 2 and config["tasks"] == ["poems"]


def _test_paths():
    from pathlib import Path

    here = Path(__file__).parent
    return [str(here), str(here.parent)]


# Faults


def test_transient_errors_at_the_commit(hub, push, folder):
    fault = hub.fail("POST", r"/api/models/.*/commit/", status=500, times=2)
    push(folder)
    assert fault.hits == 2 and len(hub.commits(REPO)) == 2


def test_commit_that_landed_although_the_hub_said_no(hub, push, folder):
    hub.fail("POST", r"/api/models/.*/commit/", status=503, after=True)
    commit = push(folder)
    assert commit["oid"] == hub.head(REPO) and len(hub.commits(REPO)) == 2


def test_pull_request_that_landed_although_the_hub_said_no(hub, push, folder):
    hub.fail("POST", r"/api/models/.*/commit/", status=503, after=True)
    answer = push(folder, create_pr=True)
    assert answer["pr"].endswith("/discussions/1") and "refs/pr/2" not in hub.repo(REPO).refs


def test_connection_that_breaks_at_the_commit(hub, push, folder):
    hub.fail("POST", r"/commit/", after=True, drop_after=0)
    commit = push(folder)
    assert commit["oid"] == hub.head(REPO) and len(hub.commits(REPO)) == 2


def test_second_fault_while_looking_whether_it_landed(hub, push, folder):
    hub.fail("POST", r"/commit/", status=500, after=True)
    hub.fail("GET", r"/api/models/user/words", status=503, skip=1)
    push(folder)
    assert len(hub.commits(REPO)) == 2


def test_commit_that_can_not_be_listed(hub, push, folder):
    hub.fail("POST", "/paths-info/", status=403, times=None)
    with pytest.raises(WorkerError, match="was published as commit [0-9a-f]{40}, but its files could not be listed"):
        push(folder)
    assert "adapter_model.safetensors" in hub.files(REPO)


def test_lasting_errors_publish_nothing_and_the_retry_transfers_nothing_twice(hub, push, folder):
    push(folder)
    before = hub.files(REPO)
    hub.fail("POST", r"/api/models/.*/commit/", status=500, times=None)
    newer = save_adapter(folder.parent / "newer", seed=3)
    with pytest.raises(WorkerError, match="Run the same push again"):
        push(newer)
    assert hub.files(REPO) == before
    hub.faults.clear()
    sent = hub.uploaded_bytes()
    push(newer)
    assert hub.uploaded_bytes() == sent, "large files were uploaded a second time"
    assert hub.files(REPO)["adapter_model.safetensors"] == (newer / "adapter_model.safetensors").read_bytes()


def test_cut_upload(hub, push, folder):
    """Where the client gives up, nothing is published, and the same call succeeds afterwards."""
    hub.fail("PUT", "/upload/", drop_after=1000, times=None)
    with pytest.raises(WorkerError):
        push(folder)
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.faults.clear()
    push(folder)
    assert "adapter_model.safetensors" in hub.files(REPO)


def test_branch_that_moves_during_a_push(hub, push, folder):
    """The card is edited between the push's reading it and its commit: the edit is in the card afterwards."""
    push(folder)
    text = hub.files(REPO)["README.md"].decode() + "\nEdited meanwhile.\n"
    newer = save_adapter(folder.parent / "moved", seed=4)
    hub.before("POST", r"/commit/main", lambda: hub.commit(REPO, {"README.md": text}))
    push(newer)
    assert "Edited meanwhile." in card_of(hub).content
    assert adapter_digest(newer) in card_of(hub).content


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_are_not_tried_again(hub, push, folder, status):
    fault = hub.fail("POST", r"/api/models/.*/commit/", status=status, times=None)
    with pytest.raises(WorkerError, match=rf"{status}[\s\S]*Nothing was published"):
        push(folder)
    assert fault.hits == 1
