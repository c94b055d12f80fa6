"""Collators of the user's: whatever they make of rows, each keeps its task, and padding does not count."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from testing_utils import build_tokenizer
from trainer_utils import TASKS, arguments, marked_datasets
from transformers import BatchEncoding, DataCollatorForSeq2Seq, DataCollatorWithFlattening, default_data_collator
from transformers import DataCollatorForLanguageModeling as HFCollator
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlora_trl import RLoraConfig, RLoraSFTTrainer
from rlora_trl.trainer.task_collator import TaskCollator
from rlora_trl.trainer.task_ids import ROW_STARTS, TASK_IDS, TOKEN_MASK, token_mask_of


WORDS = build_tokenizer().convert_tokens_to_ids([f"w{index}" for index in range(3)])


def pad(examples, side="right", width=None):
    width = width or max(len(example["input_ids"]) for example in examples)
    ids, labels = torch.zeros(len(examples), width, dtype=torch.long), torch.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        own = torch.tensor(example["input_ids"])[:width]
        place = slice(len(own)) if side == "right" else slice(width - len(own), None)
        ids[row, place], labels[row, place] = own, own
        labels[row, place.start or 0] = -100  # which has a loss where padding is before it
    return {"input_ids": ids, "labels": labels}


def with_mask(batch):
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def with_positions(batch):
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}


def with_ends(examples):
    return with_mask(pad([{"input_ids": [4, *example["input_ids"], 1]} for example in examples]))


def changing_in_place(examples):
    batch = pad(examples)
    for example in examples:
        example["input_ids"].clear()
    return batch


COLLATORS = {
    "padded": pad,
    "left": lambda examples: pad(examples, "left"),
    "numpy": lambda examples: {name: value.numpy() for name, value in pad(examples).items()},
    "encoding": lambda examples: BatchEncoding(pad(examples)),
    "reversed": lambda examples: pad(examples[::-1]),
    "sorted": lambda examples: with_mask(pad(sorted(examples, key=lambda row: -len(row["input_ids"])))),
    "truncated": lambda examples: pad(examples, width=3),
    "truncated_reversed": lambda examples: with_mask(pad(examples[::-1], width=3)),
    "wider": lambda examples: pad(examples, width=32),
    "dropped": lambda examples: pad(examples[1::2]),
    "dropped_left": lambda examples: with_mask(pad(examples[1::2], "left")),
    "repeated": lambda examples: pad(examples + examples),
    "with_ends": with_ends,
    "changing_in_place": changing_in_place,
    "position_ids": lambda examples: with_positions(pad(examples)),
    "seq2seq": DataCollatorForSeq2Seq(build_tokenizer()),
    "hf": HFCollator(build_tokenizer(), mlm=False),
    "trl": DataCollatorForLanguageModeling(0),
}


def examples_of(tasks):
    """Rows of different lengths, whose words say their task."""
    return [{"input_ids": [WORDS[task]] * (2 + place) + [1], TASK_IDS: task} for place, task in enumerate(tasks)]


@pytest.mark.parametrize("name", COLLATORS)
def test_each_row_keeps_its_task(name):
    examples = examples_of([0, 1, 2, 0, 2, 1, 1])
    if name == "seq2seq":
        examples = [{**own, "labels": own["input_ids"]} for own in examples]
    collator = COLLATORS[name]
    wanted = sum(map(len, (own["input_ids"] for own in examples)))
    batch = TaskCollator(collator, required=True)(examples)
    ids, tasks = batch["input_ids"], batch[TASK_IDS]
    assert isinstance(ids, torch.Tensor) and tasks.shape == ids.shape[:1]
    for row, task in zip(ids.tolist(), tasks.tolist(), strict=True):
        assert {WORDS.index(token) for token in row if token in WORDS} == {task}
    mask = token_mask_of(batch)
    counted = ids.numel() if mask is None else int(mask.sum())
    assert counted == int((ids != 0).sum())
    if name in ("padded", "left", "sorted", "reversed", "numpy", "wider"):
        assert counted == wanted
    assert "attention_mask" in batch or "position_ids" in batch  # which `SFTTrainer` asks for


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding", [0, 1], ids=["pad", "eos"])
@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("tasks", [True, False])
def test_padding_beside_an_added_beginning_does_not_count(side, padding, more, tasks):
    examples = examples_of([0, 1, 2, 0])
    added = [{"input_ids": [4, *example["input_ids"]]} for example in examples]

    def collate(_):
        batch = pad(added, side, width=max(len(own["input_ids"]) for own in added) + more)
        own = torch.zeros_like(batch["labels"], dtype=torch.bool)
        for row, example in enumerate(added):
            length = len(example["input_ids"])
            own[row, slice(length) if side == "right" else slice(-length, None)] = True
        batch["input_ids"][~own] = padding
        # A prompt without a loss, as of completions alone.
        batch["labels"][:, :2] = -100
        return batch

    given = examples if tasks else [{"input_ids": example["input_ids"]} for example in examples]
    batch = TaskCollator(collate, required=tasks)(given)
    assert batch["attention_mask"].sum(1).tolist() == [len(own["input_ids"]) for own in added]
    assert (batch["input_ids"][batch["attention_mask"] == 1] == 4).sum() == 4
    assert not tasks or batch[TASK_IDS].tolist() == [0, 1, 2, 0]


def test_tokens_that_were_changed_count_where_padding_is_not_known():
    examples = examples_of([0, 1])
    for made in ([[9, 9, 9, 9], [8, 8, 8, 8]], [[4, 9, 9, 9, 9], [4, 8, 8, 8, 8]]):
        ids = torch.tensor(made)
        batch = TaskCollator(lambda rows, ids=ids: {"input_ids": ids, "labels": ids.clone()})(examples)
        assert batch["attention_mask"].all() and batch[TASK_IDS].tolist() == [0, 1]


def test_joined_rows_of_other_collators():
    examples = examples_of([0, 1, 2])
    for own in examples:
        own["labels"] = own["input_ids"]
    batch = TaskCollator(DataCollatorWithFlattening(), required=True)(examples)
    assert batch[TASK_IDS].tolist() == [[0] * 3 + [1] * 4 + [2] * 5]
    assert batch[ROW_STARTS].nonzero()[:, 1].tolist() == [0, 3, 7]
    assert TOKEN_MASK not in batch and "attention_mask" not in batch
    # Cut where the joined row ends.
    cut = TaskCollator(lambda rows: {k: v[:, :5] for k, v in DataCollatorWithFlattening()(rows).items() if k != "x"})
    batch = cut(examples_of([0, 1, 2]))
    assert batch[TASK_IDS].tolist() == [[0] * 3 + [1] * 2]


def test_rows_that_begin_alike():
    """A row is that of the example that it holds whole, not of one that it begins like."""
    examples = [{"input_ids": [5, 6], TASK_IDS: 0}, {"input_ids": [5, 6, 7], TASK_IDS: 1}]
    for collate in (pad, lambda rows: with_mask(pad(rows)), lambda rows: pad(rows, "left")):
        assert TaskCollator(collate)(examples)[TASK_IDS].tolist() == [0, 1]
        assert TaskCollator(lambda rows, collate=collate: collate(rows[::-1]))(examples)[TASK_IDS].tolist() == [1, 0]


def test_equal_rows_of_two_tasks():
    examples = [{"input_ids": [5, 6], TASK_IDS: task} for task in (1, 0, 1)]
    assert TaskCollator(pad)(examples)[TASK_IDS].tolist() == [1, 0, 1]
    assert sorted(TaskCollator(lambda rows: pad(rows[::-1]))(examples)[TASK_IDS].tolist()) == [0, 1, 1]


def test_packed_rows_keep_the_task_of_each_token():
    start = 1 << 30
    examples = [
        {"input_ids": [5, 6, 7, 8], TASK_IDS: [start, 0, start + 1, 1]},
        {"input_ids": [7, 8], TASK_IDS: [start + 2, 2]},
    ]
    left = TaskCollator(lambda rows: with_mask(pad(rows, "left")))(examples)
    assert left[TASK_IDS].tolist() == [[0, 0, 1, 1], [-1, -1, 2, 2]]
    assert left[ROW_STARTS].nonzero().tolist() == [[0, 0], [0, 2], [1, 2]]
    cut = TaskCollator(lambda rows: pad(rows, width=3))(examples)
    assert cut[TASK_IDS].tolist() == [[0, 0, 1], [2, 2, -1]]


def changed(examples):
    return pad([{"input_ids": [9] * len(example["input_ids"])} for example in examples])


def test_changed_tokens_need_their_order():
    examples = examples_of([2, 0, 1])
    assert TaskCollator(changed, required=True)(examples)[TASK_IDS].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="made 2 rows from 3 examples.*in order.*router"):
        TaskCollator(lambda rows: changed(rows[1:]), required=True)(examples)
    assert TaskCollator(lambda rows: changed(rows[1:]))(examples)[TASK_IDS].tolist() == [-1, -1]
    with pytest.raises(TypeError, match="The data collator returned a tuple; it must return a dictionary"):
        TaskCollator(lambda rows: (1, 2))(examples)


def test_batches_without_tasks_are_left_alone():
    examples = [{"input_ids": [5, 6, 7]}, {"input_ids": [5]}]
    masked = TaskCollator(lambda rows: with_mask(pad(rows)))(examples)
    assert set(masked) == {"input_ids", "labels", "attention_mask"}
    plain = TaskCollator(pad)(examples)
    assert plain["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and TASK_IDS not in plain


@pytest.mark.parametrize("name", ["padded", "numpy", "reversed", "dropped", "encoding", "position_ids"])
@pytest.mark.parametrize("router", ["softmax", "task"])
def test_training_counts_what_the_collator_made(model_folders, tmp_path, name, router):
    collator = COLLATORS[name]
    batches = []

    def collate(examples):
        batches.append(collator(examples))
        return batches[-1]

    trainer = RLoraSFTTrainer(
        model_folders["llama"],
        arguments(tmp_path, max_steps=2),
        data_collator=collate,
        train_dataset=marked_datasets(8),
        eval_dataset={"same": marked_datasets(8)["same"]},
        processing_class=build_tokenizer(),
        peft_config=RLoraConfig(router=router),
    )
    trainer.train()
    rows, tokens = Counter(), Counter()
    for batch in batches[:2]:
        for row in np.asarray(batch["input_ids"]).tolist():
            task = TASKS[next(WORDS.index(token) for token in row if token in WORDS)]
            rows[task] += 1
            tokens[task] += sum(token != 0 for token in row)
    assert {task: (counts["rows"], counts["tokens"]) for task, counts in trainer.tasks_seen().items()} == {
        task: (rows[task], tokens[task]) for task in TASKS
    }
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_same_loss"]))


def test_padding_without_a_mask_gives_the_same_losses(model_folders, tmp_path):
    def losses(collator, train):
        trainer = RLoraSFTTrainer(
            model_folders["llama"],
            arguments(tmp_path, max_steps=3, balance_loss="switch"),
            data_collator=collator,
            train_dataset=train,
            processing_class=build_tokenizer(),
            peft_config=RLoraConfig(head_dropout=0.0),  # whose masks are those of places in a batch
        )
        trainer.train()
        return [
            (entry["loss"], entry["balance_loss"]) for entry in trainer.state.log_history if "balance_loss" in entry
        ]

    for train in (marked_datasets(8), Dataset.from_list([{"text": "w1 w2 w3"}, {"text": "w1"}] * 8)):
        wanted = losses(None, train)
        assert losses(pad, train) == wanted
        # On the left, positions differ by the padding, which rotary embeddings don't see.
        for left, right in zip(losses(lambda rows: pad(rows, "left"), train), wanted, strict=True):
            assert left == pytest.approx(right, rel=1e-4)


def test_collator_wraps_any_other():
    collator = TaskCollator(default_data_collator)
    examples = [{"input_ids": [1, 2], "attention_mask": [1, 1], TASK_IDS: id} for id in (1, 0)]
    batch = collator(examples)
    assert batch[TASK_IDS].tolist() == [1, 0] and batch["input_ids"].tolist() == [[1, 2], [1, 2]]
    assert TASK_IDS not in TaskCollator(default_data_collator)([{"input_ids": [1, 2]}])


def test_padding_of_joined_rows_is_masked():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = TaskCollator(DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=8))
    batch = collator([{"input_ids": [5, 6, 7], TASK_IDS: 1}, {"input_ids": [8, 9], TASK_IDS: -1}])
    assert batch[TASK_IDS].tolist() == [[1, 1, 1, -1, -1, -1, -1, -1]]
    assert batch[ROW_STARTS].nonzero()[:, 1].tolist() == [0, 3]
    assert batch[TOKEN_MASK].tolist() == [[True] * 5 + [False] * 3]
    alone = collator([{"input_ids": torch.tensor([5, 6, 7]), TASK_IDS: torch.tensor(1)}])
    assert alone[TASK_IDS].tolist() == [[1, 1, 1, -1, -1, -1, -1, -1]]
    assert alone[TOKEN_MASK].sum() == 3
