"""`RLoraConfig`: everything that defines the function of an adapter, and is saved with it."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from peft import PeftConfig
from typing_extensions import override

from ..reading import first_few, read_safetensors_header, shorten
from .config_fields import check_fields
from .initialization import INIT_SCHEMES, ROUTER_INITS
from .layer_names import is_plain, module_of, value_for
from .task_names import MAX_TASKS, task_name


SAFETENSORS_NAME = "adapter_model.safetensors"
ROUTERS = ("softmax", "top_k", "task", "uniform")
DROPOUT_POSITIONS = ("head", "input")
# PEFT compares all of them with each parameter of a model.
_MAX_PARAMETERS = 100
BIASES = ("none", "all", "rlora_only")


class RLoraPeftType(str, Enum):  # noqa: UP042 - as `peft.PeftType`; StrEnum prints differently
    """The method's type, as other packages can't extend `peft.PeftType`; transformers reads `.value`."""

    RLORA = "RLORA"


class AdapterSource(NamedTuple):
    """Where an adapter was loaded from: a folder or a Hub repository, its revision, and a subfolder."""

    name: str
    revision: str | None = None
    subfolder: str | None = None


@dataclass
class RLoraConfig(PeftConfig):
    """
    Configuration of an R-LoRA adapter ([R-LoRA: Randomized Multi-Head
    LoRA](https://huggingface.co/papers/2502.15455)).

    Args:
        r (`int`, *optional*, defaults to `4`):
            Rank of each head. A layer with fewer inputs or outputs gets the largest possible rank.
        num_heads (`int`, *optional*, defaults to `3`):
            Number N of head matrices B.
        lora_alpha (`int`, *optional*, defaults to `32`):
            Numerator of the scaling.
        use_rslora (`bool`, *optional*, defaults to `True`):
            Scale by `lora_alpha / sqrt(r)` rather than by `lora_alpha / r`.
        target_modules (`str` or `list[str]`, *optional*):
            Names of the layers to adapt, a regular expression, or `"all-linear"`. By default the MLP projections,
            which the paper trains.
        exclude_modules (`str` or `list[str]`, *optional*):
            Names, or a regular expression, of layers to leave out.
        target_parameters (`list[str]`, *optional*):
            Names of weights of experts to adapt, parameters of three dimensions such as `"experts.gate_up_proj"`; each
            expert gets its own adapter. By default those of known architectures, if `target_modules` is not set;
            `[]` for none.
        head_dropout (`float`, *optional*, defaults to `0.0`):
            Probability in `[0, 1)` that an element is dropped during training. The paper has 0.2
            ([`RLoraConfig.paper`]); on the small models of docs/results.md that gained nothing, and cost up to four
            points.
        dropout_position (`str`, *optional*, defaults to `"head"`):
            `"head"`: one independent mask for each head on A x (the paper's multi-head dropout). `"input"`: one mask
            on the x that A sees (HydraLoRA). Where `head_dropout` is 0 it has no effect.
        init_weights (`str` or `bool`, *optional*, defaults to `"rlora"`):
            `"rlora"`: Table 1 of the paper. `"zero_a"`: B random, A zero. `"zero_b"`: A Kaiming-uniform, B zero
            (HydraLoRA, LoRA). `False`: a delta that is not zero, for tests.
        init_gamma (`float`, *optional*, defaults to `64.0`):
            Constant gamma of Table 1: the standard deviations are `d_out**0.25 / sqrt(gamma * fan)`.
        router (`str`, *optional*, defaults to `"softmax"`):
            How the heads are weighted. `"softmax"`: softmax of the router's logits for each token. `"top_k"`: the
            same over the `router_top_k` largest logits. `"task"`: learned weights for each of `tasks`. `"uniform"`:
            equal weights.
        router_init (`str`, *optional*, defaults to `"zeros"`):
            `"zeros"`: equal head weights at the start, so that the model at step 0 is the base model.
            `"kaiming_uniform"`: as in the authors' code; only close to the base model. `"top_k"` needs it.
        router_top_k (`int`, *optional*):
            Number of heads for each token with `router="top_k"`, from 2 to `num_heads - 1`.
        share_a (`bool`, *optional*, defaults to `True`):
            One A for all heads; `False` gives each its own (Multi-LoRA, LoRA-MoE).
        tasks (`list[str]`, *optional*):
            Names of the tasks that the adapter was trained on. The trainer fills it in. `router="task"` needs them
            when the adapter is created, and its rows are in their order.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train in full and to save.
        layers_to_transform (`int` or `list[int]`, *optional*), layers_pattern (`str` or `list[str]`, *optional*):
            Indices of the layers to adapt and the name of the list that they index, as in `LoraConfig`.
        rank_pattern (`dict`, *optional*), alpha_pattern (`dict`, *optional*):
            Ranks or alphas by layer name or regular expression.
        fan_in_fan_out (`bool`, *optional*, defaults to `False`):
            The weight is stored as `[d_in, d_out]`. Set automatically for transformers' `Conv1D`.
        bias (`str`, *optional*, defaults to `"none"`):
            Which biases to train: `"none"`, `"all"` or `"rlora_only"`.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Rows of the token embedding to train, as in `LoraConfig`.
        saved_embeddings (`list[str]`, *optional*):
            Names of embeddings and output heads that the adapter's file holds as a whole, because the vocabulary of
            the base model was resized. Saving sets it.

    Raises:
        ValueError: If a value is out of range, or fields contradict each other.
        TypeError: If a value has another type.
    """

    # Not a field, because it is not saved. Set when a configuration is loaded, to find other files of the adapter.
    source: ClassVar[AdapterSource | None] = None
    # The token and cache that it was loaded with.
    download: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    # Not a field either: whether it was read from a file. transformers calls `PeftConfig.from_pretrained`, which does
    # not call `from_pretrained` below.
    loaded: ClassVar[bool] = False

    r: int = field(default=4, metadata={"help": "Rank of each head."})
    num_heads: int = field(default=3, metadata={"help": "Number of head matrices B."})
    lora_alpha: int = field(default=32, metadata={"help": "Numerator of the scaling."})
    use_rslora: bool = field(
        default=True, metadata={"help": "Scale by `lora_alpha / sqrt(r)` rather than by `lora_alpha / r`."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the layers to adapt, a regular expression, or 'all-linear'; by default MLP projections."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of layers to leave out."}
    )
    head_dropout: float = field(default=0.0, metadata={"help": "Probability in [0, 1) that an element is dropped."})
    dropout_position: Literal["head", "input"] = field(
        default="head",
        metadata={"help": "Where dropout acts: for each head on A x ('head'), or on the input of A ('input')."},
    )
    init_weights: str | bool = field(
        default="rlora",
        metadata={"help": "Initial values: 'rlora' (Table 1 of the paper), 'zero_a', 'zero_b' or False (for tests)."},
    )
    init_gamma: float = field(default=64.0, metadata={"help": "Constant gamma of the paper's Table 1."})
    router: Literal["softmax", "top_k", "task", "uniform"] = field(
        default="softmax", metadata={"help": "How the heads are weighted."}
    )
    router_init: Literal["zeros", "kaiming_uniform"] = field(
        default="zeros", metadata={"help": "Initial values of the router."}
    )
    router_top_k: int | None = field(
        default=None, metadata={"help": "Number of heads for each token with router='top_k'."}
    )
    share_a: bool = field(default=True, metadata={"help": "Use one A for all heads rather than one for each."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Names of the tasks that the adapter was trained on; the trainer fills it in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that `layers_to_transform` indexes."}
    )
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "Ranks by layer name or regular expression."})
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "Alphas by layer name or regular expression."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "The weight is stored as [d_in, d_out]."})
    bias: Literal["none", "all", "rlora_only"] = field(default="none", metadata={"help": "Which biases to train."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the token embedding to train."}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of weights of experts to adapt; by default those of known architectures."},
    )
    saved_embeddings: list[str] | None = field(
        default=None, metadata={"help": "Embeddings that the adapter's file holds as a whole; saving sets it."}
    )

    def __post_init__(self) -> None:
        # In a file the method is text, and PEFT has filled in these fields.
        saved = self.inference_mode or self.peft_version is not None
        from_file = type(vars(self).get("peft_type")) is str
        self.loaded = saved and from_file  # type: ignore[misc]
        if self.loaded:
            check_fields(vars(self))
        if from_file:
            self._fill_in_defaults()
        super().__post_init__()
        self.peft_type = RLoraPeftType.RLORA
        # PEFT tests names one by one, and JSON has no sets.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_parameters, list | tuple | Set):
            self.target_parameters = list(dict.fromkeys(self.target_parameters))
        self._check_parameters()
        self._check_sizes()
        self._check_choices()
        self._check_layers()
        self._check_router()
        self._check_tasks()
        self._check_symmetry()

    def _fill_in_defaults(self) -> None:
        """Null in a file stands for the default (docs/format.md), of the fields that are not PEFT's."""
        inherited = {field.name for field in fields(PeftConfig)}
        for entry in fields(self):
            if entry.init and entry.name not in inherited and getattr(self, entry.name) is None:
                value = entry.default if entry.default_factory is MISSING else entry.default_factory()
                setattr(self, entry.name, value)

    def _check_parameters(self) -> None:
        names = self.target_parameters
        if names is not None and (
            not isinstance(names, list) or not all(isinstance(name, str) and is_plain(name) for name in names)
        ):
            raise TypeError(
                f"`target_parameters` must be a list of names, got {shorten(names)}. For example "
                "['experts.gate_up_proj', 'experts.down_proj']; regular expressions are not accepted."
            )
        if names is not None and len(names) > _MAX_PARAMETERS:
            raise ValueError(
                f"`target_parameters` has {len(names)} names, more than {_MAX_PARAMETERS}. Name what they end in, and "
                "select layers with `layers_to_transform`."
            )

    def _check_sizes(self) -> None:
        # Sizes of all layers
        for name in ("r", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"`{name}` must be an integer of at least 1, got {shorten(value)}. Set `{name}=4`, for example."
                )

        # Flags: Python takes any text for true
        for name in ("use_rslora", "share_a", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"`{name}` must be True or False, got {shorten(getattr(self, name))}. Remove the quotes if it is "
                    "text."
                )

        # Types of patterns, whose values follow
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                setattr(self, name, {})
            if not isinstance(getattr(self, name), dict):
                raise TypeError(
                    f"`{name}` must be a dictionary of layer names and numbers, got "
                    f"{shorten(getattr(self, name))}. For "
                    'example {"down_proj": 8}.'
                )

        # Numbers, of all layers and of some
        for name in ("lora_alpha", "head_dropout", "init_gamma"):
            self._check_number(name, getattr(self, name))
        for pattern, value in self.alpha_pattern.items():
            self._check_number(f"alpha_pattern[{shorten(pattern)}]", value)
        for pattern, value in self.rank_pattern.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"`rank_pattern[{shorten(pattern)}]` must be an integer of at least 1, got {shorten(value)}. Use "
                    "`exclude_modules` to leave a layer out."
                )

        # Ranges
        if not 0.0 <= self.head_dropout < 1.0:
            raise ValueError(
                f"`head_dropout` must be in [0, 1), got {shorten(self.head_dropout)}. Set it to 0 to turn dropout off."
            )
        if not (math.isfinite(self.init_gamma) and self.init_gamma > 0):
            raise ValueError(
                f"`init_gamma` must be a positive number, got {shorten(self.init_gamma)}. The paper uses 64."
            )

    @staticmethod
    def _check_number(name: str, value: Any) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"`{name}` must be a number, got {shorten(value)}. Remove the quotes if it is one.")

    def _check_choices(self) -> None:
        choices = {
            "router": ROUTERS,
            "router_init": ROUTER_INITS,
            "dropout_position": DROPOUT_POSITIONS,
            "init_weights": INIT_SCHEMES,
            "bias": BIASES,
        }
        for name, accepted in choices.items():
            value = getattr(self, name)
            # `0 == False`, but 0 is a typo rather than a scheme; a file may have a list.
            if not isinstance(value, str | bool) or value not in accepted:
                choices_text = ", ".join(map(repr, accepted))
                raise ValueError(
                    f"`{name}` must be one of {choices_text}, got {shorten(value)}. Set `{name}={accepted[0]!r}`."
                )

    def _check_layers(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and isinstance(self.target_modules, str):
                raise ValueError(
                    f"`{name}` selects layers by index and needs `target_modules` as a list of names, got the string "
                    f"{self.target_modules!r}. Write the layers into the regular expression instead."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern={self.layers_pattern!r}` needs `layers_to_transform`, which is "
                f"{self.layers_to_transform!r}. Set it to the indices of the layers to adapt."
            )

    def _check_router(self) -> None:
        top_k = self.router_top_k
        if self.router != "top_k":
            if top_k is not None:
                raise ValueError(
                    f"`router_top_k={shorten(top_k)}` belongs to `router='top_k'`, but `router` is {self.router!r}. "
                    "Leave it unset, or set `router='top_k'`."
                )
        elif not isinstance(top_k, int) or isinstance(top_k, bool) or not 2 <= top_k < self.num_heads:
            raise ValueError(
                f"`router='top_k'` needs `router_top_k` from 2 to `num_heads - 1` = {self.num_heads - 1}, got "
                f"{shorten(top_k)}. A single head would always weigh 1, whatever the router learns; for all heads set "
                "`router='softmax'`."
            )
        elif self.router_init == "zeros" and self.init_weights is not False:
            raise ValueError(
                "`router='top_k'` can't start from `router_init='zeros'`: all logits are equal, so every token would "
                "use the same heads, and the others would get no gradient. Set `router_init='kaiming_uniform'`."
            )
        if self.num_heads == 1 and self.router != "uniform" and not self.loaded:
            warnings.warn(
                f"With `num_heads=1` the parameters of `router={self.router!r}` get no gradient: one head always has "
                "weight 1. Set `router='uniform'`, or more heads.",
                stacklevel=4,
            )

    def _check_tasks(self) -> None:
        if self.tasks is None:
            return
        # A set has no order, and that of the router's rows must be the same in all processes.
        is_list = isinstance(self.tasks, Iterable) and not isinstance(self.tasks, str | bytes | Set)
        if not is_list or not all(isinstance(task, str) and task.strip() for task in self.tasks):
            raise TypeError(
                f"`tasks` must be a list of names, got {shorten(self.tasks)}. For example ['sst2', 'rte']; a number "
                "is written as text."
            )
        try:
            self.tasks = [task_name(task) for task in self.tasks]
        except ValueError as error:
            raise ValueError(f"`tasks` has a name that can't be used. {error}") from error
        if len(self.tasks) > MAX_TASKS:
            raise ValueError(
                f"`tasks` names {len(self.tasks)} tasks, and an adapter has at most {MAX_TASKS}. Name groups of tasks."
            )
        counts = Counter(self.tasks)
        repeated = sorted(task for task, count in counts.items() if count > 1)
        if repeated:
            raise ValueError(
                f"`tasks` names {first_few(map(repr, repeated))} more than once. Give each task one name."
            )

    def _check_symmetry(self) -> None:
        if self.loaded:
            return
        identical_heads = self.init_weights == "zero_b" and self.num_heads > 1 and self.share_a
        masks_differ = self.head_dropout > 0 and self.dropout_position == "head"
        if identical_heads and not masks_differ and (self.router == "uniform" or self.router_init == "zeros"):
            warnings.warn(
                "With `init_weights='zero_b'` all heads start equal, and without head dropout or a random router they "
                "get the same gradients: they remain copies of each other. Set `router_init='kaiming_uniform'` (as "
                "HydraLoRA does), `head_dropout` above 0 or `init_weights='rlora'`.",
                stacklevel=4,
            )

    @classmethod
    def paper(cls, **overrides: Any) -> RLoraConfig:
        """
        The method as in the paper ([arXiv 2502.15455](https://huggingface.co/papers/2502.15455), section 4).

        One A, heads that start at random values of Table 1, head dropout 0.2, a softmax router. These values stay,
        also if the defaults of [`RLoraConfig`] change. Sizes, such as `r` and `num_heads`, are the defaults.

        Args:
            overrides: Fields of [`RLoraConfig`] to override.
        """
        preset: dict[str, Any] = {"lora_alpha": 32, "use_rslora": True, "share_a": True, "router": "softmax"}
        preset |= {"router_init": "zeros", "init_weights": "rlora", "init_gamma": 64.0}
        preset |= {"dropout_position": "head", "head_dropout": 0.2}
        return cls(**{**preset, **overrides})

    @classmethod
    def hydra_lora(cls, **overrides: Any) -> RLoraConfig:
        """
        HydraLoRA ([arXiv 2404.19245](https://huggingface.co/papers/2404.19245)): one A, heads that start at zero, a
        random softmax router, dropout on the input, scaling alpha / r.

        Args:
            overrides: Fields of [`RLoraConfig`] to override.
        """
        preset = {"init_weights": "zero_b", "router": "softmax", "router_init": "kaiming_uniform"}
        return cls(**{**preset, "dropout_position": "input", "head_dropout": 0.05, "use_rslora": False, **overrides})

    @classmethod
    def multi_lora(cls, **overrides: Any) -> RLoraConfig:
        """
        The mean of several LoRA adapters, each with its own A.

        Args:
            overrides: Fields of [`RLoraConfig`] to override.
        """
        preset = {"init_weights": "zero_b", "router": "uniform", "share_a": False}
        return cls(**{**preset, "dropout_position": "input", "head_dropout": 0.05, "use_rslora": False, **overrides})

    @classmethod
    def moe_lora(cls, **overrides: Any) -> RLoraConfig:
        """
        LoRA adapters as a mixture of experts: each with its own A, two of them for each token.

        Args:
            overrides: Fields of [`RLoraConfig`] to override.
        """
        preset = {"init_weights": "zero_b", "router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform"}
        preset |= {"share_a": False, "dropout_position": "input", "head_dropout": 0.05, "use_rslora": False}
        return cls(**{**preset, **overrides})

    @classmethod
    def mtl_lora(cls, **overrides: Any) -> RLoraConfig:
        """
        One A and learned head weights for each task, as in MTL-LoRA ([arXiv
        2410.09437](https://huggingface.co/papers/2410.09437)), without its transformation of A x for each task. The
        head weights start at random: with equal weights, heads that start at zero would remain copies of each other.

        Args:
            overrides: Fields of [`RLoraConfig`] to override.
        """
        preset = {"init_weights": "zero_b", "router": "task", "router_init": "kaiming_uniform"}
        return cls(**{**preset, "dropout_position": "input", "head_dropout": 0.05, "use_rslora": False, **overrides})

    def scaling(self, r: int | None = None, alpha: float | None = None) -> float:
        """The factor of the delta for a rank and an alpha, by default the configured ones."""
        r = self.r if r is None else r
        alpha = self.lora_alpha if alpha is None else alpha
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def rank_of(self, layer: str, *sizes: int) -> int:
        """
        The rank in a layer: that of `rank_pattern`, or `r`, limited by the sizes of the layer.

        Args:
            layer (`str`): The layer's name in the model.
            sizes (`int`): Its input and output features.
        """
        rank = value_for(self.rank_pattern, layer, self.r)
        return min(rank, *sizes) if sizes else rank

    def alpha_of(self, layer: str) -> float:
        """The alpha in a layer: that of `alpha_pattern`, or `lora_alpha`."""
        return value_for(self.alpha_pattern, layer, self.lora_alpha)

    @override
    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """
        Save the configuration; see `peft.PeftConfig.save_pretrained`.

        It announces the embeddings in the weights beside it, which a `PeftModel` saves first.
        """
        weights = os.path.join(save_directory, SAFETENSORS_NAME)
        if os.path.isfile(weights):
            saved = tuple(f"{name}.weight" for name in self.modules_to_save or ())
            others = [name for name in read_safetensors_header(weights) if not saved or not name.endswith(saved)]
            self.saved_embeddings = sorted({name for name in map(module_of, others) if name is not None}) or None
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    @override
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RLoraConfig:
        """
        Load the configuration from a folder or a Hub repository; see `peft.PeftConfig.from_pretrained`.

        Raises:
            ValueError: If the folder has weights that are truncated or not safetensors.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.source = AdapterSource(str(pretrained_model_name_or_path), kwargs.get("revision"), subfolder)
        config.download = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
        weights = os.path.join(str(pretrained_model_name_or_path), subfolder or "", SAFETENSORS_NAME)
        if os.path.isfile(weights):
            check_safetensors_file(weights)
        return config


def check_safetensors_file(path: str) -> None:
    """
    Check that the header of a safetensors file describes it exactly, before anything reads it.

    Args:
        path (`str`): The file.

    Raises:
        ValueError: If it does not.
    """
    read_safetensors_header(path)
