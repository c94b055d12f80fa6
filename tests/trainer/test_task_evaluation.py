"""Losses and scores by task in evaluation."""

import pytest
import torch
from datasets import Dataset
from testing_utils import build_tokenizer, task_datasets, task_rows
from trainer_utils import TASK_ROUTER, TASKS, arguments, make_trainer, scored_rows
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from rlora_trl import RLoraConfig, RLoraSFTTrainer


@pytest.fixture(scope="module")
def trained(model_folders, tmp_path_factory):
    """A trainer that has learned something of each task."""
    trainer = make_trainer(
        model_folders,
        tmp_path_factory.mktemp("trained"),
        evaluate={task: scored_rows(task, 12) for task in ("colour", "same", "first")},
        peft_config=RLoraConfig(**TASK_ROUTER),
        max_steps=60,
    )
    trainer.train()
    return trainer


def test_evaluation_by_task(trained):
    metrics = trained.evaluate()
    assert {f"eval_{task}_loss" for task in TASKS} <= set(metrics)
    assert {"eval_colour_accuracy", "eval_same_accuracy"} <= set(metrics) and "eval_first_accuracy" not in metrics
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{task}_loss"] for task in TASKS) / 3)
    accuracies = [metrics["eval_colour_accuracy"], metrics["eval_same_accuracy"]]
    assert metrics["eval_accuracy"] == pytest.approx(sum(accuracies) / 2)
    # By hand: the most likely option, with the task set.
    tokenizer = build_tokenizer()
    correct = 0
    trained.model.set_task("colour")
    for row in scored_rows("colour", 12):
        scores = []
        for option in row["options"]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + option, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                log_probs = trained.model(ids).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1])))
        correct += row["options"][max(range(3), key=scores.__getitem__)] == row["completion"]
    trained.model.set_task(None)
    assert metrics["eval_colour_accuracy"] == pytest.approx(correct / 12)
    assert any("eval_accuracy" in entry for entry in trained.state.log_history)


def test_evaluation_data_with_a_task_column_and_given_to_evaluate(model_folders, tmp_path):
    rows = [{**row, "task": task} for task in TASKS for row in scored_rows(task, 6)]
    trainer = make_trainer(model_folders, tmp_path, evaluate=Dataset.from_list(rows), max_steps=1)
    metrics = trainer.evaluate()
    assert {"eval_colour_loss", "eval_colour_accuracy", "eval_loss"} <= set(metrics)
    given = trainer.evaluate({"colour": scored_rows("colour", 6)}, metric_key_prefix="test")
    assert given["test_colour_loss"] == pytest.approx(metrics["eval_colour_loss"], rel=1e-5)
    assert given["test_colour_accuracy"] == metrics["eval_colour_accuracy"]
    alone = trainer.evaluate(scored_rows("colour", 6), metric_key_prefix="alone")
    assert alone["alone_accuracy"] == metrics["eval_colour_accuracy"]
    assert "plain_accuracy" not in trainer.evaluate(
        Dataset.from_list(task_rows("first", 4)), metric_key_prefix="plain"
    )


def test_best_model_by_the_mean_over_tasks(model_folders, tmp_path):
    trainer = make_trainer(
        model_folders,
        tmp_path,
        evaluate={task: scored_rows(task, 6) for task in TASKS},
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
    )
    trainer.train()
    assert trainer.state.best_metric is not None


def test_accuracy_is_that_of_the_task_whatever_the_data_are_called(trained):
    rows = scored_rows("same", 24)
    column = rows.add_column("task", ["same"] * 24)
    known = trained.evaluate({"same": rows})
    for given, prefix in (({"val": column}, "my_test"), ({"same": rows}, "my_test"), (column, "my_test")):
        metrics = trained.evaluate(given, metric_key_prefix=prefix)
        name = prefix if given is column else f"{prefix}_{next(iter(given))}"
        assert metrics[f"{name}_loss"] == pytest.approx(known["eval_same_loss"], rel=1e-5)
        assert metrics[f"{name}_accuracy"] == known["eval_same_accuracy"]
    mean = trained.evaluate({"unknown": rows})
    assert mean["eval_unknown_loss"] != pytest.approx(known["eval_same_loss"], rel=1e-3)


def test_accuracy_is_never_that_of_other_data(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    assert "eval_accuracy" in trainer.evaluate(scored_rows("same", 6))
    tokenized = trainer.train_dataset.select(range(4))
    assert "eval_accuracy" not in trainer.evaluate(tokenized)


def test_options_without_the_completion_are_reported_and_skipped(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    rows = Dataset.from_list([{**row, "options": ["A", "B"]} for row in task_rows("same", 4)])
    trainer = make_trainer(model_folders, tmp_path, evaluate={"same": rows}, max_steps=1)
    assert "has 4 rows with a completion that is not among their `options`" in caplog.text
    assert "eval_same_accuracy" not in trainer.evaluate()


def test_absent_tasks_are_reported(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    make_trainer(model_folders, tmp_path, evaluate={"colour": scored_rows("colour", 4)})
    assert "`eval_dataset` has no data for first, same" in caplog.text
    caplog.clear()
    make_trainer(model_folders, tmp_path, evaluate={"held_out": scored_rows("colour", 4)})
    assert "has no data for" not in caplog.text


def test_options_of_long_prompts_are_scored(tmp_path, caplog):
    """On a model with 64 positions, a prompt of 100 tokens does not end the run."""
    config = GPT2Config(vocab_size=80, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1)
    base = GPT2LMHeadModel(config)
    base.config._name_or_path = "tiny"
    rows = [{"prompt": " ".join(["w1"] * 100 + ["Answer:"]), "completion": " red", "options": [" red", " blue"]}] * 4
    trainer = RLoraSFTTrainer(
        base,
        arguments(tmp_path, max_steps=1, max_length=48),
        train_dataset=task_datasets(8),
        eval_dataset={"first": Dataset.from_list(rows + [{**rows[0], "prompt": "w1 Answer:"}])},
        processing_class=build_tokenizer(),
    )
    trainer.train()
    for _ in range(2):
        assert trainer.evaluate()["eval_first_accuracy"] in (0.0, 0.2, 0.8, 1.0)
    assert sum("without their beginning" in record.getMessage() for record in caplog.records) == 1
