"""What `RLoraSFTTrainer` says to data that it can't train on, and that whatever TRL accepts still trains."""

import pytest
import torch
from datasets import Dataset
from testing_utils import build_tokenizer, task_rows
from trainer_utils import arguments, make_trainer

from rlora_trl import RLoraSFTTrainer


ROWS = task_rows("same", 16)
OTHER = Dataset.from_list([{"question": row["prompt"], "answer": row["completion"]} for row in ROWS])
NULL = Dataset.from_list([*ROWS[:5], {"prompt": "w1", "completion": None}])
ACCEPTED = "accepted are 'prompt' with 'completion', 'text', or 'messages'. Rename its columns."


@pytest.mark.parametrize(
    "train, message",
    [
        (OTHER, f"The dataset 'train' has the columns 'question', 'answer'; {ACCEPTED}"),
        (OTHER.to_iterable_dataset(), f"The dataset 'train' has the columns 'question', 'answer'; {ACCEPTED}"),
        ({"a": OTHER}, f"Task 'a' has the columns 'question', 'answer'; {ACCEPTED}"),
        ({"a": OTHER.to_iterable_dataset()}, f"Task 'a' has the columns 'question', 'answer'; {ACCEPTED}"),
        (NULL, "The dataset 'train', row 6, column 'completion': it is missing or null, and must be text"),
        ({"a": Dataset.from_list(ROWS), "b": NULL}, "Task 'b', row 6, column 'completion': it is missing or null"),
        (Dataset.from_list([{"prompt": "w1", "completion": 4}]), "column 'completion': it is 4, of type int"),
    ],
    ids=["single", "stream", "dictionary", "dictionary_of_streams", "null", "null_in_a_task", "number"],
)
def test_other_columns_and_values_are_refused(model_folders, tmp_path, train, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model_folders, tmp_path, train=train)


def test_evaluation_data_too(model_folders, tmp_path):
    with pytest.raises(ValueError, match=f"The dataset 'eval' has the columns 'question', 'answer'; {ACCEPTED}"):
        make_trainer(model_folders, tmp_path, evaluate=OTHER)
    with pytest.raises(ValueError, match="The dataset 'held out' has the columns"):
        make_trainer(model_folders, tmp_path, evaluate={"held out": OTHER})
    with pytest.raises(ValueError, match="The dataset 'eval' has the columns"):
        make_trainer(model_folders, tmp_path).evaluate(OTHER)


def test_a_stream_is_checked_as_it_is_read(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, train=NULL.to_iterable_dataset(), max_steps=2)
    with pytest.raises(ValueError, match="The dataset 'train', row 6, column 'completion': it is missing or null"):
        trainer.train()


def _own_collator(rows):
    ids = torch.tensor([[5, 6, 7, len(row["question"]) % 3 + 5] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


ACCEPTED_BY_TRL = {
    "formatting_func": (OTHER, {}, {"formatting_func": lambda row: row["question"] + row["answer"]}),
    "tokenized": (Dataset.from_list([{"input_ids": [5, 6, 7], "question": "w1"}] * 8), {}, {}),
    "text_field": (Dataset.from_list([{"body": "w1 w2"}] * 8), {"dataset_text_field": "body"}, {}),
    "conversations": (
        Dataset.from_list([{"conversations": [{"from": "user", "value": "w1"}, {"from": "gpt", "value": "w2"}]}] * 8),
        {},
        {},
    ),
    "nothing_prepared": (
        OTHER,
        {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False},
        {"data_collator": _own_collator},
    ),
    "stream": (OTHER.rename_columns({"question": "prompt", "answer": "completion"}).to_iterable_dataset(), {}, {}),
}


@pytest.mark.parametrize("option", ACCEPTED_BY_TRL)
def test_what_trl_accepts_still_trains(model_folders, tmp_path, option):
    train, settings, options = ACCEPTED_BY_TRL[option]
    trainer = RLoraSFTTrainer(
        model_folders["llama"],
        arguments(tmp_path, max_steps=1, **settings),
        train_dataset=train,
        processing_class=build_tokenizer(),
        **options,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)


CHAT = [{"role": "user", "content": "w1"}]
SHAREGPT = [{"from": "user", "value": "w1"}, {"from": "gpt", "value": "w2"}]
NULL_MESSAGES = Dataset.from_list([{"messages": None, "text": "w1 w2", "prompt": None}] * 4)
TEXTS = {
    "other_messages": Dataset.from_list([{"conversations": CHAT, "text": "w1 w2"}] * 4),
    "conversations_are_text": Dataset.from_list([{"conversations": "w3", "text": "w1 w2"}] * 4),
    "conversations_are_null": Dataset.from_list([{"conversations": None, "text": "w1 w2"}] * 4),
    "messages_are_null": NULL_MESSAGES.remove_columns("prompt"),
    "messages_are_text": Dataset.from_list([{"messages": "[json]", "text": "w1 w2"}] * 4),
    "not_shown": NULL_MESSAGES.with_format("torch", columns=["text"]),
}


@pytest.mark.parametrize("tasks", [False, True], ids=["single", "tasks"])
@pytest.mark.parametrize("data", TEXTS)
def test_text_is_trained_on_beside_messages_that_are_none(model_folders, tmp_path, data, tasks):
    """TRL looks at the first row, as the name of a column says little."""
    dataset = TEXTS[data]
    trainer = make_trainer(model_folders, tmp_path, train={"a": dataset, "b": dataset} if tasks else dataset)
    assert [trainer.processing_class.decode(ids) for ids in trainer.train_dataset["input_ids"]] == (
        ["w1 w2 <eos>"] * (8 if tasks else 4)
    )


def test_messages_are_trained_on_beside_text(model_folders, tmp_path):
    dataset = Dataset.from_list([{"conversations": SHAREGPT, "messages": CHAT, "text": "w3"}] * 2)
    for train in (dataset, {"a": dataset}):
        trainer = make_trainer(model_folders, tmp_path, train=train)
        assert "w1 <assistant> w2" in trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])


def test_columns_that_a_format_hides_stay_hidden_from_rows_of_tasks(model_folders, tmp_path):
    rows = [{"prompt": None, "text": "w1 w2", "task": task} for task in ("a", "b")]
    dataset = Dataset.from_list(rows).with_format("torch", columns=["text", "task"])
    trainer = make_trainer(model_folders, tmp_path, train=dataset)
    assert trainer._task_data.names == ["a", "b"] and len(trainer.train_dataset) == 2
