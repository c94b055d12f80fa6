"""On a CUDA device: whole tiny models against the CPU, and what only exists there. Run by `make test-gpu`."""

import copy
import gc
import sys
from pathlib import Path

import expert_models
import pytest
import torch
from peft import get_peft_model
from testing_utils import perturb, random_ids, task_datasets
from torch import nn
from transformers import AutoModelForCausalLM

from rlora_trl import MultiHeadAdapter, RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.kernels import joint
from rlora_trl.tuner import base_product
from rlora_trl.tuner.base_product import frozen_product
from rlora_trl.tuner.experts import RLoraExperts


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def adapted(folder, device, dtype=torch.float32, **kwargs):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = get_peft_model(model, RLoraConfig(task_type="CAUSAL_LM", **kwargs))
    perturb(model)
    return model.to(device)


def gradients(model, device, checkpointing=None, autocast=None):
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    ids = random_ids(4, 33).to(device)
    torch.manual_seed(11)  # the masks come from the CPU generator, and so are the same on both
    with torch.autocast(device, dtype=autocast or torch.float32, enabled=autocast is not None):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {key: value.grad.cpu().double() for key, value in model.named_parameters() if value.grad is not None}
    return loss.item(), grads


def largest_error(actual, expected):
    assert actual.keys() == expected.keys()
    return max(((actual[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected)


@pytest.fixture(autouse=True)
def _full_float32():
    torch.backends.cuda.matmul.allow_tf32 = False
    yield


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_same_gradients_as_on_the_cpu(model_folders, name, checkpointing):
    loss, expected = gradients(adapted(model_folders[name], "cpu", head_dropout=0.4), "cpu")
    model = adapted(model_folders[name], "cuda", head_dropout=0.4)
    gpu_loss, actual = gradients(model, "cuda", checkpointing)
    assert gpu_loss == pytest.approx(loss, rel=1e-4)
    assert largest_error(actual, expected) < 1e-3


def test_the_base_product_joins_in(model_folders):
    model = adapted(model_folders["llama"], "cuda", torch.bfloat16)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    x = torch.randn(2, 3, 32, device="cuda", dtype=torch.bfloat16)
    base = layer.base_layer
    assert frozen_product(base, x) == (base.weight, None)
    assert frozen_product(base, x.float()) is None
    assert layer._join(layer.rlora_adapters["default"], x) is not None
    with torch.no_grad():  # decoding has kernels of its own
        assert layer._join(layer.rlora_adapters["default"], x) is None
    handle = base.register_forward_hook(lambda *args: None)
    assert frozen_product(base, x) is None
    handle.remove()
    base.weight.requires_grad_(True)
    assert frozen_product(base, x) is None


def joined_and_alone(model, monkeypatch, **kwargs):
    """Gradients of grouped layers, and where each base layer is called; and the sizes of the groups."""
    sizes, real = [], joint._apply

    def apply(x, call, *parameters):
        sizes.append(call.group.sizes.count)
        return real(x, call, *parameters)

    with monkeypatch.context() as patch:
        patch.setattr(joint, "_apply", apply)
        for _ in range(2):  # the first is observed
            sizes.clear()
            model.zero_grad()
            _, joined = gradients(model, "cuda", **kwargs)
        patch.setattr(base_product, "JOINED_DEVICES", set())
        model.zero_grad()
        _, alone = gradients(model, "cuda", **kwargs)
    return joined, alone, set(sizes)


@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("options", [{}, {"num_heads": 1, "router": "uniform"}, {"num_heads": 10, "r": 16}], ids=str)
def test_layers_with_the_same_input_are_computed_together(model_folders, options, checkpointing, monkeypatch):
    model = adapted(model_folders["llama"], "cuda", head_dropout=0.3, target_modules="all-linear", **options)
    joined, alone, sizes = joined_and_alone(model, monkeypatch, checkpointing=checkpointing)
    assert sizes == {1, 2, 3}
    assert largest_error(joined, alone) < 1e-3


FOUR_BIT = {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_layers_are_computed_together(model_folders, double, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(*size, bias=name == "up") for name, size in FOUR_BIT.items()})
    for name, linear in list(layers.items()):
        quantized = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
            compress_statistics=double,
        )
        quantized.load_state_dict(linear.state_dict())
        layers[name] = quantized

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers["down"](torch.tanh(self.layers["gate"](x)) * self.layers["up"](x))

    options = {"r": 4, "num_heads": 3, "target_modules": list(FOUR_BIT), "init_weights": False, "head_dropout": 0.0}
    model = get_peft_model(Mlp().cuda(), RLoraConfig(**options)).train()
    x = torch.randn(4, 40, 64, device="cuda", requires_grad=True)
    found = []
    for devices in ({"cuda"}, {"cuda"}, set()):
        monkeypatch.setattr(base_product, "JOINED_DEVICES", devices)
        model.zero_grad()
        x.grad = None
        model(x).square().mean().backward()
        found.append([x.grad.clone(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]])
    joined = model.base_model.model.layers["gate"].joined
    assert joined is not None and len(joined.members) == 2
    assert all(isinstance(member.weight, base_product.QuantizedWeight) for member in joined.members)
    for a, b in zip(found[1], found[2], strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-4


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sixteen_bits_against_float32(model_folders, dtype, autocast):
    _, expected = gradients(adapted(model_folders["llama"], "cuda", head_dropout=0.0), "cuda")
    _, actual = gradients(adapted(model_folders["llama"], "cuda", dtype, head_dropout=0.0), "cuda", autocast=autocast)
    assert largest_error(actual, expected) < 0.1


def test_both_back_ends_train_alike(model_folders, monkeypatch):
    results = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv("RLORA_TRL_KERNELS", choice)
        results.append(gradients(adapted(model_folders["llama"], "cuda", head_dropout=0.4), "cuda"))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert largest_error(results[1][1], results[0][1]) < 1e-4


def test_compiled_model(model_folders):
    _, expected = gradients(adapted(model_folders["llama"], "cuda", head_dropout=0.0), "cuda")
    model = adapted(model_folders["llama"], "cuda", head_dropout=0.0)
    _, actual = gradients(torch.compile(model), "cuda")
    assert largest_error({key.removeprefix("_orig_mod."): v for key, v in actual.items()}, expected) < 1e-3
    dropped = torch.compile(adapted(model_folders["llama"], "cuda", head_dropout=0.4)).train()
    losses = [dropped(input_ids=random_ids().cuda(), labels=random_ids().cuda()).loss.item() for _ in range(3)]
    assert len(set(losses)) == 3  # a new mask in each step


def test_cuda_graphs(model_folders):
    """`mode="reduce-overhead"`, in which steps are replayed from the third on."""
    _, expected = gradients(adapted(model_folders["llama"], "cuda", head_dropout=0.0), "cuda")
    compiled = torch.compile(adapted(model_folders["llama"], "cuda", head_dropout=0.0), mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        compiled.zero_grad()
        _, actual = gradients(compiled, "cuda")
        assert largest_error({key.removeprefix("_orig_mod."): v for key, v in actual.items()}, expected) < 1e-3

    dropped = torch.compile(adapted(model_folders["llama"], "cuda", head_dropout=0.4), mode="reduce-overhead").train()
    losses, ids = [], random_ids().cuda()
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        dropped.zero_grad()  # gradients are overwritten in the next step
        loss = dropped(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert len(set(losses)) == 6  # a new mask in each step, although each repeats the same launches


def test_generation(model_folders):
    model = adapted(model_folders["llama"], "cuda").eval()
    ids = random_ids(2, 5).cuda()
    written = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    expected = (
        adapted(model_folders["llama"], "cpu").eval().generate(input_ids=ids.cpu(), max_new_tokens=8, do_sample=False)
    )
    assert torch.equal(written.cpu(), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_trainer(model_folders, tmp_path, tokenizer, precision):
    args = RLoraSFTConfig(
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{precision: True},
    )
    trainer = RLoraSFTTrainer(model_folders["llama"], args, train_dataset=task_datasets(), processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_four_bit_base(model_folders):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        model_folders["llama64"], quantization_config=config, dtype=torch.bfloat16, device_map={"": 0}
    )
    ids = random_ids(2, 5).cuda()
    with torch.no_grad():
        expected = base(ids).logits
        model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM")).eval()
        assert torch.equal(model(ids).logits, expected)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["switch", "importance", "mutual_information", "z"])
def test_balance_losses_under_fp16_loss_scaling(model_folders, tmp_path, kind):
    """What the balance loss adds, with a scaled loss and 16-bit products, is what it adds in float32."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "trainer"))
    from test_balance_training import added, flat, trainer_for

    # Clipping, at a norm that is never reached, is where gradients are scaled back.
    options = {"balance_loss": kind, "balance_coef": 2.0, "max_grad_norm": 1e9, "use_cpu": False}
    expected = added(lambda **extra: trainer_for(model_folders, tmp_path, **extra), **options)
    actual = added(lambda **extra: trainer_for(model_folders, tmp_path, fp16=True, bf16=False, **extra), **options)
    a, b = flat(actual, ".router"), flat(expected, ".router")
    # A few roundings of 2**-11; "switch" jumps where rounding reorders heads that are nearly equal.
    assert ((a - b).norm() / b.norm()).item() < (5e-2 if kind == "switch" else 2e-2)


def test_steps_with_balance_losses_do_not_grow_memory(model_folders, tmp_path):
    sys.path.insert(0, str(Path(__file__).parent.parent / "trainer"))
    from test_balance_training import trainer_for

    seen = []
    for steps in (3, 30):
        trainer = trainer_for(model_folders, tmp_path, max_steps=steps, balance_loss="switch", balance_scope="global")
        trainer.train()
        torch.cuda.synchronize()
        seen.append(torch.cuda.memory_allocated())
        del trainer
        gc.collect()
    assert seen[1] <= seen[0] + 2**20


@pytest.mark.parametrize("inside", [None, False, True], ids=["alone", "non-reentrant inside", "reentrant inside"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputations_know_their_batch(model_folders, reentrant, inside):
    """A thread of the device runs backward passes, and numbers the nodes that it recomputes independently."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tuner"))
    import test_recomputation as cases

    plain = cases.build(model_folders).to("cuda")
    checkpointed = copy.deepcopy(plain)
    if inside is None:
        cases.enable(checkpointed, reentrant)
    else:
        cases.enable_within(checkpointed, inside, reentrant)
    for name, passes in cases.PASSES.items():
        grads = []
        for model in (plain, checkpointed):
            torch.manual_seed(3)
            passes(model)
            grads.append(cases.gradients(model))
        assert largest_error(grads[1], grads[0]) < 1e-4, name


@pytest.mark.parametrize("inside", [None, False, True], ids=["alone", "non-reentrant inside", "reentrant inside"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoints_around_whole_calls_know_their_batch(model_folders, reentrant, inside):
    sys.path.insert(0, str(Path(__file__).parent.parent / "tuner"))
    import test_recomputation as cases

    plain = cases.build(model_folders).to("cuda")
    checkpointed = copy.deepcopy(plain)
    if inside is not None:
        cases.enable(checkpointed, inside)
    grads = []
    for model, kind in ((plain, None), (checkpointed, reentrant), (checkpointed, reentrant)):
        torch.manual_seed(3)
        cases.whole_call(model, kind)
        grads.append(cases.gradients(model))
    assert largest_error(grads[1], grads[0]) < 1e-4 and largest_error(grads[2], grads[0]) < 1e-4


# Liger's kernels in the base model


@pytest.fixture
def liger():
    """Puts Liger's kernels into a model as `use_liger_kernel=True` does; classes of transformers are restored."""
    pytest.importorskip("liger_kernel")
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    before = [(module, dict(vars(module))) for module in (modeling_llama, modeling_qwen2)]
    yield lambda model: apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
    for module, names in before:
        vars(module).update(names)


LIGER_ADAPTERS = {
    "softmax": {},
    "task": {"router": "task", "tasks": ["a", "b"]},
    "one head": {"num_heads": 1, "router": "uniform", "head_dropout": 0.0},
}


@pytest.mark.filterwarnings("ignore:With `num_heads=1`")
@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("adapter", LIGER_ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_liger_kernels_change_only_rounding(model_folders, liger, name, adapter, checkpointing):
    """They write gradients into the tensors that they get, which must not be those that an adapter still needs."""
    options = {"head_dropout": 0.4, **LIGER_ADAPTERS[adapter]}
    expected_loss, expected = gradients(adapted(model_folders[name], "cuda", **options), "cuda", checkpointing)
    model = adapted(model_folders[name], "cuda", **options)
    liger(model)
    assert model.get_base_model().model.layers[0].mlp.forward.__func__.__module__.startswith("liger_kernel")
    loss, actual = gradients(model, "cuda", checkpointing)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert largest_error(actual, expected) < 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_liger_kernels_in_sixteen_bits(model_folders, liger, name):
    """Against float32 they are at most twice as far off as the model's own operations."""
    _, expected = gradients(adapted(model_folders[name], "cuda", head_dropout=0.4), "cuda")
    errors = []
    for patch in (lambda model: None, liger):
        model = adapted(model_folders[name], "cuda", torch.bfloat16, head_dropout=0.4)
        patch(model)
        _, actual = gradients(model, "cuda", autocast=torch.bfloat16)
        errors.append(largest_error(actual, expected))
    assert errors[1] < 2 * errors[0]


@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated")
@pytest.mark.parametrize("router", ["softmax", "task"])
def test_trainer_with_liger_kernels(model_folders, tmp_path, tokenizer, liger, router):
    """The same losses and statistics."""
    logs = []
    for use_liger_kernel in (False, True):
        args = RLoraSFTConfig(
            str(tmp_path / str(use_liger_kernel)),
            use_liger_kernel=use_liger_kernel,
            max_steps=5,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = RLoraSFTTrainer(
            model_folders["llama"],
            args,
            train_dataset=task_datasets(),
            processing_class=tokenizer,
            peft_config=RLoraConfig(router=router),
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    forward = trainer.accelerator.unwrap_model(trainer.model).get_base_model().model.layers[0].mlp.forward
    assert forward.__func__.__module__.startswith("liger_kernel")
    for plain, patched in zip(*logs, strict=True):
        assert plain.keys() == patched.keys()
        assert patched["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert patched["router_entropy"] == pytest.approx(plain["router_entropy"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_a_cpu_add_exactly_nothing(dtype):
    for d_in, d_out, r, num_heads in [(576, 96, 4, 3), (100, 37, 3, 7), (64, 33, 8, 5), (96, 128, 16, 10)]:
        for share_a in (True, False):
            adapter = MultiHeadAdapter(d_in, d_out, r, num_heads, 16.0, share_a=share_a).cuda()
            for training in (False, True):
                x = torch.randn(33, d_in, device="cuda", dtype=dtype)
                assert not adapter.train(training)(x).any(), (d_in, d_out, r, num_heads, share_a, training)


# Mixtures of experts


def adapted_experts(device, dtype=torch.float32, **kwargs):
    # Sizes that PyTorch's grouped product takes: rows of a multiple of 16 bytes.
    model = expert_models.build("qwen3_moe", hidden_size=64, moe_intermediate_size=48, num_experts=8).to(dtype)
    torch.manual_seed(3)
    return get_peft_model(model, RLoraConfig(task_type="CAUSAL_LM", **kwargs)).to(device)


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_heads", [3, 5, 10])
def test_experts_start_at_the_base_model(form, dtype, num_heads):
    """The anchor was computed on the CPU."""
    model = adapted_experts("cuda", dtype, num_heads=num_heads).eval()
    model.base_model.model.set_experts_implementation(form)
    ids = random_ids(4, 33).cuda()
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    "settings", [{}, {"num_heads": 10, "r": 16}, {"share_a": False}, {"router": "uniform"}], ids=str
)
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm", "eager"])
def test_gradients_of_experts_are_those_of_a_loop(form, settings):
    """Outputs and gradients in float32 against one expert at a time in float64, on the CPU."""
    model = adapted_experts("cpu", head_dropout=0.0, **settings)
    model.base_model.model.set_experts_implementation(form)
    perturb(model)
    loop = expert_models.with_loops(copy.deepcopy(model).double())
    loss, grads = gradients(model.cuda(), "cuda")
    ids = random_ids(4, 33)
    expected = loop.train()(input_ids=ids, labels=ids).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    wide = {name: p.grad for name, p in loop.named_parameters() if p.grad is not None}
    assert largest_error(grads, wide) < 1e-3


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_masks_of_experts_are_recomputed(checkpointing):
    model = adapted_experts("cuda", head_dropout=0.3)
    perturb(model)
    _, expected = gradients(model, "cuda")
    model.zero_grad()
    _, actual = gradients(model, "cuda", checkpointing)
    assert largest_error(actual, expected) < 1e-5


def test_the_delta_of_experts_waits_for_nothing():
    """No kernel of the adapter needs the number of rows on the host."""
    model = adapted_experts("cuda", torch.bfloat16).train()
    gradients(model, "cuda")  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts = next(m for m in model.modules() if isinstance(m, RLoraExperts))
        tokens = torch.randn(132, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        index = torch.arange(264, device="cuda").view(132, 2) % 8
        weights = torch.full((132, 2), 0.5, device="cuda", dtype=torch.bfloat16)
        experts(tokens, index, weights).backward(tokens.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
