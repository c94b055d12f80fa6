"""
Train, save and evaluate small cases one after another, as one process or as a rank of several.

A case has a `name`, a `strategy` ("plain": one process or DDP; "zero1" .. "zero3", "zero3-offload", "fsdp2"), a `base`
("float32", "bfloat16" or "4bit"), and may have `arguments` of `RLoraSFTConfig`, `config` of `RLoraConfig`, `fsdp` for
`fsdp_config`, `zero` for `zero_optimization` of DeepSpeed, `batch_seed`, see [`BatchSeed`], and `given`, with which
each rank passes a model whose adapter has values of its own. The trained adapter lies in `out-<name>`;
`<name>.<rank>.pt` has the adapter's initial values, the losses of all steps, the logits of `random_ids()` that the
trained model gives under its strategy, the dtypes of what takes part in training, and the work of the last step of
ZeRO-3.
"""

import logging
import os
from functools import partial
from hashlib import sha256
from importlib import import_module

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from cases import BACKEND, DEEPSPEED, ON_GPU, SMALL, rank, run_each, start_deepspeed
from datasets import Dataset
from peft import get_peft_model
from testing_utils import build_tokenizer, random_ids, task_rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import rlora_trl.tuner.adapter as adapter_module
from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.files.checks import check_adapter
from rlora_trl.kernels import fused
from rlora_trl.tuner import MultiHeadAdapter


NORMS = ("grad_norm_A", "grad_norm_B", "grad_norm_router")
ROWS = 8  # of all ranks, in each step


class BatchSeed(RLoraSFTTrainer):
    """Makes all dropout masks of a batch from one seed."""

    _recomputes_with_other_seeds = True


