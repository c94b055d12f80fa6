"""Train a few steps with each of several configurations, one after another, as a rank of two on CPUs.

    python -m torch.distributed.run ... configs_run.py cases.json

Each case has a `name`, what `accelerate launch` would put into the `environment` for its file, and `arguments` of
`RLoraSFTConfig`. `<name>.<rank>.json` has the losses, and what strategy was really at work.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import load_file
from testing_utils import build_tokenizer, task_rows

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


RANK = int(os.environ.get("RANK", 0))
DEFAULTS = {
    "use_cpu": True,
    "ddp_backend": "gloo",
    "bf16": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-2,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "max_length": 64,
    "train_sampling_strategy": "sequential",
}


def strategy_of(trainer):
    """What wraps the model: the name of a class, DeepSpeed's stage, and whether weights are on the host."""
    wrapped = trainer.model_wrapped
    found = {"wrapper": type(wrapped).__name__, "kind": str(trainer.accelerator.distributed_type)}
    if hasattr(wrapped, "zero_optimization_stage"):
        config = wrapped.config["zero_optimization"]
        found["stage"] = wrapped.zero_optimization_stage()
        found["optimizer"] = type(wrapped.optimizer).__name__
        found["offloaded"] = [
            config.get(f"offload_{what}", {}).get("device", "none") for what in ("param", "optimizer")
        ]
        found["accumulated_in"] = str(wrapped.get_data_types()[1])
        found["buckets"] = {name: config[name] for name in config if name.endswith(("_size", "_threshold"))}
    return found


def run(case, folder, model_folder):
    for state in (AcceleratorState, GradientState):
        state._shared_state.clear()
    PartialState._shared_state.clear()
    output = folder / f"out-{case['name']}"
    torch.manual_seed(0)
    arguments = RLoraSFTConfig(str(output), **{**DEFAULTS, **case["arguments"]})
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate divides models among GPUs only; here it is to take CPUs for some.
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
    found = strategy_of(trainer)
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found["processes"] = trainer.accelerator.num_processes
    trainer.save_model()
    if RANK == 0:
        saved = load_file(output / "adapter_model.safetensors")
        found["saved"] = {name: [tuple(value.shape), bool(value.isfinite().all())] for name, value in saved.items()}
    (folder / f"{case['name']}.{RANK}.json").write_text(json.dumps(found))
    trainer.accelerator.free_memory()


def main():
    given = json.loads(Path(sys.argv[1]).read_text())
    signal.alarm(given["timeout"])
    faulthandler.dump_traceback_later(given["timeout"] - 10)
    torch.set_num_threads(1)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        import deepspeed

        # Else it compiles its own collectives, which takes longer than the tests.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
    before = dict(os.environ)
    for case in given["cases"]:
        # Trainers collect garbage several times each, which takes half a second with all that libraries made.
        gc.freeze()
        os.environ.update(case["environment"])
        run(case, Path(sys.argv[1]).parent, given["model"])
        for name in case["environment"]:
            os.environ.pop(name)
        os.environ.update(before)
        gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
