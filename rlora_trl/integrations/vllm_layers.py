"""
Experimental: layers for vLLM that compute R-LoRA with routers that decide per token, beside plain LoRA.

vLLM puts a LoRA layer around each linear layer, the first of a tuple of classes that accepts it. `register_layers`
replaces these classes by subclasses, as vllm-ascend and vllm-gaudi do. A subclass differs in two places: it reads from
the matrices of an adapter whether they are in the packed form (`vllm_packing`), and weights heads between the two
products (`kernels/slots.py`). Everything else is vLLM's: loading, slots, kernels, quantization, tensor parallelism.

The tuple is private, so one release of vLLM is accepted. vLLM is imported when the layers are registered.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.slots import SlotLayout, mix_slots
from .vllm_packing import is_packed, unpack_layer


if TYPE_CHECKING:
    from vllm.lora.layers import BaseLayerWithLoRA


logger = logging.getLogger("vllm.rlora_trl")

VLLM_VERSION = "0.32.0"


class RankSpaceKernels:
    """
    vLLM's kernels (a `PunicaWrapperBase`) as one layer calls them: heads are weighted before the second product.

    Args:
        kernels (`PunicaWrapperBase`): The kernels, and which token belongs to which slot.
        layouts (`torch.Tensor` of shape `[S, L, 5]`, int32): A [`SlotLayout`] for each slice and slot.
        partial_ranks (`int`): Ranks among which the inputs of the layer are divided, where vLLM doesn't add up the
            first product itself. 1 if each has all of them.
    """

    def __init__(self, kernels: Any, layouts: torch.Tensor, partial_ranks: int) -> None:
        self.kernels, self.layouts, self.partial_ranks = kernels, layouts, partial_ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def add_expand(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """
        Weight heads, then add the second product to `y`. Fully sharded layers call it, with complete first products.

        Args:
            y (`torch.Tensor` of shape `[T, d_out]`): Receives the deltas.
            x (`torch.Tensor` of shape `[S, T, M]`): First products in float32.
        """
        return self.kernels.add_expand(y, mix_slots(x, self._slots(x.shape[1]), self.layouts), *args, **kwargs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> Any:
        """
        Add the deltas of all slices of a layer to its output.

        Args:
            y (`torch.Tensor` of shape `[T, d_out]`): Receives the deltas.
            x (`torch.Tensor` of shape `[T, d_in]`): Tokens.
            lora_a_stacked (`tuple[torch.Tensor, ...]`): For each slice `[L, 1, M, d_in]`.
            lora_b_stacked (`tuple[torch.Tensor, ...]`): For each slice `[L, 1, its outputs, M]`.
            scale (`float`): Factor of the deltas.
            output_slices (`tuple[int, ...]`): Outputs of each slice.
            add_inputs (`bool`, *optional*, defaults to `True`): Add to `y` rather than write over it.
        """
        width = lora_b_stacked[0].shape[-1]
        u = torch.zeros((len(output_slices), x.shape[0], width), dtype=torch.float32, device=x.device)
        self.kernels.add_shrink(u, x, lora_a_stacked, scale, **kwargs)
        if self.partial_ranks > 1:
            from vllm.distributed import tensor_model_parallel_all_reduce

            # Logits must be complete. Each rank then adds its share of the delta, as vLLM adds up the outputs.
            u = tensor_model_parallel_all_reduce(u)
        z = mix_slots(u, self._slots(x.shape[0]), self.layouts)
        if self.partial_ranks > 1:
            z = z / self.partial_ranks
        return self.kernels.add_expand(y, z, lora_b_stacked, output_slices, add_inputs=add_inputs, **kwargs)

    def _slots(self, tokens: int) -> torch.Tensor:
        """The slot of each token: negative for those without an adapter, any number for those that pad a batch."""
        on_gpu = getattr(self.kernels, "token_mapping_meta", None)
        if on_gpu is not None:
            # The buffer that graphs read; it also covers the tokens that pad a batch.
            return on_gpu.token_lora_mapping[:tokens]
        return self.kernels.token_lora_indices


class PackedLoRAMixin:
    """The part of a layer that differs from vLLM's class, which comes after it in the order of bases."""

    rlora_layouts: torch.Tensor
    # Whether the inputs are divided among ranks, and vLLM adds up outputs only.
    adds_up_outputs = False

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        super().create_lora_weights(max_loras, lora_config, model_config)  # type: ignore[misc]
        slices = len(self.lora_a_stacked)  # type: ignore[attr-defined]
        device = self.lora_a_stacked[0].device  # type: ignore[attr-defined]
        self.rlora_layouts = torch.zeros((slices, max_loras, len(SlotLayout())), dtype=torch.int32, device=device)

    def set_mapping(self, punica_wrapper: Any) -> None:
        ranks = self.tp_size if self.adds_up_outputs else 1  # type: ignore[attr-defined]
        super().set_mapping(RankSpaceKernels(punica_wrapper, self.rlora_layouts, ranks))  # type: ignore[misc]

    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)  # type: ignore[misc]
        self.rlora_layouts[:, index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """
        Copy the matrices of an adapter, packed or plain, to a slot.

        Args:
            index (`int`): The slot.
            lora_a (`torch.Tensor`, or a list of them): One for the layer, or one for each slice, `None` for slices
                that the adapter leaves alone.
            lora_b: Like `lora_a`.

        Raises:
            ValueError: If a header is damaged, or vLLM would divide packed matrices among slices in another way.
        """
        d_in = self.base_layer.input_size  # type: ignore[attr-defined]
        whole = isinstance(lora_a, torch.Tensor)
        pairs = [(lora_a, lora_b)] if whole else list(zip(lora_a, lora_b, strict=True))
        unpacked = [(a, b, SlotLayout()) if a is None else unpack_layer(a, b, d_in) for a, b in pairs]
        slices = self.rlora_layouts.shape[0]
        layouts = [layout for _, _, layout in unpacked] * (slices if whole else 1)
        if len(layouts) != slices and any(a is not None and is_packed(a, d_in) for a, _ in pairs):
            raise ValueError(
                f"The adapter has {len(pairs)} pairs of matrices for a layer of {slices} slices, which the plugin "
                "can't divide for R-LoRA. Leave the layer out of the adapter, or export it with `export_lora`."
            )

        downs, ups = [down for down, _, _ in unpacked], [up for _, up, _ in unpacked]
        super().set_lora(index, *((downs[0], ups[0]) if whole else (downs, ups)))  # type: ignore[misc]
        if len(layouts) == slices:
            self.rlora_layouts[:, index] = torch.tensor(layouts, dtype=torch.int32).to(self.rlora_layouts.device)


def layer_class(base: type[BaseLayerWithLoRA]) -> type[BaseLayerWithLoRA]:
    """The subclass of one of vLLM's LoRA layers that also computes R-LoRA; other layers are returned as they are."""
    from vllm.lora.layers import RowParallelLinearWithLoRA, RowParallelLinearWithShardedLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    if not issubclass(base, BaseLinearLayerWithLoRA) or issubclass(base, PackedLoRAMixin):
        return base
    rows = issubclass(base, RowParallelLinearWithLoRA) and not issubclass(base, RowParallelLinearWithShardedLoRA)
    return type(f"RLora{base.__name__}", (PackedLoRAMixin, base), {"adds_up_outputs": rows, "__module__": __name__})


def register_layers() -> None:
    """
    Replace vLLM's LoRA layers by those of this module, in this process. Calling it again changes nothing.

    Raises:
        RuntimeError: If another release of vLLM than [`VLLM_VERSION`] is installed, or it is set to compute LoRA on a
            second stream.
    """
    import vllm
    from vllm import envs
    from vllm.lora import utils

    found = vllm.__version__.partition("+")[0]
    if found != VLLM_VERSION:
        raise RuntimeError(
            f"The experimental layers for R-LoRA replace private parts of vLLM {VLLM_VERSION}, and {found} is "
            f"installed. Install `vllm=={VLLM_VERSION}`, or unset `RLORA_VLLM_LAYERS`: routers that decide per token "
            "are then served approximately, as plain LoRA."
        )
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise RuntimeError(
            "`VLLM_LORA_ENABLE_DUAL_STREAM` can't be used with `RLORA_VLLM_LAYERS`, as logits must be added up among "
            "ranks in the order of the base model's products. Unset one of them."
        )
    utils._all_lora_classes = tuple(layer_class(base) for base in utils._all_lora_classes)
    logger.info("Experimental layers for R-LoRA are in use: routers that decide per token are served exactly.")
