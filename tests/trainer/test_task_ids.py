"""The task of each row: through preparation and collation to the layers."""

import pytest
from datasets import ClassLabel, Dataset, IterableDataset
from testing_utils import build_tokenizer, task_datasets, task_rows
from trainer_utils import PREPARATIONS, TASK_ROUTER, TASKS, arguments, make_trainer, marked_datasets
from transformers import (
    TrainerCallback,
)

from rlora_trl import MultiHeadAdapter, RLoraConfig, RLoraSFTTrainer
from rlora_trl.trainer.task_ids import TASK_IDS, number_tasks
from rlora_trl.trainer.tasks import join_tasks


def check_tokens(batch, tokenizer, whole_rows=True):
    """Each token's id is that of its task; the end of a row belongs to the row, where no row is cut."""
    ids, tasks = batch["input_ids"], batch[TASK_IDS]
    if tasks.ndim == 1:
        tasks = tasks[:, None].expand_as(ids)
    words = tokenizer.convert_tokens_to_ids([f"w{index}" for index in range(3)])
    checked = 0
    for token, task in zip(ids.flatten().tolist(), tasks.flatten().tolist(), strict=True):
        if token in words:
            assert words.index(token) == task
            checked += 1
    assert checked > 0
    eos = (ids == tokenizer.eos_token_id).nonzero().tolist()
    if whole_rows:
        assert all(tasks[row, place] == tasks[row, place - 1] for row, place in eos if place > 0)
    return checked


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_ids_survive_preparation(model_folders, tmp_path, preparation, streaming):
    train = marked_datasets()
    if streaming:
        train = {task: dataset.to_iterable_dataset() for task, dataset in train.items()}
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train=train,
        peft_config=RLoraConfig(**TASK_ROUTER),
        max_steps=2,
        **PREPARATIONS[preparation],
    )
    tokenizer = build_tokenizer()
    seen = [check_tokens(batch, tokenizer, preparation != "bfd_split") for batch in trainer.get_train_dataloader()]
    if preparation in ("padded", "bfd", "bfd_split", "wrapped", "padding_free"):
        words = sum(len(row["text"].split()) for dataset in marked_datasets().values() for row in dataset)
        assert sum(seen) == words  # none lost
    trainer.train()
    assert {a.routing.tasks for a in trainer.model.modules() if isinstance(a, MultiHeadAdapter)} == {tuple(TASKS)}


@pytest.mark.parametrize("kind", ["dict", "column", "numbers", "class_label", "stream"])
def test_ids_from_every_kind_of_data(model_folders, tmp_path, kind):
    datasets = marked_datasets()
    rows = [{**row, "task": task} for task, dataset in datasets.items() for row in dataset]
    config = RLoraConfig(**TASK_ROUTER)
    if kind == "dict":
        train = datasets
    elif kind == "numbers":
        train = Dataset.from_list([{**row, "task": TASKS.index(row["task"])} for row in rows])
    elif kind == "class_label":
        train = Dataset.from_list(rows).cast_column("task", ClassLabel(names=TASKS))
    elif kind == "column":
        train = Dataset.from_list(rows)
    else:
        train = IterableDataset.from_generator(lambda: iter(rows))
        config = RLoraConfig(**TASK_ROUTER, tasks=TASKS)
    trainer = make_trainer(model_folders, tmp_path, train=train, peft_config=config, max_steps=2)
    tokenizer = build_tokenizer()
    words = tokenizer.convert_tokens_to_ids([f"w{index}" for index in range(3)])
    names = ["0", "1", "2"] if kind == "numbers" else TASKS
    for batch in trainer.get_train_dataloader():
        for ids, task in zip(batch["input_ids"], batch[TASK_IDS].tolist(), strict=True):
            assert trainer._task_data.names[task] == names[words.index(ids[0].item())]
    trainer.train()
    assert sum(counts["rows"] for counts in trainer.tasks_seen().values()) == 16


@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_rows_are_counted_whatever_becomes_of_them(model_folders, tmp_path, preparation):
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train=marked_datasets(),
        max_steps=-1,
        num_train_epochs=1,
        **PREPARATIONS[preparation],
    )
    trainer.train()
    assert {task: counts["rows"] for task, counts in trainer.tasks_seen().items()} == dict.fromkeys(TASKS, 30)


