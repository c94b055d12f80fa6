"""Command line and YAML through TRL's parser."""

import dataclasses
from contextlib import nullcontext

import pytest
from datasets import Dataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig
from transformers.training_args import OptimizerNames
from trl import TrlParser

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer, requirements
from rlora_trl.trainer.arguments import RLoraArguments, RLoraModelConfig, rlora_config_from_arguments
from rlora_trl.trainer.setup import check_packages


BITSANDBYTES_OPTIMIZERS = {
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit"),
    *("paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
}


def parse(*argv):
    parser = TrlParser((RLoraSFTConfig, RLoraModelConfig, RLoraArguments))
    training, model, rlora = parser.parse_args_and_config(["--output_dir", "out", "--bf16", "false", *argv])
    return training, rlora_config_from_arguments(rlora, model)


def test_defaults_are_those_of_the_config():
    _, config = parse()
    assert config == RLoraConfig(task_type="CAUSAL_LM")


def test_every_field_is_an_argument():
    arguments = {f.name for f in dataclasses.fields(RLoraArguments)} | {
        f.name for f in dataclasses.fields(RLoraModelConfig)
    }
    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    own = {f.name for f in dataclasses.fields(RLoraConfig)} - inherited
    assert own <= arguments


def test_values():
    _, config = parse(
        *("--r", "8", "--num_heads", "5", "--lora_alpha", "16", "--use_rslora", "false", "--head_dropout", "0.1"),
        *("--target_modules", "q_proj", "v_proj", "--layers_to_transform", "0", "1", "--init_weights", "false"),
        *("--rank_pattern", '{"q_proj": 2}', "--router", "task", "--tasks", "sst2", "rte"),
    )
    assert (config.r, config.num_heads, config.lora_alpha, config.use_rslora) == (8, 5, 16, False)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.layers_to_transform == [0, 1]
    assert config.rank_pattern == {"q_proj": 2}
    assert config.init_weights is False
    assert config.router == "task" and config.tasks == ["sst2", "rte"]


def test_one_target_is_a_name_or_an_expression():
    assert parse("--target_modules", "all-linear")[1].target_modules == "all-linear"


def test_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("num_heads: 7\nlearning_rate: 0.5\nrank_pattern: '{\"down_proj\": 2}'\ntask_column: kind\n")
    training, config = parse("--config", str(path))
    assert (config.num_heads, config.rank_pattern) == (7, {"down_proj": 2})
    assert (training.learning_rate, training.task_column) == (0.5, "kind")


@pytest.mark.parametrize(
    ("argument", "value", "instead"),
    [
        ("--lora_r", "8", "--r"),
        ("--lora_dropout", "0.3", "--head_dropout"),
        ("--lora_target_modules", "q", "--target_modules"),
    ],
)
def test_arguments_of_lora_are_refused(argument, value, instead):
    with pytest.raises(ValueError, match=f"configures LoRA.*{instead}"):
        parse(argument, value)


@pytest.mark.parametrize("argument", ["--load_in_4bit", "--load_in_8bit"])
def test_a_quantized_base_needs_bitsandbytes_before_anything_is_loaded(monkeypatch, argument):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"^`{argument}` needs bitsandbytes.*pip install rlora-trl\[quant\]"):
        parse(argument, "true")
    parse(argument, "false")


def test_the_trainer_needs_bitsandbytes_before_it_loads_the_model(monkeypatch, tmp_path):
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    rows = Dataset.from_list([{"prompt": "a", "completion": " b"}])
    for settings, given in (({}, four_bits), ({"quantization_config": four_bits}, None)):
        args = RLoraSFTConfig(str(tmp_path), bf16=False, model_init_kwargs=settings)
        with pytest.raises(ImportError, match="BitsAndBytesConfig.* needs bitsandbytes, which is not installed"):
            RLoraSFTTrainer("no/model", args, train_dataset=rows, quantization_config=given)


