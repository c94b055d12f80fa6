"""Adapters of the authors' code compute the same after their conversion as a reference of their forward pass."""

import json

import pytest
import torch
from authors_code import MLP, PREFIX, author_layers, authors_model, save, state, tiny_base, train
from peft import PeftModel
from safetensors.torch import load_file
from testing_utils import random_ids

from rlora_trl import RLoraConfig
from rlora_trl.convert import convert_adapter
from rlora_trl.files.checks import check_adapter
from rlora_trl.files.record import AdapterRecord
from rlora_trl.reading import AdapterCheckError


# Logits in float32, of order one, after two layers with other orders of summation.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def logits(model):
    with torch.no_grad():
        return model(random_ids()).logits


def loaded(base, folder):
    return PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.fixture
def base():
    return tiny_base()


@pytest.mark.parametrize("num_heads", [1, 2, 5])
@pytest.mark.parametrize("r, alpha", [(4, 32), (3, 7.0)])
def test_hydralora(base, tmp_path, num_heads, r, alpha):
    reference = authors_model(base, r=r, num_heads=num_heads, alpha=alpha)
    train(reference)
    source = save(tmp_path / "source", reference, lora_alpha=alpha)
    report = convert_adapter(source, tmp_path / "out", source_format="hydralora", tasks=["sst2", "rte"])
    assert (report.layers, report.num_heads, report.r, report.offset) == (6, num_heads, r, "none")
    assert (report.scaling, report.use_rslora, report.tasks, report.warnings) == (
        alpha / r,
        False,
        ("sst2", "rte"),
        (),
    )
    config = RLoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.dropout_position, config.head_dropout, config.router_init) == ("input", 0.1, "kaiming_uniform")
    assert (config.tasks, config.base_model_name_or_path) == (["sst2", "rte"], "path_to_model")
    expected = logits(reference)
    model = loaded(base, tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, **TOLERANCE)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.1


@pytest.mark.parametrize("num_heads", [1, 2, 5])
@pytest.mark.parametrize("rank_stablization", [True, False])
def test_rlora_as_in_training(base, tmp_path, num_heads, rank_stablization):
    """On the base that training has changed, which nobody has; here the initial values take its place."""
    reference = authors_model(base, num_heads=num_heads, rank_stablization=rank_stablization, random_heads=True)
    initial = save(tmp_path / "initial", reference)
    train(reference)
    source = save(tmp_path / "source", reference)
    report = convert_adapter(
        source,
        tmp_path / "out",
        source_format="r-lora",
        use_rslora=rank_stablization,
        initial_values=initial,
        base_model="user/base",
    )
    assert (report.offset, report.base_model, report.warnings) == ("initial values", "user/base", ())
    config = RLoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.init_weights, config.dropout_position, config.use_rslora) == ("rlora", "head", rank_stablization)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), logits(reference), **TOLERANCE)


def test_rlora_before_the_first_step_with_equal_heads_is_the_base(base, tmp_path):
    """The offset alone: with a router of zeros the delta is the one that was subtracted."""
    reference = authors_model(base, random_heads=True, rank_stablization=True)
    initial = save(tmp_path / "initial", reference)
    for layer in author_layers(reference).values():
        layer.lora_route.weight.zero_()
    source = save(tmp_path / "source", reference)
    convert_adapter(source, tmp_path / "out", source_format="r-lora", use_rslora=True, initial_values=initial)
    expected = logits(base)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), expected, **TOLERANCE)


def test_rlora_as_the_authors_load_it(base, tmp_path):
    """Their `from_pretrained` scales by alpha / r and puts the adapter on the original base."""
    trained = authors_model(base, rank_stablization=True, random_heads=True)
    train(trained)
    source = save(tmp_path / "source", trained)
    report = convert_adapter(source, tmp_path / "out", source_format="r-lora", use_rslora=False, ignore_offset=True)
    assert report.offset == "ignored" and "No initial delta is subtracted" in report.warnings[0]
    as_loaded = authors_model(base)
    as_loaded.load_state_dict({name.removeprefix(PREFIX): t for name, t in state(trained).items()}, strict=False)
    expected = logits(as_loaded)
    assert (expected - logits(trained)).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), expected, **TOLERANCE)


def test_rlora_on_the_base_that_training_changed(base, tmp_path):
    """Whoever has kept it needs no offset."""
    reference = authors_model(base, rank_stablization=True, random_heads=True)
    changed = {f"{name}.weight": layer.base.weight for name, layer in author_layers(reference).items()}
    train(reference)
    source = save(tmp_path / "source", reference)
    convert_adapter(source, tmp_path / "out", source_format="r-lora", use_rslora=True, ignore_offset=True)
    base.load_state_dict(changed, strict=False)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), logits(reference), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_copied_without_a_change(base, tmp_path, dtype):
    reference = authors_model(base, num_heads=3)
    train(reference)
    source = save(tmp_path / "source", reference, dtype)
    convert_adapter(source, tmp_path / "out", source_format="hydralora")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 6 * 3 and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for name, layer in author_layers(reference).items():
        prefix = f"{PREFIX}{name}.rlora_adapters."
        assert torch.equal(tensors[f"{prefix}A"], layer.lora_A.weight.to(dtype).float())
        assert torch.equal(tensors[f"{prefix}router"], layer.lora_route.weight.to(dtype).float())
        assert torch.equal(tensors[f"{prefix}B"], torch.stack(layer.heads).to(dtype).float())


