"""PEFT's task types: the classes that load a model of each type, and whether it generates text."""

from __future__ import annotations

from typing import Any


# What follows `AutoModel` and `AutoPeftModel` in the names of classes, by task type.
_SUFFIXES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "",
}


def _name(task_type: Any) -> str:
    return str(getattr(task_type, "value", task_type))


def auto_model_class(task_type: Any) -> str:
    """Name of the class of transformers that loads a base model; causal language models where the type is unknown."""
    return f"AutoModel{_SUFFIXES.get(_name(task_type), 'ForCausalLM')}"


def auto_peft_class(task_type: Any) -> str:
    """Name of the class of PEFT that loads an adapter with its base model, as [`auto_model_class`]."""
    if _name(task_type) == "FEATURE_EXTRACTION":
        return "AutoPeftModelForFeatureExtraction"
    return f"AutoPeftModel{_SUFFIXES.get(_name(task_type), 'ForCausalLM')}"


def generates(task_type: Any) -> bool:
    """Whether a model of this task type generates text: a causal language model, the default for an unset type."""
    return _name(task_type) in ("None", "CAUSAL_LM")