@pytest.mark.parametrize("name", OptimizerNames)
def test_optimizers_of_bitsandbytes_are_known_before_training(monkeypatch, tmp_path, name):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    is_of_bitsandbytes = name.value in BITSANDBYTES_OPTIMIZERS or name.value.startswith("galore_adamw_8bit")
    refused = pytest.raises(ImportError, match=f"^`optim='{name.value}'` needs bitsandbytes")
    with refused if is_of_bitsandbytes else nullcontext():
        check_packages(RLoraSFTConfig(str(tmp_path), bf16=False, optim=name), None)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_trackers_are_looked_for_before_training(name, monkeypatch, tmp_path):
    args = RLoraSFTConfig(str(tmp_path), bf16=False, report_to=["none", name, "flyte"])
    monkeypatch.setattr("rlora_trl.requirements.find_spec", lambda module: None if module.startswith(name) else 1)
    with pytest.raises(ImportError, match=f"^`report_to='{name}'` needs {name}, which is not.*pip install {name}`"):
        check_packages(args, None)
    monkeypatch.setattr("rlora_trl.requirements.find_spec", lambda module: 1)
    check_packages(args, None)


def test_kernels_of_liger_are_looked_for_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    args = RLoraSFTConfig(str(tmp_path), bf16=False, use_liger_kernel=True)
    with pytest.raises(ImportError, match="^`use_liger_kernel=True` needs Liger's kernels.*pip install liger-kernel`"):
        check_packages(args, None)


@pytest.mark.parametrize("name", ["./model", "/models/a", "~/model", "a/b/c"])
def test_a_path_without_a_model_is_no_name_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"^There is no model in {name}. Give the folder of a model, or its"):
        parse("--model_name_or_path", name)


def test_a_model_is_a_folder_or_a_name_on_the_hub(tmp_path):
    for name in (str(tmp_path), "gpt2", "user/model"):
        parse("--model_name_or_path", name)


def test_bad_json():
    with pytest.raises(ValueError, match="`--rank_pattern` must be a JSON object.*got 'down_proj=2'"):
        parse("--rank_pattern", "down_proj=2")
    with pytest.raises(ValueError, match="must be a JSON object"):
        parse("--alpha_pattern", "[1]")


def test_help_renders():
    parser = TrlParser((RLoraSFTConfig, RLoraModelConfig, RLoraArguments))
    text = parser.format_help()
    assert "--num_heads" in text and "--task_column" in text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"balance_loss": "swich"}, "`balance_loss` must be one of 'none', 'switch', .* got 'swich'"),
        ({"balance_scope": "batch"}, "`balance_scope` must be one of 'micro', 'global', got 'batch'"),
        ({"balance_coef": -0.1}, "`balance_coef` must be a number of at least 0, got -0.1"),
        ({"balance_coef": float("nan")}, "got nan"),
        ({"balance_coef": float("inf")}, "got inf"),
        ({"router_learning_rate": 0.0}, "`router_learning_rate` must be a positive number, got 0.0"),
        ({"loraplus_lr_ratio": -1}, "`loraplus_lr_ratio` must be a positive number, got -1"),
        ({"mixing": "even"}, "`mixing` must be one of 'proportional', 'equal', 'temperature', got 'even'"),
        ({"mixing_temperature": 2.0}, "`mixing_temperature=2.0` has no effect with `mixing='proportional'`"),
        ({"mixing": "temperature", "mixing_temperature": 0.5}, "`mixing_temperature` must be a number of at least 1"),
        ({"mixing_cap": 0}, "`mixing_cap` must be a whole number of at least 1"),
        ({"mixing": "equal", "mixing_cap": 5}, "`mixing_cap=5` has no effect"),
        ({"mixing_unit": "bytes"}, "`mixing_unit` must be one of 'rows', 'tokens', got 'bytes'"),
    ],
)
def test_bad_training_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RLoraSFTConfig("out", bf16=False, **kwargs)


def test_task_column_must_be_named():
    with pytest.raises(ValueError, match="task_column"):
        RLoraSFTConfig("out", bf16=False, task_column="")
