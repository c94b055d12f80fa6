"""
vLLM's LoRA layers beside those of the plugin, around vLLM's own linear layers: outputs, CUDA graphs and time.

    python benchmarks/vllm_layers.py --out benchmarks/results/vllm_layers.jsonl
    python benchmarks/vllm_layers.py --parts speed --shapes qwen2.5-3b --tokens 1 16
    python benchmarks/vllm_layers.py --update    # writes the table of docs/integrations/vllm.md from the rows

Needs the release of vLLM that the layers are for; `--update` doesn't.

`correct` compares the outputs of a batch with adapters of five kinds, an empty slot and tokens without an adapter with
float64. The error may be 1.5 times that of the layers of rlora_trl and PEFT in the same dtype. `graph` captures a
layer once and replays it with other tokens and other adapters. `speed` times the LoRA part of a decoder layer (qkv, o,
gate and up, down) and its linear layers with and without it, in a CUDA graph, with weights of random values: vLLM's
LoRA of rank 16, and on the plugin's layers R-LoRA (N=3, r=4, which is also of rank 16) and that LoRA.
"""

import argparse
import copy
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, attempt, environment, free, median, time_calls, write_row
from peft import LoraConfig, get_peft_model
from report import ROOT, Row, by_run, chosen, read, replace_block
from shapes import SHAPES, model_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import rlora_trl
from rlora_trl import RLoraConfig
from rlora_trl.files.checks import check_adapter
from rlora_trl.integrations.vllm_layers import VLLM_VERSION, register_layers
from rlora_trl.integrations.vllm_packing import pack_layer, write_packed
from rlora_trl.tuner import MultiHeadAdapter


PAGE = ROOT / "docs" / "integrations" / "vllm.md"
DTYPES = (torch.bfloat16, torch.float16)
# The layers of vLLM that are tried, and those of the model that they stand for.
KINDS = {
    "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "down_proj": ["mlp.down_proj"],
    "o_proj": ["self_attn.o_proj"],
    "up_proj": ["mlp.up_proj"],
    "replicated": ["mlp.up_proj"],
}


# vLLM


@contextmanager
def one_rank() -> Generator[tuple[tuple, tuple], None, None]:
    """vLLM with one rank: its own classes of LoRA layers, and those with the plugin's."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.lora import utils

    stock = utils._all_lora_classes
    with set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, backend="gloo")
        distributed.initialize_model_parallel(1, 1)
        register_layers()
        try:
            yield stock, utils._all_lora_classes
        finally:
            utils._all_lora_classes = stock
            distributed.destroy_model_parallel()
            distributed.destroy_distributed_environment()


def linear(
    kind: str, d_in: int, outputs: list[int], head: int, weight: torch.Tensor | None, dtype: torch.dtype
) -> Any:
    """A linear layer of vLLM on the device; without `weight` `[sum of outputs, d_in]`, with random values."""
    from vllm.model_executor.layers import linear as layers

    options = {"bias": False, "params_dtype": dtype, "prefix": kind}
    with torch.device(DEVICE):
        if kind == "gate_up_proj":
            module = layers.MergedColumnParallelLinear(d_in, outputs, **options)
        elif kind == "qkv_proj":
            module = layers.QKVParallelLinear(d_in, head, outputs[0] // head, outputs[1] // head, **options)
        elif kind in ("down_proj", "o_proj"):
            module = layers.RowParallelLinear(d_in, outputs[0], **options)
        elif kind == "up_proj":
            module = layers.ColumnParallelLinear(d_in, outputs[0], **options)
        else:
            module = layers.ReplicatedLinear(d_in, outputs[0], **options)
    if weight is None:
        module.weight.data.normal_(0, d_in**-0.5)
    else:
        module.weight.data = weight.to(DEVICE, dtype)
    module.quant_method.process_weights_after_loading(module)
    return module


def wrap(module: Any, slices: list[str], classes: tuple, config: Any) -> Any:
    """The LoRA layer that vLLM puts around a linear layer, of these classes."""
    from vllm.lora import utils

    before, utils._all_lora_classes = utils._all_lora_classes, classes
    try:
        return utils.from_layer(module, config.max_loras, config, slices if len(slices) > 1 else [])
    finally:
        utils._all_lora_classes = before


def lora_config(rank: int, slots: int, dtype: torch.dtype) -> Any:
    from vllm.config.lora import LoRAConfig

    return LoRAConfig(max_lora_rank=rank, max_loras=slots, lora_dtype=dtype)


def lora_kernels(tokens: int, config: Any) -> Any:
    """vLLM's kernels of this platform, for batches of at most `tokens` tokens."""
    from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper

    return get_punica_wrapper(tokens, max_batches=tokens, device=torch.device(DEVICE), lora_config=config)


