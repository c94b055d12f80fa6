"""Checks a loaded adapter: its configuration before layers are created, and its tensors before they are loaded."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from ..reading import AdapterCheckError, first_few, shorten
from .adapter import MultiHeadAdapter
from .comparison import compare_tensors
from .config import RLoraConfig
from .expert_targets import select_parameters
from .experts import expert_sizes
from .layer import RLoraLayer
from .layer_names import PREFIX, module_of
from .patterns import settle_patterns
from .stored import StoredTensors, read_stored


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Below this number of values, a wrong size is reported by name when the tensors are loaded.
_MIN_BUDGET = 2**24
# A configuration of another adapter, with a few more heads, is reported by name too.
_MAX_RATIO = 4


class ParameterBudget:
    """
    The number of values that a loaded configuration may create, by the size of the file or, if that is not known, of
    the base model: the sizes in a configuration are a stranger's.

    Args:
        limit (`int`): The number.
        reason (`str`): What it follows from, for messages.
    """

    def __init__(self, limit: int, reason: str) -> None:
        self.limit, self.reason, self.used = limit, reason, 0

    def take(self, config: RLoraConfig, layer: str, module: nn.Module) -> None:
        """
        Count the values of the adapter that a layer is about to get.

        Args:
            config ([`RLoraConfig`]): The configuration.
            layer (`str`): The layer's name in the model.
            module (`torch.nn.Module`): The layer.

        Raises:
            AdapterCheckError: If there are more than the limit.
        """
        d_in, d_out = _get_in_out_features(module)
        if d_in and d_out:  # else it is not a linear layer, which is refused by name
            self._take(config, layer, d_in, d_out)

    def take_experts(self, config: RLoraConfig, layer: str, experts: nn.Module, weight: str) -> None:
        """
        [`take`] for a weight of experts.

        Args:
            config ([`RLoraConfig`]), layer (`str`): As in [`take`].
            experts (`torch.nn.Module`), weight (`str`): The module that holds the weight, and its name there.
        """
        base: Any = experts.get_base_layer() if isinstance(experts, BaseTunerLayer) else experts
        sizes = expert_sizes(base, weight)
        self._take(config, layer, sizes.in_features, sizes.out_features, sizes.num_experts)

    def _take(self, config: RLoraConfig, layer: str, d_in: int, d_out: int, num_experts: int = 0) -> None:
        shapes = MultiHeadAdapter.expected_tensors(
            d_in,
            d_out,
            config.rank_of(layer, d_in, d_out),
            config.num_heads,
            router=config.router,
            num_tasks=len(config.tasks or ()),
            share_a=config.share_a,
            init_weights=config.init_weights,
            num_experts=num_experts,
        )
        self.used += sum(map(math.prod, shapes.values()))
        if self.used > self.limit:
            raise AdapterCheckError(
                f"The configuration of the adapter (`r={config.r}`, `num_heads={config.num_heads}`, "
                f"{len(config.tasks or ())} tasks) needs more than {self.limit:,} values, but {self.reason}. It was "
                "altered, or belongs to another adapter; get adapter_config.json again."
            )


def settle_loaded(config: RLoraConfig, model: nn.Module) -> ParameterBudget:
    """
    Prepare a configuration from a file for a model, before anything is created for it.

    Regular expressions are replaced by names of layers: those in the adapter's file, where it is known.

    Args:
        config ([`RLoraConfig`]): The configuration; its patterns may be replaced.
        model (`torch.nn.Module`): The base.

    Returns:
        [`ParameterBudget`]: The number of values that the adapter may have.

    Raises:
        AdapterCheckError: If the configuration has an expression that can't be replaced, or the header of the file
            does not describe it.
    """
    stored = read_stored(config)
    source = "the adapter" if config.source is None else config.source.name
    # Checkpointing and `torch.compile` add to the names of modules, which a file does not have.
    names = [without_wrappers(name) for name, _ in model.named_modules() if name]
    names += map(without_wrappers, select_parameters(config, model))
    settle_patterns(config, names, None if stored is None else stored.ranks, source)
    _check_token_rows(config, model, stored, source)
    if stored is not None:
        _check_saved_modules(config, model, stored, source)

    if stored is None:
        size = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
        return ParameterBudget(max(size, _MIN_BUDGET), f"the base model has {size:,}")
    size = sum(math.prod(entry.shape) for tensors in stored.layers.values() for entry in tensors.values())
    return ParameterBudget(max(_MAX_RATIO * size, _MIN_BUDGET), f"its file has {size:,}")


def _refuse_unannounced(
    model: nn.Module, config: RLoraConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Refuse tensors that would overwrite the base and do not follow from the configuration."""
    present = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}
    unannounced = _unannounced(config, adapter_name, [name for name in state_dict if name in present])
    if unannounced:
        modules = sorted({module_of(name) or name for name in unannounced})[:8]
        raise ValueError(
            f"The file of adapter {adapter_name!r} has {first_few(unannounced)}, which its configuration does not "
            "announce (`modules_to_save`, `bias`, `trainable_token_indices`, `saved_embeddings`): it would overwrite "
            "weights of the base model. Get the adapter again; if it is your own, of a resized vocabulary, announce "
            f'it in adapter_config.json: `"saved_embeddings": {json.dumps(modules)}`.'
        )


