"""At its initial values an adapter adds exactly nothing: in every form of the function, dtype and shape."""

import numpy as np
import pytest
import torch
from testing_utils import TINY_MODELS, random_ids

from rlora_trl import MultiHeadAdapter, RLoraConfig
from rlora_trl.kernels import compiled_multihead, multihead_delta
from rlora_trl.kernels.multihead import multihead_delta as composed
from rlora_trl.kernels.rank_space import Layout, has_initial_A, logits_of, mean_of_heads


# Columns of A and of A0 that begin at other places in a vector register, and numbers of heads whose 1 / N rounds.
SIZES = [(32, 48, 4, 3), (576, 96, 4, 3), (100, 37, 3, 7), (64, 33, 8, 5), (96, 128, 16, 10), (48, 32, 4, 1)]
TOKENS = (1, 7, 33, 65)


def adapters(dtype):
    for d_in, d_out, r, num_heads in SIZES:
        for share_a in (True, False):
            for router in ("softmax", "uniform"):
                adapter = MultiHeadAdapter(d_in, d_out, r, num_heads, 16.0, router=router, share_a=share_a)
                yield adapter.eval(), [torch.randn(tokens, d_in).to(dtype) for tokens in TOKENS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exactly_zero(dtype):
    for adapter, inputs in adapters(dtype):
        for x in inputs:
            with torch.no_grad():
                assert not adapter(x).any()
            base = torch.randn(len(x), adapter.out_features).to(dtype)
            assert torch.equal(adapter(x, base=base), base)
            assert not multihead_delta(x, *adapter.kernel_tensors(), scaling=16.0).any()
            assert not compiled_multihead(x, *adapter.kernel_tensors(), scaling=16.0).any()


@pytest.mark.parametrize("num_heads", [1, 3, 5, 7, 10, 33])
def test_the_mean_of_heads_is_summed_in_order_and_divided(num_heads):
    """So that the anchor, computed on one device, is the mean on all of them."""
    B = torch.randn(2, num_heads, 96, 16)
    total = np.zeros((2, 96, 16), dtype=np.float32)
    for head in B.unbind(1):
        total = total + head.numpy()
    assert np.array_equal(mean_of_heads(B).numpy(), total / np.float32(num_heads))


def test_training_starts_there_too():
    """Without dropout; the gradients are those of the function, not of a function that repeats A x."""
    adapter = MultiHeadAdapter(100, 37, 3, 7, 16.0).double()
    adapter.reset_anchor()
    x = torch.randn(9, 100, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, 37, dtype=torch.float64)
    trained = [adapter.A, adapter.B, adapter.router, x]
    delta = adapter(x)
    assert not delta.any()
    fused = torch.autograd.grad(delta, trained, upstream)
    delta = composed(x, *adapter.kernel_tensors(), scaling=16.0)
    assert not delta.any()
    for ours, reference in zip(fused, torch.autograd.grad(delta, trained, upstream), strict=True):
        torch.testing.assert_close(ours, reference)
    # dA is that of the heads alone: scaling * mean_i (B_i^T dy)^T x.
    by_hand = 16.0 * (upstream @ adapter.B.mean(0)).T @ x
    torch.testing.assert_close(fused[0], by_hand)


def test_a_trained_adapter_is_not_changed():
    layout = Layout(3, 4)
    adapter = MultiHeadAdapter(32, 48, 4, 3, 16.0)
    x = torch.randn(5, 32)
    with torch.no_grad():
        adapter.A[0, 0] += 1e-3
        assert adapter.eval()(x).any()
        assert has_initial_A(torch.cat([adapter.A0, adapter.router, adapter.A0]), layout)
        assert not has_initial_A(torch.cat([adapter.A, adapter.router, adapter.A0]), layout)
        assert logits_of(x @ torch.cat([adapter.A, adapter.router, adapter.A0]).T, layout).shape == (5, 3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_starts_at_its_base(name):
    from peft import get_peft_model

    model = TINY_MODELS[name]().eval()
    with torch.no_grad():
        expected = model(input_ids=random_ids()).logits
        adapted = get_peft_model(model, RLoraConfig(head_dropout=0.0, target_modules="all-linear"))
        assert torch.equal(adapted.eval()(input_ids=random_ids()).logits, expected)
    assert torch.equal(adapted.train()(input_ids=random_ids()).logits, expected)