def set_tokens(kernels: Any, tokens: Sequence[int], slots: int, prefill: bool) -> None:
    """Map tokens to slots, -1 for none. vLLM names adapters by numbers above zero."""
    from vllm.lora.layers import LoRAMapping

    ids = tuple(slot + 1 for slot in tokens)
    kernels.update_metadata(LoRAMapping(ids, ids, is_prefill=prefill), list(range(1, slots + 1)), slots + 1, 100)


def output_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a call, which returns the output that it was captured with; on a CPU the call itself."""
    if DEVICE == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()

    def replay() -> Any:
        graph.replay()
        return y

    return replay


# Adapters, in slots in this order

SLOTS, RANK = 6, 32  # the last slot is empty
TASKS = ["sst2", "rte"]
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "softmax": {},
    "plain LoRA": None,
    "top_k": {
        "router": "top_k",
        "router_top_k": 2,
        "router_init": "kaiming_uniform",
        "num_heads": 5,
        "share_a": False,
        "r": 2,
    },
    "task": {"router": "task", "tasks": TASKS},
    "uniform": {"router": "uniform", "tasks": TASKS},
}


@dataclass(frozen=True)
class Adapter:
    """An adapter of a small model, and the folder from which vLLM loads it."""

    name: str
    model: nn.Module
    folder: Path

    def layers(self, dtype: torch.dtype) -> nn.Module:
        """The decoder layer with the adapter, in a dtype."""
        model = copy.deepcopy(self.model).to(DEVICE, dtype)
        if self.name == "task":
            rlora_trl.set_task(model, TASKS[-1])
        return model.base_model.model.model.layers[0]


def make_adapters(folder: Path, hidden: int, intermediate: int) -> list[Adapter]:
    """One adapter of each kind, on one base of one decoder layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": 64, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    # Not k and v: slices without an adapter.
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj", "o_proj"]}
    made = []
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        # LoRA is scaled as R-LoRA is: rounding of the base must not hide a delta.
        config = LoraConfig(r=8, lora_alpha=128, **options) if fields is None else RLoraConfig(**options, **fields)
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        perturb(model, seed)
        made.append(Adapter(name, model, save(model, fields, folder / name.replace(" ", "_"))))
    return made


