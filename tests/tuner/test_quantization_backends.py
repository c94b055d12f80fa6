"""
Bases quantized with other libraries than bitsandbytes, on CPU; each library's tests are skipped where it is missing.

What the layers compute is checked against plain linear layers with the weights that they stand for, which the unit
vectors show.
"""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import save_file
from testing_utils import perturb, random_ids, task_datasets
from torch import nn
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.tuner.layer import RLoraLinear
from rlora_trl.tuner.offload import compute_device


GROUP = 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def hqq_layer(linear):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


def asymmetric_groups(weight):
    """Scales and zero points `[d_out, groups]` of 4 bits."""
    groups = weight.detach().float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-6).half().float()
    return scale, torch.round(-low / scale).clamp(0, 15)


def packable(kind, linear):
    options = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, "register_buffers": True}
    layer = kind(in_features=linear.in_features, out_features=linear.out_features, bias=False, **options)
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
    plain.weight.data = linear.weight.data.float()
    return layer, plain, *asymmetric_groups(linear.weight)


def gptq_layer(linear):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer, plain, scale, zero = packable(TorchLinear, linear)
    layer.pack_original(plain, scale, zero.int())
    layer.qzero_format(format=2)
    return layer  # without `post_init`, which would compile


def awq_layer(linear):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer, plain, scale, zero = packable(AwqTorchLinear, linear)
    layer.pack(plain, scale, zero)
    return layer


def aqlm_layer(linear):
    from aqlm import QuantizedLinear

    shape = {"in_features": linear.in_features, "out_features": linear.out_features}
    # With 256 codes it would need numba. Codes without a meaning: finding good ones takes a GPU and hours.
    groups = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 6}
    layer = QuantizedLinear(**shape, **groups, bias=False, dtype=linear.weight.dtype)
    generator = torch.Generator().manual_seed(linear.in_features + linear.out_features)
    layer.codes.data = torch.randint(-32, 32, layer.codes.shape, generator=generator).to(layer.codes.dtype)
    layer.codebooks.data = torch.randn(layer.codebooks.shape, generator=generator).to(linear.weight.dtype)
    layer.scales.data = linear.weight.data.std(1).view(layer.scales.shape)
    return layer


def replaced(model, make):
    """The model, frozen, with all its linear layers but the last replaced."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, make(module).requires_grad_(False))
    return model.eval()


def torchao_config(kind):
    from torchao import quantization as torchao
    from transformers import TorchAoConfig

    return TorchAoConfig(
        {
            "torchao int8": lambda: torchao.Int8WeightOnlyConfig(version=2),
            "torchao fp8": lambda: torchao.Float8WeightOnlyConfig(),
            "torchao int4": lambda: torchao.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=torchao.PerGroup(GROUP)
            ),
        }[kind]()
    )


LAYERS = {"hqq": hqq_layer, "gptq": gptq_layer, "awq": awq_layer, "aqlm": aqlm_layer}
LIBRARIES = {"hqq": "hqq", "gptq": "gptqmodel", "awq": "gptqmodel", "aqlm": "aqlm"}
TORCHAO = ("torchao int8", "torchao fp8", "torchao int4")
LIBRARIES |= dict.fromkeys(TORCHAO, "torchao")
# The backend that PEFT finds; it takes gptqmodel's AWQ layers for GPTQ's, which changes nothing but the name.
BACKENDS = {kind: kind.split()[0] for kind in LIBRARIES} | {"awq": "gptq"}
MERGING = ("hqq", *TORCHAO)
# gptqmodel computes in 16 bits.
DTYPES = dict.fromkeys(LIBRARIES, torch.float32) | {"gptq": torch.float16, "awq": torch.float16}


@pytest.fixture(params=LIBRARIES)
def kind(request):
    pytest.importorskip(LIBRARIES[request.param], exc_type=ImportError)
    return request.param


def load(model_folders, kind, dtype=None):
    folder, dtype = model_folders["llama64"], dtype or DTYPES[kind]
    if kind in TORCHAO:
        config = torchao_config(kind)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config).eval()
    return replaced(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), LAYERS[kind])


def logits(model):
    with torch.no_grad():
        return model(random_ids()).logits.float()


def stored_weights(model):
    """All that the base keeps, packed weights, scales and zero points, by the tensors in it."""
    kept = {}
    for name, module in model.named_modules():
        if "rlora_adapters" in name:
            continue
        values = {
            **module._parameters,
            **module._buffers,
            "W_q": vars(module).get("W_q"),
            **(vars(module).get("meta") or {}),
        }
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
                kept |= {f"{name}.{key}.{part}": getattr(value, part).clone() for part in parts}
                if not parts:
                    kept[f"{name}.{key}"] = value.detach().clone()
    return kept


def meant_weight(layer):
    """The weight that a layer stands for, from its outputs for the unit vectors."""
    return layer(torch.eye(layer.in_features, dtype=torch.float16 if hasattr(layer, "qweight") else None)).T


def dequantized(model):
    """A copy with plain linear layers of the weights that the quantized ones stand for."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if isinstance(module, RLoraLinear):
            base = module.base_layer
            with torch.no_grad():
                module.base_layer = nn.Linear(base.in_features, base.out_features, bias=False)
                module.base_layer.weight = nn.Parameter(meant_weight(base).contiguous(), requires_grad=False)
            module.quantization_backend = None
    return plain


