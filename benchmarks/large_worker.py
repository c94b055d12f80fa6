"""One process of `large.py`: trains what it is told, a line of JSON at a time, and writes down what each took.

Started by `large.py` alone, which sets `RANK`, `WORLD_SIZE` and the rest for several processes. A job comes by
standard input, and its answer goes to `<answers>/<id>.<rank>.json`. Between jobs everything is freed, and the answer
says what could not be.
"""

import argparse
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from common import environment
from datasets import Dataset
from large_models import build_model
from large_shapes import SHAPES
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


R, NUM_HEADS = 4, 3
CONFIGS = Path(__file__).parent.parent / "deepspeed_configs"
RANK = int(os.environ.get("RANK", 0))
CUDA = torch.cuda.is_available()
STORAGE = {"uint8": torch.uint8, "bfloat16": torch.bfloat16}


class Steps(TrainerCallback):
    """Milliseconds of each step after the first `warmup`, the device waited for; memory from the second step on."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.times, self.last = warmup, [], None
        self.first_peak = self.peak = self.reserved = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if CUDA:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last is not None and state.global_step > self.warmup:
            self.times.append(1e3 * (now - self.last))
        if CUDA:
            self.peak, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        if state.global_step == 1 and CUDA:
            # Building, sharding and the first step, which makes the optimizer's states, are told apart from the rest.
            self.first_peak = self.peak
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            now = time.perf_counter()
        self.last = now


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that trainers ask for and rows of tokens do not need."""
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def random_rows(count: int, length: int, vocabulary: int, *, tasks: bool) -> Dataset:
    """Rows of random tokens; with four tasks by turns for a trainer that knows tasks."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (count, length), generator=generator).tolist()
    columns: dict[str, list] = {"input_ids": ids, "labels": ids}
    if tasks:
        columns["task"] = [f"task{i % 4}" for i in range(count)]
    return Dataset.from_dict(columns)


def strategy_arguments(strategy: str) -> dict[str, Any]:
    """Arguments of the trainer that choose how the model is spread over processes."""
    if strategy.startswith("zero"):
        settings = json.loads((CONFIGS / f"{strategy}.json").read_text())
        # Nothing is compiled: the optimizer is PyTorch's AdamW, on the CPU too.
        return {"deepspeed": {**settings, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}}
    if strategy == "fsdp2":
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "cpu_ram_efficient_loading": False,  # the model is on each GPU already
                "reshard_after_forward": True,
                "state_dict_type": "FULL_STATE_DICT",
            },
        }
    return {}


def make_trainer(job: dict, model: Any, output: str, steps: Steps) -> SFTTrainer:
    """The trainer of a job's method, ours or TRL's with PEFT's LoRA, with the same settings."""
    ours = job["method"] == "ours"
    shape = SHAPES[job["shape"]].with_layers(job["layers"])
    settings = {
        "per_device_train_batch_size": job["batch"],
        "max_steps": job["warmup"] + job["steps"],
        "max_length": job["length"],
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": 1e-5,
        "optim": "adamw_torch",
        "bf16": True,
        "use_cpu": not CUDA,
        "logging_steps": 1000,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": CUDA,
        **strategy_arguments(job["strategy"]),
    }
    if ours:
        settings["mixture_rows"] = 0  # nothing is measured after the last step
    if "RANK" in os.environ:
        settings["ddp_backend"] = "nccl" if CUDA else "gloo"
    count = job["batch"] * job["processes"] * (job["warmup"] + job["steps"])
    lora = LoraConfig(r=shape.lora_rank(R, NUM_HEADS), lora_alpha=32, task_type="CAUSAL_LM")
    lora.target_modules = ["gate_proj", "up_proj", "down_proj"]
    arguments = (RLoraSFTConfig if ours else SFTConfig)(output, **settings)
    if job["strategy"] == "fsdp2" and not CUDA:
        allow_fsdp_without_gpus(arguments)
    return (RLoraSFTTrainer if ours else SFTTrainer)(
        model,
        arguments,
        train_dataset=random_rows(count, job["length"], shape.vocabulary, tasks=ours),
        processing_class=tokenizer(),
        peft_config=RLoraConfig(r=R, num_heads=NUM_HEADS, head_dropout=0.2) if ours else lora,
        callbacks=[steps],
    )


