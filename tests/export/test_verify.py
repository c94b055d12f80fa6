"""The check of written tensors: mistakes are refused, rounding is not, whatever the sizes of weights."""

import pytest
import torch
from exporting import WEIGHTS, adapted, load_for, same_state, state_of
from peft import get_peft_model
from safetensors.torch import load_file
from testing_utils import TINY_MODELS, perturb

from rlora_trl import RLoraConfig
from rlora_trl.export import export as export_module
from rlora_trl.export import export_lora
from rlora_trl.kernels.reference import multihead_delta_reference
from rlora_trl.tuner.selection import adapted_layers


def corrupted(kind):
    """`lora_tensors` with a mistake in it."""
    real = export_module.lora_tensors

    def wrong(layers, adapter_name, head_weights):
        if kind == "head weight":
            first = next(iter(layers))
            head_weights = {**head_weights, first: torch.tensor([0.25, 0.65, 0.1])}
        tensors = real(layers, adapter_name, head_weights)
        names = list(tensors)
        if kind == "scaling":
            tensors = {name: tensor * 1.05 if "lora_B" in name else tensor for name, tensor in tensors.items()}
        elif kind == "swapped layers":
            one, two = names[1], next(name for name in names[2:] if tensors[name].shape == tensors[names[1]].shape)
            tensors[one], tensors[two] = tensors[two], tensors[one]
        elif kind == "missing layer":
            del tensors[names[0]], tensors[names[1]]
        elif kind == "nan":
            tensors[names[0]][0, 0] = float("nan")
        return tensors

    return wrong


@pytest.mark.parametrize("base", ["fp32", "bf16", "4bit"])
@pytest.mark.parametrize("mistake", ["scaling", "head weight", "swapped layers", "missing layer", "nan"])
def test_wrong_exports_are_refused(model_folders, tmp_path, monkeypatch, base, mistake):
    model = get_peft_model(load_for(model_folders, base), RLoraConfig(task_type="CAUSAL_LM")).eval()
    # About as far from the initial values as a short training goes.
    perturb(model, 0.05)
    before = state_of(model)
    monkeypatch.setattr(export_module, "lora_tensors", corrupted(mistake))
    with pytest.raises(ValueError, match="The export differs from the adapter"):
        export_lora(model, tmp_path / "out", routing=WEIGHTS)
    same_state(model, before)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    export_lora(model, tmp_path / "out", routing=WEIGHTS)


# Dtype of the base, whether the adapter has it too, how far training went, fields of the configuration.
SIZES = {
    "hardly_trained": (torch.float32, False, 1e-4, {}),
    "untrained": (torch.float32, False, 0.0, {}),
    "untrained_bf16": (torch.bfloat16, False, 0.0, {}),
    "own_a": (torch.float32, False, 1e-4, {"share_a": False}),
    "uniform": (torch.float32, False, 1e-4, {"router": "uniform"}),
    "many_heads": (torch.float32, False, 1e-4, {"num_heads": 10, "r": 16}),
    "large_terms": (torch.float32, False, 1e-2, {"init_gamma": 1, "lora_alpha": 256}),
    "large_terms_bf16": (torch.bfloat16, False, 1e-2, {"init_gamma": 1}),
    "adapter_in_bf16": (torch.bfloat16, True, 1e-2, {}),
    "adapter_in_fp16": (torch.float16, True, 1e-4, {"init_weights": "zero_b"}),
    "float64": (torch.float64, True, 1e-4, {"router": "uniform"}),
    "far_away": (torch.float32, False, 30.0, {}),
}


def sized(option, weights=None):
    dtype, same_dtype, scale, kwargs = SIZES[option]
    torch.manual_seed(1)
    base = TINY_MODELS["llama"]().to(dtype).eval()
    config = RLoraConfig(task_type="CAUSAL_LM", **kwargs)
    model = get_peft_model(base, config, autocast_adapter_dtype=not same_dtype).eval()
    perturb(model, scale)
    heads = config.num_heads
    return model, None if config.router == "uniform" else weights or [1 / heads] * heads


def true_delta(layer, weights):
    """The delta under fixed weights as a matrix, by the reference in float64."""
    adapter = layer.rlora_adapters["default"]
    A, B, A0, B0 = (
        None if tensor is None else tensor.detach().double()
        for tensor in (adapter.A, adapter.B, adapter.A0, adapter.B0)
    )
    units = torch.eye(adapter.in_features, dtype=torch.float64)
    logits = torch.tensor(weights, dtype=torch.float64).log().expand(adapter.in_features, -1)
    return multihead_delta_reference(units, A, B, None, A0, B0, scaling=adapter.scaling, logits=logits).T


@pytest.mark.parametrize("option", SIZES)
def test_rounding_is_no_mistake_whatever_the_sizes(tmp_path, option):
    """A delta is a small difference of large terms, and is rounded as they are."""
    model, routing = sized(option)
    weights = routing or [1 / 3] * 3
    export_lora(model, tmp_path / "lora", routing=routing)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    export_lora(model, tmp_path / "merged", routing=routing, merge=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, layer in adapted_layers(model, "default").items():
        delta, base = true_delta(layer, weights), layer.get_base_weight().double()
        down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        # In single precision, relative to what the export itself sums; the rest is that of the reference.
        slack = 1e-14 * delta.abs().max() + 1e-12
        assert bool(((up @ down - delta).abs() <= 2.4e-7 * (up.abs() @ down.abs()) + slack).all())
        weight, expected = merged[f"{name}.weight"].double(), base + delta
        eps = max(torch.finfo(merged[f"{name}.weight"].dtype).eps, 1.2e-7)
        # PEFT multiplies and adds in single precision: once more the rounding of what the export sums.
        bound = eps * (expected.abs() + delta.abs()) + 4.8e-7 * (up.abs() @ down.abs()) + 6e-8 * (eps > 1e-4)
        assert bool(((weight - expected).abs() <= bound).all())


@pytest.mark.parametrize("option", SIZES)
def test_small_mistakes_are_no_rounding(tmp_path, monkeypatch, option):
    heads = SIZES[option][-1].get("num_heads", 3)
    model, routing = sized(option, [0.0, *[0.5**i for i in range(1, heads - 1)], 0.5 ** (heads - 2)])
    real = export_module.lora_tensors
    wrong = lambda *args: {k: t * 1.001 if "lora_B" in k else t for k, t in real(*args).items()}  # noqa: E731
    monkeypatch.setattr(export_module, "lora_tensors", wrong)
    for merge in (False, True):
        with pytest.raises(ValueError, match="The export differs from the adapter: in model.layers.0.mlp"):
            export_lora(model, tmp_path / "out", routing=routing, merge=merge)
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_are_not_finite(model_folders, tmp_path):
    model = adapted(model_folders)
    with torch.no_grad():
        adapted_layers(model, "default")["model.layers.1.mlp.up_proj"].rlora_adapters["default"].B[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="The adapter itself gives values that are not finite in model.layers.1.mlp"):
        export_lora(model, tmp_path / "out", routing=WEIGHTS)
    assert list(tmp_path.iterdir()) == []