def perturb(model: nn.Module, seed: int) -> None:
    """Move everything that trains away from its initial value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * noise * parameter.abs().mean().clamp(min=0.05)


def save(model: nn.Module, fields: dict[str, Any] | None, folder: Path) -> Path:
    """Save an adapter, and return the folder that the plugin would give to vLLM."""
    model.save_pretrained(folder / "adapter")
    if fields is None:
        return folder / "adapter"
    if fields.get("router", "softmax") in ("softmax", "top_k"):
        write_packed(check_adapter(folder / "adapter"), folder / "packed")
        return folder / "packed"
    rlora_trl.export_lora(model, folder / "export", task=TASKS[-1])
    return folder / "export"


# Outputs

TOKENS = [0, 0, 1, 2, -1, 0, 1, -1, 2, 2, 5, 3, 4, 3, 4, 0, 4, 3, 2, 1]
# The error may be so many times that of the reference in the same dtype, and the delta of an adapter must be so many
# times the error, or it could be wrong unnoticed.
_MAX_RATIO, _MIN_DELTA = 1.5, 20


class LayerUnderTest:
    """
    A layer of vLLM with the plugin's LoRA layer around it, and all adapters in its slots.

    Args:
        kind (`str`): One of [`KINDS`].
        adapters (`list[Adapter]`): By slot.
        classes (`tuple`): Classes of LoRA layers for vLLM to choose from.
        dtype (`torch.dtype`): That of base and adapters.
    """

    def __init__(self, kind: str, adapters: list[Adapter], classes: tuple, dtype: torch.dtype) -> None:
        self.names, self.adapters, self.dtype = KINDS[kind], adapters, dtype
        layers = [base_of(adapters[0].model.base_model.model.model.layers[0], name) for name in self.names]
        outputs = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.data for layer in layers])
        self.d_in = layers[0].in_features
        self.config = lora_config(RANK, SLOTS, dtype)
        module = linear(kind, self.d_in, outputs, outputs[0] // 4, weight, dtype)
        self.layer = wrap(module, self.names, classes, self.config)
        if not type(self.layer).__name__.startswith("RLora"):
            raise RuntimeError(f"vLLM chose {type(self.layer).__name__}, which is not a layer of the plugin")
        self.kernels = lora_kernels(128, self.config)
        self.layer.set_mapping(self.kernels)
        self.load({slot: slot for slot in range(len(adapters))})

    def load(self, places: dict[int, int]) -> None:
        """Put adapters into slots (slot: adapter), as vLLM loads them from files."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import PackedLoRALayerWeights
        from vllm.lora.peft_helper import PEFTHelper

        wanted = {name.rpartition(".")[2] for names in KINDS.values() for name in names}
        for slot, number in places.items():
            folder = str(self.adapters[number].folder)
            helper = PEFTHelper.from_local_dir(folder, None)
            helper.validate_legal(self.config)
            options = {"lora_model_id": slot + 1, "device": "cpu", "dtype": self.dtype}
            loaded = LoRAModel.from_local_checkpoint(folder, wanted, helper, **options)
            parts = [loaded.get_lora(f"model.layers.0.{name}") for name in self.names]
            weights = PackedLoRALayerWeights.pack(parts) if len(parts) > 1 else parts[0].optimize()
            self.layer.set_lora(slot, weights.lora_a, weights.lora_b)

    def spoil_mapping(self) -> None:
        """Fill the slots of all tokens with what uninitialized memory may hold."""
        on_gpu = getattr(self.kernels, "token_mapping_meta", None)
        if on_gpu is not None:
            on_gpu.token_lora_mapping.fill_(2**30)

    def set_tokens(self, tokens: Sequence[int], prefill: bool = False) -> None:
        set_tokens(self.kernels, tokens, SLOTS, prefill)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return output_of(self.layer, x)


def base_of(decoder: nn.Module, name: str) -> nn.Module:
    """A linear layer of the model without its adapter."""
    layer = decoder.get_submodule(name)
    return getattr(layer, "base_layer", layer)


class Reference:
    """
    The layers of rlora_trl and PEFT in a dtype.

    Args:
        adapters (`list[Adapter]`): By number.
        dtype (`torch.dtype`): That of the computation.
        held (`torch.dtype`, *optional*): Routers of "top_k" are rounded to it first, as a server holds them: which of
            two nearly equal logits is kept is then no error.
    """

    def __init__(self, adapters: list[Adapter], dtype: torch.dtype, held: torch.dtype | None = None) -> None:
        self.decoders, self.dtype = [adapter.layers(dtype) for adapter in adapters], dtype
        top_k = self.decoders[[*ADAPTERS].index("top_k")]
        for name, parameter in top_k.named_parameters():
            if name.endswith(".router"):
                parameter.data = parameter.data.to(held or dtype).to(dtype)

    def output(self, kind: str, x: torch.Tensor, meant: Sequence[int]) -> torch.Tensor:
        """Outputs `[T, d_out]` of tokens `[T, d_in]` with the adapters `meant`; other numbers stand for none."""
        numbers, x = torch.tensor(meant, device=DEVICE), x.to(self.dtype)
        outputs = []
        for name in KINDS[kind]:
            y = base_of(self.decoders[0], name)(x)
            for number, decoder in enumerate(self.decoders):
                rows = (numbers == number).nonzero().flatten()
                if len(rows):
                    y[rows] = decoder.get_submodule(name)(x[rows].unsqueeze(0))[0]
            outputs.append(y)
        return torch.cat(outputs, dim=-1)


