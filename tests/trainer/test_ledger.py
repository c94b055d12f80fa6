"""Counts by task come from the batch, whatever the model returns; losses by task from its outputs."""

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from testing_utils import task_datasets
from torch.nn import functional as F
from trainer_utils import PREPARATIONS, TASKS, make_trainer

from rlora_trl import RLoraConfig, RLoraSFTTrainer
from rlora_trl.trainer.ledger import TaskLedger, batch_shape, label_log_probs
from rlora_trl.trainer.observer import StepObserver
from rlora_trl.trainer.task_ids import ROW_STARTS, TASK_IDS


MISSING = "`<task>_loss` is not logged"


def text(names=("a", "b"), rows=8):
    return {name: Dataset.from_dict({"text": [f"{name} row {row}" for row in range(rows)]}) for name in names}


def run(model_folders, tmp_path, caplog, **kwargs):
    trainer = make_trainer(model_folders, tmp_path, train=text(), max_steps=2, **kwargs)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    warned = [record.getMessage() for record in caplog.records if MISSING in record.getMessage()]
    return trainer, logged, warned


def renamed(outputs):
    """Outputs as after a rename upstream."""
    return SimpleNamespace(loss=outputs.loss, token_log_probs=outputs.log_probs, valid=outputs.label_mask)


def with_outputs(monkeypatch, change):
    keep = StepObserver._keep_outputs
    monkeypatch.setattr(
        StepObserver,
        "_keep_outputs",
        lambda self, module, args, outputs: keep(self, module, args, change(outputs)),
    )


@pytest.mark.parametrize("packing", [False, True])
def test_renamed_outputs_cost_the_loss_by_task_alone(model_folders, tmp_path, monkeypatch, caplog, packing):
    options = {"packing": packing, "max_length": 48}
    reference, logged, warned = run(model_folders, tmp_path / "reference", caplog, **options)
    assert not warned and all(any(f"{task}_loss" in entry for entry in logged) for task in "ab")
    assert all(counts["rows"] and counts["tokens"] for counts in reference.tasks_seen().values())

    with_outputs(monkeypatch, renamed)
    trainer, logged, warned = run(model_folders, tmp_path / "renamed", caplog, **options)
    assert trainer.tasks_seen() == reference.tasks_seen()
    assert not any(f"{task}_loss" in entry for task in "ab" for entry in logged)
    assert len(warned) == 1
    assert "found SimpleNamespace with `loss` [], `token_log_probs` [" in warned[0] and "(trl " in warned[0]
    assert "return outputs with `logits`" in warned[0]


def test_a_mask_is_not_needed(model_folders, tmp_path, monkeypatch, caplog):
    _, expected, _ = run(model_folders, tmp_path / "reference", caplog)
    with_outputs(monkeypatch, lambda outputs: SimpleNamespace(log_probs=outputs.log_probs))
    _, logged, warned = run(model_folders, tmp_path / "unmasked", caplog)
    assert not warned
    for entry, other in zip(expected, logged, strict=True):
        assert {k: v for k, v in entry.items() if k[1:] == "_loss"} == {
            k: v for k, v in other.items() if k[1:] == "_loss"
        }


