"""vLLM for the tests of its resolver: its own classes where it is installed, and stand-ins."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import vllm_stand_ins


PARTS = {"vllm.lora.request": ("LoRARequest",), "vllm.lora.resolver": ("LoRAResolver", "LoRAResolverRegistry")}


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
