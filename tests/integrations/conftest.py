"""Pages of docs/integrations, an adapter for other tools, and vLLM: its own classes where installed, and stand-ins."""

import importlib
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import vllm_stand_ins
from peft import get_peft_model
from processes import ROOT
from testing_utils import build_tokenizer, perturb
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig


PARTS = {"vllm.lora.request": ("LoRARequest",), "vllm.lora.resolver": ("LoRAResolver", "LoRAResolverRegistry")}


@pytest.fixture
def blocks():
    """The blocks of a language on a page."""

    def find(page, language):
        text = (ROOT / "docs" / "integrations" / page).read_text(encoding="utf-8")
        return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)

    return find


@pytest.fixture
def adapter(model_folders, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folders["llama"]), RLoraConfig(task_type="CAUSAL_LM")
    )
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    build_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def real_vllm():
    """vLLM's classes, or a skip."""
    try:
        modules = [importlib.import_module(name) for name in PARTS]
    except ImportError as error:
        pytest.skip(f"vLLM is not installed: {error}")
    names = zip(modules, PARTS.values(), strict=True)
    return SimpleNamespace(**{name: getattr(module, name) for module, found in names for name in found})


@pytest.fixture(params=["stand-ins", "installed"])
def vllm(request, monkeypatch):
    """The classes, and a registry without resolvers."""
    if request.param == "installed":
        classes = request.getfixturevalue("real_vllm")
    else:
        classes = vllm_stand_ins
        for name, contents in PARTS.items():
            module = ModuleType(name)
            vars(module).update({item: getattr(vllm_stand_ins, item) for item in contents})
            monkeypatch.setitem(sys.modules, name, module)
        for name in ("vllm", "vllm.lora"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(classes.LoRAResolverRegistry, "resolvers", {})
    return classes