def test_evaluation_data_get_their_tasks_in_every_setup(model_folders, tmp_path):
    """Also where preparation is skipped, where the key is "train", and with a column of the user's own."""
    rows = task_datasets(6)
    tasked = {name: [{**row, "task": name} for row in data] for name, data in rows.items()}
    evaluate = {"train": Dataset.from_list(tasked["same"] + tasked["first"]), "colour": rows["colour"]}
    trainer = make_trainer(
        model_folders, tmp_path, evaluate=evaluate, peft_config=RLoraConfig(**TASK_ROUTER), max_steps=1
    )
    assert trainer.eval_dataset["train"][TASK_IDS] == [2] * 6 + [0] * 6
    assert trainer.eval_dataset["colour"][TASK_IDS] == [1] * 6
    plain = trainer.train_dataset.select(range(4)).select_columns(["input_ids", "labels"])
    skipped = make_trainer(
        model_folders,
        tmp_path,
        train=dict.fromkeys(TASKS, plain),
        evaluate={"same": plain.add_column("task_ids", [7] * 4)},
        peft_config=RLoraConfig(**TASK_ROUTER),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_steps=1,
    )
    skipped.train()
    assert skipped.eval_dataset["same"][TASK_IDS] == [2] * 4
    assert "eval_same_loss" in skipped.evaluate()


