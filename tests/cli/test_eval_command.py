"""`rlora eval`: scores by task, in tables and in records."""

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM
from testing_utils import build_tokenizer, task_rows

from rlora_trl import set_task
from rlora_trl.evaluation import bootstrap_interval, loading, score_tasks
from rlora_trl.evaluation.rows import load_task_rows
from rlora_trl.files.record import AdapterRecord


def test_eval_is_score_tasks(rlora, make_adapter, rows_folder):
    folder = make_adapter()
    result = rlora("eval", folder, "--data", rows_folder, "--compare_base", "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    model, rows = AutoPeftModelForCausalLM.from_pretrained(folder), load_task_rows(str(rows_folder))
    expected = score_tasks(model, build_tokenizer(), rows)
    assert {row["task"]: (row["correct"], row["rows"]) for row in shown["tasks"]} == {
        task: (score.correct, score.total) for task, score in expected.items()
    }
    with model.disable_adapter():
        base = score_tasks(model, build_tokenizer(), rows)
    assert {row["task"]: row["base_accuracy"] for row in shown["tasks"]} == {t: s.accuracy for t, s in base.items()}
    assert shown["mean"]["accuracy"] == pytest.approx(sum(s.accuracy for s in expected.values()) / 3)


def test_eval_shows_a_table(rlora, make_adapter, rows_folder):
    result = rlora("eval", make_adapter(), "--data", rows_folder / "test.jsonl", "--limit", 5)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["task", "rows", "accuracy,", "%", "95", "%", "interval"]
    assert [line.split()[0] for line in lines[1:]] == ["same", "colour", "first", "mean"]
    assert lines[-1].split()[3] == "15"
    assert "\x1b" not in result.stdout


def test_eval_shows_intervals(rlora, make_adapter, rows_folder):
    folder = make_adapter()
    words = ("eval", folder, "--data", rows_folder, "--compare-base")
    result = json.loads(rlora(*words, "--json").stdout)
    model, rows = AutoPeftModelForCausalLM.from_pretrained(folder), load_task_rows(str(rows_folder))
    scores = score_tasks(model, build_tokenizer(), rows)
    with model.disable_adapter():
        base = score_tasks(model, build_tokenizer(), rows)
    gains = [np.subtract(scores[task].values, base[task].values) for task in rows]
    for row, gain in zip(result["tasks"], gains, strict=True):
        assert row["interval"] == list(bootstrap_interval([scores[row["task"]].values], bounds=(0, 1)))
        assert row["base_interval"] == list(bootstrap_interval([base[row["task"]].values], bounds=(0, 1)))
        assert row["gain"] == pytest.approx(gain.mean())
        assert row["gain_interval"] == list(bootstrap_interval([gain], bounds=(-1, 1)))
    mean = result["mean"]
    assert mean["interval"] == list(bootstrap_interval([score.values for score in scores.values()], bounds=(0, 1)))
    assert mean["gain_interval"] == list(bootstrap_interval(gains, bounds=(-1, 1))) and result["confidence"] == 0.95

    lines = rlora(*words).stdout.splitlines()
    low, high = (100 * bound for bound in mean["interval"])
    assert f"{low:.1f} to {high:.1f}" in lines[-1]
    low, high = (100 * bound for bound in mean["gain_interval"])
    assert lines[0].endswith("interval of gain") and lines[-1].endswith(f"{low:+.1f} to {high:+.1f}")


@pytest.mark.parametrize("router", ["softmax", "task"])
def test_eval_of_generated_answers(rlora, make_adapter, rows_folder, router):
    """Tasks with options keep their accuracy; a task router gets the task of each row."""
    folder = make_adapter(router=router)
    words = ("--metric", "f1", "--metric", "colour=exact_match", "--max-new-tokens", 4, "--stop", "red")
    result = rlora("eval", folder, "--data", rows_folder, *words, "--json")
    assert result.exit_code == 0, result.stderr
    shown = {row["task"]: row for row in json.loads(result.stdout)["tasks"]}
    assert {task: row["metric"] for task, row in shown.items()} == {
        "same": "accuracy",
        "colour": "exact_match",
        "first": "f1",
    }
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    for task, rows in load_task_rows(str(rows_folder)).items():
        if router == "task":
            set_task(model, task)
        metric = {task: shown[task]["metric"]}
        options = {"metric": metric, "max_new_tokens": 4, "stop": ["red"]}
        score = score_tasks(model, build_tokenizer(), {task: rows}, **options)[task]
        assert shown[task]["score"] == shown[task][score.metric] == score.score
        assert shown[task]["correct"] == score.correct
    assert "accuracy" not in json.loads(result.stdout)["mean"], "the mean of several metrics"


def test_eval_of_the_papers_data(rlora, make_adapter, monkeypatch):
    """Each of its tasks has a metric, unless another one is given."""
    rows = [{"task": "gsm8k", "prompt": "w1 w2", "completion": " #### 7", "options": []} for _ in range(2)]
    rows += [{"task": "boolq", "prompt": "w1 w2", "completion": " yes", "options": [" no", " yes"]}]
    data = DatasetDict(test=Dataset.from_list(rows))
    monkeypatch.setattr(loading, "load_paper_data", lambda name: data if name == "setting1" else None)
    words = (
        "eval",
        make_adapter(tasks=["gsm8k", "boolq"]),
        "--data",
        "paper:setting1",
        "--max-new-tokens",
        4,
        "--json",
    )
    for options, metric in (((), "number"), (("--metric", "f1"), "f1"), (("--metric", "gsm8k=f1"), "f1")):
        shown = json.loads(rlora(*words, *options).stdout)["tasks"]
        assert [(row["task"], row["metric"]) for row in shown] == [("gsm8k", metric), ("boolq", "accuracy")]


def test_eval_shows_the_metrics(rlora, make_adapter, rows_folder):
    words = ("eval", make_adapter(), "--data", rows_folder, "--max-new-tokens", 3, "--metric")
    lines = rlora(*words, "exact_match").stdout.splitlines()
    assert lines[0].split() == ["task", "rows", "metric", "score,", "%", "95", "%", "interval"]
    assert "exact match" in next(line for line in lines if line.startswith("first"))
    metrics = [word for task in ("same", "colour", "first") for word in ("--metric", f"{task}=exact_match")]
    lines = rlora(*words[:-1], *metrics).stdout.splitlines()
    assert lines[0].split()[2:5] == ["exact", "match,", "%"]


def test_eval_of_a_task_router(rlora, make_adapter, rows_folder):
    folder = make_adapter(router="task")
    result = rlora("eval", folder, "--data", rows_folder, "--json")
    assert result.exit_code == 0, result.stderr
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    for row in json.loads(result.stdout)["tasks"]:
        set_task(model, row["task"])
        rows = load_task_rows(str(rows_folder))[row["task"]]
        assert row["correct"] == score_tasks(model, build_tokenizer(), {"": rows})[""].correct


@pytest.mark.parametrize("form", ["messages", "conversations", "prompt_completion"])
def test_eval_of_conversations(rlora, make_adapter, tmp_path, form):
    """Scores are those of the text that the chat template makes of them, options and the last answer too."""
    names = ("from", "value") if form == "conversations" else ("role", "content")
    chats, texts = [], []
    for row in task_rows("same", 12):
        question, answer = row["prompt"], row["completion"].strip()
        turns = [dict(zip(names, turn, strict=True)) for turn in (("user", question), ("assistant", answer))]
        split = {"prompt": turns[:1], "completion": turns[1:]}
        chats.append({**(split if form == "prompt_completion" else {form: turns}), "options": ["yes", "no"]})
        # The template puts a space before the end of a turn.
        texts.append({"prompt": f"<user> {question} <assistant>", "completion": f" {answer} "})
    for options, folder in ((["yes", "no"], "with"), (None, "without")):
        (tmp_path / folder).mkdir()
        rows = [{**row, "options": options} for row in chats]
        (tmp_path / folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
        adapter = make_adapter("adapter" + folder, tasks=["same"])
        result = rlora("eval", adapter, "--data", tmp_path / folder, "--json")
        assert result.exit_code == 0, result.stderr
        model = AutoPeftModelForCausalLM.from_pretrained(adapter)
        options = [" yes ", " no "] if options else []
        expected = score_tasks(model, build_tokenizer(), {"same": [{**row, "options": options} for row in texts]})[
            "same"
        ]
        shown = json.loads(result.stdout)["tasks"][0]
        assert (shown["correct"], shown["rows"]) == (expected.correct, expected.total)


def test_eval_saves_scores_of_the_adapters_tasks(rlora, make_adapter, rows_folder):
    folder = make_adapter(tasks=["same", "colour"])
    result = rlora("eval", folder, "--data", rows_folder, "--save", "--json")
    accuracies = {row["task"]: row["accuracy"] for row in json.loads(result.stdout)["tasks"]}
    record = AdapterRecord.load(folder)
    assert {task.name: task.metrics for task in record.tasks} == {
        task: {"accuracy": accuracies[task]} for task in ("same", "colour")
    }
    assert record.task("same").metric_rows == 8
    assert "Not recorded, as the adapter was not trained on them: first" in result.stderr


def test_eval_saves_what_the_base_model_does(rlora, make_adapter, rows_folder):
    folder = make_adapter()
    shown = json.loads(rlora("eval", folder, "--data", rows_folder, "--compare-base", "--save", "--json").stdout)
    metrics = {task.name: task.metrics for task in AdapterRecord.load(folder).tasks}
    assert metrics == {
        row["task"]: {"accuracy": row["accuracy"], "base_accuracy": row["base_accuracy"]} for row in shown["tasks"]
    }
    before = AdapterRecord.load(folder)
    result = rlora("eval", folder, "--data", rows_folder, "--limit", 3, "--save")
    assert result.exit_code == 1 and "same (3 rows, recorded are scores of 8)" in result.stderr
    assert "`--overwrite`" in result.stderr and AdapterRecord.load(folder) == before
    result = rlora("eval", folder, "--data", rows_folder, "--limit", 3, "--save", "--overwrite")
    assert result.exit_code == 0, result.stderr
    task = AdapterRecord.load(folder).task("same")
    assert task.metric_rows == 3 and set(task.metrics) == {"accuracy"}, "the base was scored on other rows"


def test_eval_saves_metrics_intervals_and_rows(rlora, make_adapter, rows_folder):
    folder = make_adapter()
    words = ("eval", folder, "--data", rows_folder, "--save", "--json", "--max-new-tokens", 4)
    shown = json.loads(rlora(*words, "--compare-base", "--metric", "f1").stdout)["tasks"]
    for row in shown:
        task, names = AdapterRecord.load(folder).task(row["task"]), (row["metric"], f"base_{row['metric']}")
        assert task.metrics == {names[0]: row["score"], names[1]: row["base_score"]} and task.metric_rows == 8
        assert task.intervals == {names[0]: row["interval"], names[1]: row["base_interval"]}

    # Another metric of the same rows stands beside it; of other rows, in its place.
    assert rlora(*words, "--metric", "exact_match").exit_code == 0
    assert set(AdapterRecord.load(folder).task("first").metrics) == {"f1", "base_f1", "exact_match"}
    assert rlora(*words, "--limit", 3, "--overwrite").exit_code == 0
    task = AdapterRecord.load(folder).task("first")
    assert set(task.metrics) == set(task.intervals) == {"accuracy"} and task.metric_rows == 3

    card = rlora("card", folder).stdout
    low, high = (f"{100 * bound:.1f}" for bound in task.intervals["accuracy"])
    assert f"({low} to {high})" in card and "interval_95" in card


def test_eval_of_rows_without_tasks(rlora, make_adapter, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, task_rows("same", 4))))
    for tasks, name in ((["same"], "same"), (["same", "first"], "rows")):
        shown = json.loads(
            rlora("eval", make_adapter(tasks=tasks), "--data", tmp_path / "rows.jsonl", "--json").stdout
        )
        assert [row["task"] for row in shown["tasks"]] == [name]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--task-column", "kind"], "has no column 'kind' to name tasks; it has prompt, completion, task, options."),
        (["--split", "validation"], "has no split 'validation'; it has train, test."),
        (["--data", "missing.jsonl"], "There is no data at missing.jsonl."),
        (["--data", "missing"], "There is no file or folder missing here, and no such dataset was found on the Hub"),
        (["--base", "./missing"], "./missing"),
        (["--metric", "bleu"], "`--metric` is 'bleu', and must be one of auto, accuracy, exact_match, f1, number."),
        (["--metric", "other=f1"], "`--metric other=f1` names no task of the data, which has same, colour, first."),
        (["--metric", "f1", "--metric", "number"], "`--metric` has two metrics for all tasks: f1 and number."),
        (["--stop", ""], "`--stop` is empty"),
        (["--metric", "f1", "--max-new-tokens", "500"], "`--max-new-tokens 500` is too many: the model has 128 pos"),
    ],
)
def test_eval_errors(rlora, make_adapter, rows_folder, words, message):
    result = rlora("eval", make_adapter(), "--data", rows_folder, *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr and "Traceback" not in result.stderr
