"""Training on task mixtures: draws, packing, streams, and resuming."""

import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from testing_utils import build_tokenizer, task_datasets, task_rows
from trainer_utils import TASKS, make_trainer

from rlora_trl import RLoraConfig
from rlora_trl.trainer.task_ids import TASK_IDS


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
    assert "rows per epoch" in table and "3.00x" in table and "33.33%" in table
    seen = trainer.tasks_seen()
    assert {task: counts["rows"] for task, counts in seen.items()} == {"first": 60, "colour": 60, "same": 60}
    lengths = {task: [len(row) for row in _tokens(trainer, index)] for index, task in enumerate(TASKS)}
    assert seen["first"]["tokens"] == 6 * sum(lengths["first"])
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert f"| first | 60 | {seen['first']['tokens']:,} | 33.3% |" in card


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
    with pytest.raises(ValueError, match="the training data has no task column"):
        make_trainer(model_folders, tmp_path, train=plain, mixing="equal")
    for packing in (False, True):
        with pytest.raises(ValueError, match="can't be combined with `train_sampling_strategy='sequential'`"):
            make_trainer(
                model_folders, tmp_path, mixing="equal", train_sampling_strategy="sequential", packing=packing
            )
    stream = IterableDataset.from_generator(lambda: iter([{**row, "task": "a"} for row in task_rows("first", 8)]))
    with pytest.raises(ValueError, match="needs a stream for each task"):
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


def test_counts_start_at_zero_without_a_state_file(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / "rlora_state.json").write_text('{"tasks": ')
    with pytest.raises(ValueError, match="rlora_state.json can't be read"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1" / "rlora_state.json").unlink()  # as of a checkpoint of another trainer
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sum(counts["rows"] for counts in trainer.tasks_seen().values()) == 8
