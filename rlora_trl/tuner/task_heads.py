"""A classification head for each task, chosen by the task of each row."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..reading import first_few, shorten
from .batch import IN_TRAINERS, TaskIds, resolve_task_ids, task_index
from .config import RLoraConfig
from .task_names import task_name


_HEADS = ("classifier", "score", "classification_head")


class TaskHeads(nn.Module):
    """
    The classification heads of several tasks, in place of the head of a model. Created by [`add_task_heads`].

    All heads see all rows, so that each has a gradient in each step (DDP needs that), and the one of the row's task
    is kept. Labels that a task lacks have a logit of -1.8e19 (-256 in float16): their probability is zero, and means
    over tokens, which some models take of logits, stay finite.

    Args:
        head (`torch.nn.Module`): The head of the model: a linear layer, or a module with such a layer at its end.
        labels (`Mapping[str, int]`): Number of labels by task.
        num_labels (`int`): Outputs of `head`.
        std (`float`, *optional*, defaults to `0.02`): Standard deviation of the new weights.

    Attributes:
        tasks (`tuple[str]`): Names of the K tasks.
        heads (`torch.nn.ModuleList`): Their heads, in this order.
    """

    def __init__(self, head: nn.Module, labels: Mapping[str, int], num_labels: int, std: float = 0.02) -> None:
        super().__init__()
        self.tasks = tuple(labels)
        self.num_labels = max(labels.values())
        self.heads = nn.ModuleList(_resized(head, num_labels, count, std) for count in labels.values())
        self._task_ids: torch.Tensor | None = None
        self._task: int | None = None

    def set_task(self, task: str | int | None) -> None:
        """Choose the task of all following batches, by name or index; `None` for none."""
        self._task = None if task is None else task_index(task, self.tasks)

    def begin(self, task_ids: TaskIds) -> None:
        """Set the tasks of the rows, or of the tokens, of a forward pass."""
        self._task_ids = resolve_task_ids(task_ids, self.tasks)

    def end(self) -> None:
        """Forget them."""
        self._task_ids = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `[B, d]` or `[B, S, d]`): Features, as the head of the model gets them.

        Returns:
            `torch.Tensor` of shape `[B, num_labels]` or `[B, S, num_labels]`: Logits of the tasks.

        Raises:
            ValueError: If the task of a row is unknown, or the task ids don't fit the rows.
        """
        ids = self._ids_of(x)
        every = torch.stack([self._padded(head(x, *args, **kwargs)) for head in self.heads])  # [K, B, ..., L]
        if ids.ndim == 2:
            ids, shape = ids.reshape(-1), every.shape[1:]
            return every.flatten(1, 2)[ids, torch.arange(len(ids), device=ids.device)].view(shape)
        return every[ids, torch.arange(len(ids), device=ids.device)]

    def _padded(self, logits: torch.Tensor) -> torch.Tensor:
        absent = -math.sqrt(torch.finfo(logits.dtype).max)
        return nn.functional.pad(logits, (0, self.num_labels - logits.shape[-1]), value=absent)

    def _ids_of(self, x: torch.Tensor) -> torch.Tensor:
        """The tasks of the rows `[B]`, or of the tokens `[B, S]`."""
        if self._task_ids is None and self._task is not None:
            return torch.full((len(x),), self._task, device=x.device)
        ids = self._task_ids
        if ids is None or bool((ids < 0).any()):
            raise ValueError(
                f"The model has a head for each of the tasks {first_few(map(repr, self.tasks))}, and a row without a "
                f"task. Pass `task_ids=` with each batch, one for each row ({IN_TRAINERS}), or call "
                f"`set_task({self.tasks[0]!r})`. A model that is no `PeftModel` takes no `task_ids`: call "
                f"`rlora_trl.set_task(model, {self.tasks[0]!r})`."
            )
        if tuple(ids.shape) != tuple(x.shape[: ids.ndim]) or ids.ndim >= x.ndim:
            raise ValueError(
                f"`task_ids` of shape {list(ids.shape)} don't fit features of shape {list(x.shape)} at the heads. "
                "Pass one for each row; one for each token is for models that classify tokens."
            )
        return ids.to(x.device, torch.int64)


