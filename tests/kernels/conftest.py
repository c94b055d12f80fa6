import pytest
import torch


@pytest.fixture
def poisoned_allocations(monkeypatch):
    """Memory that is allocated and never written shows as NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)

        def poisoned(*args, real=real, **kwargs):
            tensor = real(*args, **kwargs)
            fits = tensor.is_floating_point() and not tensor.requires_grad  # checkpointing has one that requires it
            return tensor.fill_(float("nan")) if fits else tensor

        monkeypatch.setattr(owner, name, poisoned)
