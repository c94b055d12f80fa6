"""Learning rates of routers and heads, and a frozen A."""

import pytest
import torch
from datasets import Dataset
from testing_utils import build_tokenizer, task_datasets
from trainer_utils import arguments, losses, make_trainer
from transformers import (
    AutoModelForCausalLM,
)

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.files.record import AdapterRecord
from rlora_trl.trainer.optimizer import TASK_ROUTER_RATE, check_deepspeed_optimizer, set_learning_rates
from rlora_trl.trainer.other_trainers import _tell_of_slow_routers


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


def router_rates(trainer):
    """The learning rates of the routers, and those of all else."""
    routers = {adapter.router for adapter in trainer._adapters.values()}
    rates = {p: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    return {rates[p] for p in routers}, {rate for p, rate in rates.items() if p not in routers}


def test_task_routers_have_a_rate_of_their_own(model_folders, tmp_path):
    by_task = RLoraConfig(router="task")
    trainer = make_trainer(model_folders, tmp_path, peft_config=by_task, learning_rate=1e-3)
    assert router_rates(trainer) == ({TASK_ROUTER_RATE}, {1e-3})
    # What the user sets counts, and a rate that is larger anyway.
    trainer = make_trainer(model_folders, tmp_path, peft_config=by_task, learning_rate=1e-3, router_learning_rate=2e-3)
    assert router_rates(trainer) == ({2e-3}, {1e-3})
    trainer = make_trainer(model_folders, tmp_path, peft_config=by_task, learning_rate=0.1)
    assert router_rates(trainer) == ({0.1}, {0.1})
    # Routers of tokens multiply an input, and learn at the common rate.
    trainer = make_trainer(model_folders, tmp_path, peft_config=RLoraConfig(), learning_rate=1e-3)
    assert router_rates(trainer) == ({1e-3}, {1e-3})


def test_the_record_has_the_rate_of_task_routers(model_folders, tmp_path):
    options = {"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(model_folders, tmp_path, peft_config=RLoraConfig(router="task"), **options)
    trainer.train()
    trainer.save_model()
    assert AdapterRecord.load(tmp_path).hyperparameters["router_learning_rate"] == TASK_ROUTER_RATE
    # The resumed run has the same groups.
    resumed = make_trainer(model_folders, tmp_path / "other", peft_config=RLoraConfig(router="task"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    a, b = (dict(t.model.named_parameters()) for t in (trainer, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_heads_by_task_move_apart(model_folders, tmp_path):
    # One input, two answers: only the task tells which. A router that stays near zero can't do better than a guess,
    # whose loss is log 2 for the one token that differs.
    rows = {"day": " red", "night": " blue"}
    train = {
        task: Dataset.from_list([{"prompt": "colour of", "completion": answer}] * 64) for task, answer in rows.items()
    }
    # `learning_rate` is the library's default.
    options = {"max_steps": 120, "learning_rate": RLoraSFTConfig.learning_rate, "completion_only_loss": True}
    trainer = make_trainer(model_folders, tmp_path, train=train, peft_config=RLoraConfig(router="task"), **options)
    trainer.train()
    weights = [adapter.router.detach().softmax(-1) for adapter in trainer._adapters.values()]
    assert max(float((w[0] - w[1]).abs().max()) for w in weights) > 0.2
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_groups_stay_as_they_are_without_rates(model_folders, tmp_path):
    # The optimizer's state in a checkpoint is by group: an empty one that vanished could not be resumed.
    trainer = make_trainer(model_folders, tmp_path, peft_config=RLoraConfig())
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters}, {"params": [], "weight_decay": 0.0}])
    assert set_learning_rates(optimizer, list(trainer._adapters.values()), trainer.args) is None
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(parameters), 0]


class _NoGroups(torch.optim.SGD):
    """An optimizer that keeps its parameters to itself."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.param_groups = []


def test_optimizers_without_groups(model_folders, tmp_path, caplog):
    trainer = make_trainer(model_folders, tmp_path, peft_config=RLoraConfig(router="task"), learning_rate=1e-3)
    adapters, optimizer = list(trainer._adapters.values()), _NoGroups(list(trainer.model.parameters()))
    assert set_learning_rates(optimizer, adapters, trainer.args) is None
    assert "Routers by task train at `learning_rate`, 0.001, instead of 0.05" in caplog.text
    trainer.args.router_learning_rate = 0.01
    with pytest.raises(ValueError, match="_NoGroups has 0 of .* parameters in them. Set `optim`"):
        set_learning_rates(optimizer, adapters, trainer.args)


def test_an_optimizer_of_the_engine_has_one_group(model_folders, tmp_path, caplog):
    trainer = make_trainer(model_folders, tmp_path, peft_config=RLoraConfig(router="task"), learning_rate=1e-3)
    adapters = list(trainer._adapters.values())
    check_deepspeed_optimizer({}, trainer.args, adapters)
    assert "Routers by task" not in caplog.text
    config = {"optimizer": {"type": "AdamW"}}
    check_deepspeed_optimizer(config, trainer.args, adapters)
    assert "Routers by task train at `learning_rate`" in caplog.text
    trainer.args.loraplus_lr_ratio = 4.0
    with pytest.raises(ValueError, match="the DeepSpeed configuration has an `optimizer`"):
        check_deepspeed_optimizer(config, trainer.args, adapters)


@pytest.mark.parametrize(("rate", "is_told"), [(1e-3, True), (0.1, False)])
def test_other_trainers_are_told_of_slow_routers(model_folders, tmp_path, caplog, rate, is_told):
    trainer = make_trainer(model_folders, tmp_path, peft_config=RLoraConfig(router="task"))
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=rate)
    _tell_of_slow_routers(optimizer, trainer._adapters, learning_rate=rate)
    assert ("may stay nearly equal for all tasks" in caplog.text) == is_told


@pytest.mark.parametrize(
    ("decay", "init", "is_told"), [(0.1, "rlora", True), (0.0, "rlora", False), (0.1, "zero_b", False)]
)
def test_weight_decay_with_an_anchor_is_told(model_folders, tmp_path, caplog, decay, init, is_told):
    # Towards zero is towards the base without an anchor, and away from it with one.
    config = RLoraConfig(init_weights=init)
    make_trainer(model_folders, tmp_path, peft_config=config, weight_decay=decay)
    assert ("pulls A and B towards zero" in caplog.text) == is_told
