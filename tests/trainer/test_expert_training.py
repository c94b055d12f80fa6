"""Mixtures of experts through the trainer: tasks, logs, saves, resumes."""

import pytest
import torch
from expert_models import EXPERT_MODELS, build
from peft import AutoPeftModelForCausalLM
from testing_utils import build_tokenizer, random_ids
from trainer_utils import TASKS, losses, make_trainer
from transformers import HfArgumentParser

from rlora_trl import RLoraConfig
from rlora_trl.analysis.heads import head_similarities
from rlora_trl.trainer.arguments import RLoraArguments, RLoraModelConfig, rlora_config_from_arguments
from rlora_trl.trainer.callbacks import HeadUsageCallback


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A folder with a tiny Qwen3-MoE and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "qwen3_moe"
    build("qwen3_moe").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_mixture_of_experts_learns_and_loads(model_folder, tmp_path):
    trainer = make_trainer(None, tmp_path, model=model_folder, max_steps=40)
    counts = HeadUsageCallback()
    counts.start(trainer.model, trainer.args.device)
    trainer.train()
    assert sum(losses(trainer)[-5:]) < 0.8 * sum(losses(trainer)[:5])
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["grad_norm_A"] > 0

    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.peft_config["default"].tasks == TASKS
    ids = random_ids()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    cosines = head_similarities(loaded)
    assert {matrix.shape for matrix in cosines.values()} == {(3, 3)}
    assert len(cosines) == 4


# TRL (1.16) can't compute the loss of these models, without adapters either: it looks for `num_experts` in their
# configuration, or for outputs that they lack.
NOT_IN_TRL = ("granitemoe", "llama4")


@pytest.mark.parametrize("family", [name for name in EXPERT_MODELS if name not in NOT_IN_TRL])
def test_the_first_step_is_silent(family, tmp_path, caplog):
    """No gradient of the adapter is missing, and experts without tokens are not reported."""
    trainer = make_trainer(None, tmp_path, model=build(family), peft_config=RLoraConfig(), max_steps=1)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "The first step gave" not in caplog.text


def test_a_task_router_trains_on_batches_of_tasks(model_folder, tmp_path):
    config = RLoraConfig(router="task", head_dropout=0.0)
    trainer = make_trainer(None, tmp_path, model=model_folder, peft_config=config, max_steps=20)
    trainer.train()
    routers = [p for name, p in trainer.model.named_parameters() if name.endswith("router")]
    assert {tuple(router.shape) for router in routers} == {(6, 3, 3)}
    assert all(float(router.detach().std()) > 0 for router in routers)


def test_a_resumed_run_is_the_same(model_folder, tmp_path):
    def run(folder, **kwargs):
        return make_trainer(
            None, folder, model=model_folder, save_strategy="steps", save_steps=3, max_steps=6, **kwargs
        )

    whole = run(tmp_path / "run")
    whole.train()
    resumed = run(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(whole)[-3:]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_16_bits_with_checkpointing(tmp_path, checkpointing):
    trainer = make_trainer(
        None, tmp_path, model=build("qwen3_moe").bfloat16(), gradient_checkpointing=checkpointing, max_steps=30
    )
    trainer.train()
    assert sum(losses(trainer)[-5:]) < 0.9 * sum(losses(trainer)[:5])


def test_the_auxiliary_loss_of_the_base_is_logged_and_its_router_stays(tmp_path):
    base = build("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.1)
    routers = {name: p.clone() for name, p in base.named_parameters() if name.endswith("mlp.gate.weight")}
    trainer = make_trainer(None, tmp_path, model=base, peft_config=RLoraConfig(), max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["aux_loss"] > 0 for entry in logs)
    parameters = dict(trainer.model.get_base_model().named_parameters())
    assert routers and all(torch.equal(parameters[name], value) for name, value in routers.items())


def test_the_card_names_the_experts(model_folder, tmp_path):
    trainer = make_trainer(None, tmp_path, model=model_folder, max_steps=1)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "| experts | experts.down_proj, experts.gate_up_proj |" in card
    assert "target modules" not in card


def test_other_experts_are_no_resumption(model_folder, tmp_path):
    def run(config):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "peft_config": config}
        return make_trainer(None, tmp_path, model=model_folder, **options)

    run(RLoraConfig()).train()
    other = run(RLoraConfig(target_parameters=["experts.down_proj"]))
    with pytest.raises(ValueError, match="target_parameters"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_experts_on_the_command_line():
    args = ["--target_parameters", "experts.down_proj", "--target_modules", "q_proj", "k_proj"]
    parsed = HfArgumentParser((RLoraArguments, RLoraModelConfig)).parse_args_into_dataclasses(args)
    config = rlora_config_from_arguments(*parsed)
    assert config.target_parameters == ["experts.down_proj"]
    assert config.target_modules == {"q_proj", "k_proj"}
