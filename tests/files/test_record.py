"""What training recorded: to JSON and back, wrong content, what may be published, and where it is found."""

import dataclasses
import json
import logging
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from rlora_trl import RLoraConfig, RLoraSFTConfig, __version__
from rlora_trl.analysis import HeadWeights
from rlora_trl.files.layout import RECORD_NAME
from rlora_trl.files.names import hub_name
from rlora_trl.files.record import (
    _HYPERPARAMETERS,
    AdapterRecord,
    TaskRecord,
    collect_versions,
    find_record,
    is_plain,
    select_hyperparameters,
)
from rlora_trl.tuner.config import AdapterSource


def full_record() -> AdapterRecord:
    layers = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])
    return AdapterRecord(
        base_model="Qwen/Qwen2.5-0.5B",
        base_model_revision="060db649",
        base_model_license="apache-2.0",
        base_dtype="bfloat16",
        quantization="bitsandbytes nf4",
        tasks=[
            TaskRecord(
                *("sst2", "sentiment", "nyu-mll/glue", "other", 6000, 90000, 0.75, {"accuracy": 0.95}, 250),
                intervals={"accuracy": [0.92, 0.98]},
            ),
            TaskRecord('数学 "x"'),
        ],
        hyperparameters={"learning_rate": 2e-4, "packing": False, "optim": "adamw_torch", "seed": 42},
        versions={"peft": "0.21.2"},
        mixtures=HeadWeights(layers, {"sst2": weights}, {"sst2": 100}),
        balance_loss="switch",
        balance_coef=0.01,
        exports=[{"task": "sst2", "path": "exports/sst2", "rank": 8, "kl": 0.01, "exact": False}],
    )


def test_round_trip(tmp_path):
    record = full_record()
    path = record.save(tmp_path / "new" / "folder")
    assert path.name == RECORD_NAME and json.loads(path.read_text("utf-8"))["format"] == 1
    loaded = AdapterRecord.load(path.parent)
    for field in dataclasses.fields(AdapterRecord):
        if field.name != "mixtures":
            assert getattr(loaded, field.name) == getattr(record, field.name), field.name
    assert torch.equal(loaded.mixtures.weights["sst2"], record.mixtures.weights["sst2"])
    assert loaded.to_dict() == record.to_dict()


def test_what_is_not_known_is_left_out():
    assert AdapterRecord().to_dict() == {"format": 1}
    assert TaskRecord("a", metrics={"loss": float("nan"), "accuracy": 1}).to_dict() == {
        "name": "a",
        "metrics": {"accuracy": 1.0},
    }


def test_intervals_belong_to_metrics():
    task = TaskRecord("a", metrics={"f1": 0.5}, intervals={"f1": [0, 1], "accuracy": [0.5, 0.5]})
    assert task.to_dict() == {"name": "a", "metrics": {"f1": 0.5}, "intervals": {"f1": [0.0, 1.0]}}
    # Training again: scores of the adapter are those of the newer run, and the base model's stay.
    scores = {"metrics": {"accuracy": 0.5, "base_accuracy": 0.25}, "metric_rows": 9}
    older = TaskRecord("a", rows=4, **scores, intervals={"accuracy": [0.4, 0.6], "base_accuracy": [0.2, 0.3]})
    newer = TaskRecord("a", rows=4, metrics={"accuracy": 0.75}).merged_with(older)
    assert newer.intervals == {"base_accuracy": [0.2, 0.3]}
    assert TaskRecord("a").merged_with(older).intervals == older.intervals


def test_unknown_keys_are_ignored():
    record = AdapterRecord.from_dict({"tasks": [{"name": "a", "colour": [1]}], "later": {"x": 1}})
    assert record == AdapterRecord(tasks=[TaskRecord("a")])


