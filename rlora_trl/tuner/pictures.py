"""Layers that see the pictures or sounds of a batch as one sequence of their own, and which row each belongs to.

The towers and projectors of a model of pictures and text get all pictures of a batch, without the rows that they stand
in. Layers give the first picture to the first row and so on, which is right if all rows have as many.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from ..reading import shorten
from .batch import BatchShape
from .layer import RLoraLayer


# Fields of a configuration with the token that stands for (a part of) a picture, a video or a sound.
_TOKENS = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))


class PictureLayers:
    """
    The adapted layers of a model that see pictures or sounds.

    Args:
        model (`torch.nn.Module`): The base model.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        tokens = {getattr(config, name, None) for name in _TOKENS}
        self.tokens = sorted(token for token in tokens if type(token) is int)
        self.layers: dict[str, RLoraLayer] = {}
        if not self.tokens or not isinstance(model, PreTrainedModel):
            return
        # What sees rows of tokens. If that is the whole model, nothing tells its towers apart.
        text = set((model.get_decoder() or model).modules())
        if (head := model.get_output_embeddings()) is not None:
            text |= set(head.modules())
        self.layers = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, RLoraLayer) and layer not in text
        }

    def check(self, batch: BatchShape | None, of_rows: Sequence[Hashable], what: str, adapters: Iterable[str]) -> None:
        """
        Check that each picture belongs to the row which layers take it for.

        Args:
            batch ([`BatchShape`], *optional*): The batch.
            of_rows (`Sequence`): What rows differ in: their tasks or the names of their adapters.
            what (`str`): The argument that has them, for the message.
            adapters (`Iterable[str]`): Names of the adapters that use it.

        Raises:
            ValueError: If rows that differ have different numbers of tokens of pictures.
        """
        ids = None if batch is None else batch.input_ids
        if not self.layers or ids is None or ids.ndim != 2 or len(set(of_rows)) < 2:
            return
        names = set(adapters)
        layer = next((name for name, layer in self.layers.items() if names & layer.rlora_adapters.keys()), None)
        if layer is None:
            return
        for token in self.tokens:
            counts = (ids == token).sum(1)  # [B]
            if len(counts) and bool((counts != counts[0]).any()):
                raise ValueError(
                    f"The layer {shorten(layer, 200)} sees the pictures or sounds of all rows as one batch, and can't "
                    f"tell which row one belongs to: `{what}` differs between rows, and they have from "
                    f"{int(counts.min())} to {int(counts.max())} tokens of pictures or sounds. Pass one row at a "
                    "time, rows with equally many pictures of the same size, or rows with one value; or adapt the "
                    "language model only, as the default targets do."
                )
