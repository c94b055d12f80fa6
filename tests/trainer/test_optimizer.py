"""Learning rates of routers and heads, and a frozen A."""

import pytest
import torch
from testing_utils import build_tokenizer, task_datasets
from trainer_utils import arguments, make_trainer
from transformers import (
    AutoModelForCausalLM,
)

from rlora_trl import RLoraSFTTrainer


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
    with pytest.raises(ValueError, match="one was passed in `optimizers`"):
        RLoraSFTTrainer(
            model,
            arguments(tmp_path, router_learning_rate=1e-3),
            train_dataset=task_datasets(),
            processing_class=build_tokenizer(),
            optimizers=(optimizer, None),
        )