def check_on_first_use(model: nn.Module, config: RLoraConfig, adapter_name: str) -> None:
    """
    Check an adapter that transformers loads, which passes nothing on the way (5.23), once it is loaded.

    transformers sets the mode of the model then, so that its `load_adapter` raises. An adapter that is to be trained
    is checked at its first forward pass.

    Args:
        model (`torch.nn.Module`): A model that has the adapter already, with initial values.
        config ([`RLoraConfig`]): The adapter's configuration, from a file.
        adapter_name (`str`): The adapter's name.
    """
    first: Any = next(
        layer for layer in model.modules() if isinstance(layer, RLoraLayer) and adapter_name in layer.rlora_adapters
    )
    before = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    adapter: Any = first.rlora_adapters[adapter_name]

    def check(*_: Any) -> None:
        if adapter_name in first.rlora_adapters:
            now = dict(model.named_parameters())
            replaced = {name for name in now if name not in before or before[name]() is not now[name]}
            _refuse_replaced(config, adapter_name, replaced)
            loaded = {name: tensor for name, tensor in now.items() if adapter_name in name.split(".")}
            _refuse_left(adapter_name, [name for name in loaded if name in before and name not in replaced], loaded)
            refuse_not_finite(adapter_name, {**loaded, **{name: now[name] for name in replaced}})
        adapter.first_use = None
        hook.remove()

    adapter.first_use = check
    hook = first.register_forward_pre_hook(check)


def _refuse_left(adapter_name: str, left: Collection[str], names: Collection[str]) -> None:
    """Refuse that some of the adapter's tensors have initial values: transformers (5.17) leaves `modules_to_save`."""
    if left and len(left) < len(names):
        raise ValueError(
            f"transformers {transformers.__version__} has not loaded {first_few(left)} of adapter {adapter_name!r}. "
            "Load it with `peft.PeftModel.from_pretrained` or `AutoPeftModelForCausalLM.from_pretrained`, or update "
            "transformers: 5.18 and newer load `modules_to_save` and `trainable_token_indices`."
        )


def _refuse_replaced(config: RLoraConfig, adapter_name: str, replaced: Collection[str]) -> None:
    """Refuse that weights of the base were replaced, as transformers does with those that a file has."""
    unannounced = _unannounced(config, adapter_name, replaced)
    if unannounced:
        raise ValueError(
            f"transformers has overwritten {first_few(unannounced)} of the base model with weights from the file of "
            f"adapter {adapter_name!r}, which its configuration does not announce. Load the base model again, and get "
            "the adapter again; `peft.PeftModel.from_pretrained` refuses such a file before it changes anything."
        )


def _unannounced(config: RLoraConfig, adapter_name: str, names: Iterable[str]) -> list[str]:
    """Tensors that are neither the adapter's nor announced by its configuration, by their names in files."""
    announced = set(config.saved_embeddings or ())
    plain = [without_wrappers(name) for name in names if adapter_name not in name.split(".")]
    return [
        name
        for name in plain
        if module_of(name) not in announced and not (config.bias != "none" and name.endswith(".bias"))
    ]


