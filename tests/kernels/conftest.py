import pytest
import torch


@pytest.fixture
def poisoned_allocations(monkeypatch):
    """Memory that is allocated and never written shows as NaN."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args, real=real, **kwargs):
            tensor = real(*args, **kwargs)
            fits = tensor.is_floating_point() and not tensor.requires_grad  # checkpointing has one that requires it
            return tensor.fill_(float("nan")) if fits else tensor

        monkeypatch.setattr(torch, name, poisoned)
