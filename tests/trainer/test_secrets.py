"""No token or password of a run is in a file that it writes, or in what its loggers report."""

import copy
import json
from dataclasses import fields

import pytest
import torch
from trainer_utils import arguments, make_trainer

from rlora_trl import RLoraSFTConfig
from rlora_trl.trainer.secrets import _SECRET_NAME, mask_secrets, without_secrets


TOKEN = "hf_" + "aB3" * 11
SECRETS = {
    "hub_token": TOKEN,
    "model_init_kwargs": {"token": "plain-secret-1", "dtype": "float32"},
    "dataset_kwargs": {"storage_options": {"password": "plain-secret-2", "urls": [f"https://me:{TOKEN}@host/x"]}},
}
HIDDEN = (TOKEN, "plain-secret")


def found_in(text):
    return [secret for secret in HIDDEN if secret in text]


def test_no_file_of_a_run_has_a_secret(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, max_steps=2, save_strategy="steps", save_steps=1, **SECRETS)
    trainer.train()
    trainer.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "training_args.bin",
        "trainer_state.json",
        "rlora_state.json",
        "README.md",
    }
    assert sum(path.name == "training_args.bin" for path in files) == 3
    assert not [path for path in files if found_in(path.read_bytes().decode("latin-1"))]

    # The run still has them, and the file is what it was otherwise.
    assert trainer.args.hub_token == TOKEN and trainer.args.model_init_kwargs["token"] == "plain-secret-1"
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(saved) is RLoraSFTConfig and saved.hub_token is None and saved.max_steps == 2
    assert saved.model_init_kwargs == {"token": "<TOKEN>", "dtype": "float32"}


@pytest.mark.parametrize("show", [str, repr, lambda args: args.to_json_string(), lambda args: str(args.to_dict())])
@pytest.mark.parametrize("show_more", [lambda args: args, lambda args: args.to_sanitized_dict()])
def test_what_is_reported_has_none(tmp_path, show, show_more):
    args = arguments(tmp_path, **SECRETS)
    assert not found_in(show(args)) and not found_in(str(show_more(args)))
    assert args.hub_token == TOKEN, "it must still push"


def test_copies_of_the_arguments_keep_them(tmp_path):
    args = arguments(tmp_path, **SECRETS)
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert copied.hub_token == TOKEN and copied.model_init_kwargs == SECRETS["model_init_kwargs"]
    assert without_secrets(args) is not args and args.hub_token == TOKEN


def test_only_secrets_are_masked(tmp_path):
    """Nothing else of the arguments has such a name: words of a tokenizer, numbers of tokens."""
    assert [field.name for field in fields(RLoraSFTConfig) if _SECRET_NAME.search(field.name)] == ["hub_token"]
    plain = {"pad_token": "<pad>", "max_new_tokens": 5, "token": True, "dtype": "bfloat16", "list": ["a", ("b", 1)]}
    assert mask_secrets(plain) == plain
    assert json.loads(arguments(tmp_path).to_json_string())["max_steps"] == 30
