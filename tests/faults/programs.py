"""Training runs of the fault tests, called in other processes (`processes.py`)."""

import ctypes
import faulthandler
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from testing_utils import build_tokenizer, task_datasets
from transformers import TrainerCallback

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.trainer.saving import gather_tensors
from rlora_trl.trainer.stopping import StopOnSignal, TrainingStopped


# It would compile collectives for shared memory, which takes longer than the tests.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.set_num_threads(1)
TOKENIZER = build_tokenizer()
LIBC = ctypes.CDLL(None, use_errno=True)
BY_HAND = "\nWritten by hand.\n"
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
ARGUMENTS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "max_length": 64,
    "per_device_train_batch_size": 4,
}


def rank():
    return int(os.environ.get("RANK", 0))


STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")


def strategy_arguments(strategy, config):
    """Arguments of the trainer for `"single"`, or one of `STRATEGIES`; `config` is added to that of DeepSpeed."""
    if strategy == "single":
        return {}
    if strategy.startswith("zero"):
        deepspeed.init_distributed("gloo")
        return {"deepspeed": {**DEEPSPEED, "zero_optimization": {"stage": int(strategy[4:])}, **config}}
    if strategy == "fsdp2":
        return {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    return {"ddp_backend": "gloo"}


def assert_strategy(trainer, strategy):
    """A strategy that is silently another would make its test pass for nothing."""
    if strategy.startswith("zero"):
        assert trainer.accelerator.state.deepspeed_plugin.zero_stage == int(strategy[4:])
    elif strategy == "fsdp2":
        assert any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    else:
        assert not trainer.is_deepspeed_enabled and not trainer.is_fsdp_enabled


class Losses(TrainerCallback):
    """Writes the loss of each step down as it is logged, so that a killed run leaves it."""

    def __init__(self, path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            with open(self.path, "a") as file:
                file.write(json.dumps([state.global_step, logs["loss"]]) + "\n")


def build_trainer(folder, settings):
    """A trainer on three tasks; `settings`: `model`, `config`, `arguments`, `strategy`, `deepspeed` and `output`."""
    strategy = settings.get("strategy", "single")
    arguments = {
        **ARGUMENTS,
        **strategy_arguments(strategy, settings.get("deepspeed", {})),
        **settings.get("arguments", {}),
    }
    arguments = RLoraSFTConfig(str(settings.get("output", folder / "out")), **arguments)
    if strategy == "fsdp2":
        # accelerate supports FSDP on accelerators only; with this type it divides models among CPUs too.
        assert arguments.device.type == "cpu"
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return RLoraSFTTrainer(
        settings["model"],
        arguments,
        train_dataset=task_datasets(),
        processing_class=TOKENIZER,
        peft_config=RLoraConfig(**{"head_dropout": 0.2, **settings.get("config", {})}),
        callbacks=[Losses(folder / "losses.jsonl")],
    )


def die_at_operation(folder, number):
    """End by SIGKILL before the `number`-th time that this process opens, makes, renames or deletes in `folder`."""
    left, events = number, ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

    def hook(event, arguments):
        nonlocal left
        if event in events and str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def has_checkpoint(folder):
    return any(Path(folder).glob("checkpoint-*"))


def train(folder, settings):
    """
    Train to the end, from the newest checkpoint if there is one, and save the adapter.

    `settings` may have `kill_at`: before which operation on files in the output folder to die.
    """
    trainer = build_trainer(folder, settings)
    output = trainer.args.output_dir
    if "kill_at" in settings:
        die_at_operation(output, settings["kill_at"])
    trainer.train(resume_from_checkpoint=has_checkpoint(output) or None)
    trainer.save_model()


def digests(folder):
    """A digest of each file of a folder, by its path in it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Disk:
    """A small disk in memory that only this process sees, which can be filled."""

    def __init__(self, folder, size):
        # A process with threads can't leave the namespace of its users.
        faulthandler.cancel_dump_traceback_later()
        user, group = os.getuid(), os.getgid()
        for left in range(100, -1, -1):
            try:
                self._call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
                break
            except OSError:
                # That thread may be about to end.
                if not left:
                    raise
                time.sleep(0.01)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        folder.mkdir()
        self._call("mount", b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode())
        self.filler = folder / "filler"

    @staticmethod
    def _call(name, *arguments):
        if LIBC[name](*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"{name} is not possible here")

    @contextmanager
    def with_free(self, size):
        """Leave this many bytes."""
        stats = os.statvfs(self.filler.parent)
        with open(self.filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, stats.f_bavail * stats.f_frsize - size)
        try:
            yield
        finally:
            self.filler.unlink()


@contextmanager
def limited_files(size):
    """Files that can't grow beyond a size in bytes; where no disk can be made, the next best."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def attempt(action):
    """What an action raised: its kind, its number and its text; or `None`."""
    try:
        action()
    except Exception as error:
        return [type(error).__name__, getattr(error, "errno", None), str(error)]
    return None


def assert_unchanged(output, before, outcome):
    after = digests(output)
    # The card describes the run, which continues.
    names = (before.keys() | after.keys()) - {"README.md"}
    changed = sorted(name for name in names if before.get(name) != after.get(name))
    assert not changed and not list(output.glob(".*")), f"{changed} changed, {outcome}"
    card = (output / "README.md").read_text()
    assert card.startswith("---") and card.endswith(BY_HAND), f"the card is not whole: {card[-200:]!r}, {outcome}"


def run_out_of_space(folder, settings):
    """
    Save while there is not enough space, for each of several amounts of it, then with enough.

    `settings` has `how`, `"disk"` or `"limit"`, and `parts`: of the largest amount that is not enough.
    """
    mount = folder / "disk"
    disk = None
    if settings["how"] == "disk":
        try:
            disk = Disk(mount, 2**24)
        except OSError as error:
            return {"impossible": str(error)}
    output = mount / "out"
    settings = {**settings, "output": str(output)}

    def trainer_for(steps):
        return build_trainer(folder, {**settings, "arguments": {**settings["arguments"], "max_steps": steps}})

    # A checkpoint and an adapter, whose card somebody has edited.
    first = trainer_for(2)
    first.train()
    first.save_model()
    with open(output / "README.md", "a") as file:
        file.write(BY_HAND)

    # The largest amount of space that is not enough.
    checkpoint = output / "checkpoint-2"
    sizes = [path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()]
    # Whole pages for each file; of files whose size is limited, the largest counts.
    needed = sum(4096 * math.ceil(size / 4096) for size in sizes) if disk else max(sizes)
    limit = disk.with_free if disk else limited_files

    # With less than that, saves fail and change nothing.
    outcome = {"checkpoints": [], "models": []}
    before = digests(output)
    for part in settings["parts"]:
        trainer = trainer_for(4)
        save = trainer._save_checkpoint

        def save_checkpoint(*args, limit=limit, part=part, save=save):
            with limit(int(part * needed)):
                return save(*args)

        trainer._save_checkpoint = save_checkpoint
        outcome["checkpoints"].append(attempt(lambda trainer=trainer: trainer.train(resume_from_checkpoint=True)))
        assert_unchanged(output, before, outcome)
        with limit(int(0.5 * part * needed)):
            outcome["models"].append(attempt(trainer.save_model))
        assert_unchanged(output, before, outcome)

    # With enough, the run resumes.
    final = trainer_for(6)
    final.train(resume_from_checkpoint=True)
    final.save_model()
    assert digests(output)["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    return outcome


def weights_of(trainer):
    """All that trains, in whole and in float32, by name. On all ranks."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    names = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return gather_tensors(model, names, keep=True)


def digest_of(tensors):
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(tensors[name].contiguous().numpy().tobytes())
    return state.hexdigest()


def load_without_anchors():
    """Have DeepSpeed load checkpoints as if their anchors had been parameters, which it leaves out when it saves."""
    load = deepspeed.DeepSpeedEngine.load_module_state_dict

    def load_rest(engine, checkpoint, *args, **kwargs):
        rest = {name: value for name, value in checkpoint["module"].items() if not name.endswith((".A0", ".B0"))}
        assert len(rest) < len(checkpoint["module"])
        return load(engine, {**checkpoint, "module": rest}, *args, **kwargs)

    deepspeed.DeepSpeedEngine.load_module_state_dict = load_rest


class Weights(TrainerCallback):
    """A digest of the weights after each step, and whether they are finite."""

    def __init__(self, trainer, strategy):
        self.trainer, self.strategy = trainer, strategy
        self.digests, self.finite = {}, {}

    def note(self, step):
        tensors = weights_of(self.trainer)
        self.digests[step] = digest_of(tensors)
        self.finite[step] = all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())

    def on_train_begin(self, args, state, control, **kwargs):
        assert_strategy(self.trainer, self.strategy)
        self.note(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.note(state.global_step)


def poison(trainer, faults):
    """
    Make something not finite: each fault is `{"what", "value", "step", "rank"}`, in the first micro-batch of a step.

    `what` is `"loss"`; `"gradient"`, of what the first layer of the model gives, so that the loss and the rest of the
    gradients are finite; or `"element"`, one element of one gradient, as it is when the backward pass is over.
    """

    def fault_of(what):
        return next((fault for fault in faults if fault["what"] == what and is_now(fault)), None)

    def is_now(fault):
        now = fault["step"] == trainer.state.global_step + 1 and fault["rank"] in (None, rank())
        return now and trainer.model.training and passes[trainer.state.global_step] == fault.get("pass", 1)

    passes = defaultdict(int)
    compute_loss, backward = trainer.compute_loss, trainer.accelerator.backward

    def poisoned_loss(model, inputs, *args, **kwargs):
        passes[trainer.state.global_step] += trainer.model.training
        result = compute_loss(model, inputs, *args, **kwargs)
        fault = fault_of("loss")
        return result * float(fault["value"]) if fault else result

    def poisoned_output(module, args, output):
        fault, hidden = fault_of("gradient"), output[0] if isinstance(output, tuple) else output
        if fault and hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * float(fault["value"]))

    def poisoned_backward(*args, **kwargs):
        backward(*args, **kwargs)
        fault = fault_of("element")
        if fault:
            grads = [
                p.grad for name, p in trainer.model.named_parameters() if name.endswith(".B") and p.grad is not None
            ]
            grad = grads[0].to_local() if hasattr(grads[0], "to_local") else grads[0]
            assert grad.numel(), "this rank has no part of it"
            grad.view(-1)[0] = float(fault["value"])

    trainer.compute_loss, trainer.accelerator.backward = poisoned_loss, poisoned_backward
    trainer.model.get_base_model().model.layers[0].register_forward_hook(poisoned_output)


def die_in_step(trainer, step, path, by):
    """End by a signal in a step, before its passes; `path` is left for others to see."""
    training_step = trainer.training_step

    def last_step(*args, **kwargs):
        if trainer.state.global_step + 1 == step:
            path.touch()
            os.kill(os.getpid(), signal.Signals[by])
        return training_step(*args, **kwargs)

    trainer.training_step = last_step


def train_ranks(folder, settings):
    """
    Train under a strategy; returns the weights after each step, the logs, the error, and the error of saving.

    `settings` may have `faults` (see `poison`), `die` (a rank, the step in which it dies, and by what), `resume`,
    `save`, `spoil` (begin with other values than were drawn), `lost_anchors` (see `load_without_anchors`), the first
    `scale` of a gradient scaler, and `group_timeout`, the seconds that collectives wait.
    """
    strategy = settings.get("strategy", "single")
    if "group_timeout" in settings:
        # On CPU transformers leaves `ddp_timeout` out.
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=settings["group_timeout"]))
    trainer = build_trainer(folder, settings)

    # What the test wants of this run.
    if settings.get("spoil"):
        for name, tensor in chain(trainer.model.named_parameters(), trainer.model.named_buffers()):
            if ".rlora_adapters." in name:
                tensor.data += 0.1
    if settings.get("lost_anchors"):
        load_without_anchors()
    weights = Weights(trainer, strategy)
    trainer.add_callback(weights)
    if settings.get("faults"):
        poison(trainer, settings["faults"])
    if "scale" in settings:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=settings["scale"])
    if settings.get("die") and settings["die"]["rank"] == rank():
        die_in_step(trainer, settings["die"]["step"], folder / "died", settings["die"].get("by", "SIGKILL"))

    outcome = {"error": attempt(lambda: trainer.train(resume_from_checkpoint=settings.get("resume")))}
    # After an error of one rank only, collectives would wait for it.
    alike = outcome["error"] is None or outcome["error"][0] == "FloatingPointError"
    outcome["at_end"] = digest_of(weights_of(trainer)) if alike else None
    outcome |= {"weights": weights.digests, "finite": weights.finite, "logs": trainer.state.log_history}
    if "scale" in settings:
        outcome["scale"] = trainer.accelerator.scaler.get_scale()
    if settings.get("save") and alike:
        outcome["save_error"] = attempt(trainer.save_model)
    return outcome


class SendsSignal(TrainerCallback):
    """Sends SIGTERM to one rank when a step begins."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_step_begin(self, args, state, control, **kwargs):
        if rank() == self.rank and state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_ranks(folder, settings):
    """Train until a rank receives SIGTERM, `settings["stop"]`: a rank and the step; returns the exit code."""
    trainer = build_trainer(folder, settings)
    try:
        with StopOnSignal(trainer.args) as stop:
            trainer.add_callback(SendsSignal(**settings["stop"]))
            trainer.add_callback(stop)
            trainer.train()
    except TrainingStopped as error:
        return {"code": error.code, "step": trainer.state.global_step}
    return None


def make_universal(folder, settings):
    """Make a checkpoint of DeepSpeed, `settings["checkpoint"]`, one that any number of processes can load."""
    import argparse

    from deepspeed.checkpoint import ds_to_universal

    checkpoint = Path(settings["checkpoint"])
    parts = checkpoint / (checkpoint / "latest").read_text().strip()
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    # What transformers does not write for stages 1 and 2.
    options["inject_missing_state"] = settings["stage"] < 3
    arguments = {"input_folder": str(parts), "output_folder": f"{parts}_universal", **options}
    ds_to_universal.main(argparse.Namespace(**arguments))
