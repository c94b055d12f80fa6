"""Adapters of other code as R-LoRA: those of the authors of R-LoRA and of HydraLoRA, and plain LoRA of PEFT."""

from .convert import convert_adapter
from .report import ConversionReport


__all__ = ["ConversionReport", "convert_adapter"]
