"""Saves and checkpoints of one process: what is written, what replaces what, and what a resumed run looks at."""

import errno
import json
import logging
import os
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from testing_utils import build_tokenizer, task_datasets
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.hub import check_adapter
from rlora_trl.trainer.resuming import find_checkpoint, read_state
from rlora_trl.trainer.saving import FullTensors, check_saved, full_disk_error, move_folder, restore_set_aside


WEIGHTS = "adapter_model.safetensors"


def make_trainer(model, folder, *, peft_config=None, callbacks=None, processing_class=None, **kwargs):
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "mixture_rows": 0,
    }
    args = RLoraSFTConfig(str(folder), **{**arguments, **kwargs})
    return RLoraSFTTrainer(
        model,
        args,
        train_dataset=task_datasets(),
        eval_dataset=task_datasets(8, seed=1) if "eval_strategy" in kwargs else None,
        peft_config=RLoraConfig(head_dropout=0.2) if peft_config is None else peft_config or None,
        processing_class=processing_class,
        callbacks=callbacks,
    )


@pytest.fixture
def trained(model_folders, tmp_path):
    trainer = make_trainer(model_folders["llama"], tmp_path / "out")
    trainer.train()
    return trainer


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


def test_a_checkpoint_is_whole_and_loads(trained, tmp_path, model_folders):
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [f"checkpoint-{n}" for n in range(1, 5)]
    for checkpoint in out.glob("checkpoint-*"):
        check_adapter(checkpoint)
        state = read_state(checkpoint)
        assert set(state["files"]) >= {WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth"}
        assert state["adapters"]["default"].startswith("sha256:")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folders["llama"]), out / "checkpoint-4"
    )
    assert torch.equal(logits(loaded), logits(trained.model))


def test_an_incomplete_save_replaces_nothing(trained, tmp_path, monkeypatch):
    trained.save_model()
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    save = PeftModel.save_pretrained

    def without_anchors(self, folder, *args, **kwargs):
        state = {name: value for name, value in self.state_dict().items() if not name.endswith(".A0")}
        save(self, folder, *args, **{**kwargs, "state_dict": state})

    monkeypatch.setattr(PeftModel, "save_pretrained", without_anchors)
    with pytest.raises(RuntimeError, match=r"lacks .*rlora_adapters\.A0.*and 3 more.*whole weights in each process"):
        trained.save_model()
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert not (out / ".rlora-saving").exists()


def test_what_is_not_finite_is_not_saved(trained, tmp_path):
    trained.save_model()
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    next(p for p in trained.model.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        trained.save_model()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


def test_shapes_are_checked(trained, tmp_path):
    tensors = load_file(tmp_path / "out" / "checkpoint-4" / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.zeros(2, 2)}, tmp_path / "out" / "checkpoint-4" / WEIGHTS)
    with pytest.raises(RuntimeError, match=r"1 tensors of other shapes, such as .*: \[2, 2\] instead of"):
        check_saved(tmp_path / "out" / "checkpoint-4", FullTensors(trained.model), "a test")


def test_modules_to_save_and_tokens_are_part_of_it(model_folders, tmp_path):
    config = RLoraConfig(modules_to_save=["lm_head"], trainable_token_indices=[7, 9])
    trainer = make_trainer(model_folders["llama"], tmp_path, peft_config=config, max_steps=2)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / WEIGHTS)
    assert "base_model.model.lm_head.weight" in saved
    assert any("trainable_tokens_delta" in name for name in saved)
    resumed = make_trainer(model_folders["llama"], tmp_path, peft_config=config, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_rotation_keeps_the_best_and_the_newest(model_folders, tmp_path):
    rest = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 2, "load_best_model_at_end": True}
    trainer = make_trainer(model_folders["llama"], tmp_path, **rest)
    # Each step is worse, so that the first is the best.
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": float(trainer.state.global_step)}
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    best = str(tmp_path / "checkpoint-1")
    assert trainer.state.best_model_checkpoint == best
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"] == best
    found = trainer.model.state_dict()
    for name, value in load_file(tmp_path / "checkpoint-1" / WEIGHTS).items():
        if ".rlora_adapters." in name:
            head, _, tail = name.rpartition(".")
            assert torch.equal(found[f"{head}.default.{tail}"], value)


def damage(checkpoint, how):
    if how == "missing":
        (checkpoint / "optimizer.pt").unlink()
    elif how == "half deleted":
        for path in checkpoint.iterdir():
            if path.name not in ("trainer_state.json", "optimizer.pt"):
                path.unlink()
    elif how == "truncated":
        data = (checkpoint / "optimizer.pt").read_bytes()
        (checkpoint / "optimizer.pt").write_bytes(data[:-100])
    elif how == "altered":
        data = bytearray((checkpoint / WEIGHTS).read_bytes())
        data[-5] ^= 1
        (checkpoint / WEIGHTS).write_bytes(bytes(data))
    else:
        (checkpoint / "trainer_state.json").unlink()


