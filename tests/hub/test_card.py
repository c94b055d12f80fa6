"""Cards: what a reader and the Hub see, what an existing one keeps, and names that would break Markdown."""

import ast
import re
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from samples import BASE as TINY_BASE
from samples import save_base, tiny_adapter

from rlora_trl import RLoraConfig
from rlora_trl.files.card_text import check_card, check_card_text
from rlora_trl.files.layout import task_slug
from rlora_trl.files.record import AdapterRecord, TaskRecord
from rlora_trl.hub.card import render_card
from rlora_trl.hub.card_reading import BEGIN, END, hand_written, read_card_info, read_existing


BASE = "Qwen/Qwen2.5-0.5B"
REPO = "someone/ten-tasks"
DIGEST, OTHER_DIGEST = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32


def config(**fields):
    defaults = {"target_modules": ["up_proj", "down_proj"], "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE}
    return RLoraConfig.paper(**{**defaults, "tasks": ["sst2", "rte", "en_fr"], **fields})


def record(**fields):
    defaults = {
        "base_model": BASE,
        "base_model_revision": "060db6499f32faf8b98477b0a26969ef7d8b9987",
        "base_model_license": "apache-2.0",
        "base_dtype": "bfloat16",
        "quantization": "bitsandbytes nf4",
        "tasks": [
            TaskRecord("sst2", "sentiment", "nyu-mll/glue", "other", 6000, 90000, 0.75, {"accuracy": 0.953}, 250),
            TaskRecord(
                "rte", "inference", "nyu-mll/glue", None, 1500, None, 0.1875, {"accuracy": 0.7, "loss": 0.51234}
            ),
            TaskRecord("en_fr", "translation", None, None, 500, None, 0.0625, {"bleu": 31.5}),
        ],
        "hyperparameters": {"learning_rate": 2e-4, "packing": False, "bf16": True, "seed": 42},
        "versions": {"rlora_trl": "0.1.0", "peft": "0.21.2"},
        "balance_loss": "switch",
        "balance_coef": 0.01,
    }
    return AdapterRecord(**{**defaults, **fields})


def render(existing=None, **fields):
    facts = {"repo_id": REPO, "digest": DIGEST, "num_parameters": 5898240, "license": "mit", "existing": existing}
    settings, noted = fields.pop("config", config()), fields.pop("record", record())
    card = render_card(settings, noted, **{**facts, **fields})
    # Without an empty line between them, text below a table becomes a row of it; above one, some readers want it too.
    text = card.text.replace("\r\n", "\n")
    assert not re.search(r"^\|.*\n(?!\||\n)|^(?!\|).+\n\|", text, re.MULTILINE), text
    return card


def tables(text):
    """Tables of a page as lists of rows of cells; every row must have the cells of its head."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert len({len(row) for row in rows}) == 1, block
        assert all(re.fullmatch("-+:?", cell) for cell in rows[1])
        found.append([rows[0], *rows[2:]])
    return found


def snippets(text):
    return re.findall(r"^```python\n(.*?\n)```$", text, re.DOTALL | re.MULTILINE)


# What a reader sees


def test_the_first_screen():
    lines = render().text.strip().splitlines()
    assert lines[0] == BEGIN and lines[2] == "# ten-tasks"
    assert lines[4] == (
        "An [R-LoRA](https://huggingface.co/papers/2502.15455) adapter for "
        f"[{BASE}](https://huggingface.co/{BASE}), trained on 3 tasks: 3 heads of rank 4, weighted "
        "per token by a learned router. Mean accuracy over 2 of its tasks: 82.7%."
    )
    assert lines[6].startswith("| task |")
    assert lines.index("## Usage") == 12 and "import rlora_trl" in lines[17]
    assert lines[14] == "Requires the Python package `rlora-trl`." and "pypi" not in str(render())


def test_the_table_of_tasks():
    glue = "[nyu-mll/glue](https://huggingface.co/datasets/nyu-mll/glue)"
    names = ["task", "cluster", "dataset", "training rows", "training tokens", "share"]
    assert tables(render().text)[0] == [
        [*names, "accuracy", "bleu", "loss", "test rows"],
        ["sst2", "sentiment", glue, "6,000", "90,000", "75.0%", "95.3%", "", "", "250"],
        ["rte", "inference", glue, "1,500", "", "18.8%", "70.0%", "", "0.5123", ""],
        ["en_fr", "translation", "", "500", "", "6.2%", "", "31.5", "", ""],
    ]


def test_facts_of_the_adapter_and_of_training():
    text = render(figures=["figures/routing.png", "figures/head_similarity.png"]).text
    _, adapter, training = tables(text)
    facts = dict(adapter[1:])
    assert facts["heads"] == "3" and facts["rank per head"] == "4" and facts["scaling"].startswith("16 ")
    assert facts["dropout"] == "0.2, an independent mask per head" and facts["router"] == "softmax"
    assert facts["balance loss"] == "switch, coefficient 0.01"
    assert facts["target modules"] == "down_proj, up_proj" and facts["trainable parameters"] == "5,898,240"
    assert facts["base dtype"] == "bfloat16"
    assert "060db6499f32" in facts["base model"] and facts["base quantization"] == "bitsandbytes nf4"
    assert facts["tensor digest"] == f"`{DIGEST}`"
    assert dict(training[1:]) == {"`learning_rate`": "0.0002", "`bf16`": "True", "`seed`": "42"}
    assert "Versions: rlora_trl 0.1.0, peft 0.21.2." in text
    assert "![Mean weight of each head by task and layer](figures/routing.png)" in text
    assert "(figures/routing.png)\n\nMean head weights by task and layer. White: equal share;" in text
    assert "![Cosine similarity between the heads](figures/head_similarity.png)\n\nCosine similarity" in text
    licenses = text[text.index("## Licenses") : text.index("## Citation")]
    assert "- This adapter: mit" in licenses and f"({'https://huggingface.co/' + BASE}): apache-2.0" in licenses
    assert "datasets/nyu-mll/glue): other" in licenses
    assert "@article{liu2025rlora" in text and "arXiv:2502.15455" in text


def test_each_way_to_load():
    first, others = snippets(render().text)
    assert first.startswith("import rlora_trl") and others.startswith("import rlora_trl")
    assert f'AutoPeftModelForCausalLM.from_pretrained("{REPO}")' in first and f'"{BASE}"' in first
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in others
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in others and 'revision="060db6499' in others
    assert "set_task" not in first + others
    for source in (first, others):
        ast.parse(source)


def test_a_task_router_is_told_its_task():
    first, others = snippets(render(config=config(router="task", router_init="kaiming_uniform")).text)
    assert 'model.set_task("sst2")' in first and 'rlora_trl.set_task(model, "sst2")' in others
    assert 'model.set_task("sst2")' in others
    ast.parse(first), ast.parse(others)


def test_exports():
    other = f"exports/{task_slug('EN fr')}"
    first = {"task": "sst2", "path": "exports/sst2", "rank": 8, "exact": False, "kl": 0.0123, "accuracy": 0.94}
    card = render(record=record(exports=[first, {"task": "EN fr", "path": other}]))
    *_, stock = snippets(card.text)
    assert 'subfolder="exports/sst2"' in stock and "rlora_trl" not in stock
    ast.parse(stock)
    assert "nats per token" in card.text
    table = next(table for table in tables(card.text) if table[0][1] == "`subfolder`")
    assert table[0] == ["task", "`subfolder`", "rank", "exact", "accuracy", "KL to routed"]
    assert table[1] == ["sst2", "exports/sst2", "8", "no", "94.0%", "0.0123"]
    assert table[2] == ["EN fr", other, "", "", "", ""]
    assert read_card_info(card.data)["exports"] == {"sst2": "exports/sst2", "EN fr": other}
    exact = render(record=record(exports=[{"task": "sst2", "path": "exports/sst2", "exact": True}])).text
    assert "subfolder" not in render().text and "nats" not in exact and "same head weights" not in exact


def test_what_exports_lose():
    noted = {
        "path": "exports/sst2",
        "rank": 8,
        "kl": 0.0123,
        "accuracy": 0.94,
        "accuracy_dynamic": 0.953,
        "rows": 250,
    }
    same = {"path": "exports/rte", "rank": 8, "accuracy": 0.7004, "accuracy_dynamic": 0.7}
    card = render(record=record(exports=[{"task": "sst2", **noted}, {"task": "rte", **same}]))
    table = next(table for table in tables(card.text) if table[0][1] == "`subfolder`")
    assert table[0][3:] == ["accuracy", "routed accuracy", "accuracy drop (pp)", "KL to routed", "test rows"]
    assert table[1][3:] == ["94.0%", "95.3%", "1.3", "0.0123", "250"]
    assert table[2][3:] == ["70.0%", "70.0%", "0.0", "", ""]


def test_the_score_of_the_base_model():
    noted = record(
        tasks=[
            TaskRecord("sst2", metrics={"loss": 0.5, "base_accuracy": 0.52, "accuracy": 0.95}),
            TaskRecord("rte", metrics={"accuracy": 0.5, "base_accuracy": 0.55}),
            TaskRecord("en_fr", metrics={"base_accuracy": 0.25}),
        ]
    )
    card = render(record=noted)
    assert tables(card.text)[0] == [
        ["task", "accuracy", "base accuracy", "gain (pp)", "loss"],
        ["sst2", "95.0%", "52.0%", "+43.0", "0.5"],
        ["rte", "50.0%", "55.0%", "-5.0", ""],
        ["en_fr", "", "25.0%", "", ""],
    ]
    assert "Mean accuracy over 2 of its tasks: 72.5% (base model alone: 53.5%)." in card.text
    index = card.data.to_dict()["model-index"][0]["results"]
    assert [metric["type"] for metric in index[0]["metrics"]] == ["accuracy", "loss", "base_accuracy"]
    assert card.data.metrics == ["accuracy"]
    assert read_card_info(card.data)["metrics"]["rte"] == {"accuracy": 0.5, "base_accuracy": 0.55}
    assert str(render(str(card), record=noted)) == str(card)
    noted.tasks[1].metrics.pop("base_accuracy")
    assert "tasks: 72.5%." in render(record=noted).text and "base model alone" not in render(record=noted).text


def test_scores_of_generated_answers_and_intervals():
    noted = record(
        tasks=[
            TaskRecord(
                "sst2",
                metrics={"base_accuracy": 0.52, "accuracy": 0.95},
                metric_rows=200,
                intervals={"accuracy": [0.91999999, 0.98], "base_accuracy": [0.45, 0.59]},
            ),
            TaskRecord("rte", metrics={"f1": 0.5, "base_f1": 0.25, "loss": 0.5}, intervals={"f1": [0.4, 0.6]}),
            TaskRecord("en_fr", metrics={"number": 0.125, "exact_match": 0.5, "base_number": 0.25}),
        ]
    )
    card = render(record=noted)
    table = tables(card.text)[0]
    accuracies = ["accuracy", "base accuracy", "gain (pp)"]
    numbers = [f"{name}exact match of the number{end}" for name, end in (("", ""), ("base ", ""), ("", " gain (pp)"))]
    assert table[0] == [
        "task",
        *accuracies,
        "exact match",
        "F1",
        "base F1",
        "F1 gain (pp)",
        *numbers,
        "loss",
        "test rows",
    ]
    assert table[1][1:4] == ["95.0% (92.0 to 98.0)", "52.0% (45.0 to 59.0)", "+43.0"] and table[1][-1] == "200"
    assert table[2][5:8] == ["50.0% (40.0 to 60.0)", "25.0%", "+25.0"]
    assert table[3][4:] == ["50.0%", "", "", "", "12.5%", "25.0%", "-12.5", "", ""]
    assert "In parentheses: 95 % intervals" in card.text and "In parentheses" not in render().text

    index = card.data.to_dict()["model-index"][0]["results"]
    first, second, third = ([(m["type"], m["name"]) for m in entry["metrics"]] for entry in index)
    assert first == [("accuracy", "Accuracy"), ("base_accuracy", "Base accuracy")]
    assert second == [("f1", "F1"), ("base_f1", "Base F1"), ("loss", "Loss")]
    numbers = [("number", "Exact match of the number"), ("base_number", "Base exact match of the number")]
    assert third == [("exact_match", "Exact match"), *numbers]
    assert index[0]["metrics"][0]["args"] == {"interval_95": [0.92, 0.98], "rows": 200}
    assert index[1]["metrics"][0]["args"] == {"interval_95": [0.4, 0.6]} and "args" not in index[2]["metrics"][0]
    assert card.data.metrics == ["accuracy", "exact_match", "f1"]
    assert read_card_info(card.data)["metrics"]["rte"] == {"f1": 0.5, "base_f1": 0.25, "loss": 0.5}
    assert str(render(str(card), record=noted)) == str(card)


def test_settings_that_say_nothing_are_left_out():
    usual = {"learning_rate": 2e-4, "train_a": True, "warmup_steps": 0, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    usual |= {"packing": False, "packing_strategy": "bfd", "label_smoothing_factor": 0.0, "loss_type": "nll"}
    assert "packing" not in (text := render(record=record(hyperparameters=usual)).text)
    assert dict(tables(text)[-1][1:]) == {"`learning_rate`": "0.0002"}
    changed = {
        "train_a": False,
        "warmup_steps": 10,
        "adam_beta2": 0.95,
        "packing": True,
        "packing_strategy": "wrapped",
    }
    shown = dict(tables(render(record=record(hyperparameters=changed)).text)[-1][1:])
    assert shown == {f"`{name}`": str(value) for name, value in changed.items()}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"router": "uniform"}, "3 heads of rank 4, equally weighted."),
        (
            {"router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform"},
            "rank 4, 2 of them selected per token",
        ),
        ({"router": "task"}, "rank 4, with learned weights for each task."),
        ({"router": "uniform", "num_heads": 1}, "trained on 3 tasks: one head of rank 4."),
        ({"tasks": ["only"]}, ", trained on one task: "),
    ],
)
def test_the_sentence_fits_the_adapter(fields, expected):
    assert expected in render(config=config(**fields), record=None).text


def test_other_task_types_have_their_classes():
    first, others = snippets(render(config=config(task_type="SEQ_CLS")).text)
    assert "AutoPeftModelForSequenceClassification" in first and "generate" not in first
    assert "AutoModelForSequenceClassification" in others
    assert "pipeline_tag" not in render(config=config(task_type="SEQ_CLS")).data.to_dict()


def test_what_is_not_known_is_left_out():
    card = render_card(RLoraConfig(), None)
    text = str(card)
    assert not re.search(r"None|nan|\[More Information|\{%|\{\{ |model-index|base_model", text)
    assert not re.search(r"^#+ .*\n+(?:#|<!--)", text, re.MULTILINE), "a section is empty"
    assert "\n\n\n" not in text and "| |" not in text.replace("|   |", "")
    (source,) = snippets(text)
    ast.parse(source)
    assert 'PeftModel.from_pretrained(base, ".")' in source
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags", "rlora"}


def test_many_tasks_are_folded():
    names = [f"task_{i}" for i in range(60)]
    card = render(config=config(tasks=names), record=record(tasks=[TaskRecord(name, rows=1) for name in names]))
    before, _, after = card.text.partition("<details><summary>The 60 tasks</summary>\n\n|")
    assert "</details>\n\n## Usage" in after and "<details>" not in render().text
    assert len(tables(card.text)[0]) == 61


def many(count, name="task_{}", **fields):
    names = [name.format(i) for i in range(count)]
    metrics = {"accuracy": 0.5, "base_accuracy": 0.25, "loss": 1.5}
    tasks = [TaskRecord(name, rows=1, metrics=metrics, **fields) for name in names]
    return {"config": config(tasks=names), "record": record(tasks=tasks)}


def test_of_many_tasks_the_first_are_shown_and_the_card_says_so():
    card = render(**many(2000))
    before, _, after = card.text.partition("<details><summary>The first 100 of 2000 tasks</summary>\n\n|")
    assert "trained on 2000 tasks" in before and "Mean accuracy over its tasks: 50.0%" in before
    assert [row[0] for row in tables(card.text)[0][1:]] == [f"task\\_{i}".replace("\\_", "_") for i in range(100)]
    note = (
        "`rlora_record.json` lists all 2000 tasks; the metadata of this card lists the first 500, and tags and results"
    )
    assert note in after
    listed = [f"task_{i}" for i in range(500)]
    check_card_text(str(card))
    info = read_card_info(card.data)
    assert info["tasks"] == listed and list(info["metrics"]) == listed
    assert [tag for tag in card.data.tags if tag.startswith("task:")] == [f"task:{name}" for name in listed]
    # Between both numbers only the table is cut, and up to the first nothing is.
    assert "`rlora_record.json` lists all 400 tasks.\n" in render(**many(400)).text
    assert "lists all" not in render(**many(100)).text
    assert "`adapter_config.json` lists all 400 tasks.\n" in render(config=many(400)["config"], record=None).text


def test_a_card_of_many_tasks_stays_the_same_and_keeps_what_is_written_by_hand():
    card = str(render(**many(2000)))
    edited = card.replace("tags:\n", "tags:\n- mine\n- task:other\n", 1) + "\n## Mine\n\nText.\n"
    again = render(edited, **many(2000))
    assert str(render(str(again), **many(2000))) == str(again)
    assert hand_written(str(again)) == "## Mine\n\nText." and {"mine", "task:other"} <= {*again.data.tags}
    assert len(again.data.tags) == len(ModelCard(card).data.tags) + 2
    # Tasks that are not listed any more have no tags left.
    fewer = many(3)
    tags = render(str(again), **fewer).data.tags
    assert {tag for tag in tags if tag.startswith("task:")} == {
        "task:task_0",
        "task:task_1",
        "task:task_2",
        "task:other",
    }


# Names as long and as long when escaped as names can be, or of the most bytes.
LONG = {
    "letters": "x" * 505,
    "escaped": "\U000e0001" * 505,
    "bytes": "数" * 505,
    "markdown": "<&|" * 168,
    "quotes": "'\\\"" * 168,
}


@pytest.mark.parametrize("name", LONG.values(), ids=LONG)
@pytest.mark.parametrize("count", [90, 2_000])
def test_readers_accept_the_largest_cards(name, count, tmp_path):
    """The page and the metadata, in bytes, with tables, settings, licenses and lists of the most entries."""
    values = many(count, name + "{}", cluster=name * 8, dataset="organization/" + "d" * 80, license=name * 8)
    noted = values["record"]
    noted.exports = [{"task": task.name, "path": f"exports/{i}", "rank": 8} for i, task in enumerate(noted.tasks)]
    noted.tasks[0].metrics = {f"{name}{i}": 1.0 for i in range(1000)}
    noted.hyperparameters = {f"{i:064}": "x" * 64 for i in range(1000)}
    noted.versions = {f"{i:064}": "x" * 64 for i in range(1000)}
    noted.quantization = noted.base_dtype = noted.base_model_license = noted.balance_loss = name * 8
    modules = [f"{name}{i}" for i in range(1000)]
    values["config"] = config(tasks=values["config"].tasks, target_modules=modules, modules_to_save=modules)
    values["config"].rank_pattern = dict.fromkeys(modules, 2)
    card = render(**values)
    card.save(tmp_path / "README.md")
    check_card(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == card.data.to_dict()
    listed = read_card_info(data)["tasks"] if len(name) <= 300 else data.to_dict()["rlora"]["tasks"]
    assert listed == [task.name for task in noted.tasks[: len(listed)]] and len(listed) >= 15
    assert "and 980 more" in card.text
    assert "The table and the metadata of this card have 12 of 1001 metrics besides scores in percent" in card.text
    assert str(render(str(card), **values)) == str(card)


def test_folders_and_machines_are_not_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in (str(tmp_path / "base"), "models", "./base", "~/base"):
        noted = record(
            base_model=name,
            tasks=[TaskRecord("sst2", dataset=str(tmp_path / "data"), license="mit", metrics={"accuracy": 0.5})],
            hyperparameters={"output_dir": str(tmp_path), "optim": "me@host:/x", "seed": 1},
            versions={"peft": "file:///home/me/peft"},
        )
        card = render(config=config(base_model_name_or_path=name, tasks=["sst2"]), record=noted, datasets=["./data"])
        assert str(tmp_path) not in str(card) and "me@host" not in str(card) and "/home/me" not in str(card)
        assert f"({name})" not in card.text and f'"{name}"' not in card.text
        data = card.data.to_dict()
        assert not {"base_model", "base_model_relation", "datasets"} & set(data)
        assert "base_model_revision" not in data["rlora"]


@pytest.mark.parametrize("router", ["softmax", "task"])
def test_the_code_runs_as_written(hub, worker, tmp_path, router):
    base, adapter = save_base(tmp_path / "base"), tiny_adapter(router=router)
    adapter.save_pretrained(tmp_path / "adapter")
    hub.commit(TINY_BASE, {path.name: path.read_bytes() for path in base.iterdir()})
    hub.commit(REPO, {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()})
    noted = AdapterRecord(base_model=TINY_BASE, base_model_revision=hub.head(TINY_BASE))
    sources = snippets(render(config=adapter.peft_config["default"], record=noted).text)
    assert len(sources) == 2
    for source in sources:
        kind = worker.run(f"{source}\nresult = type(model).__name__")
        assert kind == "PeftModelForCausalLM"


# What the Hub sees


def test_metadata():
    data = render(tags=["flan"], datasets=["org/data"]).data.to_dict()
    assert data["library_name"] == "peft" and data["license"] == "mit" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == BASE and data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["nyu-mll/glue", "org/data"] and data["metrics"] == ["accuracy"]
    assert data["tags"] == ["rlora", "multi-task", "lora", "task:sst2", "task:rte", "task:en_fr", "flan"]
    assert data["rlora"] == {
        "format": 1,
        "r": 4,
        "num_heads": 3,
        "router": "softmax",
        "scaling": 16.0,
        "digest": DIGEST,
        "parameters": 5898240,
        "base_model_revision": "060db6499f32faf8b98477b0a26969ef7d8b9987",
        "tasks": ["sst2", "rte", "en_fr"],
        "measured": ["accuracy", "loss", "bleu"],
    }


def test_one_result_for_each_task():
    card = render()
    (index,) = yaml.safe_load(str(card).split("---")[1])["model-index"]
    assert index["name"] == "ten-tasks" and len(index["results"]) == 3
    for entry, name in zip(index["results"], ("sst2", "rte", "en_fr"), strict=True):
        assert entry["task"]["type"] == "text-generation" and entry["dataset"]["name"] == name
    # Two tasks of one dataset differ by configuration; a single one claims none.
    assert index["results"][1]["dataset"] == {"name": "rte", "type": "nyu-mll/glue", "config": "rte"}
    assert index["results"][2]["dataset"] == {"name": "en_fr", "type": "en_fr"}
    assert index["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.953, "name": "Accuracy"}]
    name, results = model_index_to_eval_results([index])
    assert name == "ten-tasks" and len(results) == 4 and {type(result) for result in results} == {EvalResult}


def test_the_card_passes_through_its_own_reader():
    card = render()
    again = ModelCard(str(card))
    assert str(again) == str(card) and again.data.to_dict() == card.data.to_dict()
    assert check_card_text(str(card)) == card.data.to_dict()


def test_info_from_metadata_alone():
    card = render(record=record(exports=[{"task": "sst2", "path": "exports/sst2"}]))
    expected = {
        **card.data.to_dict()["rlora"],
        "base_model": BASE,
        "license": "mit",
        "exports": {"sst2": "exports/sst2"},
        "metrics": {"sst2": {"accuracy": 0.953}, "rte": {"accuracy": 0.7, "loss": 0.51234}, "en_fr": {"bleu": 31.5}},
    }
    assert read_card_info(card.data) == expected
    data = card.data.to_dict()
    assert read_card_info(data) == expected
    index = data.pop("model-index")
    assert read_card_info(data)["metrics"] == {}
    assert read_card_info(data, index) == expected


EMPTY = {"tasks": [], "metrics": {}, "exports": {}, "measured": []}
ODD = {
    "nothing": ({}, EMPTY),
    "none": (None, EMPTY),
    "tags only": (
        {"tags": ["task:a", "task:", "x"], "base_model": ["a/b", "c/d"]},
        {"tasks": ["a"], "base_model": "a/b"},
    ),
    "block of another kind": ({"rlora": [1], "tags": ["task:a"], "model-index": {"a": 1}}, {"tasks": ["a"]}),
    "wrong values": (
        {"rlora": {"r": "4", "num_heads": True, "scaling": float("nan"), "tasks": ["a", 3, "a"], "exports": {"a": 1}}},
        {"tasks": ["a"]},
    ),
    "huge": ({"rlora": {"scaling": 10**400, "router": "x" * 10**6, "tasks": ["x" * 10**6]}}, EMPTY),
    "odd results": (
        {
            "model-index": [
                3,
                {"results": [4, {"dataset": 5, "metrics": [6]}, {"dataset": {"name": "a"}, "metrics": [{}]}]},
            ]
        },
        EMPTY,
    ),
    "text as value": (
        {"model-index": [{"results": [{"dataset": {"name": "a"}, "metrics": [{"type": "f1", "value": "high"}]}]}]},
        EMPTY,
    ),
}


@pytest.mark.parametrize("data, expected", ODD.values(), ids=ODD)
def test_info_of_other_peoples_cards(data, expected):
    assert read_card_info(data) == {**EMPTY, **expected}
    if data is not None:
        assert read_card_info(ModelCardData(**data, ignore_metadata_errors=True)) == {**EMPTY, **expected}


def test_info_where_the_client_could_not_read_results():
    data = ModelCardData(ignore_metadata_errors=True, tags=["task:a"])
    data.eval_results = [1, EvalResult("t", ["no"], "a", "f1", 0.5)]
    assert read_card_info(data)["metrics"] == {"a": {"f1": 0.5}}


# What an existing card keeps

BEFORE = "\nA note above, with trailing blanks   \n\n"
AFTER = "\n\n## My section\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n\n\nNo end of line"


def test_rendering_again_changes_nothing():
    for existing in (None, "", "# Mine\n", "---\ntags: [a]\n---\nText", "---\nlicense: mit\n---\n\n" + BEFORE):
        once = str(render(existing))
        assert str(render(once)) == once


def test_text_around_the_generated_part_is_kept():
    old = str(render(record=record(balance_loss=None)))
    start, end = old.index(BEGIN), old.index(END) + len(END)
    between = "\n\nBetween two parts\n\n"
    edited = old[:start] + BEFORE + old[start:end] + between + BEGIN + "\nold\n" + END + AFTER
    new = str(render(edited))
    head, _, rest = new.partition(BEGIN)
    body, _, tail = rest.partition(END)
    assert head.endswith(BEFORE) and tail == between + AFTER
    assert "switch, coefficient" in body and "old" not in tail
    assert hand_written(edited) == f"{BEFORE.strip()}\n\n{(between + AFTER).strip()}"
    assert str(render(new)) == new


def test_text_without_markers_is_kept_below():
    text = "\n# My adapter\n\n<b>bold</b> and a table | here\n"
    for existing in (text, "---\nlanguage: fr\n---\n" + text):
        new = str(render(existing))
        assert new.count(BEGIN) == 1 and new.endswith(f"{END}\n{text}")
        assert hand_written(existing) == hand_written(new) == text.strip()
    assert str(render("No line before it")).endswith(f"{END}\n\nNo line before it")


AUTOMATIC = {
    "trainer": "<!-- This model card has been generated automatically according to ... -->\n\n# out\n",
    "trl": "# Model Card for out\n\nThis model is a fine-tuned version of [x](https://huggingface.co/x).\n",
    "peft": "# Model Card for Model ID\n\n## Model Details\n\n- **Developed by:** [More Information Needed]\n",
}


@pytest.mark.parametrize("body", AUTOMATIC.values(), ids=AUTOMATIC)
def test_cards_that_nobody_wrote_are_replaced(body):
    metadata = (
        "---\nbase_model: /root/models/x\nlibrary_name: transformers\nmodel_name: out\nlicence: license\n"
        "license: mit\nlanguage: fr\ntags: [trl, sft, 'base_model:adapter:/root/models/x']\n"
        "datasets: [/root/data, a/b]\n---\n"
    )
    card = render(metadata + body, license=None)
    assert hand_written(metadata + body) == hand_written(str(card)) == ""
    assert str(card).endswith(f"{END}\n") and "/root" not in str(card)
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["language"] == "fr" and data["base_model"] == BASE
    assert data["tags"][-2:] == ["trl", "sft"] and "a/b" in data["datasets"]
    assert not {"licence", "model_name"} & set(data)


def test_metadata_of_others_is_kept():
    existing = (
        "---\nlicense: cc-by-4.0\nlicense_link: x\nlanguage: [fr, en]\ntags: [mine, rlora]\n"
        "pipeline_tag: summarization\nwidget:\n- text: Hello\ndatasets: org/own\nmetrics: bleu\n"
        "library_name: other\nco2_eq_emissions: 3\n---\nText"
    )
    data = render(existing, license=None).data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["license_link"] == "x" and data["language"] == ["fr", "en"]
    assert data["tags"][-1] == "mine" and data["tags"].count("rlora") == 1
    assert data["pipeline_tag"] == "summarization" and data["widget"] == [{"text": "Hello"}]
    assert data["datasets"] == ["nyu-mll/glue", "org/own"] and data["metrics"] == ["accuracy", "bleu"]
    assert data["co2_eq_emissions"] == 3 and data["library_name"] == "peft"
    assert render(existing, license="mit").data.license == "mit"


HAND_WRITTEN = """---
model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {name: GLUE, type: nyu-mll/glue}
    metrics: [{type: accuracy, value: 0.5}]
  - task: {type: summarization}
    dataset: {name: news, type: org/news, config: en}
    metrics: [{type: rouge, value: 40.1, name: R}]
  - task: {type: text-generation}
    dataset: {name: sst2, type: nyu-mll/glue, config: sst2}
    metrics: [{type: f1, value: 0.9}, {type: accuracy, value: 0.1}]
---
"""


def results(card):
    return {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}


def test_results_written_by_hand_are_kept():
    card = render(HAND_WRITTEN)
    found = results(card)
    assert found["GLUE", "accuracy"] == 0.5 and found["news", "rouge"] == 40.1
    assert found["sst2", "f1"] == 0.9 and found["sst2", "accuracy"] == 0.953
    assert str(render(str(card))) == str(card)
    assert "| sst2 |" in card.text and "| 90.0% |" in card.text, "the page shows what the metadata says"
    # New tensors make our results outdated, not those of others.
    bare = record(tasks=[TaskRecord("sst2"), TaskRecord("rte"), TaskRecord("en_fr")])
    later = results(render(str(card), record=bare, digest=OTHER_DIGEST))
    assert later == {("GLUE", "accuracy"): 0.5, ("news", "rouge"): 40.1, ("sst2", "f1"): 0.9}


def test_the_same_data_set_and_configuration_is_the_same_result():
    text = HAND_WRITTEN.replace("name: sst2, type", "name: GLUE SST-2, type")
    card = render(text)
    found = results(card)
    assert found["sst2", "accuracy"] == 0.953 and found["sst2", "f1"] == 0.9
    assert ("GLUE SST-2", "accuracy") not in found
    assert str(render(str(card))) == str(card)


def test_results_of_earlier_pushes():
    first = str(render())
    bare = record(tasks=[TaskRecord("sst2"), TaskRecord("rte", metrics={"accuracy": 0.8})])
    same = render(first, record=bare, config=config())
    assert results(same) == {**results(render()), ("rte", "accuracy"): 0.8}
    assert tables(same.text)[0][1][:2] == ["sst2", "95.3%"]
    other = render(first, record=bare, digest=OTHER_DIGEST)
    assert results(other) == {("rte", "accuracy"): 0.8}
    assert read_card_info(other.data)["measured"] == ["accuracy"]


def test_tasks_that_the_adapter_has_lost():
    card = render(str(render()), config=config(tasks=["sst2"]), record=record(tasks=record().tasks[:1]))
    assert set(results(card)) == {("sst2", "accuracy")}
    assert [tag for tag in card.data.tags if tag.startswith("task:")] == ["task:sst2"]


def test_windows_line_ends_stay():
    existing = "---\r\nlicense: mit\r\n---\r\n\r\n# Mine\r\n\r\nText\r\n"
    text = str(render(existing))
    assert text.count("\r\n") == text.count("\n") and text.endswith("# Mine\r\n\r\nText\r\n")
    assert str(render(text)) == text and ModelCard(text).data.license == "mit"


@pytest.mark.parametrize("broken", [f"\n{BEGIN}\n\nmine\n", f"\nmine\n{END}\n", f"\nmine\n{END}\n{BEGIN}\n"])
def test_a_marker_without_its_partner_loses_nothing(broken):
    new = str(render(broken))
    assert new.count(BEGIN) == new.count(END) == 1 and "mine" in hand_written(new)
    assert str(render(new)) == new


def test_byte_order_mark_and_no_body():
    assert render("\ufeff---\nlanguage: fr\n---\n").data.language == "fr"
    assert hand_written("---\nlanguage: fr\n---\n") == hand_written("") == ""


@pytest.mark.parametrize(
    "metadata",
    [
        *("a: [", "- 1\n- 2", "model-index: 3", "1: x", "model-index:\n- name: x\n  results: [{}]"),
        *("self: x", "ignore_metadata_errors: true", "tags: 5", "eval_results: [1]", "a: !!int ''", "a: &b 1"),
        "model-index: [{name: x, results: [{source: text}]}]",
        "model-index:\n- name: x\n  results:\n"
        "  - {task: {type: a}, dataset: {type: [1], name: b}, metrics: [{type: c, value: 1}]}",
    ],
)
def test_broken_metadata_is_refused_not_lost(metadata):
    with pytest.raises(ValueError, match="metadata of the existing card.*can't be read"):
        render(f"---\n{metadata}\n---\nText")


def test_a_title_of_ones_own_is_enough():
    old = str(render())
    edited = old.replace(BEGIN, f"# My title\n\n{BEGIN}")
    assert "# ten-tasks" not in render(edited).text and "# My title" in render(edited).text


def test_card_of_an_earlier_version():
    """Its facts are read from the metadata; the words of its page are replaced."""
    folder = Path(__file__).parent.parent / "fixtures" / "earlier" / "adapter"
    old = (folder / "README.md").read_text(encoding="utf-8")
    info = read_card_info(ModelCard(old).data)
    assert (info["tasks"], info["r"], info["parameters"]) == (["first", "same"], 2, 2656)
    settings, noted = config(r=2, tasks=["first", "same"]), AdapterRecord.load(folder)
    card = render(old + "\nMine.\n", config=settings, record=noted)
    assert "## Load" in old and "## Load" not in card.text and card.text.endswith(f"{END}\n\nMine.\n")
    assert read_card_info(card.data)["tasks"] == info["tasks"] and "trl" in card.data.tags
    assert hand_written(old) == "" and str(render(str(card), config=settings, record=noted)) == str(card)


# Names that would break the page

NAMES = [
    "a|b",
    "two\nlines\r\nmore",
    "<script>alert(1)</script>",
    "**bold** _em_ `code` ~~x~~ $y$",
    "[link](javascript:alert(1))",
    "![img](http://host/x.png)",
    f"{END} gone",
    '"quotes" and \\ backslash',
    "---",
    "{{ begin }} {% raw %}",
    "数学 🙂",
    "key: value # comment",
    "- item",
    "null",
    "```",
    "a\n---\nb",
    "\u202egnp.exe",
    "\u2066a\u2069 \u200b\ufeff",
    "\x1b[2J\x1b]52;c;aGk=\x07",
    "a\x85b\u2028c\u2029d",
    "\x7f\x9b31m",
    "e" + "\u0301" * 40,
    "\U000e0041\ue000",
    "<!-- comment",
    "--> end",
    "<details></summary>",
    "&lt;b&gt;",
    "!!python/object:x",
    "&anchor *alias",
    "? complex : key",
    "%TAG ! x",
    "1_000",
    "12:30:45",
    "2020-01-01",
    "~",
    "x" * 512,
    "x y " * 128,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_do_not_break_the_page(name):
    noted = record(tasks=[TaskRecord(name, cluster=name, rows=3, license=name, metrics={"accuracy": 0.5, name: 1.0})])
    noted.quantization = noted.balance_loss = name
    settings = config(tasks=[name], router="task", target_modules=name, router_init="kaiming_uniform")
    card = render(config=settings, record=noted, tags=[name])
    text = card.text
    assert text.count(BEGIN) == text.count(END) == 1
    table, *_ = tables(text)
    assert len(table) == 2 and len(table[0]) == 5
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"<(?!!-- rlora_trl|/?details|/?summary)", prose)
    assert not re.search(r"(?<!\\)\[(?:link|img)|(?<!\\)!\[img\]|(?<!\\)\*\*bold|(?<![\\\w])_em", prose)
    assert all(character.isprintable() or character == "\n" for character in text)
    for source in snippets(text):
        (call, *_) = re.findall(r"model\.set_task\((.*)\)", source) or [None]
        assert call is None or ast.literal_eval(call.split(")  #")[0]) == name
        ast.parse(source)
    assert str(ModelCard(str(card))) == str(card) == str(render(str(card), config=settings, record=noted, tags=[name]))
    info = read_card_info(ModelCard(str(card)).data)
    if len(name) <= 300:  # longer names are not read from cards
        (listed,) = info["tasks"]  # YAML takes NEL for a line end
        assert listed == name.replace("\x85", " ") and info["metrics"][listed]["accuracy"] == 0.5
    check_card_text(str(card))
    assert f"task:{' '.join(name.split())}" in card.data.tags


def test_metadata_of_others_can_not_reach_the_template():
    existing = "---\ncard_data: 2\nbegin: x\nsummary: '{{ 7 * 1001 }}'\ntitle: hacked\n---\nText {{ 7 * 1001 }}"
    card = render(existing)
    assert "hacked" not in card.text and card.text.endswith("Text {{ 7 * 1001 }}") and "7007" not in card.text
    assert card.data.to_dict()["card_data"] == 2 and card.data.to_dict()["summary"] == "{{ 7 * 1001 }}"


def test_a_card_of_many_markers_and_tags_is_read_in_time():
    tags = "".join(f"- t{index}\n" for index in range(50_000))
    text = f"---\ntags:\n{tags}---\n" + f"{BEGIN}a{END}b" * 15_000 + BEGIN * 15_000
    start = time.process_time()
    assert hand_written(text) == "b" * 15_000
    assert time.process_time() - start < 5


def test_dates_and_results_of_hand_written_metadata_stay():
    result = "{task: {type: a}, dataset: {type: b, name: c}, metrics: [{type: d, value: 1}]}"
    index = f"model-index: [{{name: x, results: [{result}]}}]"
    old = read_existing(f"---\ndate: 2024-01-01\nempty:\n{index}\n---\ntext")
    assert old.metadata == {"date": "2024-01-01"} and [result.metric_value for result in old.results] == [1]
