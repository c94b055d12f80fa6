"""Rows without a token to train on after preparation: warnings, and their tasks."""

import json

import pytest
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM
from testing_utils import build_tokenizer, task_rows
from trainer_utils import arguments, make_trainer

from rlora_trl import MultiHeadAdapter, RLoraConfig, RLoraSFTTrainer
from rlora_trl.trainer.task_ids import TASK_IDS


CUT = {"max_length": 12}
PREPARATIONS = {
    "padded": CUT,
    "bfd": {**CUT, "packing": True},
    "equal": {**CUT, "mixing": "equal"},
    "equal_bfd": {**CUT, "packing": True, "mixing": "equal"},
}


def short(task="first", count=8):
    return task_rows(task, count)


def long(count=8):
    """Prompts of more than 12 tokens."""
    return [{"prompt": " ".join(["w3"] * 20), "completion": " yes"}] * count


def as_datasets(tasks):
    return {task: Dataset.from_list(rows) for task, rows in tasks.items()}


def as_column(tasks):
    return Dataset.from_list([{**row, "task": task} for task, rows in tasks.items() for row in rows])


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "without a token to" in r.getMessage()]


@pytest.mark.parametrize("kind", [as_datasets, as_column])
@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_a_task_without_rows_is_named_and_not_recorded(model_folders, tmp_path, caplog, preparation, kind):
    caplog.set_level("WARNING")
    tasks = {"a": short() + long(3), "gone": long(), "z": short("same")}
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train=kind(tasks),
        evaluate=as_datasets({"z": short("same", 4), "gone": short("colour", 4)}),
        max_steps=2,
        **PREPARATIONS[preparation],
    )
    (text,) = warnings_of(caplog)
    assert "have no effect: a 3 of 11, gone 8 of 8." in text
    assert "No row remains of 'gone': the run does not train on it." in text
    assert "fills `max_length=12`" in text and "Raise `max_length`, or shorten or remove these rows" in text
    assert trainer._task_data.names == ["a", "z"] and set(trainer.mixture.rows) == {"a", "z"}
    trainer.train()
    assert set(trainer.tasks_seen()) == {"a", "z"} and all(c["rows"] for c in trainer.tasks_seen().values())
    assert {m.routing.tasks for m in trainer.model.modules() if isinstance(m, MultiHeadAdapter)} == {("a", "z")}
    trainer.save_model()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tasks"] == ["a", "z"]
    # Evaluation data has the numbers of what is left, and a task that is gone has none.
    if "bfd" not in preparation:
        assert set(trainer.eval_dataset["z"][TASK_IDS]) == {1} and set(trainer.eval_dataset["gone"][TASK_IDS]) == {-1}
    assert {"eval_z_loss", "eval_gone_loss"} <= set(trainer.evaluate())
    assert warnings_of(caplog) == [text]


@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_each_task_keeps_its_rows_when_others_are_gone(model_folders, tmp_path, preparation):
    """The words of the rows say their task."""
    tasks = {
        name: [{"prompt": f"{word} {word}", "completion": f" {word}"}] * 6 for name, word in (("a", "w1"), ("c", "w2"))
    }
    trainer = make_trainer(
        model_folders, tmp_path, train=as_datasets({"b": long(), **tasks}), **PREPARATIONS[preparation]
    )
    words = build_tokenizer().convert_tokens_to_ids(["w1", "w2"])
    seen = set()
    for batch in trainer.get_train_dataloader():
        ids = batch[TASK_IDS] if batch[TASK_IDS].ndim == 2 else batch[TASK_IDS][:, None].expand_as(batch["input_ids"])
        pairs = zip(batch["input_ids"].flatten().tolist(), ids.flatten().tolist(), strict=True)
        seen |= {(word, task) for word, task in pairs if word in words}
    assert seen == {(words[0], 0), (words[1], 1)}


@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_head_weights_of_a_task_need_rows(model_folders, tmp_path, preparation):
    with pytest.raises(
        ValueError,
        match="`router=\"task\"` learns the head weights of each task.*no row remains of 'gone' \\(a 1 of 9, gone 8",
    ):
        make_trainer(
            model_folders,
            tmp_path,
            train=as_datasets({"a": short() + long(1), "gone": long()}),
            peft_config=RLoraConfig(router="task"),
            **PREPARATIONS[preparation],
        )


@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_no_task_has_rows(model_folders, tmp_path, preparation):
    with pytest.raises(
        ValueError, match="no row with a token to train on \\(a 8 of 8, b 2 of 2\\).*Raise `max_length`"
    ):
        make_trainer(
            model_folders, tmp_path, train=as_datasets({"a": long(), "b": long(2)}), **PREPARATIONS[preparation]
        )


