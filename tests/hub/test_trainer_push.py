"""What `RLoraSFTTrainer` records, and how it publishes: end of training, every save, exports."""

import json
import re
import shutil
from pathlib import Path

import pytest
from processes import WorkerError
from safetensors.torch import load_file, save_file
from samples import BASE, save_base


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


# An untrained adapter "default", and the one to train, "mine".
NAMED = """
from peft import get_peft_model
from transformers import AutoModelForCausalLM
model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), RLoraConfig(r=2, task_type="CAUSAL_LM"))
model.add_adapter("mine", RLoraConfig(r=5, task_type="CAUSAL_LM"))
model.set_adapter("mine")
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def train(hub, worker, base, tmp_path):
    hub.commit(BASE, base)

    def source(text, arguments):
        variables = {"arguments": arguments, "push": {}, "config": {}, "paths": [str(HERE), str(HERE.parent)]}
        return worker.run(text, model=BASE, folder=str(tmp_path / "run"), repo=REPO, **variables)

    def run(model=BASE, arguments=None, push=None, config=None, folder=None):
        variables = {"arguments": arguments or {}, "push": push or {}, "config": config or {}}
        folder = str(folder or tmp_path / "run")
        paths = [str(HERE), str(HERE.parent)]
        return worker.run(TRAIN, model=model, folder=folder, repo=REPO, paths=paths, **variables)

    run.source, run.base = source, base
    return run


def test_push_to_hub(hub, train, tmp_path):
    result = train(push={"tags": ["mine"], "license": "mit", "commit_message": "First try"})
    assert hub.head(REPO) == result["oid"] and len(hub.commits(REPO)) == 2
    assert hub.commits(REPO)[0].title == "First try"
    files = hub.files(REPO)
    expected = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "rlora_record.json"}
    expected |= {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
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
    train(push={"exports": ["first", "same"], "private": True})
    assert len(hub.commits(REPO)) == 2 and hub.repo(REPO).private
    files = hub.files(REPO)
    for task in ("first", "same"):
        config = json.loads(files[f"exports/{task}/adapter_config.json"])
        assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == BASE
        assert f"exports/{task}/adapter_model.safetensors" in files
    assert "subfolder=" in files["README.md"].decode()
    exports = {export["task"]: export for export in json.loads(files["rlora_record.json"])["exports"]}
    assert exports["same"]["kl"] > 0 and 0 <= exports["same"]["accuracy"] <= 1 and "kl" not in exports["first"]
    assert "nats per token" in files["exports/same/README.md"].decode()


def test_exports_in_the_background(hub, train):
    with pytest.raises(WorkerError, match="in the background"):
        train(push={"exports": ["first"], "blocking": False})


def test_adapter_of_another_name(hub, train, worker, base, tmp_path):
    """The active adapter is published, not one that happens to be called "default"."""
    hub.commit(BASE, base)
    source = TRAIN.replace("    model,\n", "").replace("peft_config=RLoraConfig(**config)", "peft_config=None")
    source = source.replace("trainer = RLoraSFTTrainer(", NAMED + "trainer = RLoraSFTTrainer(")
    variables = {"arguments": {}, "push": {}, "config": {}, "paths": [str(HERE), str(HERE.parent)]}
    worker.run(source, model=BASE, folder=str(tmp_path / "run"), repo=REPO, **variables)
    config = json.loads(hub.files(REPO)["adapter_config.json"])
    assert config["r"] == 5 and config["tasks"] == ["first", "colour", "same"]
    assert {task["name"] for task in json.loads(hub.files(REPO)["rlora_record.json"])["tasks"]} == set(config["tasks"])


def test_best_checkpoint_has_its_own_metrics(hub, train):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps"}
    best |= {"eval_steps": 2, "save_steps": 2, "max_steps": 6, "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    source = TRAIN.replace("trainer.evaluate()\n", "before = trainer.adapter_record().to_dict()\n")
    source = source.replace("trainer.push_to_hub(**push)", "trainer.evaluate()").replace(
        'result = {"oid": getattr(commit, "oid", None)', 'result = {"oid": "", "before": before'
    )
    source = source[: source.index("if not hasattr")]
    hub.commit(BASE, train.base)
    result = train.source(source, best)
    losses = [{task["name"]: task["metrics"]["loss"] for task in result[key]["tasks"]} for key in ("before", "record")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_continued_training_keeps_the_record_of_other_tasks(hub, train, worker, base, tmp_path):
    train()
    source = """
        import sys
        sys.path[:0] = paths
        from peft import AutoPeftModelForCausalLM
        from testing_utils import task_datasets
        from rlora_trl import RLoraSFTConfig, RLoraSFTTrainer
        model = AutoPeftModelForCausalLM.from_pretrained(repo, is_trainable=True)
        args = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "hub_model_id": repo}
        data = {"same": task_datasets()["same"]}
        trainer = RLoraSFTTrainer(model, RLoraSFTConfig(folder, **args), train_dataset=data)
        trainer.train()
        trainer.push_to_hub()
    """
    paths = [str(HERE), str(HERE.parent)]
    worker.run(source, repo=REPO, folder=str(tmp_path / "more"), paths=paths)
    record = json.loads(hub.files(REPO)["rlora_record.json"])
    tasks = {task["name"]: task for task in record["tasks"]}
    assert tasks["first"]["rows"] > 0 and tasks["first"]["cluster"] == "words"
    assert sum(task["rows"] for task in tasks.values()) == 32 + 16
    assert set(record["mixtures"]["weights"]) == {"first", "colour", "same"}


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


REVISIONS = """
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from testing_utils import perturb, random_ids
from transformers import AutoModelForCausalLM

