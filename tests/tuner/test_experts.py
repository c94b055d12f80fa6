"""Adapters on the weights of experts: every family against a loop over experts in float64."""

import ast
import copy
import re
import warnings

import accelerate
import pytest
import torch
from expert_models import EXPERT_MODELS, build, mean_loss, with_loops, wrappers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import perturb, random_ids
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rlora_trl import RLoraConfig
from rlora_trl.kernels.dropout import keep_mask
from rlora_trl.kernels.grouped import RowGroups
from rlora_trl.reading import read_safetensors_header
from rlora_trl.tuner import find_routings
from rlora_trl.tuner.expert_products import ExpertRows
from rlora_trl.tuner.routing import using_all
from rlora_trl.tuner.selection import adapted_layers


# Against a loop in float64. In float64 only the order of additions differs; PyTorch's grouped product has no float64,
# and float32 rounds to 6e-8 in each of some dozen products.
TOL = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 2e-4, "atol": 2e-5}}
DTYPES = {"grouped_mm": torch.float32}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Families whose experts have one form.
ONE_FORM = ("llama4",)
CASES = [(family, form) for family in EXPERT_MODELS for form in IMPLEMENTATIONS if family not in ONE_FORM]
CASES += [(family, None) for family in ONE_FORM]
CONFIGS = {
    "softmax": {},
    "kaiming": {"router_init": "kaiming_uniform"},
    "top_k": {"router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform"},
    "uniform": {"router": "uniform"},
    "own_a": {"share_a": False},
    "zero_b": {"init_weights": "zero_b", "router_init": "kaiming_uniform"},
    "uniform_zero_a": {"router": "uniform", "init_weights": "zero_a"},
}


def adapt(model, *, form=None, **settings):
    if form is not None:
        model.set_experts_implementation(form)
    torch.manual_seed(1)
    return get_peft_model(model, RLoraConfig(r=3, num_heads=3, **settings))


def adapt_wide(family, *, form=None, **settings):
    """An adapter in training, away from its initial values, in the widest dtype that the base computes in."""
    model = adapt(build(family), form=form, **settings).train().to(DTYPES.get(form, torch.float64))
    perturb(model)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def compare_with_loop(model, ids, **forward):
    """Outputs and gradients of a model and of the same model with loops over experts."""
    masks, logits = forward.pop("masks", None), forward.pop("logits", None)
    loop = with_loops(copy.deepcopy(model).double(), masks=masks, task_logits=logits)
    results = []
    for each in (model, loop):
        output = each(ids, **forward).logits
        mean_loss(output, ids).backward()
        results.append((output.detach(), gradients(each)))
    (output, grads), (expected, expected_grads) = results
    tolerance = TOL[output.dtype]
    torch.testing.assert_close(output.double(), expected, **tolerance)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        wide = expected_grads[name]
        torch.testing.assert_close(grad.double(), wide, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert any(grad.abs().max() > 0 for name, grad in grads.items() if "down_proj" in name)


@pytest.mark.parametrize(("family", "form"), CASES)
def test_step_0_is_the_base_model_bit_for_bit(family, form):
    model = build(family)
    ids = random_ids()
    if form is not None:
        model.set_experts_implementation(form)
    with torch.no_grad():
        expected = model(ids).logits
        adapted = adapt(model, form=form).eval()
        assert torch.equal(adapted(ids).logits, expected)
    assert torch.equal(adapted(ids).logits, expected)  # with a graph

    perturb(adapted)
    with torch.no_grad():
        assert not torch.allclose(adapted(ids).logits, expected, atol=1e-3)
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, expected)


@pytest.mark.parametrize(("family", "form"), CASES)
def test_gradients_are_those_of_a_loop_over_experts(family, form):
    model = adapt_wide(family, form=form, head_dropout=0.0)
    compare_with_loop(model, random_ids())


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_configuration_equals_the_loop(name, form):
    model = adapt_wide("qwen3_moe", form=form, head_dropout=0.0, **CONFIGS[name])
    compare_with_loop(model, random_ids())


