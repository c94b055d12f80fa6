"""`rlora train`: in a process of its own as users run it, and how it parts the command line."""

import json
import os
import signal
import subprocess
import sys
from subprocess import CalledProcessError

import pytest
import typer
from processes import RLORA, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from rlora_cli import train_process
from rlora_cli.train import _exit_code, split_arguments, training_parser, with_defaults
from rlora_trl.files.record import AdapterRecord


NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def train(*words, timeout=300):
    return subprocess.run(
        [*RLORA, "train", *map(str, words)], capture_output=True, text=True, timeout=timeout, env=os.environ
    )


def test_train_from_yaml(model_folders, rows_folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {model_folders['llama']}\ndataset_name: {rows_folder}\noutput_dir: {tmp_path / 'out'}\n"
        "max_steps: 2\nper_device_train_batch_size: 4\nreport_to: none\nsave_strategy: 'no'\nnum_heads: 5\nr: 3\n"
        "num_processes: 1\nenv:\n  RLORA_TRL_KERNELS: torch\n  OMP_DISPLAY_ENV: 'TRUE'\n"
    )
    done = train("--config", config, "--r", 2, "--score-rows", 3, "--mixed_precision", "no")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "mean of tasks" in done.stdout and "AutoPeftModelForCausalLM.from_pretrained" in done.stdout
    assert f"rlora push {tmp_path / 'out'} user/name" in done.stderr
    waiting = {line.split("= ")[-1] for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line}
    assert waiting <= {"'PASSIVE'"}, "threads that spin while they wait"
    assert "values were not passed" not in done.stdout + done.stderr
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["num_heads"], saved["r"], saved["tasks"]) == (5, 2, ["colour", "first", "same"])
    record = AdapterRecord.load(tmp_path / "out")
    assert {task.name: task.metric_rows for task in record.tasks} == dict.fromkeys(saved["tasks"], 3)