def allow_fsdp_without_gpus(arguments: Any) -> None:
    """Let a CPU try the script: accelerate takes FSDP's settings only from processes that it believes to have GPUs."""
    from accelerate import DistributedType, PartialState

    assert arguments.device.type == "cpu"
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def train(job: dict) -> dict:
    """The row of a job: step times and memory of this process."""
    started = time.monotonic()
    unset_hf_deepspeed_config()  # else the model would be laid out in parts, by the arguments of the job before
    device = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
    shape = SHAPES[job["shape"]].with_layers(job["layers"])
    model = build_model(shape, job["base"], device, job["length"], STORAGE[job["storage"]])
    built = time.monotonic() - started
    steps = Steps(job["warmup"])
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(job, model, output, steps)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        del model
        try:
            loss = trainer.train().training_loss
            engine = type(trainer.model_wrapped).__name__
        finally:
            release(trainer)
    if not loss < float("inf"):
        raise RuntimeError(f"The loss is {loss}; nothing is reported.")
    return {
        "trainable": trainable,
        "engine": engine,
        "times_ms": [round(value, 2) for value in steps.times],
        "peak_gib": steps.peak / 2**30,
        "peak_with_start_gib": max(steps.first_peak, steps.peak) / 2**30,
        "reserved_gib": steps.reserved / 2**30,
        "gpu_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if CUDA else 0.0,
        "loss": loss,
        "build_s": round(built, 1),
        "wall_s": round(time.monotonic() - started, 1),
    }


def release(trainer: SFTTrainer) -> None:
    """Undo what holds on to the model outside the trainer."""
    destroy = getattr(trainer.model_wrapped, "destroy", None)
    if destroy is not None:
        destroy()
    trainer.accelerator.free_memory()


def answer(job: dict) -> dict:
    """What a job gave: a row, or an error; and what memory is still taken after it."""
    given: dict[str, Any] = {}
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    try:
        given["row"] = train(job)
    except Exception as error:  # a row too: the others go on
        traceback.print_exc()
        given["error"] = short_error(error)
        error.__traceback__ = None
    for _ in range(2):
        gc.collect()
    if CUDA:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    given["left_gib"] = torch.cuda.memory_allocated() / 2**30 if CUDA else 0.0
    given["environment"] = {
        **environment(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default"),
        **{name: version_of(name) for name in ("trl", "accelerate", "deepspeed", "bitsandbytes")},
    }
    return given


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def short_error(error: Exception) -> str:
    """An error in a line; running out of memory has one name, however it shows."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text:
        return "out of memory"
    return " ".join(text.split())[:500]


def set_up(preload: list[str]) -> None:
    """Import the rest, choose the device, and connect the processes where DeepSpeed does not do it itself."""
    if "deepspeed" in preload:
        import deepspeed

        # Else it compiles its own collectives for CPUs, which takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not CUDA:
        torch.set_num_threads(1)


def connect(preload: list[str]) -> None:
    """Choose the device and connect the processes; not before the first job, as it takes memory of the device."""
    if CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "deepspeed" in preload:
        import deepspeed

        deepspeed.init_distributed("nccl" if CUDA else "gloo", auto_mpi_discovery=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True, help="folder of the answers")
    parser.add_argument("--preload", nargs="*", default=[], help="packages to import before the first job")
    args = parser.parse_args()
    set_up(args.preload)
    connected = False
    for line in sys.stdin:
        job = json.loads(line)
        # The one who started this process ends it in time; should that one be gone, it ends itself.
        signal.alarm(int(job["limit"]) + 60)
        if not connected:
            connect(args.preload)
            connected = True
        path = args.answers / f"{job['id']}.{RANK}.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(answer(job)))
        draft.replace(path)
        signal.alarm(0)
    os._exit(0)  # at once: communicators that are taken down one after the other can wait for each other


if __name__ == "__main__":
    main()