WRONG = {
    "base_model": ({"base_model": 3}, r"`base_model` must be of type str, got 3"),
    "tasks": ({"tasks": {"name": "a"}}, "`tasks` must be a list"),
    "task": ({"tasks": ["a"]}, r"`tasks\[0\]` must be an object"),
    "no name": ({"tasks": [{"rows": 1}]}, r"`tasks\[0\].name` is missing"),
    "rows": ({"tasks": [{"name": "a"}, {"name": "b", "rows": "many"}]}, r"`tasks\[1\].rows` must be of type int"),
    "boolean": ({"tasks": [{"name": "a", "tokens": True}]}, r"`tasks\[0\].tokens` must be of type int"),
    "share": ({"tasks": [{"name": "a", "share": 75}]}, r"`tasks\[0\].share` must be a number from 0 to 1, got 75"),
    "metrics": ({"tasks": [{"name": "a", "metrics": {"loss": "low"}}]}, r"`tasks\[0\].metrics` must be of type dict"),
    "nan": ({"balance_coef": float("nan")}, "`balance_coef` must be a finite number"),
    "negative": ({"tasks": [{"name": "a", "rows": -1}]}, r"`tasks\[0\].rows` must be a finite number of at least 0"),
    "export": ({"exports": [{"path": "a", "rank": "8"}]}, r"`exports\[0\].rank` must be of type int"),
    "blank name": ({"tasks": [{"name": "  "}]}, r"`tasks\[0\].name` must be of type str, .* it is blank"),
    "long name": ({"tasks": [{"name": "a" * 1_000_000}]}, r"`tasks\[0\].name` must be .* at most 512"),
    "number as name": ({"tasks": [{"name": 3.5}]}, r"`tasks\[0\].name` must be of type str"),
    "half a character": ({"tasks": [{"name": "a\ud800"}]}, r"`tasks\[0\].name` must be .*surrogate"),
    "huge metric": ({"tasks": [{"name": "a", "metrics": {"loss": 10**400}}]}, "`tasks.0..metrics` must be finite"),
    "interval": (
        {"tasks": [{"name": "a", "intervals": {"f1": [0.5]}}]},
        r"`tasks\[0\].intervals` must be two finite numbers",
    ),
    "interval of texts": ({"tasks": [{"name": "a", "intervals": {"f1": ["0", "1"]}}]}, "`tasks.0..intervals` must be"),
    "interval upside down": ({"tasks": [{"name": "a", "intervals": {"f1": [1, 0]}}]}, "the lower one first"),
    "huge interval": ({"tasks": [{"name": "a", "intervals": {"f1": [0, 10**400]}}]}, "must be two finite numbers"),
    "long text": ({"tasks": [{"name": "a", "cluster": "x" * 5000}]}, r"`tasks\[0\].cluster` has a text of 5000 ch"),
    "long key": ({"versions": {"x" * 5000: "1"}}, "`versions` has a text of 5000 characters"),
    "many tasks": ({"tasks": [{"name": "a"}] * 10_001}, "`tasks` has 10001 entries, and at most 10000"),
    "many exports": ({"exports": [3] * 10_001}, "`exports` has 10001 entries"),
    "many metrics": ({"tasks": [{"name": "a", "metrics": dict.fromkeys(map(str, range(1001)), 1)}]}, "1001 entries"),
    "many settings": ({"hyperparameters": dict.fromkeys(map(str, range(1001)), 1)}, "at most 1000 are read"),
    "long export": ({"exports": [{"path": "a", "note": "x" * 5000}]}, r"`exports\[0\]` has a text"),
    "huge": ({"balance_coef": 10**400}, "`balance_coef` must be a finite number"),
    "twice": ({"tasks": [{"name": "a"}, {"name": "a"}]}, "'a' more than once"),
    "hyperparameters": ({"hyperparameters": {"a": [1]}}, "`hyperparameters` must be of type dict"),
    "versions": ({"versions": {"peft": 1}}, "`versions` must be"),
    "exports": ({"exports": [{"task": "a"}]}, r"`exports\[0\].path` is missing"),
    "mixtures": ({"mixtures": {"layers": 3}}, "`mixtures` can't be read"),
    "format": ({"format": 2}, "Install a newer rlora_trl"),
    "list": ([1], "must be an object"),
}


@pytest.mark.parametrize("content, message", WRONG.values(), ids=WRONG)
def test_wrong_content(content, message):
    with pytest.raises(ValueError, match=message):
        AdapterRecord.from_dict(content)


