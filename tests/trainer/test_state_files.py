"""States of checkpoints that are damaged or a stranger's: readers refuse them by one error, and use none of them."""

import copy
import json
import random
import re
import shutil

import pytest
import torch
from trainer_utils import make_trainer
from transformers import TrainerState

from rlora_trl.reading import AdapterCheckError
from rlora_trl.trainer.ledger import TaskLedger
from rlora_trl.trainer.resuming import (
    check_files,
    check_settings,
    check_strategy,
    checkpoint_problem,
    find_checkpoint,
    list_checkpoints,
)
from rlora_trl.trainer.run_settings import RunSettings, check_run
from rlora_trl.trainer.saving import restore_set_aside
from rlora_trl.trainer.state_files import read_object, read_state, read_trainer_state


SEED = 16
MUTATIONS = 2500
STRATEGY = "whole weights in each process"
# Values in place of others, of every type and at its limits.
VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**70,
        -(2**70),
        0.5,
        -0.0,
        1e308,
        "",
        "x",
        "\0",
        "\ud7ff",
        "../../x",
    ),
    *("/etc/passwd", "x" * 5000, "ä" * 300, "1", "\x1b[2J", [], {}, [[]], [{}], {"x": []}, [1, "a"], ["x"] * 1000),
    *({"": 0}, {"x" * 5000: 1}, {"../x": 4}, {"a\0": 4}, float("nan"), float("inf"), json.loads("[" * 40 + "]" * 40)),
]