def without_wrappers(name: str) -> str:
    """The name of a parameter or module in the model itself, which is its name in files."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _check_token_rows(config: RLoraConfig, model: nn.Module, stored: StoredTensors | None, source: str) -> None:
    """Check that the embeddings and the file have the rows in `trainable_token_indices`, which PEFT takes unseen."""
    indices = config.trainable_token_indices
    if not indices:
        return

    problem = None
    if stored is not None and not any(name.endswith(".trainable_tokens_delta") for name in stored.others):
        problem = "its file has no rows of an embedding"
    embeddings = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    # By default PEFT takes the input embedding, or the module of this name where a model does not say.
    get_embedding: Any = getattr(model, "get_input_embeddings", None)
    embedding = None if get_embedding is None else get_embedding()
    for ending, rows in (indices if isinstance(indices, dict) else {"embed_tokens": indices}).items():
        sizes = [len(weight) for name, weight in embeddings.items() if name.endswith(ending) and weight.ndim]
        if embedding is not None and not isinstance(indices, dict):
            sizes = [len(embedding.weight)]
        if sizes and max(rows, default=0) >= max(sizes):
            problem = f"the embedding of the base model has {max(sizes)} rows"
    if problem is not None:
        raise AdapterCheckError(
            f"The configuration of {source} has `trainable_token_indices={shorten(indices)}`, but {problem}. Resize "
            "the embeddings of the base model as in training, or get the adapter again."
        )


def _check_saved_modules(config: RLoraConfig, model: nn.Module, stored: StoredTensors, source: str) -> None:
    """Check that the file has the modules that the configuration announces; PEFT takes them without a look."""
    saved = tuple(config.modules_to_save or ())
    # A repository may name modules otherwise than the model of this version of transformers.
    ends = {".".join(name.split(".")[-2:]) for name in stored.others}
    for name, module in model.named_modules():
        if not saved or not name.endswith(saved):
            continue
        module = getattr(module, "original_module", module)
        tensors = (module.get_base_layer() if isinstance(module, RLoraLayer) else module).state_dict()
        lacking = [key for key in tensors if ".".join(f"{name}.{key}".split(".")[-2:]) not in ends]
        if lacking and any(f"{name}.heads." in key for key in stored.others):
            raise AdapterCheckError(
                f"The file of {source} has heads of several tasks in place of {name}. Call `add_task_heads` on the "
                "base model first, with the tasks and labels of the training."
            )
        if lacking:
            raise AdapterCheckError(
                f"The file of {source} lacks {name}.{lacking[0]}, which `modules_to_save` of its configuration "
                "announces. It is incomplete, or the configuration is another adapter's; get both again."
            )


def check_adapter_tensors(
    model: nn.Module, config: RLoraConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """
    Check the tensors of an adapter against the model that they are about to be loaded into.

    Args:
        model (`torch.nn.Module`): A model that has the adapter already, with initial values.
        config ([`RLoraConfig`]): The adapter's configuration.
        adapter_name (`str`): The adapter's name.
        state_dict (`Mapping[str, torch.Tensor]`): The tensors, by their names in the model.

    Raises:
        ValueError: If tensors are missing or unknown, have other shapes, hold values that are not finite, or would
            replace weights of the base that the configuration of a loaded adapter does not announce.
    """
    adapters: dict[str, Any] = {
        f"{layer_name}.rlora_adapters.{adapter_name}": layer.rlora_adapters[adapter_name]
        for layer_name, layer in model.named_modules()
        if isinstance(layer, RLoraLayer) and adapter_name in layer.rlora_adapters
    }
    expected = {
        f"{prefix}.{name}": shape for prefix, adapter in adapters.items() for name, shape in adapter.shapes.items()
    }
    tensors = {
        name if name in expected else name.removeprefix(PREFIX): tensor
        for name, tensor in state_dict.items()
        if ".rlora_adapters." in name
    }
    missing, unknown, misshapen = compare_tensors(expected, {name: tensor.shape for name, tensor in tensors.items()})

    if missing or unknown:
        parts = [f"lacks {first_few(missing)}"] if missing else []
        parts += [f"has {first_few(unknown)}, which the model has no place for"] if unknown else []
        raise ValueError(
            f"Adapter {adapter_name!r} does not fit the model: its file {' and '.join(parts)}. The file is "
            "incomplete, or its adapter_config.json belongs to another adapter. Save or download both again."
        )
    for name, (needed, found) in misshapen.items():
        raise ValueError(
            f"Adapter {adapter_name!r} belongs to another base model or configuration: {name} is {list(found)} in the "
            f"file, the model needs {list(needed)}. Load it on the model named in its adapter_config.json "
            "(`base_model_name_or_path`)."
        )

    unusual = [name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES]
    if unusual:
        raise ValueError(
            f"Adapter {adapter_name!r} has {first_few(unusual)} of type {tensors[unusual[0]].dtype}, and tensors of "
            "adapters must be floating-point numbers of 16 to 64 bits. The file was altered; save or download it "
            "again."
        )
    if config.loaded:
        _refuse_unannounced(model, config, adapter_name, state_dict)
    refuse_not_finite(adapter_name, state_dict)


def refuse_not_finite(adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Refuse tensors with values that are not finite.

    Raises:
        ValueError: If one has; the message names it.
    """
    broken = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype in _DTYPES and not tensor.is_meta and not tensor.isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"Adapter {adapter_name!r} holds NaN or infinity in {first_few(broken)}. The file is damaged or training "
            "diverged; use an earlier checkpoint."
        )