def test_messages_are_short(tmp_path):
    """A hostile record names a file's contents in its errors, which a terminal or a log shows."""
    for content, _ in WRONG.values():
        with pytest.raises(ValueError) as info:
            AdapterRecord.from_dict(content)
        assert len(str(info.value)) < 1000
    record = AdapterRecord(tasks=[TaskRecord(f"task {i}") for i in range(10_000)])
    with pytest.raises(ValueError, match="and 9990 more") as info:
        record.task("other")
    assert len(str(info.value)) < 1000


def _record_of(tasks: int, layers: int, heads: int) -> AdapterRecord:
    weights = torch.full((layers, heads), 1 / heads)
    names = [f"task-{i}" for i in range(tasks)]
    return AdapterRecord(
        tasks=[TaskRecord(name, "words", rows=40, tokens=400, metrics={"accuracy": 0.5}) for name in names],
        mixtures=HeadWeights(
            tuple(f"model.layers.{i}.mlp.up_proj" for i in range(layers)),
            dict.fromkeys(names, weights),
            dict.fromkeys(names, 100),
        ),
    )


def test_a_record_of_the_most_tasks_is_read_in_time(tmp_path):
    path = _record_of(10_000, 2, 3).save(tmp_path)
    start = time.process_time()
    record = AdapterRecord.load(path.parent)
    assert time.process_time() - start < 20, "reading 10,000 tasks takes about 2 s"
    assert len(record.tasks) == len(record.mixtures.weights) == 10_000


def test_what_is_written_can_be_read(tmp_path, caplog, monkeypatch):
    """Head weights of all tasks may exceed what a reader accepts: then the last ones are left out, with a warning."""
    monkeypatch.setattr(logging.getLogger("rlora_trl"), "propagate", True)
    record = _record_of(2500, 60, 5)  # 750,000 weights
    record.save(tmp_path)
    loaded = AdapterRecord.load(tmp_path)
    assert loaded.tasks == record.tasks, "the record has all tasks"
    kept = list(loaded.mixtures.weights)
    assert 1000 < len(kept) < 2500 and kept == list(record.mixtures.weights)[: len(kept)]
    assert list(loaded.mixtures.tokens) == kept
    assert f"the first {len(kept):,} of 2,500 tasks" in caplog.text and "measure_head_weights" in caplog.text


def test_weights_are_one_line_for_each_layer(tmp_path):
    record = full_record()
    record.tasks[0].cluster = "[\n  1, 2\n]"  # only looks like a list
    text = record.save(tmp_path).read_text("utf-8")
    assert "        [0.5, 0.25, 0.25],\n        [0.125, 0.125, 0.75]\n" in text
    assert AdapterRecord.load(tmp_path).tasks == record.tasks


def test_sizes_of_head_weights_are_compared_first(monkeypatch):
    """Before any tensor is made, in time linear in the contents."""
    monkeypatch.setattr(torch, "tensor", None)
    many = [f"t{i}" for i in range(9000)]
    row = [1 / 4096] * 4096
    wrong = [
        ([f"l{i}" for i in range(1_000_000)], {"a": [[1.0]] * 1_000_000}, "at most 50000 names, got 1000000 of them"),
        (["a"], dict.fromkeys(many, [row]) | {"t8999": [row[:4095]]}, r"shape \[1, 4096\]"),
        (["a"], dict.fromkeys(many, [row]) | {"t8999": [row, row]}, r"shape \[1, N\]"),
        (["a"], {str(i): [[1.0]] for i in range(10_001)}, "at most 10000 tasks, got 10001 of them"),
        (["a"], {"a": [[10**400]]}, "must be lists of numbers"),
        (["a"], {"a" * 600: [[1.0]]}, "at most 512"),
        (["a" * 600], {"a": [[1.0]]}, "names of at most 512 characters"),
        ([3], {"a": [[1.0]]}, "names of at most 512 characters"),
    ]
    for layers, weights, message in wrong:
        with pytest.raises(ValueError, match=message) as info:
            HeadWeights.from_dict({"layers": layers, "weights": weights, "tokens": dict.fromkeys(weights, 1)})
        assert len(str(info.value)) < 1000


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / RECORD_NAME).write_text('{"tasks": 3}')
    with pytest.raises(ValueError, match=f"{RECORD_NAME} is not a record of an adapter: `tasks`"):
        AdapterRecord.load(tmp_path)
    (tmp_path / RECORD_NAME).write_text('{"tasks": [{"name": "a", "metrics": {"loss": NaN}}]}')
    with pytest.raises(ValueError, match=f"{RECORD_NAME} is not valid JSON: .*NaN"):
        AdapterRecord.load(tmp_path)
    (tmp_path / RECORD_NAME).write_text("{")
    with pytest.raises(ValueError, match=RECORD_NAME):
        AdapterRecord.load(tmp_path)


