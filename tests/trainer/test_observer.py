"""What observes training steps, without a trainer."""

import logging
import math

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from testing_utils import TINY_MODELS, random_ids
from trainer_utils import arguments

from rlora_trl import MultiHeadAdapter, RLoraConfig
from rlora_trl.trainer.monitor import RoutingMonitor
from rlora_trl.trainer.observer import StepObserver
from rlora_trl.trainer.task_ids import TASK_IDS
from rlora_trl.tuner.routing import Routing, find_routings, using_all


def make(tmp_path, **kwargs):
    model = get_peft_model(TINY_MODELS["llama"](), RLoraConfig(head_dropout=0.0, tasks=["a", "b"])).train()
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, MultiHeadAdapter)}
    return model, StepObserver(
        adapters, ["a", "b"], arguments(tmp_path, **kwargs), model, lambda: Accelerator(cpu=True)
    )


def run_step(model, observer, *, will_log=True):
    ids = random_ids()
    batch = {"input_ids": ids, "labels": ids, TASK_IDS: torch.tensor([0, 1, 1])}
    observer.begin_step([batch], will_log=will_log, ranks_alike=1)
    tally = observer.tally(batch, 1) if observer.records_step else None
    with using_all([(routing, {"tally": tally}) for routing in find_routings(model)]):
        with observer.reading_outputs(model.get_base_model(), batch):
            loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    observer.end_step(is_skipped=False, will_log=will_log)
    return loss.item()


def test_logs_of_a_step(tmp_path):
    model, observer = make(tmp_path)
    run_step(model, observer)
    logs = {"loss": 1.0}
    observer.extend_logs(logs)

    assert {"router_entropy", "head_load_max", "head_load_cv", "head_similarity", "grad_norm_A", "a_loss"} <= set(logs)
    assert "balance_loss" not in logs  # none was asked for
    assert observer.tasks_seen() == {"a": {"rows": 1, "tokens": 9}, "b": {"rows": 2, "tokens": 18}}


def test_a_step_that_is_not_logged_has_no_statistics(tmp_path):
    model, observer = make(tmp_path)
    run_step(model, observer, will_log=False)
    logs = {"loss": 1.0}
    observer.extend_logs(logs)
    assert "router_entropy" not in logs and "grad_norm_A" not in logs and "a_loss" in logs


def test_a_task_may_have_the_name_of_another_entry(tmp_path):
    model, observer = make(tmp_path)
    run_step(model, observer)
    logs = {"loss": 1.0, "a_loss": 5.0}
    observer.extend_logs(logs)
    assert logs["a_loss"] == 5.0 and logs["task_a_loss"] != 5.0


def test_counts_continue_from_a_checkpoint(tmp_path):
    model, observer = make(tmp_path)
    observer.load_tasks_seen({"a": {"rows": 10, "tokens": 100}})
    run_step(model, observer)
    assert observer.tasks_seen()["a"] == {"rows": 11, "tokens": 109}


def test_missing_gradients_of_the_first_step_are_reported_once(tmp_path, caplog):
    model, observer = make(tmp_path)
    unused = next(iter(observer.adapters.values()))
    with caplog.at_level(logging.WARNING), observer.watching_first_step(is_fresh=True):
        unused.fixed_logits = torch.zeros(unused.num_heads)  # its router is not used
        run_step(model, observer)
        run_step(model, observer)
    assert caplog.text.count("The first step gave no gradient for") == 1


def test_layers_without_tokens_do_not_hide_the_others():
    """A tower without its input, or a head that the loss doesn't use."""
    routing = Routing(None, "softmax")
    adapters = [MultiHeadAdapter(8, 6, 2, 3, 1.0, routing=routing).train() for _ in range(3)]
    monitor = RoutingMonitor(adapters, "none", 0.0, False, torch.device("cpu"))
    assert monitor.summary(lambda tensor: tensor) == {}
    monitor.begin_step(torch.zeros(()), 1, lambda tensor: tensor)
    tally = monitor.tally(1, 0)
    routing.update(tally=tally)
    for adapter in adapters[:2]:
        adapter(torch.randn(5, 8, requires_grad=True)).sum().backward()
    summary = monitor.summary(lambda tensor: tensor)
    assert summary["router_entropy"] == pytest.approx(math.log(3)) and summary["head_load_max"] == pytest.approx(1 / 3)
