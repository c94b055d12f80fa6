"""What `RLoraSFTTrainer` records, and how it publishes: end of training, every save, exports."""

import json
import re
from pathlib import Path

import pytest
from samples import BASE, save_base
from worker import WorkerError


HERE = Path(__file__).parent
REPO = "user/words"
TRAIN = """
import sys
sys.path[:0] = paths
from testing_utils import task_datasets
from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer

train = {name: data.add_column("cluster", ["words"] * len(data)) for name, data in task_datasets().items()}
settings = {"output_dir": folder, "max_steps": 4, "learning_rate": 1e-2, "router_learning_rate": 1e-2, "use_cpu": True}
settings |= {"report_to": [], "disable_tqdm": True, "hub_model_id": repo, **arguments}
test = task_datasets(8, 1)
test["same"] = test["same"].add_column("options", [[" yes", " no"]] * 8)
data = {"train_dataset": train, "eval_dataset": test}
trainer = RLoraSFTTrainer(model, RLoraSFTConfig(**settings), **data, peft_config=RLoraConfig(**config))
trainer.train()
trainer.evaluate()
commit = trainer.push_to_hub(**push)
result = {"oid": getattr(commit, "oid", None), "record": trainer.adapter_record().to_dict()}
if not hasattr(commit, "oid"):
    result["oid"] = commit.result(60).oid
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def train(hub, worker, base, tmp_path):
    hub.commit(BASE, base)

    def run(model=BASE, arguments=None, push=None, config=None, folder=None):
        variables = {"arguments": arguments or {}, "push": push or {}, "config": config or {}}
        folder = str(folder or tmp_path / "run")
        paths = [str(HERE), str(HERE.parent)]
        return worker.run(TRAIN, model=model, folder=folder, repo=REPO, paths=paths, **variables)

    return run


def test_push_to_hub(hub, train, tmp_path):
    result = train(push={"tags": ["mine"], "license": "mit", "commit_message": "First try"})
    assert hub.head(REPO) == result["oid"] and len(hub.commits(REPO)) == 2
    assert hub.commits(REPO)[0].title == "First try"
    files = hub.files(REPO)
    expected = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "rlora_record.json"}
    assert {path for path in files if not path.startswith("figures/")} == expected
    assert {"figures/routing.png", "figures/head_similarity.png"} <= set(files)
    record = json.loads(files["rlora_record.json"])
    assert record["base_model"] == BASE and record["base_model_revision"] == hub.head(BASE)
    tasks = {task["name"]: task for task in record["tasks"]}
    assert set(tasks) == {"first", "colour", "same"}
    assert sum(task["rows"] for task in tasks.values()) == 32
    assert sum(task["share"] for task in tasks.values()) == pytest.approx(1.0)
    assert all(task["cluster"] == "words" and task["metrics"]["loss"] > 0 for task in tasks.values())
    assert record["hyperparameters"]["learning_rate"] == 0.01
    weights = record["mixtures"]["weights"]
    assert set(weights) == set(tasks) and weights["first"] != weights["same"]
    card = files["README.md"].decode()
    assert "mine" in card and "license: mit" in card and f"`{BASE}`" in card or BASE in card
    everything = b"".join(files.values())
    assert str(tmp_path).encode() not in everything and not re.search(rb"hf_test", everything)


def test_exports_are_in_the_same_commit(hub, train):
    train(push={"exports": ["first", "same"]})
    assert len(hub.commits(REPO)) == 2
    files = hub.files(REPO)
    for task in ("first", "same"):
        config = json.loads(files[f"exports/{task}/adapter_config.json"])
        assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == BASE
        assert f"exports/{task}/adapter_model.safetensors" in files
    assert "subfolder=" in files["README.md"].decode()
    exports = {export["task"]: export for export in json.loads(files["rlora_record.json"])["exports"]}
    assert exports["same"]["kl"] > 0 and 0 <= exports["same"]["accuracy"] <= 1 and "kl" not in exports["first"]
    assert "nats per token" in files["exports/same/README.md"].decode()


def test_every_save(hub, train):
    """`hub_strategy="every_save"` pushes checkpoints' adapters, and nothing else of them."""
    arguments = {"push_to_hub": True, "hub_strategy": "every_save", "save_steps": 2, "hub_always_push": True}
    train(arguments=arguments)
    titles = [commit.title for commit in hub.commits(REPO)]
    assert titles[-1] == "initial commit" and "Training in progress, step 2" in titles
    for commit in hub.commits(REPO):
        assert not any(path.endswith((".bin", ".pt", ".pth")) or "checkpoint" in path for path in commit.files)


def test_push_in_the_background(hub, train):
    assert train(push={"blocking": False})["oid"] == hub.head(REPO)


def test_local_base_model(hub, train, base):
    with pytest.raises(WorkerError, match="hub_base_model"):
        train(model=str(base), arguments={"push_to_hub": True})
    train(model=str(base), arguments={"hub_base_model": BASE}, push={"exports": ["first"]})
    config = json.loads(hub.files(REPO)["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE
    assert str(base).encode() not in b"".join(hub.files(REPO).values())


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_are_never_published(hub, train, strategy):
    with pytest.raises(WorkerError, match="state of the optimizer"):
        train(arguments={"push_to_hub": True, "hub_strategy": strategy})


def test_adapters_without_a_router(hub, train):
    result = train(config={"router": "uniform"}, push={"exports": ["first"]})
    assert "mixtures" not in result["record"]
    assert "exports/first/adapter_model.safetensors" in hub.files(REPO)
