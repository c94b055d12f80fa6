"""What the programs of these tests share: ranks, DeepSpeed on the CPU, and cases that run one after another."""

import gc
import os

import torch
import torch.distributed as dist


# Set in the GPU suite: a GPU for each rank.
ON_GPU = os.environ.get("RLORA_TRL_TEST_DEVICE") == "cuda"
BACKEND = "nccl" if ON_GPU else "gloo"
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # its own optimizer would have to be compiled
}
# Arguments of `RLoraSFTConfig` for small runs whose losses are compared.
SMALL = {
    "use_cpu": not ON_GPU,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "max_length": 64,
    "train_sampling_strategy": "sequential",
}


def rank():
    return int(os.environ.get("RANK", 0))


def start_deepspeed():
    """Have DeepSpeed ready for the ranks of this launch."""
    import deepspeed

    # It would compile collectives for shared memory, which takes longer than the tests.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(BACKEND)


def run_each(cases, run):
    """Call `run` with each case, then leave the process group."""
    torch.set_num_threads(1)
    for case in cases:
        # Trainers collect garbage several times each, which takes half a second with all that libraries made.
        gc.freeze()
        run(case)
        gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