def head_masks(adapter, expert, rows, seed):
    """The masks of `adapter` for rows that are numbered within each expert, as in the loop of the base model."""
    own = (adapter.derive_seed(seed) ^ ((expert + 1) * 0x9E3779B97F4A7C15)) & (2**63 - 1)
    return keep_mask(own, (rows, adapter.num_heads, adapter.r), adapter.dropout)


def test_each_head_has_its_own_mask():
    model = adapt_wide("qwen3_moe", form="eager", head_dropout=0.4)
    seed = 17
    with using_all([(routing, {"seed": seed}) for routing in find_routings(model)]):
        compare_with_loop(model, random_ids(), masks=lambda *args: head_masks(*args, seed))


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_masks_of_sorted_rows_keep_the_mean(form):
    """All forms drop the configured share, and scale up the others."""
    model = adapt_wide("qwen3_moe", form=form, head_dropout=0.5, router="uniform")
    ids = random_ids()
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = plain(ids).logits
        outputs = torch.stack([model(ids).logits for _ in range(400)])
    assert outputs.std(0).max() > 0.01
    first = wrappers(model)["base_model.model.model.layers.0.mlp.experts"]
    adapter = first.weights()["down_proj"].rlora_adapters["default"]
    x = torch.randn(40, adapter.in_features, dtype=expected.dtype)
    groups = RowGroups(offsets=torch.tensor([5, 5, 17, 30, 39, 40], dtype=torch.int32))
    rows = ExpertRows(groups, None, 40)
    with torch.no_grad():
        deltas = torch.stack([adapter.delta(adapter(), x, rows) for _ in range(800)])
        undropped = adapter.delta(adapter()._replace(seed=None), x, rows)
    noise = deltas.std(0) / 800**0.5
    assert ((deltas.mean(0) - undropped).abs() <= 6 * noise + 1e-6).all()


@pytest.mark.parametrize("position", ["head", "input"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_masks(position, reentrant):
    model = adapt_wide("mixtral", form="eager", head_dropout=0.3, dropout_position=position)
    ids = random_ids()

    def run():
        model.zero_grad()
        torch.manual_seed(3)
        mean_loss(model(ids).logits, ids).backward()
        return gradients(model)

    expected = run()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in run().items():
        torch.testing.assert_close(grad, expected[name], **TOL[torch.float64])


TASKS = ["sums", "signs", "names"]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_each_row_of_a_batch_has_its_task(family, form):
    model = adapt_wide(family, form=form, head_dropout=0.0, router="task", tasks=TASKS)
    ids = random_ids(4, 7)
    tasks = torch.tensor([2, 0, -1, 1])
    by_token = torch.where(tasks < 0, len(TASKS), tasks).repeat_interleave(7)

    def logits(token, adapter, expert):
        return adapter.task_logits()[expert][by_token[token]]

    compare_with_loop(model, ids, task_ids=tasks, logits=logits)


def test_one_task_for_a_batch():
    model = adapt_wide("qwen3_moe", form="grouped_mm", head_dropout=0.0, router="task", tasks=TASKS).eval()
    ids = random_ids(2, 7)
    with torch.no_grad():
        model.set_task("names")
        chosen = model(ids).logits
        model.set_task(None)
        assert torch.equal(chosen, model(ids, task_ids=["names", "names"]).logits)
        assert not torch.allclose(chosen, model(ids, task_ids=["sums", "names"]).logits)
        assert torch.equal(chosen[1], model(ids, task_ids=["sums", "names"]).logits[1])


@pytest.mark.parametrize("family", EXPERT_MODELS)
def test_an_adapter_is_saved_and_loaded_exactly(family, tmp_path):
    model = adapt(build(family)).eval()
    perturb(model)
    ids = random_ids()
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    names = read_safetensors_header(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("experts.gate_up_proj.rlora_adapters.A") for name in names)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(build(family), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    base = build(family)
    base.load_adapter(str(tmp_path))  # by transformers
    with torch.no_grad():
        assert torch.equal(base(ids).logits, expected)


def test_adapters_of_another_base_or_file_are_refused(tmp_path):
    adapt(build("qwen3_moe")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="belongs to another base model"):
        PeftModel.from_pretrained(build("qwen3_moe", num_experts=4), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(name for name in tensors if name.endswith("down_proj.rlora_adapters.B"))
    del tensors[lost]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"down_proj\.rlora_adapters"):
        PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)


def test_several_adapters_on_one_base(tmp_path):
    ids = random_ids()
    first, second = adapt(build("qwen3_moe")), adapt(build("qwen3_moe"), target_parameters=["experts.down_proj"])
    outputs = []
    for seed, model in enumerate((first, second)):
        perturb(model.eval(), seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        with torch.no_grad():
            outputs.append(model(ids).logits)

    base = build("qwen3_moe")
    with torch.no_grad():
        plain = base(ids).logits
    model = PeftModel.from_pretrained(base, tmp_path / "0", adapter_name="one")
    model.load_adapter(tmp_path / "1", "two")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, outputs[0])
        model.set_adapter("two")
        assert torch.equal(model(ids).logits, outputs[1])
        mixed = model(ids, adapter_names=["one", "two", "__base__"]).logits
        for row, expected in enumerate((*outputs, plain)):
            torch.testing.assert_close(mixed[row], expected[row], **TOL[torch.float32])

        both = wrappers(model)["base_model.model.model.layers.0.mlp.experts"]
        assert set(both.weights()["down_proj"].rlora_adapters) == {"one", "two"}
        assert set(both.weights()["gate_up_proj"].rlora_adapters) == {"one"}
        model.delete_adapter("two")
        model.set_adapter("one")
        assert torch.equal(model(ids).logits, outputs[0])
        assert torch.equal(model.unload()(ids).logits, plain)
    assert not wrappers(base)


@pytest.mark.parametrize("family", EXPERT_MODELS)
def test_a_uniform_adapter_is_merged(family):
    model = adapt(build(family).double(), form="eager" if family not in ONE_FORM else None, router="uniform").double()
    perturb(model.eval())
    ids = random_ids()
    with torch.no_grad():
        expected = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, expected, **TOL[torch.float64])
        model.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, expected, **TOL[torch.float64])
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, plain, **TOL[torch.float64])
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, **TOL[torch.float64])
    assert not wrappers(merged)