def test_a_column_of_texts_called_task_is_not_taken_for_tasks(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    rows = [{**row, "task": f"Solve problem {i}"} for i, row in enumerate(task_rows("first", 24))]
    trainer = make_trainer(model_folders, tmp_path, train=Dataset.from_list(rows), max_steps=1)
    assert "does not look like task names" in caplog.text and trainer.tasks_seen() == {}
    trainer.train()


def test_columns_that_name_no_tasks_of_the_adapter(model_folders, tmp_path):
    """A loaded adapter has tasks; what it goes on with need not tell any, and a stream may have others."""
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    trainer.train()
    rows = [{**row, "task": f"Solve problem {i}"} for i, row in enumerate(task_rows("first", 24))]
    for data in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        again = RLoraSFTTrainer(
            trainer.model, arguments(tmp_path, max_steps=1), train_dataset=data, processing_class=build_tokenizer()
        )
        again.train()
        assert {counts["rows"] for counts in again.tasks_seen().values()} == {0}


def test_rows_packed_by_the_user_keep_their_lengths(model_folders, tmp_path):
    packed = Dataset.from_dict(
        {"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[5, 6, 7, 8]] * 8, "seq_lengths": [[2, 2]] * 8}
    )
    trainer = make_trainer(
        model_folders, tmp_path, train={"a": packed, "b": packed}, padding_free=True, max_length=None, max_steps=1
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["position_ids"].max() == 1


@pytest.mark.parametrize("kind", ["map", "stream", "mixed_stream", "mixed_map"])
def test_formatting_functions_do_without_columns_of_other_types(model_folders, tmp_path, kind, caplog):
    caplog.set_level("WARNING")
    train = {
        "a": Dataset.from_list([{"question": "w1", "answer": "w2", "meta": "x", "own": 1}] * 4),
        "b": Dataset.from_list([{"question": "w3", "answer": "w4", "meta": [1]}] * 4),
    }
    if "stream" in kind:
        train = {task: dataset.to_iterable_dataset() for task, dataset in train.items()}
    trainer = RLoraSFTTrainer(
        model_folders["llama"],
        arguments(tmp_path, max_steps=2, mixing="equal" if "mixed" in kind else "proportional"),
        train_dataset=train,
        processing_class=build_tokenizer(),
        formatting_func=lambda row: f"{row['question']} {row['answer']}",
    )
    assert "Columns 'meta' are dropped, and `formatting_func` does not get them: Tasks 'a' and 'b'" in caplog.text
    rows = [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert set(rows) == {"w1 w2 <eos>", "w3 w4 <eos>"}
    assert trainer.train().global_step == 2


def test_formatting_functions_need_a_column(model_folders, tmp_path):
    train = {"a": Dataset.from_list([{"x": "w1"}]), "b": Dataset.from_list([{"y": "w1"}])}
    with pytest.raises(ValueError, match="Tasks have no column in common .a: x; b: y.. Give a column of one name"):
        join_tasks(train, any_format=True)


def test_formatting_functions_with_tasks(model_folders, tmp_path):
    train = {
        name: Dataset.from_list([{"q": row["prompt"], "a": row["completion"], "id": 1} for row in data])
        for name, data in task_datasets(8).items()
    }
    trainer = RLoraSFTTrainer(
        model_folders["llama"],
        arguments(tmp_path, max_steps=1),
        train_dataset=train,
        processing_class=build_tokenizer(),
        formatting_func=lambda row: row["q"] + row["a"],
    )
    trainer.train()
    assert sum(counts["rows"] for counts in trainer.tasks_seen().values()) == 8


def test_the_model_does_not_hold_the_trainer(model_folders, tmp_path):
    import gc
    import pickle
    import weakref

    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    trainer.train()
    model, held = trainer.model, weakref.ref(trainer)
    pickled = pickle.dumps(model.get_base_model().model.layers[0].mlp)
    assert len(pickled) < 10**6
    del trainer
    gc.collect()
    routing = next(m.routing for m in model.modules() if isinstance(m, MultiHeadAdapter))
    assert held() is None and routing.batch.tally is None and routing.batch.task_ids is None


def test_the_right_mixture_is_trained(model_folders, tmp_path):
    """With data of one task in a batch, only its mixture gets a gradient."""

    class Mixtures(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.moved = [
                (m.router.grad.abs().sum(1) > 0).tolist() for m in model.modules() if isinstance(m, MultiHeadAdapter)
            ]

    train = marked_datasets()
    watch = Mixtures()
    for packing in (False, True):
        trainer = RLoraSFTTrainer(
            model_folders["llama"],
            arguments(tmp_path, max_steps=1, packing=packing, max_length=16),
            train_dataset=Dataset.from_list([{**row, "task": "colour"} for row in train["colour"]]),
            processing_class=build_tokenizer(),
            peft_config=RLoraConfig(**TASK_ROUTER, tasks=TASKS),
            callbacks=[watch],
        )
        trainer.train()
        assert watch.moved == [[False, True, False]] * 6


def test_errors_of_data(model_folders, tmp_path):
    with pytest.raises(ValueError, match="needs the task of each row, and the training data has no task column"):
        make_trainer(
            model_folders,
            tmp_path,
            train=Dataset.from_list(task_rows("first", 8)),
            peft_config=RLoraConfig(router="task"),
        )
    with pytest.raises(ValueError, match="the training data has same too. Name all tasks"):
        make_trainer(model_folders, tmp_path, peft_config=RLoraConfig(router="task", tasks=["first", "colour"]))
    rows = Dataset.from_list([{"text": "w1", "task": "a", "task_ids": 1}])
    with pytest.raises(ValueError, match="has a row of task 'a', and the adapter's tasks are b"):
        number_tasks(rows, ["b"], "task")
    with pytest.raises(ValueError, match="has 'first' more than once|has '1' more than once"):
        make_trainer(model_folders, tmp_path, train={1: task_datasets()["first"], "1": task_datasets()["same"]})


def test_a_task_router_continues_with_its_tasks(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, peft_config=RLoraConfig(**TASK_ROUTER), max_steps=1)
    trainer.train()
    again = RLoraSFTTrainer(
        trainer.model,
        arguments(tmp_path, max_steps=1),
        train_dataset={"same": task_datasets()["same"]},
        processing_class=build_tokenizer(),
    )
    assert set(again.train_dataset[TASK_IDS]) == {2}
    again.train()
    with pytest.raises(ValueError, match="has new too. Train a new adapter on all of them"):
        RLoraSFTTrainer(
            trainer.model,
            arguments(tmp_path, max_steps=1),
            train_dataset={"new": task_datasets()["same"]},
            processing_class=build_tokenizer(),
        )
