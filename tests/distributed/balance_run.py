"""Train small cases one after another, in one process or as a rank of several, and write down what came of each.

    python balance_run.py cases.json                                        (or by `python -m torch.distributed.run`)

Each case has a `name`, `rows` with their task, `arguments` of `RLoraSFTConfig`, and may have a DeepSpeed `stage`, and
`by_name`, with which the trainer loads the model and makes the adapter itself. For each rank, `<name>.<rank>.pt` holds
the weights before and after, the logs, the counts by task, what the monitor had, the collectives of a step, and what
strategy was really at work.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from testing_utils import build_tokenizer
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.hub import check_adapter


RANK = int(os.environ.get("RANK", 0))
# Set in the GPU suite: a GPU for each rank.
ON_GPU = os.environ.get("RLORA_TRL_TEST_DEVICE") == "cuda"
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


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


def watch_steps(trainer, found):
    """Note the collectives of each `get_batch_samples`, the record that each step closes, and the prior it gives."""
    get_batch_samples = trainer.get_batch_samples

    def watched(*args, **kwargs):
        reduces, all_reduces = Counted(trainer.accelerator, "reduce"), Counted(dist, "all_reduce")
        try:
            return get_batch_samples(*args, **kwargs)
        finally:
            reduces.close()
            all_reduces.close()
            found["reduces"].append(reduces.sizes)
            found["all_reduces"].append(all_reduces.sizes)

    trainer.get_batch_samples = watched
    monitor = trainer._observer.monitor
    begin_step = monitor.begin_step

    def begun(*args, **kwargs):
        found["records"].append(monitor.step.data.cpu().clone())
        begin_step(*args, **kwargs)
        found["priors"].append(None if monitor.prior is None else monitor.prior.cpu().clone())

    monitor.begin_step = begun


def weights_of(trainer):
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    with ExitStack() as stack:
        if any(hasattr(p, "ds_id") for p in named.values()):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(list(named.values())))
        return {name: p.detach().clone().float().cpu() for name, p in named.items()}


def prepare(stage):
    """Leave nothing of the case before, and have DeepSpeed ready where a case is for it."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()
    if stage is not None:
        import deepspeed

        deepspeed.init_distributed("nccl" if ON_GPU else "gloo")


def run(case, folder, model_folder, adapter_folder):
    output = folder / f"out-{case['name']}"
    stage = case.get("stage")
    prepare(stage)
    model = model_folder
    if not case.get("by_name"):
        # Before the arguments, so that DeepSpeed does not load it in parts.
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        model = PeftModel.from_pretrained(model, adapter_folder, is_trainable=True)
    defaults = {
        "use_cpu": not ON_GPU,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
        "logging_steps": 1,
        "max_length": 64,
        "train_sampling_strategy": "sequential",
    }
    if "RANK" in os.environ:
        defaults["ddp_backend"] = "nccl" if ON_GPU else "gloo"
    if stage is not None:
        defaults["deepspeed"] = {**DEEPSPEED, "zero_optimization": {"stage": stage}}
    arguments = RLoraSFTConfig(str(output), **{**defaults, **case["arguments"]})
    trainer = RLoraSFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(case["rows"]),
        processing_class=build_tokenizer(),
        peft_config=RLoraConfig(head_dropout=0.0, router_init="kaiming_uniform") if case.get("by_name") else None,
    )
    found = {"reduces": [], "all_reduces": [], "records": [], "priors": []}
    found["processes"] = trainer.accelerator.num_processes
    found["type"] = trainer.accelerator.distributed_type.value
    plugin = trainer.accelerator.state.deepspeed_plugin
    found["stage"] = plugin.zero_stage if found["type"] == "DEEPSPEED" else None
    watch_steps(trainer, found)
    found["before"] = weights_of(trainer)
    trainer.train()
    found["after"] = weights_of(trainer)
    found["logs"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    found["seen"] = trainer.tasks_seen()
    found["num_heads"] = trainer._observer.monitor.num_heads
    if case.get("save"):
        trainer.save_model()
        if RANK == 0:
            found["saved"] = load_file(output / "adapter_model.safetensors")
            check_adapter(output)  # that it is complete, anchors included
    torch.save(found, folder / f"{case['name']}.{RANK}.pt")
    trainer.accelerator.free_memory()


def main():
    given = json.loads(Path(sys.argv[1]).read_text())
    # The launcher starts ranks in sessions of their own: each ends itself if all else fails.
    signal.alarm(given["timeout"])
    faulthandler.dump_traceback_later(given["timeout"] - 30)
    torch.set_num_threads(1)
    if any(case.get("stage") is not None for case in given["cases"]):
        import deepspeed

        # Else it compiles its own collectives, which takes longer than the tests.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for case in given["cases"]:
        # Trainers collect garbage several times each, which takes half a second with all that libraries made.
        gc.freeze()
        run(case, Path(sys.argv[1]).parent, given["model"], given["adapter"])
        gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