def test_a_routed_adapter_is_not_merged():
    with pytest.raises(ValueError, match="its delta depends on the token"):
        adapt(build("qwen3_moe")).merge_adapter()


@pytest.mark.parametrize("family", EXPERT_MODELS)
def test_default_targets_are_all_mlp_projections(family):
    config = adapt(build(family)).peft_config["default"]
    assert config.target_parameters == ["experts.gate_up_proj", "experts.down_proj"]
    assert config.target_modules == EXPERT_MODELS[family][3]


def adapted_names(model):
    return {name.removeprefix("base_model.model.") for name in adapted_layers(model, "default")}


def test_only_the_selected_weights_are_adapted():
    select = {"target_parameters": ["experts.down_proj"]}
    layers = [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    assert adapted_names(adapt(build("qwen3_moe"), **select)) == set(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        assert adapted_names(adapt(build("qwen3_moe"), **select, layers_to_transform=[1])) == {layers[1]}
    with_attention = adapted_names(adapt(build("qwen3_moe"), **select, target_modules=["q_proj"]))
    assert with_attention == {*layers, *(f"model.layers.{i}.self_attn.q_proj" for i in range(2))}
    excluded = {"exclude_modules": ["layers.0.mlp.experts"]}
    assert adapted_names(adapt(build("qwen3_moe"), **excluded)) == {layers[1], layers[1].replace("down", "gate_up")}
    no_experts = adapted_names(adapt(build("qwen2_moe"), target_modules=["down_proj"]))
    assert no_experts == {f"model.layers.{i}.mlp.shared_expert.down_proj" for i in range(2)}


def test_ranks_and_alphas_by_pattern():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        model = adapt(build("qwen3_moe"), rank_pattern={"experts.down_proj": 2}, alpha_pattern={"gate_up_proj": 8})
    weights = wrappers(model)["base_model.model.model.layers.0.mlp.experts"].weights()
    assert (weights["down_proj"].r["default"], weights["gate_up_proj"].r["default"]) == (2, 3)
    assert weights["gate_up_proj"].scaling["default"] == pytest.approx(8 / 3**0.5)
    assert weights["down_proj"].rlora_adapters["default"].A.shape == (6, 2, 24)


class UnknownConfig(MixtralConfig):
    model_type = "unknown_moe"


def unknown_model():
    model = build("mixtral")
    model.config.__class__ = UnknownConfig
    return model


def test_without_a_default_the_error_names_remedies_that_work():
    with pytest.raises(ValueError, match=r"has no default for models of type 'unknown_moe'") as caught:
        get_peft_model(unknown_model(), RLoraConfig())
    remedy = re.search(r"target_parameters=(\[.*?\])", str(caught.value))
    names = ast.literal_eval(remedy[1])
    assert names == ["experts.down_proj", "experts.gate_up_proj"]
    assert len(adapted_layers(get_peft_model(unknown_model(), RLoraConfig(target_parameters=names)), "default")) == 4


def test_wrong_names_are_refused_or_reported():
    with pytest.raises(TypeError, match="`target_parameters` must be a list of names"):
        RLoraConfig(target_parameters="experts.down_proj")
    with pytest.raises(TypeError, match="regular expressions are not accepted"):
        RLoraConfig(target_parameters=[r".*\.down_proj"])
    with pytest.raises(TypeError, match="which is of shape .* three dimensions"):
        adapt(build("qwen3_moe"), target_parameters=["q_proj.weight"])
    with pytest.raises(ValueError, match=r"adapted by `target_parameters=\['experts.down_proj', 'experts.gate_up"):
        adapt(build("qwen3_moe"), target_parameters=["experts.gate_proj"])
    with pytest.warns(UserWarning, match="`target_parameters` names 'experts.gate_proj'"):
        adapt(build("qwen3_moe"), target_parameters=["experts.gate_proj", "experts.down_proj"])


def test_kernels_that_nothing_sees_are_refused():
    model = adapt(build("qwen3_moe"))

    def hidden_kernel(self, hidden_states, top_k_index, top_k_weights):
        return torch.zeros_like(hidden_states)

    def odd_kernel(self, hidden_states, top_k_index, top_k_weights):
        return torch.einsum("td,eod->to", hidden_states, self.down_proj.transpose(1, 2))

    for kernel, reason in ((hidden_kernel, "a kernel that PyTorch does not see"), (odd_kernel, "einsum")):
        ALL_EXPERTS_FUNCTIONS.register("test_kernel", kernel)
        for wrapper in wrappers(model).values():
            wrapper.base_layer.config._experts_implementation_internal = "test_kernel"
        with pytest.raises(RuntimeError, match=rf"computes with `\w+` by {reason}, to which R-LoRA can't add"):
            model(random_ids())


@pytest.mark.parametrize("mark", [{"_is_expert_parallel": True}, {"num_experts": 3}], ids=str)
def test_expert_parallelism_is_refused(mark):
    """By the mark of transformers, and in 5.17, which has none, by the number of experts of this process."""
    model = adapt(build("qwen3_moe"))
    for wrapper in wrappers(model).values():
        for name, value in mark.items():
            setattr(wrapper.base_layer, name, value)
    with pytest.raises(NotImplementedError, match="expert parallelism"):
        model(random_ids())


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_16_bit_bases_keep_float32_adapters(form):
    model = adapt(build("qwen3_moe").to(torch.bfloat16), form=form, head_dropout=0.0)
    adapter = wrappers(model)["base_model.model.model.layers.0.mlp.experts"].weights()["down_proj"]
    assert {parameter.dtype for parameter in adapter.rlora_adapters.parameters()} == {torch.float32}
    ids = random_ids()
    model.eval()
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(adapted, model(ids).logits)

    perturb(model.train())
    mean_loss(model(ids).logits.float(), ids).backward()
    wide = with_loops(copy.deepcopy(model).double())
    wide.zero_grad()
    mean_loss(wide(ids).logits, ids).backward()
    # 16 bits round to 4e-3; a token whose experts are nearly equally likely may be sent to others.
    for (name, parameter), (_, expected) in zip(model.named_parameters(), wide.named_parameters(), strict=True):
        if parameter.requires_grad and "layers.1" in name and name.endswith(".B"):
            error = (parameter.grad - expected.grad).norm() / expected.grad.norm()
            assert error < 0.25, (name, error)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_autocast_computes_in_its_dtype(form):
    model = adapt(build("qwen3_moe"), form=form).train()
    ids = random_ids()
    with torch.autocast("cpu", torch.bfloat16):
        mean_loss(model(ids).logits.float(), ids).backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


def test_experts_without_tokens_get_no_gradient():
    model = adapt_wide("qwen3_moe", form="grouped_mm")
    ids = random_ids(1, 2)  # at most 4 of 6 experts in each layer
    mean_loss(model(ids).logits, ids).backward()
    by_expert = next(
        g for n, g in gradients(model).items() if "layers.0" in n and "down_proj" in n and n.endswith(".B")
    ).flatten(1)
    assert 1 <= (by_expert.abs().amax(1) == 0).sum() < 6


def test_training_changes_adapters_and_nothing_else():
    model = adapt(build("mixtral")).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = random_ids()
    losses = []
    for _ in range(8):
        loss = mean_loss(model(ids).logits, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        trained = ".rlora_adapters." in name and not name.endswith(("A0", "B0"))
        assert torch.equal(parameter, before[name]) != trained, name


def test_the_auxiliary_loss_of_the_base_is_untouched():
    base = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    ids = random_ids()
    expected = base(ids, labels=ids)
    model = adapt(base).eval()
    actual = model(ids, labels=ids)
    assert torch.equal(actual.aux_loss, expected.aux_loss)
    assert torch.equal(actual.loss, expected.loss)


def test_inference_notices_changed_parameters():
    model = adapt(build("qwen3_moe")).eval()
    ids = random_ids()
    with torch.no_grad():
        first = model(ids).logits
        assert torch.equal(model(ids).logits, first)
        perturb(model)
        assert not torch.equal(model(ids).logits, first)


def test_generation_and_copies():
    model = adapt(build("qwen3_moe")).eval()
    perturb(model)
    ids = random_ids(2, 5)
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 8)
    copied = copy.deepcopy(model)
    wrapper = next(iter(wrappers(copied).values()))
    assert wrapper.weights()["down_proj"].get_base_layer() is wrapper.base_layer
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, model(ids).logits)


def test_the_state_of_the_model_is_described():
    model = adapt(build("qwen3_moe"))
    status = model.get_model_status()
    assert status.active_adapters == ["default"]
    names = {entry.name for entry in model.get_layer_status()}
    assert {f"model.{name}" for name in adapted_names(model)} < names
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_without_grouped_products_of_pytorch(family, monkeypatch):
    """transformers' own operator, for older versions of PyTorch and dtypes that theirs lacks."""
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)
    model = adapt(build(family), form="grouped_mm", head_dropout=0.0).train().double()
    perturb(model)
    compare_with_loop(model, random_ids())


