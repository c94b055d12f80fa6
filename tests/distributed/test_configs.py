"""The files in `deepspeed_configs/`, as accelerate and DeepSpeed read them, and in training on two CPU processes."""

import json
import os
import re
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from processes import CPU, ROOT, Program, free_port, script


CONFIGS = ROOT / "deepspeed_configs"
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
STRATEGIES = (*STAGES, "fsdp2", "ddp")
# Seconds for a launch; all take less than 60.
TIMEOUT = 150


def test_there_is_a_file_for_each_strategy():
    files = {path.name for path in CONFIGS.iterdir()}
    assert files == {"README.md", *(f"{name}.json" for name in STAGES), *(f"{name}.yaml" for name in STRATEGIES)}
    # The README names these files and no others.
    named = set(re.findall(r"[\w-]+\.(?:json|yaml)\b", (CONFIGS / "README.md").read_text()))
    assert named == files - {"README.md"}


def launched_environment(name):
    """What `accelerate launch --config_file deepspeed_configs/<name>.yaml` puts into the environment."""
    words = [
        "--config_file",
        str(CONFIGS / f"{name}.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "x.py",
    ]
    before = dict(os.environ)
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        fields = list((defaults.deepspeed_config or {}).keys())
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    return {key: value for key, value in environment.items() if before.get(key) != value}


@pytest.mark.parametrize("name", STRATEGIES)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kinds = {"fsdp2": DistributedType.FSDP, "ddp": DistributedType.MULTI_GPU}
    assert config.distributed_type == kinds.get(name, DistributedType.DEEPSPEED)
    # accelerate asks for the number of GPUs, rather than taking one from a file.
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "x.py"]
    with pytest.raises(ValueError, match="--num_processes"):
        _validate_launch_command(launch_command_parser().parse_args(words))
    if name in STAGES:
        assert config.deepspeed_config["deepspeed_config_file"] == f"deepspeed_configs/{name}.json"
        # Both would be refused: the precision is in the JSON file.
        assert "mixed_precision" not in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_reads_the_file_as_training_fills_it_in(name):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    from rlora_trl import RLoraSFTConfig

    config = HfTrainerDeepSpeedConfig(str(CONFIGS / f"{name}.json"))
    try:
        config.trainer_config_process(RLoraSFTConfig("x", use_cpu=True, bf16=True, per_device_train_batch_size=2))
        assert config.is_zero3() == (STAGES[name] == 3) and config.is_offload() == (name == "zero3_offload")
        for key in ("bucket_size", "prefetch_bucket_size", "param_persistence_threshold"):
            # What depends on the model is filled in when it is known.
            for prefix in ("zero_optimization.reduce_", "zero_optimization.stage3_"):
                config.fill_only(prefix + key, 1024)
    finally:
        unset_hf_deepspeed_config()
    assert "auto" not in json.dumps(config.config)
    read = DeepSpeedConfig({**config.config, "train_batch_size": 2})
    assert read.zero_optimization_stage == STAGES[name] and read.grad_accum_dtype == "fp32"
    # DeepSpeed's parser does not refuse names that it does not know.
    fields = type(read.zero_config).model_fields
    names = {*fields, *(field.alias for field in fields.values() if field.alias)}
    assert set(config.config["zero_optimization"]) <= names


def train(folder, model, cases, commands):
    """Run the cases by each of the commands at the same time; the outcome on both ranks, by case."""
    words = script("configs_run:run_cases", cases, model, folder=folder, timeout=TIMEOUT + 20)
    launchers = [
        Program([sys.executable, *command, *words], folder / f"output-{i}.txt", env=CPU)
        for i, command in enumerate(commands)
    ]
    codes = [launcher.wait(TIMEOUT) for launcher in launchers]
    logs = "\n".join(launcher.tail() for launcher in launchers)
    assert codes == [0] * len(commands), f"{codes}: {logs}"
    names = [entry["name"] for entry in cases]
    return {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)] for name in names}


def case(name, environment=None, **arguments):
    return {"name": name, "environment": environment or {}, "arguments": arguments}


def assert_strategy(name, outcome):
    assert outcome["processes"] == 2
    if name in STAGES:
        assert outcome["wrapper"] == "DeepSpeedEngine" and outcome["stage"] == STAGES[name]
        assert outcome["accumulated_in"] == "torch.float32" and "Adam" not in outcome["optimizer"]
        assert outcome["offloaded"] == (["cpu", "cpu"] if name == "zero3_offload" else ["none", "none"])
    else:
        assert outcome["wrapper"] == ("DistributedDataParallel" if name == "ddp" else "FSDPPeftModelForCausalLM")


def assert_same_training(expected, ranks):
    """Losses are those of DDP but for what bfloat16 rounds, on both ranks, and the saved adapter is complete."""
    for rank in ranks:
        assert len(rank["losses"]) == 3 and rank["losses"] == pytest.approx(expected["losses"], rel=0.02)
        assert rank["losses"][0] != rank["losses"][2]
    saved = ranks[0]["saved"]
    # Two layers of three projections, each with A, B, router, A0 and B0.
    assert saved.keys() == expected["saved"].keys() and len(saved) == 30
    for tensor, (shape, finite) in saved.items():
        assert finite and shape == expected["saved"][tensor][0], tensor


@pytest.fixture(scope="module")
def by_torchrun(model_folders, tmp_path_factory):
    """Each file, by torchrun on two machines that are this one; each case sets what `accelerate launch` would."""
    pytest.importorskip("deepspeed")
    cases = [case(name, launched_environment(name)) for name in ("ddp", *STAGES, "fsdp2")]
    cases.append(case("json", deepspeed="deepspeed_configs/zero3.json"))
    endpoint = f"127.0.0.1:{free_port()}"
    commands = [
        ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
        + ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "rlora"]
        for rank in (0, 1)
    ]
    return train(tmp_path_factory.mktemp("torchrun"), model_folders["llama"], cases, commands)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STAGES, "fsdp2", "json"])
def test_each_file_trains_by_torchrun_on_two_machines(by_torchrun, name):
    assert_strategy("ddp", by_torchrun["ddp"][0])
    assert_strategy("zero3" if name == "json" else name, by_torchrun[name][0])
    assert_same_training(by_torchrun["ddp"][0], by_torchrun[name])


@pytest.mark.slow
def test_a_file_trains_by_accelerate_on_two_machines(by_torchrun, model_folders, tmp_path):
    common = ["-m", "accelerate.commands.launch", "--config_file", "deepspeed_configs/zero2.yaml"]
    common += ["--num_machines", "2", "--num_processes", "2"]
    common += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    commands = [[*common, "--machine_rank", str(rank)] for rank in (0, 1)]
    ranks = train(tmp_path, model_folders["llama"], [case("zero2")], commands)["zero2"]
    assert_strategy("zero2", ranks[0])
    assert_same_training(by_torchrun["ddp"][0], ranks)