def adapted(model_folders, kind, **settings):
    # By name: PEFT's "all-linear" finds subclasses of `nn.Linear` only.
    config = RLoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **settings)
    return get_peft_model(load(model_folders, kind), config).eval()


def test_step_zero_and_disabling_give_the_quantized_base(model_folders, kind):
    base = load(model_folders, kind)
    expected = logits(base)
    full = AutoModelForCausalLM.from_pretrained(model_folders["llama64"], dtype=DTYPES[kind])
    assert not torch.equal(expected, logits(full))  # it is quantized
    model = adapted(model_folders, kind)
    layers = [module for module in model.modules() if isinstance(module, RLoraLinear)]
    assert len(layers) == 14
    assert {layer.quantization_backend.backend_name for layer in layers} == {BACKENDS[kind]}
    assert all(p.dtype == torch.float32 for layer in layers for p in layer.rlora_adapters.parameters())
    assert torch.equal(logits(model), expected)
    perturb(model)
    assert (logits(model) - expected).norm() > 0.05 * expected.norm()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_gradients_are_those_of_the_weights_that_the_base_stands_for(model_folders, kind):
    model = adapted(model_folders, kind, head_dropout=0.0).train()
    perturb(model)
    reference = dequantized(model)
    gradients = []
    for each in (model, reference):
        embeddings = each.get_input_embeddings()(random_ids()).detach().requires_grad_(True)
        each(inputs_embeds=embeddings, labels=random_ids()).loss.backward()
        named = {key: p.grad for key, p in each.named_parameters() if p.requires_grad}
        gradients.append({"input": embeddings.grad, **named})
    tolerance = 2e-2 if DTYPES[kind] == torch.float16 else 1e-4
    for key, expected in gradients[1].items():
        error = (gradients[0][key] - expected).float().norm() / expected.float().norm()
        assert error < tolerance, (key, error)
    assert {p.rsplit(".", 1)[-1] for p in gradients[0]} == {"input", "A", "B", "router"}


def test_training_leaves_the_base_alone_and_the_adapter_can_be_saved(model_folders, kind, tmp_path):
    model = adapted(model_folders, kind).train()
    before = stored_weights(model)
    assert len(before) > 30
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=random_ids(), labels=random_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = stored_weights(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())  # gptqmodel keeps a few tables besides
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(model_folders, kind), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    # The same adapter runs on the base that is not quantized.
    full = AutoModelForCausalLM.from_pretrained(model_folders["llama64"], dtype=DTYPES[kind])
    base_error = (logits(full) - logits(load(model_folders, kind))).norm()
    exchanged = PeftModel.from_pretrained(full, tmp_path).eval()
    assert (logits(exchanged) - logits(model)).norm() < 2 * base_error