@pytest.mark.parametrize("how", ["missing", "half deleted", "truncated", "altered", "stateless"])
def test_a_damaged_checkpoint_is_passed_over_or_refused(trained, tmp_path, model_folders, how, caplog):
    out = tmp_path / "out"
    damage(out / "checkpoint-4", how)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(out) == out / "checkpoint-3"
    assert "Skipped the damaged checkpoint" in caplog.text
    fresh = make_trainer(model_folders["llama"], out)
    with pytest.raises(ValueError, match="can't be resumed from .*checkpoint-4"):
        fresh.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    fresh.train(resume_from_checkpoint=True)
    expected = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in fresh.state.log_history if "loss" in entry] == pytest.approx(expected, rel=1e-6)


def test_no_checkpoint_to_go_on_from(model_folders, tmp_path):
    with pytest.raises(ValueError, match="found no complete checkpoint"):
        make_trainer(model_folders["llama"], tmp_path).train(resume_from_checkpoint=True)


def test_folders_set_aside_come_back(tmp_path):
    new, target = tmp_path / "new", tmp_path / "checkpoint-1"
    for folder, text in ((new, "new"), (target, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
    os.replace(target, tmp_path / ".rlora-replaced-checkpoint-1")  # where a process ended in the middle
    (tmp_path / ".rlora-saving").mkdir()
    restore_set_aside(tmp_path)
    assert (target / "file").read_text() == "old" and not (tmp_path / ".rlora-saving").exists()
    move_folder(new, target)
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_older_checkpoint_without_our_state_still_resumes(trained, tmp_path, model_folders):
    out = tmp_path / "out"
    for path in (out / "checkpoint-4",):
        shutil.rmtree(path)
    (out / "checkpoint-3" / "rlora_state.json").unlink()
    fresh = make_trainer(model_folders["llama"], out)
    fresh.train(resume_from_checkpoint=True)
    assert fresh.state.global_step == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 2}, "r: checkpoint has 4, this run has 2"),
        ({"num_heads": 5}, "num_heads: checkpoint has 3, this run has 5"),
        ({"target_modules": ["up_proj"]}, "target_modules: checkpoint has .*gate_proj.* this run has .*up_proj"),
        ({"lora_alpha": 8}, "lora_alpha: checkpoint has 32, this run has 8"),
        ({"router": "uniform"}, "router: checkpoint has 'softmax', this run has 'uniform'"),
    ],
)
def test_another_adapter_is_refused_before_anything_is_loaded(trained, tmp_path, model_folders, change, said):
    fresh = make_trainer(model_folders["llama"], tmp_path / "out", peft_config=RLoraConfig(**change))
    before = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        fresh.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, before[name]) for name, value in fresh.model.state_dict().items())


def test_what_may_change_is_told(trained, tmp_path, model_folders, caplog):
    rest = {"peft_config": RLoraConfig(head_dropout=0.0), "max_steps": 5}
    fresh = make_trainer(model_folders["llama"], tmp_path / "out", **rest)
    with caplog.at_level(logging.WARNING):
        fresh.train(resume_from_checkpoint=True)
    assert "head_dropout: checkpoint has 0.2, this run has 0.0" in caplog.text


@pytest.mark.parametrize(
    ("base", "commit", "said"),
    [
        ("other/model", None, "base model: checkpoint has other/model, this run has some/model"),
        ("some/model", "a" * 40, "commit of the base model: checkpoint has aaaa.*, this run has bbbb"),
    ],
)
def test_another_base_model_is_refused(trained, tmp_path, model_folders, monkeypatch, base, commit, said):
    checkpoint = tmp_path / "out" / "checkpoint-4"
    for name, key, value in (
        ("adapter_config.json", "base_model_name_or_path", base),
        ("rlora_record.json", "base_model_revision", commit),
    ):
        values = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**values, key: value}))
    fresh = make_trainer(model_folders["llama"], tmp_path / "out")
    fresh.model.peft_config["default"].base_model_name_or_path = "some/model"
    fresh._base_commit = "b" * 40

    with pytest.raises(ValueError, match=said):
        fresh.train(resume_from_checkpoint=str(checkpoint))


def test_equal_commits_decide_about_the_base_model(trained, tmp_path, model_folders):
    """A repository may have several names."""
    checkpoint = tmp_path / "out" / "checkpoint-4"
    record = json.loads((checkpoint / "rlora_record.json").read_text())
    (checkpoint / "rlora_record.json").write_text(json.dumps({**record, "base_model_revision": "a" * 40}))
    fresh = make_trainer(model_folders["llama"], tmp_path / "out", max_steps=5)
    fresh.model.peft_config["default"].base_model_name_or_path = "other/name"
    fresh._base_commit = "a" * 40
    fresh.train(resume_from_checkpoint=str(checkpoint))
    assert fresh.state.global_step == 5