@pytest.fixture(scope="module")
def saved(model_folders, tmp_path_factory):
    """A checkpoint with all that a state may have, and the settings of its run."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = make_trainer(
        model_folders, folder, max_steps=1, save_strategy="steps", balance_loss="switch", balance_scope="global"
    )
    trainer.train()
    return folder / "checkpoint-1", trainer


def load_part(name, load):
    """What the trainer does with its parts of a state."""

    def read(checkpoint, trainer):
        state = read_state(checkpoint)
        try:
            load(state.get(name), trainer)
        except ValueError as error:
            raise AdapterCheckError(str(error)) from error

    return read


def begin_run(parts, trainer):
    settings = RunSettings()
    settings.begin(2, trainer.args, None, parts)
    settings.recorded(3)


def check_config(folder, trainer):
    check_settings(folder, trainer.model.peft_config["default"], "default", "0" * 40)


# Each function that reads the state of a checkpoint, the file, and whether it raises `AdapterCheckError` itself or, as
# what users see, a `ValueError`.
READERS = {
    "read_state": ("rlora_state.json", lambda folder, trainer: read_state(folder), AdapterCheckError),
    "read_trainer_state": (
        "trainer_state.json",
        lambda folder, trainer: load_trainer_state(folder),
        AdapterCheckError,
    ),
    "read_object": ("trainer_state.json", lambda folder, trainer: read_object(folder / "x.json"), AdapterCheckError),
    "checkpoint_problem": ("rlora_state.json", lambda folder, trainer: checkpoint_problem(folder), None),
    "checkpoint_problem (trainer)": ("trainer_state.json", lambda folder, trainer: checkpoint_problem(folder), None),
    "checkpoint_problem (adapter)": ("adapter_config.json", lambda folder, trainer: checkpoint_problem(folder), None),
    "check_files": ("rlora_state.json", lambda folder, trainer: check_files(folder), ValueError),
    "find_checkpoint": ("trainer_state.json", lambda folder, trainer: find_checkpoint(folder.parent), ValueError),
    "check_strategy": ("rlora_state.json", lambda folder, trainer: check_strategy(folder, STRATEGY, 1), ValueError),
    "check_settings": ("adapter_config.json", check_config, ValueError),
    "check_settings (record)": (
        "rlora_record.json",
        check_config,
        ValueError,
    ),
    "check_run": (
        "rlora_state.json",
        lambda folder, trainer: check_run(folder, trainer.args, trainer._describe_data()),
        ValueError,
    ),
    "RunSettings.begin": ("rlora_state.json", load_part("runs", begin_run), AdapterCheckError),
    "TaskLedger.load": (
        "rlora_state.json",
        load_part("tasks", lambda part, trainer: TaskLedger(["first", "same"], torch.device("cpu")).load(part or {})),
        AdapterCheckError,
    ),
    "load_head_sums": (
        "rlora_state.json",
        load_part("head_sums", lambda part, trainer: trainer._observer.load_head_sums(part)),
        AdapterCheckError,
    ),
}


def load_trainer_state(folder):
    """What is accepted, transformers loads."""
    read_trainer_state(folder)
    TrainerState.load_from_json(str(folder / "trainer_state.json"))


def mutate(draw, text):
    """A JSON text with some of its values, keys or characters changed."""
    if draw.random() < 0.2:
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(text))
            end = start + draw.choice((0, 1, 1, 5, 50))
            text = text[:start] + draw.choice(("", "{", "]", '"', "0", "\\ud800", "e9", ",", text[:20])) + text[end:]
        return text

    root = [json.loads(text)]
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        holder, key = root, 0
        while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.8:
            holder = holder[key]
            key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = draw.random()
        if kind < 0.7 or holder is root:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        elif kind < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw.choice(("x", "x" * 5000, "../x", "", "\0", "files"))] = holder.pop(key)
        else:
            holder.insert(key, copy.deepcopy(draw.choice(VALUES)))
    return json.dumps(root[0])


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    """A copy whose files may be changed; each test puts back what it has changed."""
    return shutil.copytree(saved[0], tmp_path_factory.mktemp("changed") / "checkpoint-1")


@pytest.mark.parametrize("name", READERS)
def test_mutated_states_raise_documented_errors_only(saved, folder, name):
    file, read, documented = READERS[name]
    trainer, draw = saved[1], random.Random(f"{SEED} {name}")
    text = (saved[0] / file).read_text()
    path = folder / ("x.json" if name == "read_object" else file)
    refused = 0
    try:
        path.write_text(text)
        read(folder, trainer)
        for _ in range(MUTATIONS // len(READERS)):
            mutated = mutate(draw, text)
            path.write_text(mutated)
            try:
                refused += read(folder, trainer) is not None
            except Exception as error:
                assert documented and isinstance(error, documented), f"{type(error)} {error}: {mutated[:2000]}"
                assert len(str(error)) < 2500 and str(error).replace("\n", " ").isprintable(), repr(str(error))
                refused += 1
    finally:
        (folder / file).write_text(text)
    assert refused > 5


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"files": []},
            "rlora_state.json has [] as 'files', which must be sizes in bytes by the names of files. Resu",
        ),
        ({"files": {"x" * 5000: 4}}, f"{'x' * 80}... is missing"),
        ({"files": {"../x": 4}}, "../x is missing"),
        ({"adapters": {"../checkpoint-1": ""}}, "../checkpoint-1/adapter_model.safetensors is missing"),
        ({"processes": "two"}, "rlora_state.json has 'two' as 'processes', which must be a number of at least 1."),
        ({"runs": [{"from_step": 0}]}, "as 'runs', which must be a list of objects with `from_step`, `compared` and"),
        ({"strategy": ["x"]}, "rlora_state.json has ['x'] as 'strategy', which must be a line of text."),
    ],
)
def test_own_state_is_checked(saved, folder, changed, message):
    path = folder / "rlora_state.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), **changed}))
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            check_files(folder)
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"global_step": "1"}, "trainer_state.json has '1' as 'global_step', which must be a count. Resume from"),
        ({"global_step": 7}, "its state is of step 7"),
        ({"probe_loss": "x"}, "trainer_state.json has 'x' as 'probe_loss', which must be absent; fields are best_glo"),
        ({"log_history": [1]}, "trainer_state.json has [1] as 'log_history', which must be a list of objects."),
        ({"best_model_checkpoint": 4}, "as 'best_model_checkpoint', which must be text or null."),
        ({"stateful_callbacks": {"x": 1}}, "which must be an object of the states of callbacks."),
    ],
)
def test_state_of_transformers_is_checked(saved, folder, changed, message):
    path = folder / "trainer_state.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), **changed}))
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            check_files(folder)
    finally:
        path.write_text(text)


def test_logs_may_have_nan(saved, folder):
    """Those of a run that diverges."""
    path = folder / "trainer_state.json"
    text = path.read_text()
    state = json.loads(text)
    state["log_history"].append({"loss": float("nan"), "step": 1})
    path.write_text(json.dumps(state))
    try:
        check_files(folder)
    finally:
        path.write_text(text)


def test_damaged_parts_are_refused_before_the_first_step(saved, model_folders, tmp_path):
    for name, part in (("tasks", {"first": {"rows": "x"}}), ("head_sums", [[1.0]]), ("head_sums", {})):
        out = tmp_path / name
        shutil.copytree(saved[0], out / "checkpoint-1", dirs_exist_ok=True)
        path = out / "checkpoint-1" / "rlora_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: part}))
        trainer = make_trainer(model_folders, out, max_steps=2, balance_loss="switch", balance_scope="global")
        with pytest.raises(
            AdapterCheckError, match=f"rlora_state.json has a damaged part '{name}': .*Resume from ano"
        ):
            trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 1


def test_infinite_settings_can_be_resumed_with(model_folders, tmp_path):
    """JSON has no infinity."""
    settings = {"max_grad_norm": float("inf"), "save_strategy": "steps", "save_steps": 1}
    make_trainer(model_folders, tmp_path, max_steps=1, **settings).train()
    resumed = make_trainer(model_folders, tmp_path, max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def test_strange_names_of_folders(saved, tmp_path):
    names = [
        f"checkpoint-{'9' * 200}",
        "checkpoint-",
        "checkpoint--1",
        "checkpoint-x",
        "checkpoint-1\n",
        "checkpoint-²",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".rlora-replaced-checkpoint-..").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == names[:1]
    restore_set_aside(tmp_path)
    with pytest.raises(ValueError, match="found no complete checkpoint"):
        find_checkpoint(tmp_path)
