"""Exports adapters as plain LoRA, for PEFT without this package, vLLM and llama.cpp, or merged into their base."""

from .export import export_lora
from .report import ExportReport


__all__ = ["ExportReport", "export_lora"]
