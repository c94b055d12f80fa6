"""
Train a few steps with each of several configurations, one after another, as a rank of two on CPUs.

Each case has a `name`, what `accelerate launch` would put into the `environment` for its file, and `arguments` of
`RLoraSFTConfig`. `<name>.<rank>.json` has the losses, and the strategy that was used.
"""

import json
import os

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from cases import SMALL, rank, run_each, start_deepspeed
from datasets import Dataset
from safetensors.torch import load_file
from testing_utils import build_tokenizer, task_rows

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


DEFAULTS = {
    **SMALL,
    "ddp_backend": "gloo",
    "bf16": True,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
}


def strategy_of(trainer):
    """What wraps the model: the name of a class, DeepSpeed's stage, and whether weights are on the host."""
    wrapped = trainer.model_wrapped
    outcome = {"wrapper": type(wrapped).__name__, "kind": str(trainer.accelerator.distributed_type)}
    if hasattr(wrapped, "zero_optimization_stage"):
        config = wrapped.config["zero_optimization"]
        outcome["stage"] = wrapped.zero_optimization_stage()
        outcome["optimizer"] = type(wrapped.optimizer).__name__
        outcome["offloaded"] = [
            config.get(f"offload_{what}", {}).get("device", "none") for what in ("param", "optimizer")
        ]
        outcome["accumulated_in"] = str(wrapped.get_data_types()[1])
        outcome["buckets"] = {name: config[name] for name in config if name.endswith(("_size", "_threshold"))}
    return outcome


def run(case, folder, model_folder):
    # Nothing of the case before is left.
    for state in (AcceleratorState, GradientState):
        state._shared_state.clear()
    PartialState._shared_state.clear()

    output = folder / f"out-{case['name']}"
    torch.manual_seed(0)
    arguments = RLoraSFTConfig(str(output), **{**DEFAULTS, **case["arguments"]})
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate divides models among GPUs only; with this type it divides them among CPUs too.
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = RLoraSFTTrainer(
        model_folder,
        arguments,
        train_dataset=Dataset.from_list(task_rows("first", 24)),
        processing_class=build_tokenizer(),
        peft_config=RLoraConfig(head_dropout=0.0),
    )
    trainer.train()

    outcome = strategy_of(trainer)
    outcome["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    outcome["processes"] = trainer.accelerator.num_processes

    trainer.save_model()
    if rank() == 0:
        saved = load_file(output / "adapter_model.safetensors")
        outcome["saved"] = {name: [tuple(value.shape), bool(value.isfinite().all())] for name, value in saved.items()}
    (folder / f"{case['name']}.{rank()}.json").write_text(json.dumps(outcome))
    trainer.accelerator.free_memory()


def run_cases(folder, cases, model):
    start_deepspeed()
    before = dict(os.environ)

    def run_in_environment(case):
        os.environ.update(case["environment"])
        run(case, folder, model)
        for name in case["environment"]:
            os.environ.pop(name)
        os.environ.update(before)

    run_each(cases, run_in_environment)
