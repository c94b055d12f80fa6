"""Which weights of experts get an adapter: defaults by architecture, and the names in `target_parameters`."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from copy import copy

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..reading import first_few
from .config import RLoraConfig
from .direct_use import bypassed_layers
from .experts import RLoraExperts, expert_sizes
from .layer_names import value_for
from .targets import is_linear, unlike_linear, warn_once


_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# Names of the MLP projections of shared experts and of layers without experts; a model may have none of them.
_DENSE = ("gate_proj", "up_proj", "down_proj")
# Weights of experts and names of linear layers that are adapted by default: all MLP projections.
EXPERT_TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = dict.fromkeys(
    "qwen2_moe qwen3_moe mixtral olmoe gpt_oss granitemoe deepseek_v2 deepseek_v3 llama4 llama4_text qwen3_next "
    "glm4_moe flex_olmo dots1 ernie4_5_moe minimax phimoe".split(),
    (_EXPERTS, _DENSE),
)
EXPERT_TARGETS |= dict.fromkeys(
    "granitemoeshared granitemoehybrid".split(), (_EXPERTS, ("shared_mlp.input_linear", "shared_mlp.output_linear"))
)


def settle_experts(config: RLoraConfig, model: nn.Module) -> None:
    """
    Fill in the default targets of a model with experts.

    Args:
        config ([`RLoraConfig`]): Its `target_parameters` and `target_modules` are set if neither is; if only
            `target_parameters` is, no linear layers are adapted.
        model (`torch.nn.Module`): The base.
    """
    if config.target_modules is not None:
        _warn_of_experts(config, model)
        return
    if config.target_parameters is None:
        parameters, modules = EXPERT_TARGETS.get(_model_type(model), ((), ()))
        if not parameters:
            return
        config.target_parameters = list(parameters)
        names = [name for name, module in model.named_modules() if is_linear(module)]
        config.target_modules = {end for end in modules if any(name.endswith(f".{end}") for name in names)}  # type: ignore[assignment]
    elif config.target_parameters:
        config.target_modules = set()  # type: ignore[assignment]


def _warn_of_experts(config: RLoraConfig, model: nn.Module) -> None:
    """Warn about targets that look as if they included experts, which are no linear layers."""
    targets = config.target_modules
    if config.loaded or config.target_parameters is not None or targets is None:
        return
    if isinstance(targets, str):
        looks_so = targets.lower() == "all-linear"
    else:
        looks_so = any(target.rpartition(".")[2] in _DENSE for target in targets)
    experts = experts_of(model) if looks_so else []
    if experts:
        shown = targets if isinstance(targets, str) else sorted(targets)
        warn_once(
            f"`target_modules={shown!r}` selects linear layers, and the experts of this model are none: they are not "
            f"adapted. To adapt them, set `target_parameters={experts}`; to leave them out, `target_parameters=[]`."
        )


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def expert_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that may hold experts, by name, without wrappers of adapters."""
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, RLoraExperts):
            wrapped += (f"{name}.",)
            yield name, module.base_layer
        elif not (wrapped and name.startswith(wrapped)):
            yield name, module


def select_parameters(config: RLoraConfig, model: nn.Module) -> list[str]:
    """
    The weights of experts that a configuration selects, by their names in the base model.

    Args:
        config ([`RLoraConfig`]): The configuration. Besides `target_parameters`, `exclude_modules`,
            `layers_to_transform` and `layers_pattern` apply.
        model (`torch.nn.Module`): The model, with adapters or without.
    """
    if not config.target_parameters:
        return []
    matching = copy(config)
    matching.target_modules = set(config.target_parameters)  # type: ignore[assignment]
    ends = tuple(config.target_parameters)
    selected = []
    for module_name, module in expert_holders(model):
        names = [*module._parameters, *dict(module.named_children()).get("parametrizations", nn.Module())._modules]
        for name in (f"{module_name}.{parameter}" for parameter in names):
            # The cheap comparison first: models have many parameters.
            if name.endswith(ends) and _matches(matching, name, module_name):
                selected.append(name)
    return selected


def _matches(config: RLoraConfig, name: str, module_name: str) -> bool:
    excluded = copy(config)
    excluded.target_modules = {module_name}  # type: ignore[assignment]
    excluded.layers_to_transform = None
    return bool(check_target_module_exists(config, name)) and bool(check_target_module_exists(excluded, module_name))


def unmatched_parameters(config: RLoraConfig, selected: list[str]) -> Iterator[str]:
    """A warning about names in `target_parameters` that no parameter has."""
    names = config.target_parameters or ()
    unmatched = [end for end in names if not any(f".{name}".endswith(f".{end}") for name in selected)]
    if unmatched:
        yield (
            f"`target_parameters` names {', '.join(map(repr, unmatched))}, but no selected parameter of the model has "
            "such a name: nothing is adapted for it. Correct the name or remove it."
        )


@contextmanager
def patterns_of_modules(config: RLoraConfig, model: nn.Module) -> Generator[RLoraConfig, None, None]:
    """
    Hide patterns of ranks and alphas that match weights of experts and no module, for a `with` block.

    PEFT compares patterns with names of modules, and would warn that these are ignored (no upstream issue as of peft
    0.21.2).

    Args:
        config ([`RLoraConfig`]): The configuration.
        model (`torch.nn.Module`): The base.

    Yields:
        [`RLoraConfig`]: A copy with all patterns.
    """
    every = copy(config)
    if not config.target_parameters or not (config.rank_pattern or config.alpha_pattern):
        yield every
        return
    parameters, modules = select_parameters(config, model), [name for name, _ in model.named_modules()]

    def of_modules(patterns: dict) -> dict:
        return {
            pattern: value
            for pattern, value in patterns.items()
            if any(value_for({pattern: True}, name, False) for name in modules)
            or not any(value_for({pattern: True}, name, False) for name in parameters)
        }

    config.rank_pattern, config.alpha_pattern = of_modules(config.rank_pattern), of_modules(config.alpha_pattern)
    try:
        yield every
    finally:
        config.rank_pattern, config.alpha_pattern = every.rank_pattern, every.alpha_pattern


def experts_of(model: nn.Module) -> list[str]:
    """The ends of the names of all weights of experts in a model, such as "experts.gate_up_proj"."""
    found = set()
    for module_name, module in expert_holders(model):
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or len(getattr(parameter, "ds_shape", parameter.shape)) != 3:
                continue
            try:
                expert_sizes(module, name)
            except TypeError:
                continue
            found.add(f"{module_name.rpartition('.')[2]}.{name}")
    return sorted(found)


def describe_targets(model: nn.Module) -> str:
    """What can be adapted in a model, for an error: only remedies that work."""
    left_out = {*bypassed_layers(model, is_linear), *unlike_linear(model)}
    every = [name for name, module in model.named_modules() if is_linear(module) and name not in left_out]
    linear = sorted({name.rsplit(".", 1)[-1] for name in every})
    experts = experts_of(model)
    if not experts:
        return (
            f"R-LoRA adapts linear layers, and this model's are named {', '.join(linear) or '(none)'}. Set "
            '`target_modules` to some of them, or to "all-linear".'
        )
    return (
        f"The experts of this model are adapted by `target_parameters={experts}`. Its linear layers, without experts, "
        f"are named {first_few(linear, 12) if linear else '(none)'}: set `target_modules` to some of them, or to "
        '"all-linear".'
    )