def test_saves_elsewhere_while_a_checkpoint_is_written(model_folders, tmp_path):
    class Twice(RLoraSFTTrainer):
        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            super().save_model(str(tmp_path / "backup"), True)

    trainer = make_trainer(model_folders["llama"], tmp_path / "out", max_steps=1)
    trainer.__class__ = Twice
    trainer.train()
    check_adapter(tmp_path / "backup")
    check_adapter(tmp_path / "out" / "checkpoint-1")


def test_names_of_kept_states_are_checked(model_folders, tmp_path):
    trainer = make_trainer(model_folders["llama"], tmp_path, max_steps=1)
    trainer.kept_states["files"] = trainer.kept_states["tasks"]
    with pytest.raises(ValueError, match="`kept_states` can't have the names files"):
        trainer.train()


def test_checkpoints_hold_no_training_rows(trained, tmp_path):
    """Token ids of rows would be integer tensors, or lists of them."""
    checkpoint = tmp_path / "out" / "checkpoint-4"
    tensors = [tensor for path in checkpoint.glob("*.safetensors") for tensor in load_file(path).values()]
    assert tensors and all(tensor.is_floating_point() for tensor in tensors)
    assert set(read_state(checkpoint)) == {"tasks", "head_sums", "runs", "adapters", "strategy", "processes", "files"}


def test_another_strategy_is_refused(trained, tmp_path, model_folders):
    """Its optimizer's state would not be found, and nobody would say so."""
    path = tmp_path / "out" / "checkpoint-4" / "rlora_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "strategy": "DeepSpeed ZeRO-2 (...)"}))
    fresh = make_trainer(model_folders["llama"], tmp_path / "out")
    with pytest.raises(ValueError, match="was saved with DeepSpeed ZeRO-2.* uses whole weights in each process"):
        fresh.train(resume_from_checkpoint=True)
    path.write_text(json.dumps({**state, "processes": 4}))  # which only DeepSpeed minds
    make_trainer(model_folders["llama"], tmp_path / "out", max_steps=5).train(resume_from_checkpoint=True)


def test_rotation_goes_by_age(trained, tmp_path, model_folders):
    """Checkpoints of an earlier and longer run go first."""
    out = tmp_path / "out"
    make_trainer(model_folders["llama"], out, max_steps=2, save_total_limit=2).train()
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_folder_of_the_users_own_stays(model_folders, tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "notes").write_text("mine")
    trainer = make_trainer(model_folders["llama"], tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / ".saving" / "notes").read_text() == "mine"


def test_an_error_of_another_process_is_ones_own(trained, monkeypatch):
    monkeypatch.setattr(type(trained.accelerator), "num_processes", 2)
    monkeypatch.setattr("rlora_trl.trainer.checkpoints.gather_object", lambda told: [*told, "OSError: no space"])
    with pytest.raises(RuntimeError, match="Another process failed. OSError: no space"):
        with trained._raise_on_all_ranks():
            pass
    with pytest.raises(KeyError, match="mine"):  # one's own comes first
        with trained._raise_on_all_ranks():
            raise KeyError("mine")


@pytest.mark.parametrize("rest", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_packed_runs_are_resumed(model_folders, tmp_path, rest):
    make_trainer(model_folders["llama"], tmp_path, max_steps=1, **rest).train()
    fresh = make_trainer(model_folders["llama"], tmp_path, max_steps=2, **rest)
    fresh.train(resume_from_checkpoint=True)
    assert fresh.state.global_step == 2


def test_the_best_weights_of_an_adapter_of_another_name(model_folders, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folders["llama"]), RLoraConfig(task_type="CAUSAL_LM"), "tasks"
    )
    args = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(model, tmp_path, processing_class=build_tokenizer(), peft_config=False, **args)
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": float(trainer.state.global_step)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    found = trainer.model.state_dict()
    for name, value in load_file(tmp_path / "checkpoint-1" / "tasks" / WEIGHTS).items():
        head, _, tail = name.rpartition(".")
        assert torch.equal(found[f"{head}.tasks.{tail}"], value), name


def test_errors_of_full_disks_and_others(tmp_path):
    def told(error):
        return full_disk_error(error, tmp_path, "it")

    assert "There is no space left" in str(told(OSError(errno.ENOSPC, "No space left on device")))
    assert "There is no space left" in str(told(Exception("I/O error: No space left on device (os error 28)")))
    assert "probably no space left" in str(told(OSError(errno.EFBIG, "File too large")))
    assert "probably no space left" in str(told(RuntimeError("PytorchStreamWriter failed writing file data/0")))
    assert told(RuntimeError("PytorchStreamWriter failed writing file: Input/output error")) is None
    assert told(OSError(errno.EACCES, "Permission denied")) is None
