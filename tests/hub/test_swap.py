"""
Files that are swapped between the check of a pull and loading, which reads them once more.

Whoever can write to the folder could put another adapter there, and loading can't tell it from the one that was
checked. What it refuses by itself, however, it refuses here, too.
"""

import json
import pickle

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from samples import tiny_adapter
from testing_utils import TINY_MODELS

from rlora_trl import pull_adapter


WEIGHTS = "adapter_model.safetensors"


def change_weights(change):
    def swap(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(name for name in tensors if name.endswith(".A")))
        save_file(tensors, folder / WEIGHTS)

    return swap


def change_config(**values):
    def swap(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | values))

    return swap


class Command:
    """Unpickled, it would run a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return exec, (self.command,)


def pickle_weights(folder):
    (folder / WEIGHTS).unlink()
    marker = folder / "ran"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Command(f"open({str(marker)!r}, 'w')")))


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])


SWAPS = {
    "NaN": change_weights(lambda tensors, name: tensors[name].view(-1)[3].fill_(float("nan"))),
    "infinity": change_weights(lambda tensors, name: tensors[name].view(-1)[3].fill_(float("inf"))),
    "another rank": change_weights(lambda tensors, name: tensors.update({name: torch.ones(8, 48)})),
    "a tensor less": change_weights(lambda tensors, name: tensors.pop(name)),
    "no tensor": change_weights(lambda tensors, name: tensors.clear()),
    "a file that is cut off": truncate,
    "a pickle": pickle_weights,
    "other heads": change_config(num_heads=5),
    "no adapter": change_config(peft_type="NOTHING"),
}


def base_model():
    torch.manual_seed(1)
    return TINY_MODELS["llama"]()


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS.keys())
def test_loading_refuses_what_was_swapped_after_the_check(tmp_path, swap, second):
    tiny_adapter().save_pretrained(tmp_path)
    folder = pull_adapter(str(tmp_path))
    model = PeftModel.from_pretrained(base_model(), folder) if second else None
    swap(tmp_path)
    with pytest.raises((ValueError, RuntimeError, OSError, KeyError, pickle.UnpicklingError)):
        if model is None:
            PeftModel.from_pretrained(base_model(), folder)
        else:
            model.load_adapter(folder, "second")
    assert not (tmp_path / "ran").exists()