def test_saving_is_all_or_nothing(tmp_path):
    path = AdapterRecord(base_model="a/b").save(tmp_path)
    before = path.read_text()
    broken = AdapterRecord()
    broken.hyperparameters["x"] = object()
    with pytest.raises(TypeError):
        broken.save(tmp_path)
    path.unlink()
    path.mkdir()  # what `os.replace` refuses to write over
    with pytest.raises(OSError):
        AdapterRecord(base_model="c/d").save(tmp_path)
    path.rmdir()
    path.write_text(before)
    assert [file.name for file in tmp_path.iterdir()] == [RECORD_NAME], "temporary files are left"


def test_an_adapter_that_goes_on_training():
    older, before = full_record(), full_record().to_dict()
    older.tasks.append(TaskRecord("cola", rows=2000, tokens=10, metrics={"base_accuracy": 0.5, "accuracy": 0.7}))
    older.mixtures.weights["cola"], older.mixtures.tokens["cola"] = older.mixtures.weights["sst2"].clone(), 7
    mixtures = HeadWeights(older.mixtures.layers, {"cola": torch.full((2, 3), 1 / 3)}, {"cola": 9})
    newer = AdapterRecord(
        base_model="Qwen/Qwen2.5-0.5B",
        base_dtype="float16",
        tasks=[
            TaskRecord("rte", rows=1000, tokens=50, share=0.25),
            TaskRecord("sst2"),
            TaskRecord("cola", "grammar", rows=1000, share=0.75, metrics={"accuracy": 0.8}, metric_rows=40),
        ],
        hyperparameters={"learning_rate": 1e-4},
        mixtures=mixtures,
    )
    unchanged = newer.to_dict()
    merged = newer.merged_with(older)
    sst2, unnamed, cola, rte = merged.tasks
    assert dataclasses.replace(sst2, share=0.75) == older.task("sst2"), "not trained now"
    assert unnamed == older.tasks[1] and rte == dataclasses.replace(newer.tasks[0], share=0.1)
    assert cola == TaskRecord(
        "cola",
        "grammar",
        rows=3000,
        tokens=10,
        share=0.3,
        metrics={"accuracy": 0.8, "base_accuracy": 0.5},
        metric_rows=40,
    )
    assert sst2.share == 0.6 and unnamed.share is None
    assert (merged.base_model_revision, merged.base_model_license) == ("060db649", "apache-2.0")
    assert (merged.base_dtype, merged.quantization, merged.balance_loss) == ("float16", None, None)
    assert merged.hyperparameters == {"learning_rate": 1e-4} and merged.exports == []
    assert list(merged.mixtures.weights) == ["sst2", "cola"] and merged.mixtures.tokens == {"sst2": 100, "cola": 9}
    assert torch.equal(merged.mixtures.weights["cola"], mixtures.weights["cola"])
    assert newer.to_dict() == unchanged and full_record().to_dict() == before
    merged.tasks[0].metrics["x"] = 1.0
    assert AdapterRecord.from_dict(merged.to_dict()).to_dict() == merged.to_dict()


def test_what_does_not_fit_is_not_kept():
    older = full_record()
    other_layers = HeadWeights(("a",), {"rte": torch.full((1, 3), 1 / 3)}, {"rte": 1})
    other_heads = HeadWeights(older.mixtures.layers, {"rte": torch.full((2, 2), 0.5)}, {"rte": 1})
    for mixtures in (other_layers, other_heads):
        assert AdapterRecord(mixtures=mixtures).merged_with(older).mixtures is mixtures
    assert AdapterRecord().merged_with(older).mixtures is older.mixtures
    # Another base has neither its commit nor its license.
    merged = AdapterRecord(base_model="a/b").merged_with(older)
    assert (merged.base_model, merged.base_model_revision, merged.base_model_license) == ("a/b", None, None)
    # Weights that went on training have not the old score, and nothing is counted where nothing is known.
    again = TaskRecord("sst2", rows=1).merged_with(older.task("sst2"))
    assert again.metrics == {} and again.metric_rows is None and again.rows == 6001
    assert TaskRecord("a").merged_with(TaskRecord("a", share=0.5)) == TaskRecord("a", share=0.5)


