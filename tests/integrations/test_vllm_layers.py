"""
Layers for vLLM: its own LoRA layers around its own linear layers, on a CPU, with adapters of several kinds; and where
vLLM is not installed, the part of them that is in this package, with stand-ins.
"""

import copy
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import vllm_stand_ins
from peft import LoraConfig, get_peft_model
from processes import ROOT
from safetensors.torch import load_file
from testing_utils import perturb
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.files.checks import check_adapter
from rlora_trl.integrations import vllm_layers
from rlora_trl.integrations.vllm_layers import VLLM_VERSION, register_layers
from rlora_trl.integrations.vllm_packing import write_packed


sys.path.insert(0, str(ROOT / "benchmarks"))
import vllm_layers as benchmark  # noqa: E402


SLOTS = 4
RANK = 32
# Adapters by slot; the last slot stays empty.
ADAPTERS = {kind: benchmark.ADAPTERS[kind] for kind in ("softmax", "plain LoRA", "top_k")}
TOKENS = [0, 0, 1, 2, -1, 0, 1, -1, 2, 2, 3]


@pytest.fixture(scope="module")
def installed():
    """vLLM of the release that the layers are for, with one rank, and its classes replaced; or a skip."""
    pytest.importorskip("vllm.lora.layers", exc_type=ImportError)
    vllm = importlib.import_module("vllm")
    if vllm.__version__.partition("+")[0] != VLLM_VERSION:
        pytest.skip(f"needs vLLM {VLLM_VERSION}")
    with pytest.MonkeyPatch.context() as patch, benchmark.one_rank():
        patch.setattr(benchmark, "DEVICE", "cpu")
        yield vllm


@pytest.fixture(scope="module")
def models(model_folders, tmp_path_factory):
    """Models with an adapter of each kind, and the folder from which vLLM loads it."""
    made = []
    for number, (kind, fields) in enumerate(ADAPTERS.items()):
        base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
        targets = ["q_proj", "gate_proj", "up_proj", "down_proj", "o_proj"]  # not k and v: a slice without an adapter
        options = {"task_type": "CAUSAL_LM", "target_modules": targets}
        config = RLoraConfig(**options, **fields) if fields is not None else LoraConfig(r=8, **options)
        torch.manual_seed(number)
        model = get_peft_model(base, config).eval()
        perturb(model, seed=number)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder / "adapter")
        if fields is not None:
            write_packed(check_adapter(folder / "adapter"), folder / "packed")
        made.append((model, folder / ("adapter" if fields is None else "packed")))
    return made