def test_loss_from_logits(model_folders, tmp_path, monkeypatch, caplog):
    """A loss of the user's own calls the model without TRL's fused head."""
    _, expected, _ = run(model_folders, tmp_path / "reference", caplog)

    def own_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    monkeypatch.setattr(RLoraSFTTrainer.__mro__[3], "compute_loss", own_loss)
    _, logged, warned = run(model_folders, tmp_path / "own", caplog)
    assert not warned
    for key in ("a_loss", "b_loss"):
        assert logged[0][key] == pytest.approx(expected[0][key], rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL deprecates both
@pytest.mark.parametrize("kind", ["label_smoothing", "loss_func"])
def test_two_passes(model_folders, tmp_path, caplog, kind):
    """TRL runs the model with and without logits; the pass with the fused head is the one that is read."""
    config = RLoraConfig(head_dropout=0.0)  # two passes draw two masks
    _, expected, _ = run(model_folders, tmp_path / "reference", caplog, peft_config=config)
    trainer = make_trainer(
        model_folders,
        tmp_path / kind,
        train=text(),
        max_steps=2,
        peft_config=config,
        label_smoothing_factor=0.1 if kind == "label_smoothing" else 0.0,
    )
    if kind == "loss_func":
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * 0.0
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert MISSING not in caplog.text and trainer._observer.ledger.has_log_probs
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for key in ("a_loss", "b_loss"):
        assert logged[0][key] == pytest.approx(expected[0][key], rel=1e-5)


def test_evaluation_counts_nothing(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, train=text(), evaluate=text(), max_steps=1)
    trainer.evaluate()
    assert trainer.tasks_seen() == {task: {"rows": 0, "tokens": 0} for task in "ab"}


# The ledger itself.


def ledger():
    PartialState()  # for its logger
    return TaskLedger(["a", "b"], torch.device("cpu"))


def same(tensor):
    return tensor


def test_counts_need_no_outputs(caplog):
    counts = ledger()
    batch = {
        TASK_IDS: torch.tensor([1, -1]),
        "input_ids": torch.zeros(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        "labels": torch.full((2, 4), -100),
    }
    for _ in range(3):
        counts.note(batch, None)
    assert counts.totals(same) == {"a": {"rows": 0, "tokens": 0}, "b": {"rows": 3, "tokens": 12}}
    assert counts.pop_mean_losses(same) == {}
    assert caplog.text.count("no forward pass of the model was seen") == 1


def test_packed_rows():
    counts = ledger()
    batch = {
        TASK_IDS: torch.tensor([[0, 0, 1, 1, 1, -1]]),
        ROW_STARTS: torch.tensor([[True, False, True, False, True, False]]),
        "input_ids": torch.zeros(1, 6, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 5, -100, 5, 5, -100]]),
    }
    log_probs = torch.tensor([[-1.0, 0.0, -2.0, -4.0, 0.0]])
    counts.note(batch, SimpleNamespace(log_probs=log_probs))
    assert counts.totals(same) == {"a": {"rows": 1, "tokens": 2}, "b": {"rows": 2, "tokens": 3}}
    assert counts.pop_mean_losses(same) == {"a_loss": 1.0, "b_loss": 3.0}


def test_what_is_not_finite_does_not_count():
    counts = ledger()
    batch = {
        TASK_IDS: torch.tensor([0, 1]),
        "input_ids": torch.zeros(2, 3, dtype=torch.long),
        "labels": torch.ones(2, 3, dtype=torch.long),
    }
    counts.note(batch, SimpleNamespace(log_probs=torch.tensor([[float("nan"), -2.0], [-1.0, -float("inf")]])))
    assert counts.pop_mean_losses(same) == {"a_loss": 2.0, "b_loss": 1.0}


def test_log_probs_of_logits():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    expected = -F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(2, 4)
    found, labeled = label_log_probs(SimpleNamespace(logits=logits), {"labels": labels})
    torch.testing.assert_close(found, expected)
    assert torch.equal(labeled, labels[:, 1:] != -100)

    # Where the sequence is divided among processes, each label stands at the token before it.
    found, labeled = label_log_probs(SimpleNamespace(logits=logits), {"shift_labels": labels})
    expected = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 5)
    torch.testing.assert_close(found, expected)
    assert labeled.shape == (2, 5)


def test_outputs_that_do_not_fit():
    labels = torch.ones(2, 5, dtype=torch.long)
    for outputs in (
        None,
        (torch.zeros(()),),
        SimpleNamespace(logits=None),
        SimpleNamespace(log_probs=torch.zeros(2, 3)),
        SimpleNamespace(logits=torch.zeros(2, 1, 7)),
        SimpleNamespace(logits=torch.zeros(2, 7)),
    ):
        assert label_log_probs(outputs, {"labels": labels}) is None
    assert label_log_probs(SimpleNamespace(log_probs=torch.zeros(2, 4)), {}) is None


def test_shape_of_a_batch():
    assert batch_shape({"input_ids": torch.zeros(2, 3)}) == (2, 3)
    assert batch_shape({"inputs_embeds": torch.zeros(2, 3, 8)}) == (2, 3)
    assert batch_shape({"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2, 5)}) == (2, 5)
    with pytest.raises(ValueError, match="needs `input_ids` .*the collator returned pixel_values. Have it add"):
        batch_shape({"pixel_values": torch.zeros(2, 3, 4, 4)})


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