def judge(
    actual: torch.Tensor, own: Reference, exact: Reference, kind: str, x: torch.Tensor, meant: Sequence[int]
) -> Row:
    """
    Root mean square errors against float64 by adapter, the worst ratio to those of `own`, and whether all hold.

    Args:
        actual (`torch.Tensor` of shape `[T, d_out]`): Outputs of the layer of vLLM.
        own, exact (`Reference`): In its dtype, and in float64.
        kind (`str`): One of [`KINDS`].
        x (`torch.Tensor` of shape `[T, d_in]`): Tokens.
        meant (`Sequence[int]`): The adapter of each token; other numbers stand for none.
    """
    expected = exact.output(kind, x, meant)
    wrong, rounded = actual.double() - expected, own.output(kind, x, meant).double() - expected
    delta = expected - exact.output(kind, x, [-1] * len(meant))
    numbers = torch.tensor(meant, device=DEVICE)
    by_adapter = {}
    for number in sorted(set(meant)):
        rows = numbers == number
        adapted = 0 <= number < len(ADAPTERS)
        error, own_error, size = (float(each[rows].pow(2).mean().sqrt()) for each in (wrong, rounded, delta))
        by_adapter[[*ADAPTERS][number] if adapted else "none" if number < 0 else "empty slot"] = {
            "error": error,
            "own_error": own_error,
            "delta": size,
            "ratio": error / max(own_error, 1e-12),
            "ok": error <= max(_MAX_RATIO * own_error, 1e-6) and (not adapted or size > _MIN_DELTA * error),
        }
    found = by_adapter.values()
    return {
        "ok": all(each["ok"] for each in found),
        "worst": max(each["ratio"] for each in found),
        "by_adapter": by_adapter,
    }


def check_batch(
    kind: str, tokens: list[int], adapters: list[Adapter], classes: tuple, own: Reference, exact: Reference
) -> Row:
    """Judge the outputs of one batch."""
    layer = LayerUnderTest(kind, adapters, classes, own.dtype)
    layer.set_tokens(tokens, prefill=len(tokens) > 64)
    torch.manual_seed(1)
    x = torch.randn(len(tokens), layer.d_in, dtype=own.dtype, device=DEVICE)
    return judge(layer(x), own, exact, kind, x, tokens)


def part_correct(adapters: list[Adapter], classes: tuple) -> Iterator[Row]:
    """A row for each dtype, kind of layer and batch."""
    for dtype in DTYPES:
        own, exact = Reference(adapters, dtype), Reference(adapters, torch.float64, held=dtype)
        for kind in KINDS:
            for tokens in (TOKENS, sorted(TOKENS * 4)):
                facts = {"part": "correct", "layer": kind, "dtype": str(dtype)[6:], "step": f"{len(tokens)} tokens"}
                yield facts | result_of(partial(check_batch, kind, tokens, adapters, classes, own, exact))


# What changes between replays: slots of the tokens, and what is done before.
STEPS: dict[str, tuple[list[int], Any]] = {
    "as captured": (TOKENS, None),
    "other tokens": (TOKENS[::-1], None),
    "fewer adapters": ([0] * 10 + [-1] * 10, None),
    "padded": (TOKENS[:11], LayerUnderTest.spoil_mapping),
    "padded, base only": ([-1] * 11, LayerUnderTest.spoil_mapping),
    "other adapters": (TOKENS, {0: 2, 1: 0, 2: 4, 3: 1, 4: 3}),
    "a slot emptied": (TOKENS, 0),
}


class Replays:
    """A layer in a CUDA graph, captured once; on a CPU, which has none, the layer."""

    def __init__(self, kind: str, adapters: list[Adapter], classes: tuple, dtype: torch.dtype) -> None:
        self.kind, self.layer = kind, LayerUnderTest(kind, adapters, classes, dtype)
        self.places = {slot: slot for slot in range(len(adapters))}
        self.layer.set_tokens(TOKENS)
        self.x = torch.randn(len(TOKENS), self.layer.d_in, dtype=dtype, device=DEVICE)
        self.replay = captured(lambda: self.layer(self.x))

    def step(self, tokens: list[int], change: Any, own: Reference, exact: Reference) -> Row:
        """Change what is in memory, replay, and judge the outputs of `tokens`, which padding may follow."""
        self.prepare(change)
        self.layer.set_tokens(tokens)
        self.x.copy_(torch.randn_like(self.x))
        x = self.x[: len(tokens)]
        # vLLM's kernels for CPUs know no padding.
        y = self.layer(x) if DEVICE == "cpu" and len(tokens) < len(TOKENS) else self.replay()
        meant = [self.places.get(slot, -1) for slot in tokens]
        return judge(y[: len(tokens)].clone(), own, exact, self.kind, x, meant)

    def prepare(self, change: Any) -> None:
        """Load other adapters, empty a slot, or call a method of the layer."""
        if isinstance(change, dict):
            self.layer.load(change)
            self.places.update(change)
        elif isinstance(change, int):
            self.layer.layer.reset_lora(change)
            self.places.pop(change, None)
        elif change is not None:
            change(self.layer)