def test_products_within_an_autograd_function_are_refused(monkeypatch):
    """DeepSpeed ZeRO-3 replaces `linear` by one: a delta would get no gradient."""

    class Wrapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x.matmul(weight.t())

    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias=None: Wrapped.apply(x, weight))
    model = adapt(build("mixtral"), form="eager")
    with pytest.raises(RuntimeError, match=r"`matmul` within an autograd function.*set_experts_implementation"):
        model(random_ids())


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 loses outputs of transformers' models where graphs break"
)
def test_compiled_models_compute_the_same():
    model = adapt_wide("qwen3_moe", form="grouped_mm", head_dropout=0.0)
    ids = random_ids()
    expected = model(ids).logits
    mean_loss(expected, ids).backward()
    grads = gradients(model)
    model.zero_grad()
    try:
        compiled = torch.compile(model, backend="aot_eager")(ids).logits
        torch.testing.assert_close(compiled, expected, **TOL[torch.float32])
        mean_loss(compiled, ids).backward()
    finally:
        torch._dynamo.reset()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, grads[name], **TOL[torch.float32])


def test_a_4_bit_base_with_experts_in_16_bits(tmp_path):
    """bitsandbytes quantizes linear layers only."""
    pytest.importorskip("bitsandbytes")
    sizes = {
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "head_dim": 16,
    }  # bitsandbytes packs blocks of these on CPU
    build("qwen3_moe", **sizes).save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=four_bits)
    ids = random_ids()
    with torch.no_grad():
        expected = base(ids).logits
        model = adapt(base, target_modules="all-linear", target_parameters=["experts.down_proj"]).eval()
        assert torch.equal(model(ids).logits, expected)
    perturb(model.train())
    mean_loss(model(ids).logits.float(), ids).backward()
    assert all(grad.abs().max() > 0 for name, grad in gradients(model).items() if name.endswith(".B"))


