"""
Sees the products of an experts module with its weights, and adds the deltas of adapters to them.

Models compute experts in many ways: a loop, one product for each row, grouped products, or a padded batch. Only the
products with the experts' weights differ from those of an adapted model. PyTorch passes each operation of a `with`
block to a `TorchFunctionMode`, so the module's own code runs unchanged, whichever way its model has chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..kernels.grouped import RowGroups, sort_by_expert


# Operations by name. `@` is `Tensor.matmul` in some versions.
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
_PLAIN = ("linear", "matmul", "__matmul__", "mm")
_BATCHED = ("bmm",)
# Those that only look at a weight.
_LOOKS = frozenset(
    ("__get__", "__set__", "size", "dim", "stride", "numel", "data_ptr", "element_size", "type", "__len__")
)
_LOOKS |= frozenset(
    ("is_contiguous", "storage_offset", "untyped_storage", "get_device", "is_floating_point", "__hash__")
)
_LOOKS |= frozenset(("__repr__", "ndimension", "nelement", "_is_view", "__format__", "__bool__", "is_complex"))
# Those that give the same weights in another form.
_SAME = ("to", "type_as", "contiguous", "detach", "bfloat16", "half", "float")


class ExpertRows(NamedTuple):
    """
    The rows of a product.

    Args:
        groups ([`RowGroups`]): Their experts.
        tokens (`torch.Tensor` of shape `[S]`, *optional*): The token of each row; `None` if that is not known.
        num_tokens (`int`): Number of tokens, T.
        per_token (`int`, *optional*): Experts that each token is sent to; `None` if that is not known.
        sparse (`bool`, *optional*, defaults to `False`): Rows of zeros stand for tokens that an expert does not get.
    """

    groups: RowGroups
    tokens: torch.Tensor | None
    num_tokens: int
    per_token: int | None = None
    sparse: bool = False


class Products(Protocol):
    """What is added to the products with one weight of an experts module."""

    in_features: int
    num_experts: int

    def add_delta(self, out: torch.Tensor, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """
        The product with the deltas of its rows.

        Args:
            out (`torch.Tensor` of shape `[S, d_out]`): The product.
            x (`torch.Tensor` of shape `[S, d_in]`): Its rows, sorted by expert.
            rows ([`ExpertRows`]): Their experts and tokens.
        """

    def joined_product(
        self,
        x: torch.Tensor,
        rows: ExpertRows,
        product: Callable[[torch.Tensor], torch.Tensor],
        product_backward: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        """
        [`add_delta`] together with the product, or `None` if that has to be computed first.

        Args:
            x (`torch.Tensor` of shape `[S, d_in]`), rows ([`ExpertRows`]): As in [`add_delta`].
            product (`Callable`): The product of rows with the weight, which is frozen.
            product_backward (`Callable`): The gradient of its rows.
        """


class _Weight(NamedTuple):
    """A weight `[E, ...]` of all experts, or a part of it: of one expert, or of the expert of each row."""

    name: str
    tensor: torch.Tensor  # kept, so that no other tensor gets its id
    expert: int | None = None
    experts: torch.Tensor | None = None


class ExpertProducts(TorchFunctionMode):
    """
    Adds deltas to the products of an experts module while its `forward` runs.

    Args:
        module (`torch.nn.Module`): The module, with weights of three dimensions.
        products (`Mapping[str, Products]`): What to add, by the name of the weight.
        tokens (`torch.Tensor` of shape `[T, d_in]`): The input of the module.
        per_token (`int`, *optional*): See [`ExpertRows`].
    """

    def __init__(
        self,
        module: nn.Module,
        products: Mapping[str, Products],
        tokens: torch.Tensor,
        per_token: int | None = None,
    ) -> None:
        super().__init__()
        self.module, self.products, self.tokens, self.per_token = module, products, tokens, per_token
        self.called: set[str] = set()
        self._grad = torch.is_grad_enabled()
        self._parts: dict[int, _Weight] = {}
        self._rows: torch.Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = self._weight_in([*args[:3], *kwargs.values()])
        if weight is None:
            self._note_rows(func, args, kwargs)
            return func(*args, **kwargs)

        name = getattr(func, "__name__", str(func))
        name = name if name != "default" else str(func).split(".")[-2]
        if name in _GROUPED or name in _PLAIN or name in _BATCHED:
            self.called.add(weight.name)
            if self._grad and not torch.is_grad_enabled():
                # As DeepSpeed ZeRO-3 does with `linear`: a delta would get no gradient.
                raise self._unknown(weight.name, f"`{name}` within an autograd function")
            form = self._grouped if name in _GROUPED else self._plain if name in _PLAIN else self._batched
            return form(weight, func, args, kwargs)

        result = func(*args, **kwargs)
        if name == "__getitem__":
            self._note_index(weight, args[1], result)
        elif name in _SAME or name in ("transpose", "t", "__get__") and isinstance(result, torch.Tensor):
            # `__get__` also reads `T`, `mT` and `data`, and the gradient.
            self._parts[id(result)] = weight._replace(tensor=result)
        elif name not in _LOOKS:
            raise self._unknown(weight.name, name)
        return result

    # Weights

    def _weight_in(self, values: Sequence[Any]) -> _Weight | None:
        """The adapted weight among the arguments of an operation."""
        for value in values:
            if isinstance(value, torch.Tensor):
                known = self._parts.get(id(value))
                if known is not None:
                    return known
                # FSDP replaces parameters when it gathers them, so they are looked up each time.
                for name in self.products:
                    if value is self.module._parameters[name]:
                        return _Weight(name, value)  # type: ignore[arg-type]
        return None

    def _note_index(self, weight: _Weight, index: Any, result: torch.Tensor) -> None:
        """`weight[index]`: the matrix of one expert, or one for each row."""
        whole = weight.expert is None and weight.experts is None
        if whole and isinstance(index, torch.Tensor) and index.ndim == 1 and not index.is_floating_point():
            self._parts[id(result)] = weight._replace(tensor=result, experts=index)
        elif whole and (isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0)):
            self._parts[id(result)] = weight._replace(tensor=result, expert=int(index))
        else:
            raise self._unknown(weight.name, f"an index of type {type(index).__name__}")

    # Rows

    def _note_rows(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Remember which tokens were selected from the input of the module."""
        name = getattr(func, "__name__", "")
        if name not in ("__getitem__", "repeat_interleave") or not self._is_input(args[0]):
            return
        if name == "__getitem__" and isinstance(args[1], torch.Tensor) and args[1].ndim == 1:
            self._rows = args[1]
        elif name == "repeat_interleave":
            repeats = args[1] if len(args) > 1 else kwargs["repeats"]
            self._rows = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(repeats)

    def _is_input(self, value: Any) -> bool:
        """Whether a tensor is the input of the module. Hooks of DeepSpeed ZeRO-3 pass another one on its memory."""
        tokens = self.tokens
        if value is tokens or type(value) is not torch.Tensor or type(tokens) is not torch.Tensor:
            return value is tokens
        return value.shape == tokens.shape and value.data_ptr() == tokens.data_ptr()

    # Products

    def _grouped(
        self, weight: _Weight, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """`grouped_mm(x, weight, offs)`, rows sorted by expert."""
        x, matrices, rest = args[0], args[1], args[2:]
        rows = self._rows_of(RowGroups(offsets=kwargs["offs"] if "offs" in kwargs else rest[0]))
        if not matrices.requires_grad:
            out = self._checked(weight, x).joined_product(
                *(x, rows),
                lambda tokens: func(tokens, matrices, *rest, **kwargs),
                lambda dy: func(dy, matrices.transpose(-2, -1), *rest, **kwargs),
            )
            if out is not None:
                return out
        return self._add(weight, func(*args, **kwargs), x, rows)

    def _plain(self, weight: _Weight, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """`linear(x, weight_e)` or `x @ weight_e`, the rows of one expert."""
        out = func(*args, **kwargs)
        if weight.expert is None or args[0].ndim != 2:
            raise self._unknown(weight.name, f"a product with rows of shape {list(args[0].shape)}")
        return self._add(weight, out, args[0], self._rows_of(RowGroups(expert=weight.expert)))

    def _batched(
        self, weight: _Weight, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """`bmm` with one matrix for each row, or with one for each expert and as many rows for all."""
        out = func(*args, **kwargs)
        count = self.products[weight.name].num_experts
        if weight.experts is not None:
            x = args[1] if args[0] is weight.tensor else args[0]
            rows, experts = x.reshape(len(x), -1), weight.experts  # [S, d_in], [S]
            order, groups = sort_by_expert(experts, count)
            tokens = None if self._rows is None else self._rows[order]
            of_rows = ExpertRows(groups, tokens, len(self.tokens), self.per_token)
            result = self._add(weight, out.reshape(len(out), -1)[order], rows[order], of_rows)
            return result[torch.argsort(order)].view_as(out)

        x = args[0]  # [E, C, d_in]
        if weight.expert is not None or x.shape[0] != count or x is weight.tensor:
            raise self._unknown(weight.name, f"a batched product with rows of shape {list(x.shape)}")
        offsets = torch.arange(1, count + 1, dtype=torch.int32, device=x.device) * x.shape[1]
        # Every expert gets all tokens, those of others as zeros.
        tokens = torch.arange(x.shape[1], device=x.device).repeat(count)
        of_rows = ExpertRows(RowGroups(offsets=offsets), tokens, x.shape[1], sparse=True)
        return self._add(weight, out.flatten(0, 1), x.reshape(-1, x.shape[2]), of_rows).view_as(out)

    def _rows_of(self, groups: RowGroups) -> ExpertRows:
        return ExpertRows(groups, self._rows, len(self.tokens), self.per_token)

    def _add(self, weight: _Weight, out: torch.Tensor, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        return self._checked(weight, x).add_delta(out, x, rows)

    def _checked(self, weight: _Weight, x: torch.Tensor) -> Products:
        """What to add to the product of rows with a weight, if they fit its adapters."""
        products = self.products[weight.name]
        if x.shape[1] != products.in_features:
            raise RuntimeError(
                f"{type(self.module).__name__} multiplies `{weight.name}` by rows of {x.shape[1]} features, but its "
                f"adapter was created for {products.in_features}. Leave it out of `target_parameters`."
            )
        return products

    # Failures

    def check(self) -> None:
        """
        Check that all weights were used, after `forward`.

        Raises:
            RuntimeError: If one was not.
        """
        missed = sorted(set(self.products) - self.called)
        if missed and self.tokens.numel():
            raise self._unknown(missed[0], "a kernel that PyTorch does not see")

    def _unknown(self, weight: str, what: str) -> RuntimeError:
        config = getattr(self.module, "config", None)
        implementation = getattr(config, "_experts_implementation", None)
        return RuntimeError(
            f"{type(self.module).__name__} computes with `{weight}` by {what}, to which R-LoRA can't add (experts "
            f'implementation {implementation!r}). Call `model.set_experts_implementation("grouped_mm")`, or leave it '
            "out of `target_parameters`."
        )
