"""The task of each row: through preparation and collation to the layers; counts, losses and scores by task."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from test_trainer import arguments, make_trainer
from testing_utils import TINY_MODELS, build_tokenizer, task_datasets, task_rows
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from rlora_trl import HeadUsageCallback, MultiHeadAdapter, RLoraConfig, RLoraSFTTrainer
from rlora_trl.trainer.task_ids import ROW_STARTS, TASK_IDS, TOKEN_MASK, TaskCollator, number_tasks
from rlora_trl.trainer.tasks import join_tasks


TASKS = ["first", "colour", "same"]
TASK_ROUTER = {"router": "task", "head_dropout": 0.0}


def marked_datasets(count=30):
    """Rows whose every token tells their task: a different word for each."""
    return {
        task: Dataset.from_list(
            [{"text": " ".join([f"w{index}"] * (2 + row % 7))} for row in range(count)]  # EOS is added
        )
        for index, task in enumerate(TASKS)
    }


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


PREPARATIONS = {
    "padded": {},
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 16},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 5},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed_rows_to_multiple": {"packing": True, "max_length": 16, "pad_to_multiple_of": 32},
    "truncated": {"max_length": 3},
}


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
            assert trainer._tasks[task] == names[words.index(ids[0].item())]
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
    assert "don't seem to be names of tasks" in caplog.text and trainer.tasks_seen() == {}
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


def test_collator_wraps_any_other():
    collator = TaskCollator(default_data_collator)
    examples = [{"input_ids": [1, 2], "attention_mask": [1, 1], TASK_IDS: id} for id in (1, 0)]
    batch = collator(examples)
    assert batch[TASK_IDS].tolist() == [1, 0] and batch["input_ids"].tolist() == [[1, 2], [1, 2]]
    assert TASK_IDS not in TaskCollator(default_data_collator)([{"input_ids": [1, 2]}])


def test_padding_of_joined_rows_is_told():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = TaskCollator(DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=8))
    batch = collator([{"input_ids": [5, 6, 7], TASK_IDS: 1}, {"input_ids": [8, 9], TASK_IDS: -1}])
    assert batch[TASK_IDS].tolist() == [[1, 1, 1, -1, -1, -1, -1, -1]]
    assert batch[ROW_STARTS].nonzero()[:, 1].tolist() == [0, 3]
    assert batch[TOKEN_MASK].tolist() == [[True] * 5 + [False] * 3]
    alone = collator([{"input_ids": torch.tensor([5, 6, 7]), TASK_IDS: torch.tensor(1)}])
    assert alone[TASK_IDS].tolist() == [[1, 1, 1, -1, -1, -1, -1, -1]]
    assert alone[TOKEN_MASK].sum() == 3


def test_errors_of_data(model_folders, tmp_path):
    with pytest.raises(ValueError, match="learns from the task of each row, and the training data has no column"):
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


def test_a_task_router_goes_on_with_the_tasks_it_has(model_folders, tmp_path):
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


# Mixing, counts, and resuming


def test_mixture_is_drawn_printed_and_counted(model_folders, tmp_path, capsys):
    train = task_datasets(40)
    train["first"] = train["first"].select(range(10))
    trainer = make_trainer(
        model_folders, tmp_path, train=train, max_steps=-1, num_train_epochs=2, mixing="equal", disable_tqdm=False
    )
    assert trainer.mixture.draws == {"first": 30, "colour": 30, "same": 30}
    trainer.train()
    printed = capsys.readouterr()
    table = printed.out + printed.err
    assert "rows per epoch" in table and "3.00x" in table and "33.33 %" in table
    seen = trainer.tasks_seen()
    assert {task: counts["rows"] for task, counts in seen.items()} == {"first": 60, "colour": 60, "same": 60}
    lengths = {task: [len(row) for row in _tokens(trainer, index)] for index, task in enumerate(TASKS)}
    assert seen["first"]["tokens"] == 6 * sum(lengths["first"])
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert f"| first | 60 | {seen['first']['tokens']:,} | 33.3 % |" in card


def _tokens(trainer, task):
    dataset = trainer.train_dataset
    return [row["input_ids"] for row in dataset if row[TASK_IDS] == task]


@pytest.mark.parametrize("packing", [False, True])
def test_mixing_by_tokens_and_with_packing(model_folders, tmp_path, packing):
    train = task_datasets(40)
    train["first"] = train["first"].select(range(8))
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train=train,
        max_steps=-1,
        num_train_epochs=1,
        mixing="temperature",
        mixing_temperature=4.0,
        mixing_unit="tokens",
        packing=packing,
        max_length=32,
    )
    trainer.train()
    tokens = {task: counts["tokens"] for task, counts in trainer.tasks_seen().items()}
    total = sum(tokens.values())
    for task, share in trainer.mixture.shares.items():
        assert tokens[task] / total == pytest.approx(share, abs=0.04)
    rows = {task: counts["rows"] for task, counts in trainer.tasks_seen().items()}
    assert rows == trainer.mixture.draws


def test_packed_draws_are_redone_each_epoch(model_folders, tmp_path):
    train = {"large": Dataset.from_list([{"text": f"w{n} w{n} w{n}"} for n in range(40)])}
    train["small"] = Dataset.from_list([{"text": "red blue"}] * 4)
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train=train,
        max_steps=-1,
        num_train_epochs=2,
        mixing="equal",
        packing=True,
        max_length=16,
        per_device_train_batch_size=1,
    )
    assert trainer.mixture.draws == {"large": 22, "small": 22}
    loader = trainer.get_train_dataloader()
    words = [build_tokenizer().convert_tokens_to_ids(f"w{n}") for n in range(40)]
    seen = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        ids = torch.cat([batch["input_ids"].flatten() for batch in loader]).tolist()
        seen.append({word for word in words if word in ids})
    assert seen[0] == seen[2]
    # 22 of 40 rows in one epoch, the others and four again in the next; a packed row may be left over.
    assert len(seen[0]) >= 18 and len(seen[0] & seen[1]) <= 4 and len(seen[0] | seen[1]) >= 34
    trainer.train()


def test_mixing_needs_tasks_and_its_own_sampling(model_folders, tmp_path):
    plain = Dataset.from_list(task_rows("first", 8))
    with pytest.raises(ValueError, match="the training data has no column of tasks"):
        make_trainer(model_folders, tmp_path, train=plain, mixing="equal")
    for packing in (False, True):
        with pytest.raises(ValueError, match="can't go with `train_sampling_strategy='sequential'`"):
            make_trainer(
                model_folders, tmp_path, mixing="equal", train_sampling_strategy="sequential", packing=packing
            )
    stream = IterableDataset.from_generator(lambda: iter([{**row, "task": "a"} for row in task_rows("first", 8)]))
    with pytest.raises(ValueError, match="needs the tasks of a stream apart"):
        make_trainer(model_folders, tmp_path, train=stream, mixing="equal")


def test_streams_are_mixed(model_folders, tmp_path):
    train = task_datasets(40)
    train["first"] = train["first"].select(range(10))
    streams = {task: dataset.to_iterable_dataset() for task, dataset in train.items()}
    trainer = make_trainer(model_folders, tmp_path, train=streams, mixing="equal", max_steps=12)
    trainer.train()
    rows = {task: counts["rows"] for task, counts in trainer.tasks_seen().items()}
    assert sum(rows.values()) == 96 and min(rows.values()) > 20


@pytest.mark.parametrize(
    "settings",
    [
        {"mixing": "equal"},
        {"mixing": "equal", "packing": True, "max_length": 16, "per_device_train_batch_size": 4},
        {"balance_loss": "switch", "balance_scope": "global"},
    ],
)
def test_resuming_within_the_second_epoch(model_folders, tmp_path, settings):
    def run(folder, resume=None, **kwargs):
        trainer = make_trainer(
            model_folders,
            folder,
            train=task_datasets(24),
            peft_config=RLoraConfig(router_init="kaiming_uniform"),
            max_steps=-1,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=12,
            gradient_accumulation_steps=1,
            **{**settings, **kwargs},
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path)
    checkpoint = tmp_path / "checkpoint-12"
    assert whole.state.max_steps // 2 < 12 < whole.state.max_steps  # within the second epoch
    assert "tasks" in json.loads((checkpoint / "rlora_state.json").read_text())
    resumed = run(tmp_path / "other", resume=str(checkpoint))
    tail = [e for e in whole.state.log_history if "loss" in e and e["step"] > 12]
    again = [e for e in resumed.state.log_history if "loss" in e and e["step"] > 12]
    assert len(tail) == len(again) == whole.state.max_steps - 12
    for a, b in zip(tail, again, strict=True):
        for name in ("loss", "balance_loss", "head_load_max", "grad_norm_router"):
            assert a.get(name) == b.get(name), (a["step"], name)
    assert resumed.tasks_seen() == whole.tasks_seen()


def test_counts_begin_anew_without_a_state_file(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / "rlora_state.json").write_text('{"tasks": ')
    with pytest.raises(ValueError, match="rlora_state.json can't be read"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1" / "rlora_state.json").unlink()  # as of a checkpoint of another trainer
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sum(counts["rows"] for counts in trainer.tasks_seen().values()) == 8


# Losses and scores by task


@pytest.mark.parametrize("preparation", ["padded", "bfd", "padding_free"])
def test_training_loss_by_task(model_folders, tmp_path, preparation):
    """Against the loss of each row by itself, at weights that stay."""
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train=task_datasets(12),
        max_steps=-1,
        num_train_epochs=1,
        learning_rate=1e-30,
        logging_steps=100,
        logging_strategy="epoch",
        peft_config=RLoraConfig(head_dropout=0.0),
        **PREPARATIONS[preparation],
    )
    plain = make_trainer(
        model_folders, tmp_path, train=task_datasets(12), peft_config=RLoraConfig(head_dropout=0.0), max_length=None
    )
    expected = {}
    for index, task in enumerate(TASKS):
        losses, tokens = 0.0, 0
        for row in plain.train_dataset:
            if row[TASK_IDS] != index:
                continue
            with torch.no_grad():
                labels = torch.tensor([row["labels"]])
                output = plain.model.get_base_model()(input_ids=torch.tensor([row["input_ids"]])).logits
            chosen = labels[0, 1:] != -100
            log_probs = output[0, :-1].log_softmax(-1)
            losses -= log_probs[chosen, labels[0, 1:][chosen]].sum().item()
            tokens += chosen.sum().item()
        expected[task] = losses / tokens
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for task in TASKS:
        assert entry[f"{task}_loss"] == pytest.approx(expected[task], rel=1e-3), task


def scored_rows(task, count, seed=9):
    options = {"colour": [" red", " blue", " green"], "same": [" yes", " no"]}
    return Dataset.from_list([{**row, "options": options.get(task, [])} for row in task_rows(task, count, seed)])


def test_evaluation_by_task(model_folders, tmp_path):
    evaluate = {task: scored_rows(task, 12) for task in ("colour", "same")} | {"first": scored_rows("first", 12)}
    trainer = make_trainer(
        model_folders, tmp_path, evaluate=evaluate, peft_config=RLoraConfig(**TASK_ROUTER), max_steps=60
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert {f"eval_{task}_loss" for task in TASKS} <= set(metrics)
    assert {"eval_colour_accuracy", "eval_same_accuracy"} <= set(metrics) and "eval_first_accuracy" not in metrics
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{task}_loss"] for task in TASKS) / 3)
    accuracies = [metrics["eval_colour_accuracy"], metrics["eval_same_accuracy"]]
    assert metrics["eval_accuracy"] == pytest.approx(sum(accuracies) / 2)
    # By hand: the most likely option, with the task told.
    tokenizer = build_tokenizer()
    correct = 0
    trainer.model.set_task("colour")
    for row in evaluate["colour"]:
        scores = []
        for option in row["options"]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + option, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                log_probs = trainer.model(ids).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1])))
        correct += row["options"][max(range(3), key=scores.__getitem__)] == row["completion"]
    assert metrics["eval_colour_accuracy"] == pytest.approx(correct / 12)
    assert any("eval_accuracy" in entry for entry in trainer.state.log_history)


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


def test_early_stopping_counts_each_evaluation_once(model_folders, tmp_path):
    from transformers import EarlyStoppingCallback

    def steps_until_stopped(metric, evaluate):
        trainer = make_trainer(
            model_folders,
            tmp_path,
            evaluate=evaluate,
            max_steps=8,
            learning_rate=1e-30,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model=metric,
        )
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
        trainer.train()
        return trainer.state.global_step

    tasks = {task: scored_rows(task, 6) for task in ("colour", "same")}
    for metric in ("eval_same_loss", "eval_same_accuracy", "eval_accuracy", "eval_loss"):
        assert steps_until_stopped(metric, tasks) == 4, metric
    assert steps_until_stopped("eval_accuracy", tasks["same"]) == 4


def test_accuracy_is_that_of_the_task_whatever_the_data_are_called(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, peft_config=RLoraConfig(**TASK_ROUTER), max_steps=60)
    trainer.train()
    rows = scored_rows("same", 24)
    column = rows.add_column("task", ["same"] * 24)
    known = trainer.evaluate({"same": rows})
    for given, prefix in (({"val": column}, "my_test"), ({"same": rows}, "my_test"), (column, "my_test")):
        metrics = trainer.evaluate(given, metric_key_prefix=prefix)
        name = prefix if given is column else f"{prefix}_{next(iter(given))}"
        assert metrics[f"{name}_loss"] == pytest.approx(known["eval_same_loss"], rel=1e-5)
        assert metrics[f"{name}_accuracy"] == known["eval_same_accuracy"]
    mean = trainer.evaluate({"unknown": rows})
    assert mean["eval_unknown_loss"] != pytest.approx(known["eval_same_loss"], rel=1e-3)


def test_accuracy_is_never_that_of_other_data(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    assert "eval_accuracy" in trainer.evaluate(scored_rows("same", 6))
    tokenized = trainer.train_dataset.select(range(4))
    assert "eval_accuracy" not in trainer.evaluate(tokenized)


def test_options_without_the_completion_are_told_and_passed_over(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    rows = Dataset.from_list([{**row, "options": ["A", "B"]} for row in task_rows("same", 4)])
    trainer = make_trainer(model_folders, tmp_path, evaluate={"same": rows}, max_steps=1)
    assert "have 4 rows whose completion is none of their `options`" in caplog.text
    assert "eval_same_accuracy" not in trainer.evaluate()


def test_absent_tasks_are_told(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    make_trainer(model_folders, tmp_path, evaluate={"colour": scored_rows("colour", 4)})
    assert "`eval_dataset` has no data for first, same" in caplog.text
    caplog.clear()
    make_trainer(model_folders, tmp_path, evaluate={"held_out": scored_rows("colour", 4)})
    assert "has no data for" not in caplog.text


def test_head_usage_by_task(model_folders, tmp_path):
    callback = HeadUsageCallback(path=tmp_path / "usage.json")
    evaluate = {task: scored_rows(task, 6) for task in ("colour", "same")}
    trainer = RLoraSFTTrainer(
        model_folders["llama"],
        arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2),
        train_dataset=task_datasets(),
        eval_dataset=evaluate,
        processing_class=build_tokenizer(),
        peft_config=RLoraConfig(router="task", router_init="kaiming_uniform"),
        callbacks=[callback],
    )
    trainer.train()
    assert list(callback.usage) == [2, 4] and set(callback.usage[4]) == {"colour", "same"}
    adapters = [m for m in trainer.model.modules() if isinstance(m, MultiHeadAdapter)]
    assert len(callback.layers) == len(adapters) == 6
    for task in ("colour", "same"):
        wanted = torch.stack([a.task_logits().softmax(-1)[TASKS.index(task)] for a in adapters])
        torch.testing.assert_close(callback.usage[4][task], wanted.detach(), rtol=1e-5, atol=1e-6)
    stored = json.loads((tmp_path / "usage.json").read_text())
    assert stored["layers"] == callback.layers and set(stored["usage"]) == {"2", "4"}


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # TRL's, of `predict`
def test_head_usage_of_a_loaded_adapter_with_new_tasks(model_folders, tmp_path):
    first = make_trainer(model_folders, tmp_path, train={"old": task_datasets()["first"]}, max_steps=1)
    first.train()
    callback = HeadUsageCallback()
    trainer = RLoraSFTTrainer(
        first.model,
        arguments(tmp_path, max_steps=1),
        train_dataset=task_datasets(),
        eval_dataset={"same": scored_rows("same", 4)},
        processing_class=build_tokenizer(),
        callbacks=[callback],
    )
    trainer.evaluate()
    # Neither what is predicted nor what the user runs in between counts.
    trainer.predict(trainer.eval_dataset["same"])
    trainer.model(torch.tensor([[5, 6, 7]]))
    trainer.train()
    trainer.evaluate({"colour": scored_rows("colour", 4)})
    assert {step: set(usage) for step, usage in callback.usage.items()} == {0: {"same"}, 1: {"colour"}}
    assert all(routing.batch.usage is None for routing in trainer._routings)


def test_head_usage_with_a_plain_trainer(model_folders, tmp_path):
    from peft import get_peft_model
    from transformers import TrainingArguments

    torch.manual_seed(0)
    model = get_peft_model(TINY_MODELS["llama"](), RLoraConfig(task_type="CAUSAL_LM", router_init="kaiming_uniform"))
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
    callback = HeadUsageCallback()
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        eval_dataset=rows,
        callbacks=[callback],
    )
    trainer.evaluate()
    weights = callback.usage[0]["(unknown)"]
    adapters = [m for m in model.modules() if isinstance(m, MultiHeadAdapter)]
    seen = []
    adapters[0].register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8]]))
    torch.testing.assert_close(
        weights[0], adapters[0].head_weights(seen[0]).mean((0, 1)).detach(), rtol=1e-4, atol=1e-5
    )


# Learning rates, frozen A, gradients of the first step


def test_learning_rates(model_folders, tmp_path):
    trainer = make_trainer(
        model_folders,
        tmp_path,
        learning_rate=1e-3,
        router_learning_rate=5e-3,
        loraplus_lr_ratio=4.0,
        weight_decay=0.1,
        max_steps=4,
        lr_scheduler_type="linear",
    )
    trainer.train()
    names = {p: name.rsplit(".", 1)[-1] for name, p in trainer.model.named_parameters()}
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(names[parameter], set()).add((group["initial_lr"], group["weight_decay"]))
    assert rates == {"A": {(1e-3, 0.1)}, "B": {(4e-3, 0.1)}, "router": {(5e-3, 0.1)}}
    assert all(group["lr"] == 0 for group in trainer.optimizer.param_groups)  # the schedule is that of all
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[0] == 1e-3


def test_resuming_with_learning_rates(model_folders, tmp_path):
    options = {"router_learning_rate": 5e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(model_folders, tmp_path, **options)
    whole.train()
    resumed = make_trainer(model_folders, tmp_path / "other", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    a, b = (dict(t.model.named_parameters()) for t in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_frozen_a(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, train_a=False, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "rlora" in name}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if "rlora" in name:
            frozen = name.rsplit(".", 1)[-1] in ("A", "A0", "B0")
            assert torch.equal(parameter, before[name]) == frozen, name
    assert "grad_norm_A" not in trainer.state.log_history[0]


def test_learning_rates_need_an_optimizer_of_the_trainer(model_folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="one was passed ready-made"):
        RLoraSFTTrainer(
            model,
            arguments(tmp_path, router_learning_rate=1e-3),
            train_dataset=task_datasets(),
            processing_class=build_tokenizer(),
            optimizers=(optimizer, None),
        )


@pytest.mark.parametrize(("strategy", "logs"), [("no", 0), ("epoch", 2)])
def test_other_logging_strategies(model_folders, tmp_path, strategy, logs):
    trainer = make_trainer(
        model_folders, tmp_path, train=task_datasets(8), logging_strategy=strategy, max_steps=-1, num_train_epochs=2
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == logs
    assert all({"head_load_max", "grad_norm_router", "first_loss"} <= set(entry) for entry in entries)


def test_a_task_called_like_something_that_is_logged(model_folders, tmp_path):
    train = {"balance": task_datasets()["first"], "other": task_datasets()["same"]}
    trainer = make_trainer(model_folders, tmp_path, train=train, max_steps=1, balance_loss="switch")
    trainer.train()
    entry = trainer.state.log_history[0]
    assert 0.9 < entry["balance_loss"] < 1.2 and {"task_balance_loss", "other_loss"} <= set(entry)


def first_step_warnings(caplog):
    return [r.getMessage() for r in caplog.records if "The first step gave" in r.getMessage()]


def test_a_healthy_first_step_says_nothing(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    for config in (RLoraConfig(), RLoraConfig.hydra_lora(), RLoraConfig(router="task"), RLoraConfig.multi_lora()):
        make_trainer(model_folders, tmp_path, peft_config=config, max_steps=1).train()
    assert first_step_warnings(caplog) == []


def test_first_gradients_that_are_zero_are_told(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    trainer = make_trainer(model_folders, tmp_path, max_steps=2)
    for module in trainer.model.modules():
        if isinstance(module, MultiHeadAdapter):
            module.B.data.copy_(module.B[:1].expand_as(module.B).clone())  # heads that are equal
            module.dropout = 0.0
    trainer.train()
    (told,) = first_step_warnings(caplog)
    assert "no gradient to speak of for router in base_model.model.model.layers.0" in told and "and 3 more" in told
    assert "equal heads give it nothing to choose from" in told


def test_heads_that_are_never_chosen_are_told(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    config = RLoraConfig(router="top_k", router_top_k=2, router_init="kaiming_uniform")
    trainer = make_trainer(model_folders, tmp_path, peft_config=config, max_steps=1)
    for module in trainer.model.modules():
        if isinstance(module, MultiHeadAdapter):
            module.router.data.zero_()  # of equal logits the first are kept
    trainer.train()
    told = first_step_warnings(caplog)
    assert len(told) == 1 and "head 2 of B" in told[0] and "balance_loss='switch'" in told[0]


def test_layers_that_the_loss_does_not_reach_are_told(model_folders, tmp_path, caplog):
    caplog.set_level("WARNING")
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    trainer.model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.data.zero_()
    layer = trainer.model.get_base_model().model.layers[1].mlp
    layer.down_proj.forward = lambda x, own=layer.down_proj.forward: own(x.detach())
    trainer.train()
    told = first_step_warnings(caplog)
    assert len(told) == 1 and "no gradient for base_model.model.model.layers.1.mlp.gate_proj" in told[0]
    assert "the loss does not depend on these layers" in told[0]


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