def test_errors_in_the_process_are_one_message(rlora, capfd, model_folders, rows_folder, tmp_path):
    words = ["--model_name_or_path", model_folders["llama"], "--dataset_name", rows_folder, "--r", 0]
    result = rlora("train", *words, "--output_dir", tmp_path / "out")
    assert result.exit_code == 1
    lines = (capfd.readouterr().err + result.stderr).splitlines()
    assert not any("Traceback" in line or "CalledProcessError" in line for line in lines)
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
    assert "`r`" in lines[-1]


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "rows.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}',
            ", row 2, column 'completion': it is missing",
        ),
        ("rows.csv", "prompt;completion\na;b", " has the columns 'prompt;completion'; accepted are"),
        ("rows.jsonl", '{"prompt": "a", "completion": 4}', ", row 1, column 'completion': it is 4, of type int"),
        ("rows.jsonl", "", " is empty."),
        (
            "rows.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt"',
            ", line 2: Expecting ':' delimiter at column 10",
        ),
        ("rows.jsonl", '{"question": "a", "answer": "b"}', " has the columns 'question', 'answer'; accepted are"),
    ],
    ids=["null", "semicolons", "number", "empty", "broken", "columns"],
)
def test_data_that_can_not_be_trained_on(monkeypatch, capfd, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    words = ["--model_name_or_path", "m", "--dataset_name", str(tmp_path / name), "--output_dir", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", ["train_process", *words])
    assert train_process.main() == 1
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
    assert f"{tmp_path / name}{message}" in lines[-1]
    assert not any("Traceback" in line or "is a bug" in line for line in lines)


def split(*words):
    return split_arguments(training_parser(), list(words))


def test_what_is_whose(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 1.0e-3\nnum_processes: 2\n")
    launch, program = split("--num_machines", "1", f"--config={config}", *NEEDED, "--accelerate_config", "zero2")
    assert launch == ["--num_processes", "2", "--num_machines", "1", "--accelerate_config", "zero2"]
    assert program == ["--config", str(config), *NEEDED]


def test_what_the_launcher_chooses_by_itself(monkeypatch, tmp_path):
    import accelerate.commands.config.config_args as config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "default.yaml"))
    words = with_defaults(["--num-processes=2", "--mixed_precision", "bf16"])
    assert words == ["--num_machines", "1", "--dynamo_backend", "no", "--num-processes=2", "--mixed_precision", "bf16"]
    assert with_defaults(["--config_file", "x.yaml"]) == ["--config_file", "x.yaml"]
    (tmp_path / "default.yaml").write_text("num_processes: 3\n")
    assert with_defaults([]) == []


def test_environment_of_the_file_reaches_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("RLORA_TEST_SET", "before")
    config = tmp_path / "run.yaml"
    config.write_text("env:\n  RLORA_TEST_SET: 3\n")
    split("--config", str(config), *NEEDED)
    assert os.environ["RLORA_TEST_SET"] == "3"


@pytest.mark.parametrize(
    "words, message",
    [
        # Abbreviations too: an option of the launcher may be how one of ours begins.
        ([*NEEDED, "--learning_rat", "1"], "No such argument: `--learning_rat`. Did you mean `--learning_rate`?"),
        (["run.yaml"], "Unexpected argument `run.yaml`. Did you mean `--config run.yaml`?"),
        (NEEDED[:2], "`--dataset_name`, the data, is missing."),
        (NEEDED[2:], "`--model_name_or_path`, the base model, is missing."),
        ([*NEEDED, "--config"], "`--config` needs a YAML file after it."),
    ],
)
def test_wrong_arguments(words, message):
    with pytest.raises(typer.BadParameter) as raised:
        split(*words)
    assert message in raised.value.message


def test_wrong_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must be a YAML mapping of arguments, got list"):
        split("--config", str(tmp_path / "run.yaml"))
    (tmp_path / "typo.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(typer.BadParameter, match="No such argument: `--learning_rat`"):
        split("--config", str(tmp_path / "typo.yaml"), *NEEDED)


def failed_rank(code):
    now = {"message": {"message": "", "extraInfo": {"timestamp": 0}}}
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="")
    failure.error_file_data, failure.timestamp = now, 0
    return ChildFailedError("train", {1: failure})


@pytest.mark.parametrize(
    "error, received, code",
    [
        (CalledProcessError(1, "train"), None, 1),
        (CalledProcessError(1, "train"), signal.SIGTERM, 143),
        (CalledProcessError(130, "train"), None, 130),
        (CalledProcessError(-9, "train"), None, 137),
        (SignalException("", signal.SIGINT), None, 130),
        (failed_rank(1), None, 1),
        (failed_rank(143), None, 143),
        (failed_rank(-9), None, 137),
    ],
)
def test_exit_code_says_why(error, received, code, capsys):
    assert _exit_code(error, received) == code
    assert ("killed by SIGKILL, perhaps for lack of memory" in capsys.readouterr().err) == (code == 137)


RELAY = """
import os, signal, subprocess, sys, time
from rlora_cli.relay import Relay

with Relay() as relay:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)  # as of a terminal, and counts as the same
    if sys.argv[2] == "twice":
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGHUP)
    print(child.wait(), relay.signal == signal.SIGHUP, child.stdout.read().split(), flush=True)
    os.kill(os.getpid(), signal.SIGHUP)
print("not reached")
"""
CHILD = """
import signal, time
signal.signal(signal.SIGHUP, lambda *received: print("hup", flush=True))
print(flush=True)
time.sleep({})  # longer than signals count as one
"""


@pytest.mark.parametrize("times, seconds, ended", [("once", 3, "0 True ['hup']"), ("twice", 60, "-9 True ['hup']")])
def test_signals_are_passed_on(times, seconds, ended):
    """The first to the children, the second as SIGKILL; where there are none, this process ends."""
    done = run([sys.executable, "-c", RELAY, CHILD.format(seconds), times], timeout=60)
    assert (done.stdout, done.returncode) == (f"{ended}\n", 129), done.stderr


def test_all_arguments_are_shown(rlora):
    result = rlora("train", "--help-all")
    assert result.exit_code == 0
    for name in (
        "--num_heads",
        "--balance_coef",
        "--learning_rate",
        "--load_in_4bit",
        "--score_rows",
        "--task_column",
    ):
        assert name in result.stdout
    assert rlora("train").exit_code == 2