def linear(kind, layers, dtype):
    """A linear layer of vLLM with the weights of layers of transformers."""
    outputs = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight.data for layer in layers])
    return benchmark.linear(kind, layers[0].in_features, outputs, outputs[0] // 4, weight, dtype)


def lora_layer(kind, module, models, dtype, sharded=False):
    """The LoRA layer that vLLM puts around a linear layer, with an adapter in each slot, as vLLM loads them."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.lora.utils import from_layer

    config = LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS, lora_dtype=dtype, fully_sharded_loras=sharded)
    names = benchmark.KINDS[kind]
    layer = from_layer(module, SLOTS, config, names if len(names) > 1 else [])
    assert type(layer).__module__ == vllm_layers.__name__
    kernels = PunicaWrapperCPU(64, 64, "cpu")
    layer.set_mapping(kernels)
    for slot, (_, folder) in enumerate(models):
        helper = PEFTHelper.from_local_dir(str(folder), None)
        helper.validate_legal(config)
        expected = {name.rpartition(".")[2] for names in benchmark.KINDS.values() for name in names}
        loaded = LoRAModel.from_local_checkpoint(
            str(folder), expected, helper, lora_model_id=slot + 1, device="cpu", dtype=dtype
        )
        parts = [loaded.get_lora(f"model.layers.0.{name}") for name in names]
        weights = PackedLoRALayerWeights.pack(parts) if len(parts) > 1 else parts[0].optimize()
        layer.set_lora(slot, weights.lora_a, weights.lora_b)

    def mapping(tokens, prefill):
        ids = [slot + 1 for slot in tokens]
        kernels.update_metadata(LoRAMapping(ids, ids, is_prefill=prefill), [1, 2, 3, 4], SLOTS + 1, 100)

    return layer, mapping


def expected_output(kind, x, tokens, models, dtype):
    """What the layers of PEFT and of this package give for the tokens of each slot, in a dtype."""
    outputs = []
    for name in benchmark.KINDS[kind]:
        rows = []
        for token, slot in zip(x, tokens, strict=True):
            model = models[slot if 0 <= slot < len(models) else 0][0]
            layer = model.get_submodule(f"base_model.model.model.layers.0.{name}")
            layer = getattr(layer, "base_layer", layer) if not 0 <= slot < len(models) else layer
            rows.append(copy.deepcopy(layer).to(dtype)(token.to(dtype).unsqueeze(0)))
        outputs.append(torch.cat(rows))
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prefill", "sharded"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("kind", benchmark.KINDS)
@torch.no_grad()
def test_outputs_are_those_of_the_adapters(installed, models, kind, prefill, sharded, dtype):
    base = models[0][0].base_model.model.model.layers[0]
    layers = [base.get_submodule(name) for name in benchmark.KINDS[kind]]
    layers = [getattr(layer, "base_layer", layer) for layer in layers]
    layer, mapping = lora_layer(kind, linear(kind, layers, dtype), models, dtype, sharded)
    mapping(TOKENS, prefill)
    torch.manual_seed(1)
    x = torch.randn(len(TOKENS), layers[0].in_features, dtype=dtype)
    actual = layer(x)
    actual = (actual[0] if isinstance(actual, tuple) else actual).double()

    exact = expected_output(kind, x, TOKENS, models, torch.float64)
    rounded = expected_output(kind, x, TOKENS, models, dtype).double()
    without = expected_output(kind, x, [-1] * len(TOKENS), models, torch.float64)
    error = (actual - exact).pow(2).mean().sqrt()
    own = (rounded - exact).pow(2).mean().sqrt()
    changed = (exact - without).pow(2).mean().sqrt()
    assert error < max(1.5 * own, 1e-6) and changed > 50 * error, (error, own, changed)


@torch.no_grad()
def test_a_slot_is_used_again(installed, models):
    """For plain LoRA, then for nothing."""
    base = models[0][0].base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer, mapping = lora_layer("up_proj", linear("up_proj", [base], torch.float32), models, torch.float32)
    mapping([0, 1], True)
    x = torch.randn(1, base.in_features).expand(2, -1)
    before = layer(x)[0]
    assert not torch.allclose(before[0], before[1], atol=1e-2)

    layer.set_lora(0, layer.lora_a_stacked[0][1, 0].clone(), layer.lora_b_stacked[0][1, 0].clone())
    after = layer(x)[0]
    torch.testing.assert_close(after[0], before[1])
    layer.reset_lora(0)
    torch.testing.assert_close(layer(x)[0][0], base(x[0]))


def test_layers_without_the_plugin_refuse_the_packed_form(installed, models, monkeypatch):
    from vllm.lora import utils

    base = models[0][0].base_model.model.model.layers[0].mlp.up_proj.base_layer
    monkeypatch.setattr(vllm_layers, "__name__", "vllm.lora.layers.column_parallel_linear")
    stock = tuple(
        cls.__mro__[2] if issubclass(cls, vllm_layers.PackedLoRAMixin) else cls for cls in utils._all_lora_classes
    )
    monkeypatch.setattr(utils, "_all_lora_classes", stock)
    with pytest.raises(RuntimeError, match="must match the size"):
        lora_layer("up_proj", linear("up_proj", [base], torch.float32), models, torch.float32)


def test_matrices_that_vllm_would_divide(installed, models):
    base = models[0][0].base_model.model.model.layers[0].mlp
    layers = [base.gate_proj.base_layer, base.up_proj.base_layer]
    layer, _ = lora_layer("gate_up_proj", linear("gate_up_proj", layers, torch.float32), models, torch.float32)
    down, up = torch.zeros(11, layers[0].in_features + 8), torch.zeros(layers[0].out_features * 2 + 1, 16)
    down[0, -8:-2] = torch.tensor([77.0, 3, 4, 0, 1, 1])
    with pytest.raises(ValueError, match="has 1 pairs of matrices for a layer of 2 slices"):
        layer.set_lora(0, [down], [up])


def test_registered_once(installed):
    from vllm.lora import utils

    before = utils._all_lora_classes
    register_layers()
    assert utils._all_lora_classes == before
    names = [cls.__name__ for cls in before if issubclass(cls, vllm_layers.PackedLoRAMixin)]
    assert len(names) == 12 and "RLoraRowParallelLinearWithLoRA" in names


def test_other_releases_are_refused(installed, monkeypatch):
    monkeypatch.setattr(installed, "__version__", "0.33.0+cu130")
    with pytest.raises(RuntimeError, match=f"private parts of vLLM {VLLM_VERSION}, and 0.33.0 is installed. Install"):
        register_layers()


def test_a_second_stream_is_refused(installed, monkeypatch):
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    with pytest.raises(RuntimeError, match="can't be used with `RLORA_VLLM_LAYERS`"):
        register_layers()


# With stand-ins


class Layer(vllm_layers.PackedLoRAMixin, vllm_stand_ins.LinearWithLoRA):
    pass


class RowLayer(Layer):
    adds_up_outputs = True


def stand_in(cls, models, names, slots, **options):
    """A layer of stand-ins with the adapters' files in its slots."""
    layers = [models[0][0].get_submodule(f"base_model.model.model.layers.0.{name}").base_layer for name in names]
    layer = cls([base.weight for base in layers], **options)
    layer.create_lora_weights(SLOTS, SimpleNamespace(max_lora_rank=RANK))
    layer.set_mapping(vllm_stand_ins.Kernels(torch.tensor(slots)))
    for slot, (_, folder) in enumerate(models):
        tensors = load_file(folder / "adapter_model.safetensors")
        parts = [f"base_model.model.model.layers.0.{name}" for name in names]
        downs, ups = ([tensors[f"{part}.lora_{side}.weight"] for part in parts] for side in "AB")
        layer.set_lora(slot, *((downs, ups) if len(names) > 1 else (downs[0], ups[0])))
    return layer


@pytest.mark.parametrize("kind", ["gate_up_proj", "up_proj"])
@torch.no_grad()
def test_stand_ins(models, kind):
    torch.manual_seed(0)
    layer = stand_in(Layer, models, benchmark.KINDS[kind], TOKENS)
    x = torch.randn(len(TOKENS), layer.inputs)
    torch.testing.assert_close(layer(x), expected_output(kind, x, TOKENS, models, torch.float32), rtol=1e-4, atol=1e-5)
    layer.reset_lora(0)
    without = [-1 if slot == 0 else slot for slot in TOKENS]
    torch.testing.assert_close(
        layer(x), expected_output(kind, x, without, models, torch.float32), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_ranks_that_divide_the_inputs(models, monkeypatch):
    """Logits are added up among ranks before the softmax. Both ranks run here, one after the other."""
    ranks = [
        stand_in(RowLayer, models, benchmark.KINDS["down_proj"], TOKENS, tp_size=2, tp_rank=rank) for rank in (0, 1)
    ]
    x = torch.randn(len(TOKENS), 2 * ranks[0].inputs)
    partial = []
    distributed = ModuleType("vllm.distributed")
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    distributed.tensor_model_parallel_all_reduce = lambda u: partial.append(u) or u
    for layer in ranks:
        layer(x)
    distributed.tensor_model_parallel_all_reduce = lambda u: partial[0] + partial[1]
    expected = expected_output("down_proj", x, TOKENS, models, torch.float32)
    torch.testing.assert_close(ranks[0](x) + ranks[1](x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_in_one_graph(models):
    """Which token has which adapter, and what is in a slot, are read from memory, as a CUDA graph does."""
    layer = stand_in(Layer, models, benchmark.KINDS["gate_up_proj"], TOKENS)
    kernels = layer.punica_wrapper.kernels
    # On a GPU vLLM has a buffer for the largest batch.
    kernels.token_mapping_meta = SimpleNamespace(token_lora_mapping=torch.full((64,), -1, dtype=torch.int32))
    buffer = kernels.token_mapping_meta.token_lora_mapping
    x = torch.randn(len(TOKENS), layer.inputs)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: layer(x), backend=backend, fullgraph=True)
    for slots in (TOKENS, TOKENS[::-1]):
        kernels.token_lora_indices.copy_(torch.tensor(slots))
        buffer[: len(slots)] = torch.tensor(slots)
        expected = expected_output("gate_up_proj", x, slots, models, torch.float32)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    before = layer(x)
    layer.reset_lora(0)
    torch.testing.assert_close(compiled(x), layer(x))
    assert not torch.allclose(before, layer(x), atol=1e-2) and len(graphs) == 1