def test_one_data_set_without_tasks(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    make_trainer(model_folders, tmp_path, train=Dataset.from_list(short() + long(2)), **CUT)
    (text,) = warnings_of(caplog)
    assert "have no effect: all 2 of 10." in text
    with pytest.raises(ValueError, match="no row with a token to train on \\(all 8 of 8\\)"):
        make_trainer(model_folders, tmp_path, train=Dataset.from_list(long()), **CUT)


def test_no_warning_without_lost_rows(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    for options in (
        CUT,
        {**CUT, "packing": True},
        {"max_length": None},
        {**CUT, "packing": True, "packing_strategy": "wrapped"},
    ):
        make_trainer(model_folders, tmp_path, train=as_datasets({"a": short(), "b": short("same")}), **options)
    make_trainer(
        model_folders,
        tmp_path,
        train=as_datasets({"a": long(), "b": long()}),
        packing=True,
        packing_strategy="bfd_split",  # cuts rows into pieces, which all are trained on
        **CUT,
    )
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("options", [{"max_length": None}, {"dataset_kwargs": {"skip_prepare_dataset": True}}])
def test_rows_without_a_label(model_folders, tmp_path, caplog, options):
    """Nothing drops them, and nothing is learned from them."""
    caplog.set_level("WARNING")
    learned = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    masked = {"input_ids": [5, 6, 7], "labels": [5, -100, -100]}  # the first token is predicted from nothing
    train = as_datasets({"a": [masked] * 4, "b": [learned] * 4 + [masked]})
    evaluate = as_datasets({"b": [learned] * 2})
    trainer = make_trainer(model_folders, tmp_path, train=train, evaluate=evaluate, max_steps=1, **options)
    assert "have no effect: a 4 of 4, b 1 of 5." in warnings_of(caplog)[0]
    assert trainer._task_data.names == ["b"] and set(trainer.train_dataset[TASK_IDS]) == {0}
    assert trainer.eval_dataset["b"][TASK_IDS] == [0, 0]
    trainer.train()
    with pytest.raises(ValueError, match="no row remains of 'a'"):
        make_trainer(model_folders, tmp_path, train=train, peft_config=RLoraConfig(router="task"), **options)


def test_empty_rows(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    train = as_datasets({"a": [{"text": "w1 w2"}] * 4, "b": [{"text": ""}] * 4})
    trainer = make_trainer(model_folders, tmp_path, train=train)
    assert "have no effect: b 4 of 4." in warnings_of(caplog)[0] and trainer._task_data.names == ["a"]


def test_tasks_that_were_trained_on_before_stay(model_folders, tmp_path):
    first = make_trainer(model_folders, tmp_path, train=as_datasets({"a": short(), "b": short("same")}), max_steps=1)
    first.train()
    first.save_model()
    again = RLoraSFTTrainer(
        AutoPeftModelForCausalLM.from_pretrained(tmp_path, is_trainable=True),
        arguments(tmp_path / "again", max_steps=1, **CUT),
        train_dataset=as_datasets({"new": long(), "b": long(), "a": short()}),
        processing_class=build_tokenizer(),
    )
    assert again._task_data.names == ["a", "b"] == again.model.peft_config["default"].tasks
    again.train()
    # Those that a new adapter names in advance are no better than those of the data.
    config = RLoraConfig(tasks=["a", "b"])
    fresh = make_trainer(
        model_folders, tmp_path, train=as_datasets({"a": short(), "b": long()}), peft_config=config, **CUT
    )
    assert fresh.model.peft_config["default"].tasks == ["a"]


def test_evaluation_data(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    evaluate = {"a": short() + long(2), "b": long()}
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train=as_datasets({"a": short(), "b": short("same")}),
        evaluate=as_datasets(evaluate),
        max_steps=1,
        **CUT,
    )
    (text,) = warnings_of(caplog)
    assert "have no effect: a 2 of 10; b 8 of 8, so it gets no loss." in text
    metrics = trainer.evaluate()
    assert "eval_a_loss" in metrics and "eval_b_loss" not in metrics
    caplog.clear()
    trainer.evaluate({"other": Dataset.from_list(long(3) + short())})
    assert [text.split(":")[1].split(".")[0] for text in warnings_of(caplog)] == [" other 3 of 11"]


def test_packed_evaluation_data_given_as_a_dictionary(model_folders, tmp_path):
    trainer = make_trainer(
        model_folders, tmp_path, train=as_datasets({"a": short(), "b": short("same")}), max_steps=1, packing=True
    )
    given = as_datasets({"a": short(count=4), "b": short("same", 4)})
    metrics = trainer.evaluate(given)
    alone = trainer.evaluate(given["b"].add_column("task", ["b"] * 4), metric_key_prefix="alone")
    assert metrics["eval_b_loss"] == pytest.approx(alone["alone_loss"], rel=1e-5)


def test_a_stream_of_evaluation_data_has_the_numbers_of_what_is_left(model_folders, tmp_path):
    evaluate = as_column({"gone": short(count=2), "b": short("same", 2)}).to_iterable_dataset()
    train = as_datasets({"gone": long(), "b": short("same")})
    trainer = make_trainer(model_folders, tmp_path, train=train, evaluate=evaluate, **CUT)
    assert [row[TASK_IDS] for row in trainer.eval_dataset] == [-1, -1, 0, 0]


def test_streams_are_known_afterwards(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    streams = {task: rows.to_iterable_dataset() for task, rows in as_datasets({"a": short(), "gone": long()}).items()}
    trainer = make_trainer(model_folders, tmp_path, train=streams, max_steps=1, **CUT)
    trainer.train()
    assert "Training saw no row of 'gone', which are in the adapter" in caplog.text
    caplog.clear()
    rows = [{**row, "task": task} for task in ("a", "b") for row in short()]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    make_trainer(model_folders, tmp_path, train=stream, peft_config=RLoraConfig(tasks=["a", "b"]), max_steps=2).train()
    assert "saw no row" not in caplog.text