settings = {"output_dir": folder, "max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
settings |= {"hub_model_id": repo, "bf16": False, **arguments}
config = RLoraConfig(**config)
if base_as == "object":
    model = AutoModelForCausalLM.from_pretrained(model, revision=revision)
trainer = RLoraSFTTrainer(model, RLoraSFTConfig(**settings), train_dataset=task_datasets(8), peft_config=config)
trainer.train()
perturb(trainer.model, scale=2.0)
trainer.save_model()
trainer.push_to_hub()
ids = random_ids()
with torch.no_grad():
    expected = trainer.model.eval()(input_ids=ids).logits
    saved = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    published = AutoPeftModelForCausalLM.from_pretrained(repo, dtype=torch.float32).eval()(input_ids=ids).logits
result = {
    "off": [float((logits - expected).abs().max()) for logits in (saved, published)],
    "config": trainer.model.peft_config["default"].revision,
}
"""
SETUP = TRAIN.split("\ntrain = ")[0]


@pytest.fixture
def two_revisions(hub, train, tmp_path):
    """A base model at main, and other weights at v2."""
    hub.commit(BASE, train.base)
    files = {path.name: path for path in train.base.iterdir()}
    state = load_file(files["model.safetensors"])
    other = tmp_path / "other"
    shutil.copytree(train.base, other)
    save_file({name: value.flip(0) for name, value in state.items()}, other / "model.safetensors", {"format": "pt"})
    hub.commit(BASE, other, revision="v2")
    return hub


def run_revision(train, arguments, base_as="name", revision=None, config=None):
    text = f"{SETUP}\n{REVISIONS}".replace("**config)", f"**{config or {}!r})")
    prefix = f"base_as, revision = {base_as!r}, {revision!r}\n"
    return train.source(prefix + text, arguments)


@pytest.mark.parametrize("revision", ["v2", "commit"])
def test_the_revision_of_the_base_is_recorded(two_revisions, train, tmp_path, revision):
    hub = two_revisions
    commit = hub.head(BASE, "v2")
    name = commit if revision == "commit" else revision
    result = run_revision(train, {"model_init_kwargs": {"revision": name}})
    assert result["config"] == name and max(result["off"]) < 1e-5
    files = hub.files(REPO)
    assert json.loads(files["adapter_config.json"])["revision"] == name
    assert json.loads(files["rlora_record.json"])["base_model_revision"] == commit
    assert commit[:12] in files["README.md"].decode() and f'revision="{commit}"' in files["README.md"].decode()


def test_main_is_recorded_by_its_commit(two_revisions, train):
    hub = two_revisions
    result = run_revision(train, {"model_init_kwargs": {"revision": "main"}})
    assert result["config"] is None and max(result["off"]) < 1e-5
    assert json.loads(hub.files(REPO)["rlora_record.json"])["base_model_revision"] == hub.head(BASE)


def test_nothing_is_claimed_of_a_base_that_was_loaded_elsewhere(two_revisions, train):
    hub = two_revisions
    result = run_revision(train, {}, base_as="object", revision="v2")
    assert result["config"] is None
    files = hub.files(REPO)
    assert "base_model_revision" not in json.loads(files["rlora_record.json"])
    assert "revision=" not in files["README.md"].decode()
    # A revision that the user states is recorded.
    result = run_revision(train, {}, base_as="object", revision="v2", config={"revision": "v2"})
    assert result["config"] == "v2" and max(result["off"]) < 1e-5
    assert json.loads(hub.files(REPO)["rlora_record.json"])["base_model_revision"] == hub.head(BASE, "v2")


@pytest.mark.parametrize("loaded", [{"revision": "v2"}, {}])
def test_two_revisions_are_refused(two_revisions, train, loaded):
    text = f"revision 'v1' of the base model, and `model_init_kwargs` loads '{loaded.get('revision', 'main')}'"
    with pytest.raises(WorkerError, match=text):
        run_revision(train, {"model_init_kwargs": loaded}, config={"revision": "v1"})