def test_quantized_experts_are_refused():
    model = build("mixtral")
    experts = next(module for module in model.modules() if "down_proj" in module._parameters)
    torch.nn.utils.parametrize.register_parametrization(experts, "down_proj", torch.nn.Identity())
    with pytest.raises(TypeError, match=r"parametrized \(quantized\); R-LoRA adapts parameters of experts"):
        adapt(model)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_targets_that_miss_the_experts_are_reported(targets):
    narrow = {"exclude_modules": ["shared_expert_gate"]} if targets == "all-linear" else {}
    with pytest.warns(UserWarning, match="the experts of this model are none: they are not adapted") as caught:
        adapt(build("qwen2_moe"), target_modules=targets, **narrow)
    names = ast.literal_eval(re.search(r"target_parameters=(\[.+?\])", str(caught[0].message))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapt(build("qwen2_moe"), target_modules=targets, **narrow, target_parameters=names)
        assert len(wrappers(model)) == 2
        adapt(build("qwen2_moe"), target_modules=targets, **narrow, target_parameters=[])
        adapt(build("qwen2_moe"), target_modules=["q_proj"])


def test_names_of_separate_experts_are_refused_with_those_that_work():
    """As in transformers 4, where each expert was a module; PEFT converts them for LoRA."""
    with pytest.raises(
        ValueError, match=r"adapted by `target_parameters=\['experts.down_proj', 'experts.gate_up_proj'\]"
    ):
        adapt(build("qwen3_moe"), target_modules=["gate_proj", "up_proj", "down_proj"])


@pytest.mark.parametrize("form", ["grouped_mm", "eager"])
@pytest.mark.parametrize("to_disk", [False, True])
def test_offloaded_experts(form, to_disk, tmp_path):
    """accelerate replaces the weights while the module runs."""
    base, ids = build("qwen3_moe"), random_ids()
    base.set_experts_implementation(form)
    with torch.no_grad():
        expected = base(ids).logits
    device = torch.device("cpu")
    if to_disk:
        accelerate.disk_offload(base, tmp_path, execution_device=device)
    else:
        accelerate.cpu_offload(base, execution_device=device)
    model = adapt(base).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    mean_loss(model.train()(ids).logits, ids).backward()
    assert all(grad.abs().max() > 0 for name, grad in gradients(model).items() if name.endswith(".B"))


def test_a_base_that_trains_gets_its_gradient():
    """The products of weights that are not frozen are left to autograd."""
    model = adapt_wide("qwen3_moe", form="eager", head_dropout=0.0)
    grouped = copy.deepcopy(model).float()
    ids = random_ids()
    results = []
    for each, form in ((model, "eager"), (grouped, "grouped_mm")):
        for wrapper in wrappers(each).values():
            wrapper.base_layer.requires_grad_(True)
        each.base_model.model.set_experts_implementation(form)
        mean_loss(each(ids).logits, ids).backward()
        results.append(gradients(each))
    expected, actual = results
    assert any(name.endswith("base_layer.gate_up_proj") for name in actual)
    for name, grad in actual.items():
        torch.testing.assert_close(grad.double(), expected[name], **TOL[torch.float32])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_hooks_may_pass_another_tensor(form):
    """DeepSpeed ZeRO-3 replaces the inputs of modules by tensors on the same memory."""
    model = adapt_wide("qwen3_moe", form=form, router="task", tasks=TASKS).eval()
    ids, tasks = random_ids(3, 7), torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = model(ids, task_ids=tasks).logits
        for wrapper in wrappers(model).values():
            wrapper.base_layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
        assert torch.equal(model(ids, task_ids=tasks).logits, expected)
