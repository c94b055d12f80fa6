"""The configuration of a trainer, and checks of settings that do not work together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from accelerate.logging import get_logger
from transformers import BitsAndBytesConfig, TrainingArguments

from ..requirements import require_bitsandbytes, require_liger, require_trackers
from ..tuner import MultiHeadAdapter, RLoraConfig
from .config import RLoraSFTConfig


logger = get_logger(__name__)

# Parts of the names of bitsandbytes' optimizers. Those of torchao have "torch" in theirs.
_BITSANDBYTES_OPTIMIZERS = ("8bit", "paged", "bnb", "lion", "ademamix")


def check_devices(args: RLoraSFTConfig) -> None:
    """
    Refuse a process with several GPUs.

    Raises:
        ValueError: If `Trainer` would use `torch.nn.DataParallel`.
    """
    if args.n_gpu > 1:
        # The replicas of `torch.nn.DataParallel` would share one batch context.
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, over which `Trainer` would spread each batch by threads "
            "(`torch.nn.DataParallel`), which R-LoRA does not support. Start one process for each GPU with "
            "`accelerate launch` or `torchrun`, or show it a single one with `CUDA_VISIBLE_DEVICES=0`."
        )


def check_packages(args: RLoraSFTConfig, quantization_config: Any) -> None:
    """
    Refuse settings whose package is missing, before data are prepared and the model is loaded.

    transformers looks for those of the optimizer and of the kernels when training begins.

    Args:
        args ([`RLoraSFTConfig`]): Configuration of the run.
        quantization_config (`BitsAndBytesConfig`, *optional*): That of the trainer, else the one in
            `args.model_init_kwargs` counts.

    Raises:
        ImportError: If bitsandbytes is needed to quantize the base or for the optimizer, Liger for its kernels, or a
            tracker of `report_to`, and is not installed.
    """
    given = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
    if isinstance(given, BitsAndBytesConfig):
        require_bitsandbytes("`quantization_config=BitsAndBytesConfig(...)`")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "torch" not in optimizer and any(part in optimizer for part in _BITSANDBYTES_OPTIMIZERS):
        require_bitsandbytes(f"`optim={optimizer!r}`")
    if args.use_liger_kernel:
        require_liger("`use_liger_kernel=True`")
    require_trackers(args.report_to)


def check_balance(args: RLoraSFTConfig, config: RLoraConfig) -> None:
    """
    Refuse a balance loss for an adapter that has nothing to balance.

    Raises:
        ValueError: If there is no router, or a single head.
    """
    if args.balance_loss != "none" and (config.router == "uniform" or config.num_heads == 1):
        raise ValueError(
            f"`balance_loss={args.balance_loss!r}` needs a router with several heads to balance, and the adapter has "
            f"`router={config.router!r}` and `num_heads={config.num_heads}`. Set `balance_loss='none'`."
        )


def check_parallelism(args: RLoraSFTConfig, parallelism: Any) -> None:
    """
    Refuse a balance loss where sequences are divided among processes.

    Args:
        args ([`RLoraSFTConfig`]): Configuration of the run.
        parallelism (`ParallelismConfig`, *optional*): How accelerate divides a sequence.

    Raises:
        NotImplementedError: If a balance loss would count the tokens of parts of sequences.
    """
    if args.balances and parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise NotImplementedError(
            f"`balance_loss={args.balance_loss!r}` does not count tokens under context or sequence parallelism yet. "
            'Set `balance_loss="none"`, or use data parallelism.'
        )


def check_optimizer(args: RLoraSFTConfig, optimizer: Any) -> None:
    """
    Refuse learning rates of parameter groups for an optimizer that the user passed.

    Args:
        args ([`RLoraSFTConfig`]): Configuration of the run.
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer that was passed.

    Raises:
        ValueError: If both are there.
    """
    if optimizer is not None and (args.router_learning_rate or args.loraplus_lr_ratio):
        raise ValueError(
            "`router_learning_rate` and `loraplus_lr_ratio` set up the optimizer, and one was passed in `optimizers`. "
            "Set the learning rates in its parameter groups, or choose the optimizer with `optim`."
        )


def warn_of_decay(args: RLoraSFTConfig, adapters: Iterable[MultiHeadAdapter]) -> None:
    """
    Say that weight decay moves an adapter with an anchor away from the base, as it does the opposite for LoRA.

    Args:
        args ([`RLoraSFTConfig`]): Configuration of the run.
        adapters (`Iterable[MultiHeadAdapter]`): The adapters in training.
    """
    if args.weight_decay and any(adapter.A0 is not None for adapter in adapters):
        logger.warning(
            f"`weight_decay={args.weight_decay:g}` pulls A and B towards zero, where the adapter isn't the base model "
            "but the base less the initial delta (the frozen anchor). Set `weight_decay=0`, or "
            "`init_weights='zero_b'`, which has no anchor."
        )


def as_rlora_config(args: TrainingArguments | None, model: Any) -> RLoraSFTConfig:
    """The configuration as an [`RLoraSFTConfig`], from that of another class or from the model's name."""
    if isinstance(args, RLoraSFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        return RLoraSFTConfig(f"{str(name).rstrip('/').split('/')[-1]}-R-LoRA")
    # Not through `to_dict`, which hides every field named like a token, `eos_token` among them.
    names = {entry.name for entry in fields(RLoraSFTConfig)}
    config = RLoraSFTConfig(
        **{entry.name: getattr(args, entry.name) for entry in fields(args) if entry.init and entry.name in names}
    )
    for entry in fields(args):
        if entry.name not in names:  # a field of a subclass of the user's
            setattr(config, entry.name, getattr(args, entry.name))
    return config
