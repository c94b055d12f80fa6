"""
Train small cases, each for a step or two, in one process or as a rank of several, and save what came of each.

Each case has a `name`, `rows` with their task, `arguments` of `RLoraSFTConfig`, and may have a DeepSpeed `stage`,
`by_name`, with which the trainer loads the model and makes the adapter, and `experts`, the same on a mixture of
experts. For each rank, `<name>.<rank>.pt` holds the
weights before and after, the logs, the counts by task, the statistics and priors of the monitor, the collectives of a
step, and the strategy that was used.
"""

import os
from contextlib import ExitStack

import expert_models
import torch
import torch.distributed as dist
from cases import BACKEND, DEEPSPEED, SMALL, rank, run_each, start_deepspeed
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from testing_utils import build_tokenizer
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.files.checks import check_adapter


class Counted:
    """Counts the calls of `owner.name`, and the elements of their first argument."""

    def __init__(self, owner, name):
        self.sizes = []
        self.owner, self.name, self.original = owner, name, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, tensor, *args, **kwargs):
        self.sizes.append(tensor.numel())
        return self.original(tensor, *args, **kwargs)

    def close(self):
        setattr(self.owner, self.name, self.original)


def watch_steps(trainer, outcome):
    """Note the collectives of each `get_batch_samples`, the record that each step closes, and the prior it gives."""
    get_batch_samples = trainer.get_batch_samples

    def watched(*args, **kwargs):
        reduces, all_reduces = Counted(trainer.accelerator, "reduce"), Counted(dist, "all_reduce")
        try:
            return get_batch_samples(*args, **kwargs)
        finally:
            reduces.close()
            all_reduces.close()
            outcome["reduces"].append(reduces.sizes)
            outcome["all_reduces"].append(all_reduces.sizes)

    trainer.get_batch_samples = watched
    monitor = trainer._observer.monitor
    begin_step = monitor.begin_step

    def begun(*args, **kwargs):
        outcome["records"].append(monitor.step.data.cpu().clone())
        begin_step(*args, **kwargs)
        outcome["priors"].append(None if monitor.prior is None else monitor.prior.cpu().clone())

    monitor.begin_step = begun


def weights_of(trainer):
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    with ExitStack() as stack:
        if any(hasattr(p, "ds_id") for p in named.values()):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(list(named.values())))
        return {name: p.detach().clone().float().cpu() for name, p in named.items()}


def run(case, folder, model_folder, adapter_folder):
    output = folder / f"out-{case['name']}"
    stage = case.get("stage")
    # Nothing of the case before is left.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()
    if stage is not None:
        start_deepspeed()

    model, is_new = model_folder, case.get("by_name") or case.get("experts")
    if case.get("experts"):
        # Without the base's own loss, which is no mean over rows.
        model = expert_models.build("qwen3_moe", router_aux_loss_coef=0.0)
    elif not is_new:
        # Before the arguments, so that DeepSpeed does not load it in parts.
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        model = PeftModel.from_pretrained(model, adapter_folder, is_trainable=True)

    defaults = {
        **SMALL,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
    }
    if "RANK" in os.environ:
        defaults["ddp_backend"] = BACKEND
    if stage is not None:
        defaults["deepspeed"] = {**DEEPSPEED, "zero_optimization": {"stage": stage}}
    arguments = RLoraSFTConfig(str(output), **{**defaults, **case["arguments"]})
    trainer = RLoraSFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(case["rows"]),
        processing_class=build_tokenizer(),
        peft_config=RLoraConfig(head_dropout=0.0, router_init="kaiming_uniform") if is_new else None,
    )

    outcome = {"reduces": [], "all_reduces": [], "records": [], "priors": []}
    outcome["processes"] = trainer.accelerator.num_processes
    outcome["type"] = trainer.accelerator.distributed_type.value
    plugin = trainer.accelerator.state.deepspeed_plugin
    outcome["stage"] = plugin.zero_stage if outcome["type"] == "DEEPSPEED" else None
    watch_steps(trainer, outcome)

    outcome["before"] = weights_of(trainer)
    trainer.train()
    outcome["after"] = weights_of(trainer)
    outcome["logs"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    outcome["seen"] = trainer.tasks_seen()
    outcome["num_heads"] = trainer._observer.monitor.num_heads

    if case.get("save"):
        trainer.save_model()
        if rank() == 0:
            outcome["saved"] = load_file(output / "adapter_model.safetensors")
            check_adapter(output)  # that it is complete, anchors included
    torch.save(outcome, folder / f"{case['name']}.{rank()}.pt")
    trainer.accelerator.free_memory()


def run_cases(folder, cases, model, adapter):
    run_each(cases, lambda case: run(case, folder, model, adapter))