def test_task_by_name():
    record = full_record()
    assert record.task("sst2").rows == 6000
    with pytest.raises(ValueError, match="no task 'rte'; it has 'sst2'"):
        record.task("rte")


def test_hyperparameters_of_a_run(tmp_path):
    args = RLoraSFTConfig(
        str(tmp_path / "out"),
        hub_token="hf_secret",
        hub_model_id="someone/model",
        run_name="/home/me/run",
        resume_from_checkpoint=str(tmp_path),
        deepspeed=None,
        router_learning_rate=1e-3,
        balance_loss="switch",
        mixing="temperature",
        mixing_temperature=2.0,
        use_cpu=True,
    )
    selected = select_hyperparameters(args)
    assert selected["learning_rate"] == args.learning_rate and selected["router_learning_rate"] == 1e-3
    assert selected["lr_scheduler_type"] == args.lr_scheduler_type.value
    assert selected["optim"] == args.optim.value
    assert selected["mixing_temperature"] == 2.0 and selected["balance_coef"] == 0.01
    assert "num_train_epochs" in selected and "max_steps" not in selected
    text = json.dumps(selected)
    assert all(type(value) in (str, int, float, bool) for value in selected.values())
    assert not any(secret in text for secret in ("hf_secret", "someone", "/home/me", str(tmp_path)))


def test_settings_without_effect_are_left_out():
    args = SimpleNamespace(balance_loss="none", balance_coef=0.01, mixing="proportional", mixing_temperature=2.0)
    assert select_hyperparameters(args) == {"balance_loss": "none", "mixing": "proportional"}
    assert select_hyperparameters(SimpleNamespace(max_steps=20, num_train_epochs=3.0)) == {"max_steps": 20}


def test_paths_and_objects_are_not_selected():
    args = SimpleNamespace(optim="/usr/lib/optim.so", lr_scheduler_type=object(), seed=float("nan"), packing="a\nb")
    assert select_hyperparameters(args) == {}
    assert is_plain("adamw_torch") and is_plain("2.13.0+cpu") and is_plain(True)
    assert not any(map(is_plain, ("a/b", "C:\\x", "host:8080", "me@host", "x" * 65, "", None, [1])))


def test_the_list_names_fields_that_exist():
    names = {field.name for field in dataclasses.fields(RLoraSFTConfig)} | {"world_size"}
    assert set(_HYPERPARAMETERS) <= names


def test_versions_are_collected_without_imports():
    imported = set(sys.modules)
    versions = collect_versions()
    assert versions["rlora_trl"] == __version__ and versions["torch"].startswith(torch.__version__.split("+")[0])
    assert {"peft", "trl", "transformers", "datasets", "accelerate"} <= set(versions)
    assert not {name.partition(".")[0] for name in set(sys.modules) - imported} & set(versions)
    assert all(map(is_plain, versions.values()))


def test_names_on_the_hub(tmp_path, monkeypatch):
    assert hub_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B" and hub_name("gpt2") == "gpt2"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in (None, "", "models/mine", str(tmp_path), "./models", "../x", "~/x", "a/b/c", "C:\\models\\x", "a b"):
        assert hub_name(name) is None, name


def test_record_beside_a_folder(tmp_path):
    config = RLoraConfig()
    assert find_record(config) is None
    AdapterRecord(base_model="a/b").save(tmp_path / "inner")
    config.source = AdapterSource(str(tmp_path / "inner"))
    assert find_record(config).base_model == "a/b"
    config.source = AdapterSource(str(tmp_path), None, "inner")
    assert find_record(config).base_model == "a/b"
    config.source = AdapterSource(str(tmp_path))
    assert find_record(config) is None
    config.source = AdapterSource(str(tmp_path / "gone"))
    assert find_record(config) is None
