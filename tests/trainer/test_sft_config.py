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


def test_the_learning_rate_is_one_for_adapters(tmp_path):
    """TRL's default, for training all weights, hardly moves an adapter."""
    assert RLoraSFTConfig(str(tmp_path), bf16=False).learning_rate == 5e-4
    assert RLoraSFTConfig(str(tmp_path), bf16=False, learning_rate=3e-5).learning_rate == 3e-5


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_with_cuda_graphs_are_refused(tmp_path, mode):
    with pytest.raises(ValueError, match=f"`torch_compile_mode='{mode}'` records steps as CUDA graphs"):
        RLoraSFTConfig(str(tmp_path), bf16=False, torch_compile_mode=mode)
    RLoraSFTConfig(str(tmp_path), bf16=False, torch_compile_mode="default")