def training_rows(steps):
    """Rows of two tasks by turns, as many as the steps take."""
    tasks = {task: task_rows(task, steps * ROWS // 2, seed=5) for task in ("first", "colour")}
    turns = zip(*tasks.values(), strict=True)
    return [{**row, "task": task} for rows in turns for task, row in zip(tasks, rows, strict=True)]


def deepspeed_config(strategy, **options):
    zero = {"stage": int(strategy[4]), **options}
    if strategy.endswith("offload"):
        zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    return {**DEEPSPEED, "zero_optimization": zero}


def build_arguments(case, output):
    bf16 = case["base"] != "float32"
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    values = {
        **SMALL,
        "bf16": bf16,
        "model_init_kwargs": {"dtype": "bfloat16" if bf16 else "float32"},
        "gradient_checkpointing": False,
        "max_steps": 20,
        "per_device_train_batch_size": ROWS // ranks,
        "optim": "adamw_torch",
        "learning_rate": 3e-3,
    }
    if "RANK" in os.environ:
        values["ddp_backend"] = BACKEND

    # Nothing of the case before is left.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    unset_hf_deepspeed_config()

    if case["strategy"].startswith("zero"):
        values["deepspeed"] = deepspeed_config(case["strategy"], **case.get("zero", {}))
    if case["strategy"] == "fsdp2":
        values |= {"fsdp": True, "fsdp_config": {"version": 2, **case.get("fsdp", {})}}
    arguments = RLoraSFTConfig(str(output), **{**values, **case.get("arguments", {})})
    if case["strategy"] == "fsdp2" and not ON_GPU:
        # On CPU accelerate supports DDP only, though PyTorch's FSDP2 runs there.
        assert arguments.device.type == "cpu" and PartialState().num_processes == ranks
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


def four_bit():
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )


class Warnings(logging.Handler):
    """Collects the warnings of the trainer."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []
        logging.getLogger("rlora_trl.trainer").addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())

    def close(self):
        logging.getLogger("rlora_trl.trainer").removeHandler(self)
        super().close()


class Dtypes(TrainerCallback):
    """Notes the dtypes of adapters: of parameters, in products, of gradients."""

    def __init__(self):
        self.outcome = {"parameters": set(), "products": set(), "gradients": set()}
        self.original = adapter_module.fused_delta
        adapter_module.fused_delta = self

    def __call__(self, x, A, B, router, *rest):
        if torch.is_grad_enabled():
            tensors = (A, B, router, *rest[:2])  # and the anchors; a router by task is no part of the product
            self.outcome["products"].add((x.dtype, *{tensor.dtype for tensor in tensors if tensor is not None}))
        return self.original(x, A, B, router, *rest)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = adapter_tensors(model).values()
        self.outcome["gradients"] |= {p.grad.dtype for p in parameters if p.grad is not None}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        adapter_module.fused_delta = self.original
        self.outcome["parameters"] = {tensor.dtype for tensor in adapter_tensors(model).values()}


class Zero3Work(TrainerCallback):
    """
    Notes what is done for small tensors in the last step of ZeRO-3: the names of adapters' parameters that stay whole,
    the collectives that gather such parameters after the step, and the adapters that concatenate weights on their own.
    """

    def __init__(self, trainer):
        self.trainer, self.outcome = trainer, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.backend, self.optimizer = import_module("deepspeed.comm.comm").cdb, self.trainer.model_wrapped.optimizer
        kept = {id(parameter) for parameter in self.optimizer.persistent_parameters}
        names = [name for name, p in model.named_parameters() if id(p) in kept and ".rlora_adapters." in name]
        self.outcome["kept"] = sorted(name.rpartition(".")[2] for name in names)
        self.originals = (
            (self.optimizer, "_post_step", self.optimizer._post_step),
            (self.backend, "all_gather_into_tensor", self.backend.all_gather_into_tensor),
            (fused, "concat_weights", fused.concat_weights),
        )
        for owner, name, function in self.originals:
            setattr(owner, name, partial(self.count, name, function))

    def count(self, name, function, *args, **kwargs):
        # Gathering in passes depends on what else is small.
        if name != "all_gather_into_tensor" or self.in_post_step:
            self.outcome[name] += 1
        self.in_post_step |= name == "_post_step"
        try:
            return function(*args, **kwargs)
        finally:
            self.in_post_step &= name != "_post_step"

    def on_step_begin(self, *args, **kwargs):
        self.in_post_step = False
        self.outcome |= {name: 0 for _, name, _ in self.originals}

    def on_train_end(self, *args, **kwargs):
        for owner, name, function in self.originals:
            setattr(owner, name, function)


def adapter_tensors(model):
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, MultiHeadAdapter)}
    return {f"{name}.{key}": p for name, module in adapters.items() for key, p in module.named_parameters()}


def digests_of(model):
    """Digests of the base's weights, where a rank has all of them."""
    base = {name: p.data for name, p in model.named_parameters() if not p.requires_grad and "rlora" not in name}
    return {
        name: sha256(data.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
        for name, data in base.items()
    }


@torch.no_grad()
def logits_of(trainer):
    model = trainer.model_wrapped
    model.eval()
    return model(input_ids=random_ids().to(trainer.args.device)).logits.cpu()


def run(case, folder, models):
    output = folder / f"out-{case['name']}"
    arguments = build_arguments(case, output)
    torch.manual_seed(7)
    model, config = models[case["base"]], RLoraConfig(**{"head_dropout": 0.0, **case.get("config", {})})
    if case.get("given"):
        torch.manual_seed(rank())
        config.task_type = "CAUSAL_LM"
        model, config = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config), None
    trainer = RLoraSFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(training_rows(arguments.max_steps)),
        processing_class=build_tokenizer(),
        # Each rank draws its own masks: losses are those of one process only without dropout.
        peft_config=config,
        quantization_config=four_bit() if case["base"] == "4bit" else None,
    )

    # Watch what takes part in training.
    initial = {name: tensor.detach().cpu().clone() for name, tensor in adapter_tensors(trainer.model).items()}
    dtypes, warnings = Dtypes(), Warnings()
    trainer.add_callback(dtypes)
    work = Zero3Work(trainer)
    if case["strategy"].startswith("zero3"):
        trainer.add_callback(work)
    if case["strategy"] == "fsdp2" and not ON_GPU:
        for module in trainer.model.modules():
            # Some CPUs would reorder 4-bit weights for inference, in place, which FSDP2 does not expect.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if case.get("batch_seed"):
        # As where activations are recomputed with other random states.
        trainer.__class__ = BatchSeed

    divided = case["strategy"] == "fsdp2" or case["strategy"].startswith("zero3")
    before = None if divided else digests_of(trainer.model)
    trainer.train()

    # What came of it.
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    outcome = {"dtypes": dtypes.outcome, "losses": [entry["loss"] for entry in logs], "initial": initial}
    outcome["norms"] = [[entry[key] for key in NORMS if key in entry] for entry in logs]
    outcome["warnings"] = warnings.texts
    outcome["work"] = work.outcome
    outcome["processes"] = trainer.accelerator.num_processes
    outcome["type"] = trainer.accelerator.distributed_type.value
    outcome["base_is_unchanged"] = divided or before == digests_of(trainer.model)
    warnings.close()

    trainer.save_model()
    outcome["logits"] = logits_of(trainer)
    if rank() == 0:
        check_adapter(output)
    torch.save(outcome, folder / f"{case['name']}.{rank()}.pt")
    trainer.accelerator.free_memory()


def run_cases(folder, cases, models):
    if any(case["strategy"].startswith("zero") for case in cases):
        start_deepspeed()
    run_each(cases, lambda case: run(case, folder, models))
