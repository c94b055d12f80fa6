"""Records of adapters on the Hub are found, with a token where one is needed."""

import json

import pytest
from processes import WorkerError
from samples import BASE, save_base, tiny_adapter, tiny_record

from rlora_trl.files.layout import RECORD_NAME
from rlora_trl.files.record import AdapterRecord, TaskRecord


FIND = """
from rlora_trl import RLoraConfig
from rlora_trl.files.record import find_record
from rlora_trl.tuner.config import AdapterSource

config = RLoraConfig()
config.source = AdapterSource(*source)
record = find_record(config)
result = None if record is None else record.to_dict()
"""


def test_record_on_the_hub(hub, worker):
    record = AdapterRecord(base_model="a/b", tasks=[TaskRecord("first")])
    hub.commit("user/adapter", {RECORD_NAME: json.dumps(record.to_dict()), "inner/adapter_config.json": "{}"})
    first = hub.head("user/adapter")
    hub.commit("user/adapter", {RECORD_NAME: json.dumps(AdapterRecord(base_model="c/d").to_dict())})
    assert worker.run(FIND, source=["user/adapter", first])["base_model"] == "a/b"
    assert worker.run(FIND, source=["user/adapter"])["base_model"] == "c/d"
    hub.commit("user/bare", {"adapter_config.json": "{}"})
    for source in (["user/bare"], ["user/adapter", None, "inner"], ["user/nowhere"], ["user/bare", "v9"]):
        assert worker.run(FIND, source=source) is None, source


def test_record_of_a_hostile_endpoint(hub, worker, tmp_path):
    hub.commit("user/adapter", {RECORD_NAME: json.dumps(AdapterRecord(base_model="a/b").to_dict())})
    outside = {"ETag": f'"{tmp_path}/x"', "X-Repo-Commit": "../../../x"}
    hub.rewrite("*", "/resolve/", lambda answer: answer.headers.update(outside))
    assert worker.run(FIND, source=["user/adapter"])["base_model"] == "a/b"
    assert not any(tmp_path.iterdir()) and not [*hub.home.glob("**/x")]
    # A file that is missing leaves none either.
    assert worker.run(FIND, source=["user/adapter", None, "inner"]) is None
    assert not [*hub.home.glob("**/.no_exist")]


def test_record_that_is_too_large_is_not_downloaded(hub, worker):
    hub.commit("user/adapter", {RECORD_NAME: "{}"})
    hub.announce_size("user/adapter", RECORD_NAME, 2**30)
    with pytest.raises(WorkerError, match="more than") as caught:
        worker.run(FIND, source=["user/adapter"])
    assert "ValueError" in caught.value.bases and not hub.count("GET", "/resolve/")


def test_record_in_the_cache(hub, worker):
    """Where the Hub does not answer."""
    hub.commit("user/adapter", {RECORD_NAME: json.dumps(AdapterRecord(base_model="a/b").to_dict())})
    worker.run(FIND, source=["user/adapter"])
    hub.fail("*", "/", drop_after=0, times=None)
    assert worker.run(FIND, source=["user/adapter"])["base_model"] == "a/b"
    assert worker.run(FIND, source=["user/adapter", None, "inner"]) is None


PRIVATE = """
import os

os.environ.pop("HF_TOKEN")
from rlora_trl.export import export_lora

report = export_lora("user/adapter", out, task="same", revision="trained", token=token)
result = [report.mixture, sorted(os.listdir(out))]
"""


def test_a_token_opens_the_record_the_adapter_and_its_base(hub, worker, tmp_path):
    """For `export_lora`, which finds the mixtures in the record."""
    tiny_adapter().save_pretrained(tmp_path / "adapter")
    tiny_record().save(tmp_path / "adapter")
    hub.create(BASE, private=True)
    hub.commit(BASE, {path.name: path.read_bytes() for path in save_base(tmp_path / "base").iterdir()})
    hub.create("user/adapter", private=True)
    hub.commit("user/adapter", {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()})
    hub.repo("user/adapter").refs["refs/heads/trained"] = hub.head("user/adapter")
    hub.commit("user/adapter", {"adapter_config.json": "{}"})
    mixture, files = worker.run(PRIVATE, out=str(tmp_path / "out"), token=hub.token)
    assert "recorded with the adapter" in mixture and files[:2] == ["README.md", "adapter_config.json"]
    hub.wipe()
    with pytest.raises(WorkerError, match="user/adapter"):
        worker.run(PRIVATE, out=str(tmp_path / "other"), token=False)