def part_graph(adapters: list[Adapter], classes: tuple) -> Iterator[Row]:
    """A row for each kind of layer and step."""
    dtype = DTYPES[0]
    own, exact = Reference(adapters, dtype), Reference(adapters, torch.float64, held=dtype)
    for kind in KINDS:
        facts = {"part": "graph", "layer": kind, "dtype": str(dtype)[6:]}
        replays, why = attempt(partial(Replays, kind, adapters, classes, dtype))
        if why is not None:
            yield facts | {"step": "capture", "ok": False, "error": why}
            continue
        for name, (tokens, change) in STEPS.items():
            yield facts | {"step": name} | result_of(partial(replays.step, tokens, change, own, exact))


def result_of(check: Callable[[], Row]) -> Row:
    found, why = attempt(check)
    return found if why is None else {"ok": False, "error": why}


# Time

USED = 4  # slots, all with adapters
COPIES = 4  # of a decoder layer, with weights of their own, so that a cache does not hold what a step reads
N, R, LORA_RANK = 3, 4, 16
STOCK, RLORA, LORA = "vLLM LoRA r=16", "plugin R-LoRA N=3 r=4", "plugin LoRA r=16"


def matrices(d_in: int, d_out: int, packed: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random `lora_A` and `lora_B` of a slice: R-LoRA in the packed form, or LoRA."""
    if not packed:
        down, up = torch.randn(LORA_RANK, d_in) * d_in**-0.5, torch.randn(d_out, LORA_RANK) * 0.01
        return down.to(dtype), up.to(dtype)
    adapter = MultiHeadAdapter(d_in, d_out, R, N, scaling=1.0)
    for parameter in adapter.parameters():
        parameter.data.normal_(0, 0.02)
    down, up, _ = pack_layer(adapter, "a layer")
    return down.to(dtype), up.to(dtype)


@dataclass(frozen=True)
class Decoder:
    """Copies of the linear layers of a decoder layer with LoRA layers, and their kernels."""

    copies: list[list[Any]]
    kernels: Any

    def run(self, call: Callable[[Any, torch.Tensor], Any], x: dict[int, torch.Tensor]) -> Callable[[], None]:
        """Call all layers with their input, by its width."""

        def all_layers() -> None:
            for layers in self.copies:
                for layer in layers:
                    call(layer, x[layer.input_size])

        return all_layers


def make_decoder(shape: str, classes: tuple, packed: bool, most_tokens: int) -> Decoder:
    """The layers of a shape, with random adapters in all slots."""
    model, dtype = model_config(shape), DTYPES[0]
    hidden, intermediate = model.hidden_size, model.intermediate_size
    head = hidden // model.num_attention_heads
    kv = head * model.num_key_value_heads
    described = [
        ("qkv_proj", hidden, [hidden, kv, kv]),
        ("o_proj", hidden, [hidden]),
        ("gate_up_proj", hidden, [intermediate, intermediate]),
        ("down_proj", intermediate, [hidden]),
    ]
    config = lora_config(LORA_RANK, USED, dtype)
    kernels = lora_kernels(most_tokens, config)
    copies = []
    for _ in range(COPIES):
        layers = []
        for kind, d_in, outputs in described:
            layer = wrap(linear(kind, d_in, outputs, head, None, dtype), KINDS[kind], classes, config)
            layer.set_mapping(kernels)
            for slot in range(USED):
                downs, ups = zip(*(matrices(d_in, out, packed, dtype) for out in outputs), strict=True)
                layer.set_lora(slot, *((list(downs), list(ups)) if len(outputs) > 1 else (downs[0], ups[0])))
            layers.append(layer)
        copies.append(layers)
    return Decoder(copies, kernels)


def times(decoder: Decoder, tokens: int) -> Row:
    """Microseconds of a decoder layer: its LoRA part, its linear layers with it and without it."""
    per = max(1, tokens // USED)
    prefill = tokens > 256  # prompts of one adapter each; decoding mixes them
    mapping = [min(i // per, USED - 1) if prefill else i % USED for i in range(tokens)]
    set_tokens(decoder.kernels, mapping, USED, prefill)
    layers = decoder.copies[0]
    options = {"dtype": DTYPES[0], "device": DEVICE}
    x = {width: torch.randn(tokens, width, **options) for width in {layer.input_size for layer in layers}}
    y = {width: torch.zeros(tokens, width, **options) for width in {sum(layer.output_slices) for layer in layers}}

    def lora(layer: Any, x: torch.Tensor) -> None:
        weights = (layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)
        layer.punica_wrapper.add_lora_linear(y[sum(layer.output_slices)], x, *weights)

    runs = {
        "lora_graph_us": captured(decoder.run(lora, x)),
        "lora_eager_us": decoder.run(lora, x),
        "linear_graph_us": captured(decoder.run(output_of, x)),
        "base_graph_us": captured(decoder.run(lambda layer, x: output_of(layer.base_layer, x), x)),
    }
    repeats = 30 if tokens <= 256 else 15
    found = {name: round(1e3 * median(time_calls(run, repeats, 3)) / COPIES, 2) for name, run in runs.items()}
    return {"ok": True, **found}


def part_speed(stock: tuple, ours: tuple, shapes: Iterable[str], token_counts: Sequence[int]) -> Iterator[Row]:
    """A row for each shape, number of tokens and form."""
    for shape in shapes:
        facts = {"part": "speed", "shape": shape, "layers": model_config(shape).num_hidden_layers}
        facts |= {"dtype": str(DTYPES[0])[6:], "slots": USED}
        made = {}
        for name, classes, packed in ((STOCK, stock, False), (RLORA, ours, True), (LORA, ours, False)):
            decoder, why = attempt(partial(make_decoder, shape, classes, packed, max(token_counts)))
            if why is None:
                made[name] = decoder
            else:
                yield facts | {"variant": name, "ok": False, "error": why}
        for tokens in token_counts:
            for name, decoder in made.items():
                yield facts | {"tokens": tokens, "variant": name} | result_of(partial(times, decoder, tokens))
        made.clear()
        free()


# The document


def speed_table(rows: list[Row]) -> str:
    """Microseconds of a decoder layer by shape and tokens, from one run; empty without rows."""
    timed = by_run([row for row in chosen(rows, part="speed") if row.get("lora_graph_us")])
    run = timed[0] if timed else []
    lines = []
    for shape, tokens in dict.fromkeys((row["shape"], row["tokens"]) for row in run):
        found = {row["variant"]: row for row in chosen(run, shape=shape, tokens=tokens)}
        if {STOCK, RLORA, LORA} - found.keys():
            continue
        cells = [f"{shape}, {tokens}", f"{found[STOCK]['base_graph_us']:.0f}"]
        for key in ("lora_graph_us", "linear_graph_us"):
            stock = found[STOCK][key]
            cells.append(f"{stock:.0f}")
            cells += [f"{found[name][key]:.0f} ({found[name][key] / stock:.2f})" for name in (RLORA, LORA)]
        lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return ""
    forms = ["vLLM's LoRA", "R-LoRA", "the plugin's LoRA"]
    head = [
        "model, tokens",
        "no LoRA",
        *(f"LoRA part, {form}" for form in forms),
        *(f"layers with {form}" for form in forms),
    ]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, rule)] + lines) + f"\n\n{speed_note(run)}"


def speed_note(run: list[Row]) -> str:
    """What the numbers are, what they were measured on, and the times without graphs."""

    def eager(*variants: str) -> str:
        found = [row["lora_eager_us"] / 1e3 for row in run if row["variant"] in variants]
        return f"{min(found):.1f} to {max(found):.1f} ms"

    row = run[-1]
    return (
        "Microseconds of one decoder layer in a CUDA graph (times vLLM's LoRA), medians: its linear layers without "
        "LoRA, the LoRA part alone, and the linear layers with it. vLLM's LoRA has rank 16 and vLLM's layers; R-LoRA "
        "has N=3 and r=4, the plugin's LoRA rank 16, both on the plugin's layers. Random values, "
        f"{row['slots']} adapters in a batch, {row['dtype']}. Without graphs the host launches the LoRA part in "
        f"{eager(STOCK)} with vLLM's classes and in {eager(RLORA, LORA)} with the plugin's. {row['device']}, torch "
        f"{row['torch']}, triton {row['triton']}, vLLM {row['vllm']}, {row['date']}."
    )


def numerics_note(rows: list[Row]) -> str:
    """What `correct` and `graph` found on a GPU, in their largest run; empty without rows."""
    notes = []
    for part, title in (("correct", "Outputs of batches"), ("graph", "Outputs of replayed CUDA graphs")):
        runs = by_run([row for row in chosen(rows, part=part) if row["device"] != "cpu"])
        if runs:
            failed = sum(not row["ok"] for row in runs[0])
            worst = max(row.get("worst", 0.0) for row in runs[0])
            notes.append(
                f"{title}, {len(runs[0])} cases: the error against float64 is at most {worst:.2f} times that of this "
                f"package's layers in the same dtype; {failed or 'none'} failed."
            )
    return " ".join(notes)


def document(rows: list[Row]) -> str:
    """The block of the page."""
    return "\n\n".join(filter(None, (speed_table(rows), numerics_note(rows))))


# The command


def line(row: Row) -> str:
    """A row in one line."""
    verdict = "ok    " if row["ok"] else "FAILED"
    if "error" in row:
        where = row.get("layer") or f"{row['shape']} {row.get('tokens', '')} {row['variant']}"
        return f"{row['part']:<7} {verdict} {where} {row.get('step', '')}: {row['error']}"
    if row["part"] == "speed":
        shown = " ".join(f"{key[:-3]} {row[key]:8.1f}" for key in row if key.endswith("_us"))
        return f"{row['part']:<7} {verdict} {row['shape']} {row['tokens']:>5} {row['variant']:<22} {shown}"
    bad = [name for name, each in row["by_adapter"].items() if not each["ok"]]
    start = f"{row['part']:<7} {verdict} {row['layer']:<13} {row['dtype']:<9} {row['step']:<18}"
    return f"{start} {row['worst']:6.2f} {', '.join(bad)}".rstrip()


def all_rows(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """The rows of all parts that are asked for."""
    with one_rank() as (stock, ours), torch.no_grad():
        hidden, intermediate = (512, 1376) if DEVICE == "cuda" else (64, 96)
        adapters = make_adapters(scratch, hidden, intermediate) if {*args.parts} - {"speed"} else []
        if "correct" in args.parts:
            yield from part_correct(adapters, ours)
        if "graph" in args.parts:
            yield from part_graph(adapters, ours)
        if "speed" in args.parts:
            yield from part_speed(stock, ours, args.shapes, args.tokens)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["correct", "graph", "speed"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen2.5-3b", "qwen2.5-7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 2048, 8192])
    parser.add_argument("--limit", type=float, default=900, help="seconds after which no other row is begun")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--update", action="store_true", help="write rows of results/ into the document, run nothing")
    args = parser.parse_args(arguments)
    if not args.update and importlib.util.find_spec("vllm") is None:
        parser.error(
            f"vLLM is not installed, and the layers are for {VLLM_VERSION}. `pip install vllm=={VLLM_VERSION}`"
        )
    return args


def main(arguments: list[str] | None = None) -> None:
    started = time.monotonic()
    args = parse(arguments)
    if args.update:
        replace_block(PAGE, "vllm layers", document(read("vllm_layers")), "vllm_layers.py")
        return

    from vllm import __version__ as version

    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for row in all_rows(args, Path(scratch)):
            write_row(args.out, {**row, **environment(), "vllm": version})
            print(line(row), flush=True)
            failed += not row["ok"]
            if time.monotonic() - started > args.limit:
                print(f"Stopped after {args.limit:g} s (`--limit`); the rest was not run.", flush=True)
                break
    if failed:
        sys.exit(f"{failed} row(s) failed.")


if __name__ == "__main__":
    main()
