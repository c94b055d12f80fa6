"""Defaults of `RLoraSFTConfig` that differ from those of `SFTConfig`."""

import warnings

import pytest

from rlora_trl import RLoraSFTConfig


@pytest.mark.parametrize("checkpointing", [None, False])
def test_no_warning_of_names_that_the_user_did_not_set(tmp_path, checkpointing):
    chosen = {} if checkpointing is None else {"gradient_checkpointing": checkpointing}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = RLoraSFTConfig(str(tmp_path), bf16=False, **chosen)
    assert args.gradient_checkpointing is (checkpointing is None)