def test_what_is_written(base, tmp_path):
    """The folder passes the checks for adapters of others, is the same each time, and says where it comes from."""
    reference = authors_model(base)
    train(reference)
    source = save(tmp_path / "source", reference, blc_alpha=0.0, blc_weight=None)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        convert_adapter(source, tmp_path / name, source_format="hydralora", tasks=("x",))
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "rlora_record.json"}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert json.loads(files["adapter_config.json"])["target_modules"] == sorted(MLP)
    assert len(check_adapter(tmp_path / "a").layers) == 6
    record = AdapterRecord.load(tmp_path / "a")
    assert record.hyperparameters == {"converted_from": "hydralora", "converted_offset": "none"}
    assert [task.name for task in record.tasks] == ["x"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "targets, written",
    [
        (["mlp.gate_proj", "mlp.up_proj"], ["mlp.gate_proj", "mlp.up_proj"]),
        # The authors' code compares ends of names, PEFT whole words.
        (["e_proj", "p_proj"], ["gate_proj", "up_proj"]),
        (
            ["lp.gate_proj", "lp.up_proj"],
            [f"model.layers.{i}.mlp.{n}" for i in (0, 1) for n in ("gate_proj", "up_proj")],
        ),
        (r".*mlp\.(gate|up)_proj", [f"model.layers.{i}.mlp.{n}" for i in (0, 1) for n in ("gate_proj", "up_proj")]),
    ],
)
def test_targets(base, tmp_path, targets, written):
    reference = authors_model(base, targets=("gate_proj", "up_proj"))
    train(reference)
    source = save(tmp_path / "source", reference, target_modules=targets)
    convert_adapter(source, tmp_path / "out", source_format="hydralora")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == sorted(written)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), logits(reference), **TOLERANCE)


# What their files lack, and arguments that do not fit them


def test_what_the_files_lack_is_asked_for(base, tmp_path):
    reference = authors_model(base, random_heads=True)
    source = save(tmp_path / "source", reference)

    def refused(message, **arguments):
        with pytest.raises((ValueError, TypeError), match=message):
            convert_adapter(source, tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()

    refused("Both write the same names, but R-LoRA's has changed the base weights.*source_format='r-lora'")
    refused("Both write the same names", source_format="lora")
    refused("`source_format` must be one of 'lora', 'hydralora', 'r-lora', got 'peft'", source_format="peft")
    refused("does not save its scaling. Pass `use_rslora=True` if", source_format="r-lora", ignore_offset=True)
    refused("subtracts the initial delta from the base weights", source_format="r-lora", use_rslora=True)
    refused(
        "not both",
        source_format="r-lora",
        use_rslora=True,
        ignore_offset=True,
        initial_values=source,
    )
    refused("`ignore_offset` belongs to `source_format='r-lora'`", source_format="hydralora", ignore_offset=True)
    refused("`initial_values` belongs to", source_format="hydralora", initial_values=source)
    refused("`use_rslora=True` contradicts the source", source_format="hydralora", use_rslora=True)
    refused("`tasks` must be a list of names", source_format="hydralora", tasks="sst2")
    refused("`tasks` names 'a' more than once", source_format="hydralora", tasks=["a", "a"])


def test_initial_values_of_another_adapter(base, tmp_path):
    reference = authors_model(base, random_heads=True)
    source = save(tmp_path / "source", reference)
    train(reference)
    trained = save(tmp_path / "trained", reference)
    others = save(tmp_path / "others", authors_model(base, random_heads=True, targets=("up_proj",)))

    def refused(message, initial):
        with pytest.raises(AdapterCheckError, match=message):
            convert_adapter(trained, tmp_path / "out", source_format="r-lora", use_rslora=True, initial_values=initial)

    refused("equals the adapter itself", trained)
    refused("is not of the same adapter as .*model.layers.0.mlp.down_proj", others)
    refused("neither adapter_model.safetensors nor adapter_model.bin", tmp_path)
    # The same settings with another seed.
    seed = save(tmp_path / "seed", authors_model(base, random_heads=True))
    refused("has left no trace in the adapter: the cosine of their heads is", seed)
    opposite = tmp_path / "opposite.bin"
    torch.save({name: -tensor for name, tensor in state(reference).items()}, opposite)
    refused("has left no trace", opposite)
    # A file is as good as its folder.
    convert_adapter(
        trained,
        tmp_path / "out",
        source_format="r-lora",
        use_rslora=True,
        initial_values=source / "adapter_model.bin",
    )


def test_initial_values_are_recognized_after_a_long_training(base, tmp_path):
    """What training has added is three times as large as the initial heads, and has no relation to them."""
    reference = authors_model(base, random_heads=True)
    initial = save(tmp_path / "initial", reference)
    train(reference, scale=3.0)
    source = save(tmp_path / "source", reference)
    convert_adapter(source, tmp_path / "out", source_format="r-lora", use_rslora=False, initial_values=initial)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_initial_heads_of_zeros(base, tmp_path):
    """`--lora_B_init zeros`: nothing was subtracted, and the initial values say so."""
    reference = authors_model(base)
    initial = save(tmp_path / "initial", reference)
    train(reference)
    source = save(tmp_path / "source", reference)
    convert_adapter(source, tmp_path / "out", source_format="r-lora", use_rslora=False, initial_values=initial)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out")), logits(reference), **TOLERANCE)


def test_the_output_folder_must_be_empty(base, tmp_path):
    source = save(tmp_path / "source", authors_model(base))
    for target in (source, source / "adapter_config.json"):
        with pytest.raises(ValueError, match="`output_dir` .* exists, and is not an empty folder"):
            convert_adapter(source, target, source_format="hydralora")
