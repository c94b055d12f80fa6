"""The callback that shows which heads each task uses."""

import json

import pytest
import torch
from testing_utils import TINY_MODELS, build_tokenizer, task_datasets
from trainer_utils import TASKS, arguments, make_trainer, scored_rows
from transformers import (
    Trainer,
)

from rlora_trl import HeadUsageCallback, MultiHeadAdapter, RLoraConfig, RLoraSFTTrainer


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
