"""The parts of a training program: its data, how its threads wait, and the time that it says it takes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from testing_utils import task_datasets, task_rows

import rlora_cli
from rlora_trl import RLoraSFTConfig
from rlora_trl.trainer import cores, script


ROW = {"prompt": "a", "completion": "b"}
OTHER = {"question": "a", "answer": "b"}


def load(folder, splits, **settings):
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = script.RLoraScriptArguments(dataset_name=str(folder))
    return script.load_data(arguments, RLoraSFTConfig(str(folder / "out"), **settings))


def test_data_are_checked_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="has the columns 'question', 'answer'; accepted are"):
        load(tmp_path, {"train": [OTHER]})
    with pytest.raises(ValueError, match="row 2, column 'completion': it is missing"):
        load(tmp_path, {"train": [ROW, {"prompt": "a"}]})
    # Evaluation data that are not used are not looked at.
    assert load(tmp_path, {"train": [ROW], "test": [ROW, {"prompt": "a"}]}).evaluation is None
    with pytest.raises(ValueError, match="split 'test', row 2, column 'completion'"):
        load(tmp_path, {}, eval_strategy="steps", eval_steps=1)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="accepted are 'prompt' with 'completion', 'body', or 'messages'"):
        load(tmp_path, {"train": [{"text": "a"}]}, dataset_text_field="body")
    assert load(tmp_path, {"train": [OTHER]}, dataset_kwargs={"skip_prepare_dataset": True}).train[0] == OTHER


def test_rows_to_score_are_those_of_named_tasks(tmp_path):
    """By the rule of training: a column that happens to be called like the default need not name tasks."""
    for number, value in enumerate((None, ["a"], 1.5, "a")):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = [{**ROW, "task": value}] * 2
        assert list(load(folder, {"train": rows, "test": rows}).scored) == (["a"] if value == "a" else [])
    with pytest.raises(ValueError, match=f"^{folder}, split 'test': 1 rows have no task in column 'task', .* row 3"):
        load(folder, {"train": rows, "test": [*rows, {**ROW, "task": None}]})
    with pytest.raises(ValueError, match=f"^{folder}, split 'train': 1 rows have no task in column 'task', .* row 3"):
        load(folder, {"train": [*rows, {**ROW, "task": None}], "test": rows})


@pytest.mark.parametrize(
    "row, message",
    [
        ({"completion": None}, ", column 'completion': it is missing or null, and must be text"),
        ({"options": ["b", None]}, ", column 'options': it is .'b', None., and must be a list of texts"),
        ({"options": "b, c"}, ", column 'options': it is 'b, c', and must be a list of texts"),
        ({"options": [" b"]}, " has completion 'b', which is not among its options .' b'.. Write it exactly as one"),
    ],
)
def test_rows_to_score_are_checked(tmp_path, row, message):
    """Also without evaluation while training."""
    good = {**ROW, "task": "a", "options": ["b", "c"]}
    if isinstance(row.get("options"), str):
        good["options"] = '["b", "c"]'
    assert load(tmp_path, {"train": [good], "test": [good]}).scored["a"][0]["options"] == ["b", "c"]
    with pytest.raises(ValueError, match=f"^{tmp_path}, split 'test', row 2{message}"):
        load(tmp_path, {"train": [good], "test": [good, {**good, **row}]})


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "caf\xe9", "completion": "b"}', " is not UTF-8 text: .* byte 0xe9. Save it in UTF-8."),
        (b'{"prompt": "a" "completion": "b"}', ", line 4: Expecting ',' delimiter at column 16"),
    ],
)
def test_a_file_that_fails_while_it_is_read_is_named(tmp_path, monkeypatch, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(ROW).encode()] * 3 + [line]))
    arguments = script.RLoraScriptArguments(dataset_name=str(path), dataset_streaming=True)
    monkeypatch.setattr(script, "_train", lambda model, data, *others: list(data.train))
    with pytest.raises(ValueError, match=f"^{path}{message}"):
        data = script.load_data(arguments, RLoraSFTConfig(str(tmp_path / "out")))
        script.train("m", data, None, None, None)


@pytest.mark.parametrize(
    "stored, bf16, fast, said",
    [
        (torch.float32, False, False, None),
        (torch.float32, True, False, "To change that, set `bf16=False` (`--bf16 false`)."),
        (torch.bfloat16, False, False, "To change that, load the model in float32 (`--dtype float32`)."),
        (torch.bfloat16, True, False, "(`--dtype float32`) and set `bf16=False` (`--bf16 false`)."),
        (torch.bfloat16, True, True, None),
    ],
)
def test_a_precision_that_this_cpu_emulates_is_named_before_the_first_step(
    tmp_path, monkeypatch, stored, bf16, fast, said
):
    monkeypatch.setattr(cores, "has_fast_bf16", lambda: fast)
    arguments = RLoraSFTConfig(str(tmp_path), bf16=bf16, use_cpu=True)
    message = cores.slow_precision(arguments, torch.nn.Linear(2, 2, dtype=stored))
    assert message is None if said is None else said in message


def run_script(model, folder, data, monkeypatch, **settings):
    """Train as `rlora train` does, in a test that fails when rows are scored."""
    monkeypatch.setattr(script, "score_tasks", lambda *args, **options: pytest.fail("scored"))
    words = ["--model_name_or_path", model, "--output_dir", str(folder), "--bf16", "false", "--report_to", "none"]
    words += ["--max_steps", "1", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    _, training, model_args, rlora = script.make_parser().parse_args_and_config(words)
    return script.train(model, data, training, model_args, rlora)


def test_a_run_that_can_not_be_resumed_is_refused_before_rows_are_scored(tmp_path, model_folders, monkeypatch):
    data = script.TrainingData(task_datasets(4), scored={"same": task_rows("same", 1)})
    with pytest.raises(ValueError, match="found no complete checkpoint"):
        run_script(model_folders["llama"], tmp_path, data, monkeypatch, resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="There is no checkpoint '.*checkpoint-9'; '.*' has no checkpoint"):
        wrong = str(tmp_path / "checkpoint-9")
        run_script(model_folders["llama"], tmp_path, data, monkeypatch, resume_from_checkpoint=wrong)


def waiting(lines, **environment):
    """What OpenMP says of itself when it is loaded."""
    library = next(Path(torch.__file__).parent.glob("lib/libgomp*"), None)
    if library is None:
        pytest.skip("this PyTorch brings no OpenMP of GCC")
    kept = {name: value for name, value in os.environ.items() if name not in rlora_cli._WAITING}
    code = f"{lines}\nimport ctypes\nctypes.CDLL({str(library)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    settings = dict(line.split("] ")[-1].strip().split(" = ") for line in done.stderr.splitlines() if " = " in line)
    return settings["OMP_WAIT_POLICY"].strip("'"), settings["GOMP_SPINCOUNT"].strip("'")


def test_threads_sleep_while_they_wait():
    passive = "import rlora_cli; rlora_cli.wait_passively()"
    assert waiting(passive) == ("PASSIVE", "0")
    assert waiting(passive, OMP_WAIT_POLICY="ACTIVE") == waiting("", OMP_WAIT_POLICY="ACTIVE") != ("PASSIVE", "0")
    assert waiting(passive, GOMP_SPINCOUNT="77") == waiting("", GOMP_SPINCOUNT="77")


def test_the_command_and_the_example_load_pytorch_after_that():
    root = Path(__file__).parent.parent.parent
    example = (root / "examples" / "sft_flan.py").read_text()
    assert example.index("\nwait_passively()") < example.index("import torch")
    code = "import sys, rlora_cli\nsys.argv = ['rlora', '--version']\ntry: rlora_cli.main()\nexcept SystemExit: pass\n"
    code += "import os; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    kept = {name: value for name, value in os.environ.items() if name not in rlora_cli._WAITING}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False PASSIVE"


def steps(monkeypatch, seconds, total, scoring=0.0, first=0):
    """Run the callback through a training of so many steps; the steps after which it printed, and the texts."""
    clock = itertools.accumulate(itertools.chain([100.0], itertools.repeat(seconds)))
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(clock))
    printed = []
    monkeypatch.setattr(script.tqdm, "write", lambda text, file: printed.append((state.global_step, text)))
    state = SimpleNamespace(max_steps=total, global_step=first, is_local_process_zero=True)
    callback = script.ExpectedTime(scoring)
    callback.on_train_begin(None, state, None)
    for _ in range(total - first):
        state.global_step += 1
        callback.on_step_end(None, state, None)
    return printed


def test_the_time_of_a_run_is_printed_early(monkeypatch):
    assert steps(monkeypatch, 2.0, 60, scoring=30.4) == [
        (3, "About 2 min left: 57 steps of 2.0 s, and 30 s of scoring.")
    ]
    assert steps(monkeypatch, 2.0, 60) == [(3, "About 2 min left: 57 steps of 2.0 s.")]
    assert steps(monkeypatch, 2.0, 60, first=40) == [(43, "About 34 s left: 17 steps of 2.0 s.")]
    assert steps(monkeypatch, 90.0, 1003) == [(3, "About 25.0 h left: 1000 steps of 90.0 s.")]
    assert steps(monkeypatch, 0.1, 60) == []  # over before anybody has read it


def test_quantities_of_time():
    assert [script.describe_seconds(value) for value in (0.4, 89, 91, 3600, 5400)] == [
        *("0 s", "89 s", "2 min", "60 min", "1.5 h")
    ]