def _resized(head: nn.Module, num_labels: int, count: int, std: float) -> nn.Module:
    """A copy of a head with another number of outputs, whose last layer is new."""
    copied = copy.deepcopy(head)
    linear = [(name, module) for name, module in copied.named_modules() if isinstance(module, nn.Linear)]
    path, last = next(((n, m) for n, m in reversed(linear) if m.out_features == num_labels), (None, None))
    if path is None or last is None:
        raise ValueError(
            f"The classification head, a {type(head).__name__}, has no linear layer with {num_labels} outputs that "
            "could be made for each task. Load the model with that head as a linear layer, or name another one in "
            "`head`."
        )
    weight = last.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    new = nn.Linear(last.in_features, count, bias=last.bias is not None, device=weight.device, dtype=dtype)
    nn.init.normal_(new.weight, std=std)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    if path == "":
        return new
    copied.set_submodule(path, new)
    return copied


def add_task_heads(model: PreTrainedModel, labels: Mapping[str, int], head: str | None = None) -> PreTrainedModel:
    """
    Give a model that classifies sequences, tokens or pictures a head for each task.

    Call it on the base model: before `get_peft_model`, whose adapter then trains and saves the heads
    (`modules_to_save`), and before `PeftModel.from_pretrained`, with the same tasks in the same order.

    Args:
        model (`PreTrainedModel`): The base model, which is changed. Its `num_labels` becomes the largest of `labels`.
        labels (`Mapping[str, int]`): Number of labels by task: at least 2, or 1 for all (regression).
        head (`str`, *optional*): Name of the head in the model; by default `"classifier"`, `"score"` or
            `"classification_head"`.

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        TypeError: If `labels` is not a dictionary of names and whole numbers.
        ValueError: If a number of labels is too small, or the model has no such head, or has adapters already.
    """
    if not isinstance(labels, Mapping) or not all(type(count) is int for count in labels.values()):
        raise TypeError(
            f"`labels` must be a dictionary of tasks and their numbers of labels, got {shorten(labels)}. For example "
            '{"sst2": 2, "mnli": 3}.'
        )
    counts = {task_name(task): count for task, count in labels.items()}
    if not counts or (min(counts.values()) < 2 and set(counts.values()) != {1}):
        raise ValueError(
            f"`labels` must have at least one task, and 2 or more labels for each (or 1 for all, for regression), got "
            f"{shorten(dict(counts))}."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model has adapters already. Call `add_task_heads` on the base model, before they are added."
        )

    name = head or next((name for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)), None)
    if name is None or not isinstance(getattr(model, name, None), nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no head {head or ' or '.join(_HEADS)}. Load a model that classifies, such as "
            "`AutoModelForSequenceClassification`, or name its head in `head`."
        )
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    setattr(model, name, TaskHeads(getattr(model, name), counts, model.config.num_labels, std))
    model.config.num_labels = model.num_labels = max(counts.values())
    return model


def find_task_heads(model: nn.Module) -> list[TaskHeads]:
    """All heads by task in a model: those of the base, and their copies that adapters train."""
    return [module for module in model.modules() if isinstance(module, TaskHeads)]


def save_task_heads(config: RLoraConfig, model: nn.Module) -> None:
    """
    Name the heads of tasks in `modules_to_save`, so that they are trained and saved whole.

    PEFT does so for the task types "SEQ_CLS" and "TOKEN_CLS" only, and after "all-linear" has taken their layers.

    Args:
        config ([`RLoraConfig`]): The configuration, which is changed unless it comes from a file.
        model (`torch.nn.Module`): The base.
    """
    if config.loaded:
        return
    names = [name for name, module in model.named_modules() if isinstance(module, TaskHeads)]
    for name in [name.split(".")[0] for name in names]:
        if name not in (config.modules_to_save or ()):
            config.modules_to_save = [*(config.modules_to_save or ()), name]