def test_unloading_gives_the_base_back(model_folders, kind):
    expected = logits(load(model_folders, kind))
    model = adapted(model_folders, kind)
    perturb(model)
    base = model.unload()
    assert not any(isinstance(module, RLoraLinear) for module in base.modules())
    assert torch.equal(logits(base), expected)


def test_merging_works_where_the_weights_can_be_written_and_is_refused_elsewhere(model_folders, kind):
    model = adapted(model_folders, kind, router="uniform")
    perturb(model, 0.1)
    expected = logits(model)
    if kind not in MERGING:
        with pytest.raises(ValueError, match="can't be merged into this base, which is quantized with"):
            model.merge_and_unload()
        assert torch.equal(logits(model), expected)
        return
    full = AutoModelForCausalLM.from_pretrained(model_folders["llama64"], dtype=DTYPES[kind])
    base_error = (logits(full) - logits(load(model_folders, kind))).norm()
    # The merged weight is rounded again, which makes about the error that rounding the base made.
    assert (logits(model.merge_and_unload()) - expected).norm() < 2.5 * base_error


@pytest.mark.parametrize("kind", ["torchao int8"])
def test_trainer_quantizes_with_torchao(model_folders, kind, tmp_path):
    pytest.importorskip("torchao")
    args = RLoraSFTConfig(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = RLoraSFTTrainer(
        model_folders["llama64"], args, train_dataset=task_datasets(), quantization_config=torchao_config(kind)
    )
    layers = [module for module in trainer.model.modules() if isinstance(module, RLoraLinear)]
    assert layers and all(layer.quantization_backend.backend_name == "torchao" for layer in layers)
    assert all(p.dtype == torch.float32 for layer in layers for p in layer.rlora_adapters.parameters())
    before = stored_weights(trainer.model)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(history[-3:]) < 0.9 * sum(history[:3])
    after = stored_weights(trainer.model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_trainer_takes_an_awq_checkpoint(model_folders, tokenizer, tmp_path):
    pytest.importorskip("gptqmodel", exc_type=ImportError)
    model = load(model_folders, "awq")
    folder = tmp_path / "awq"
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    described = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
    config["quantization_config"] = {**described, "version": "gemm", "backend": "torch_awq"}
    (folder / "config.json").write_text(json.dumps(config))
    placed = {"dtype": "float16", "device_map": "cpu"}
    args = RLoraSFTConfig(
        str(tmp_path / "adapter"),
        max_steps=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs=placed,
    )
    trainer = RLoraSFTTrainer(str(folder), args, train_dataset=task_datasets(8))
    assert all(p.dtype == torch.float32 for name, p in trainer.model.named_parameters() if "rlora_adapters" in name)
    before = stored_weights(trainer.model)
    trainer.train()
    after = stored_weights(trainer.model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    trainer.save_model()
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **placed).eval()
    assert torch.equal(logits(again), logits(trainer.model.eval()))
    assert not torch.equal(logits(again), logits(model))


def test_base_that_cuts_the_gradient_runs_but_does_not_train(model_folders):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(version=2))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folders["llama64"], quantization_config=config),
        RLoraConfig(task_type="CAUSAL_LM"),
    )
    assert torch.isfinite(logits(model.eval())).all()
    with pytest.raises(RuntimeError, match="No gradient flows through this base, which is quantized with torchao"):
        model.train()(input_ids=random_ids(), labels=random_ids())


@pytest.mark.parametrize("library", ["hqq", "aqlm"])
def test_device_is_found_where_a_layer_has_no_weight(library):
    pytest.importorskip(library)
    layer = LAYERS[library](nn.Linear(64, 64, bias=False))
    assert not hasattr(layer, "weight")
    assert compute_device(layer) == torch.device("cpu")
    assert compute_device(nn.Identity()) is None
