"""Commands that measure, export and describe adapters, on a tiny model."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from testing_utils import build_tokenizer, task_rows
from transformers import AutoModelForCausalLM

from rlora_cli.loading import chosen_tasks, load_adapter, local_record
from rlora_trl import RLoraConfig, set_task
from rlora_trl.analysis import head_similarities
from rlora_trl.evaluation import score_tasks
from rlora_trl.evaluation.rows import load_task_rows
from rlora_trl.files.checks import check_adapter
from rlora_trl.files.layout import task_slug
from rlora_trl.files.record import AdapterRecord
from rlora_trl.tuner.routing import find_routings


def test_eval_is_score_tasks(rlora, make_adapter, rows_folder):
    folder = make_adapter()
    result = rlora("eval", folder, "--data", rows_folder, "--compare_base", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    model, rows = AutoPeftModelForCausalLM.from_pretrained(folder), load_task_rows(str(rows_folder))
    expected = score_tasks(model, build_tokenizer(), rows)
    assert {row["task"]: (row["correct"], row["rows"]) for row in told["tasks"]} == {
        task: (score.correct, score.total) for task, score in expected.items()
    }
    with model.disable_adapter():
        base = score_tasks(model, build_tokenizer(), rows)
    assert {row["task"]: row["base_accuracy"] for row in told["tasks"]} == {t: s.accuracy for t, s in base.items()}
    assert told["mean"]["accuracy"] == pytest.approx(sum(s.accuracy for s in expected.values()) / 3)


def test_eval_shows_a_table(rlora, make_adapter, rows_folder):
    result = rlora("eval", make_adapter(), "--data", rows_folder / "test.jsonl", "--limit", 5)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["task", "rows", "accuracy,", "%"]
    assert [line.split()[0] for line in lines[1:]] == ["same", "colour", "first", "mean"]
    assert lines[-1].split()[3] == "15"
    assert "\x1b" not in result.stdout


def test_a_task_router_is_told_the_task(make_adapter):
    loaded = load_adapter(check_adapter(make_adapter(router="task")))
    routing = find_routings(loaded.model)[0]
    told = [
        (list(portion), routing.batch.task) for portion in chosen_tasks(loaded, {"first": [], "other": [], "same": []})
    ]
    assert told == [(["first"], 2), (["other"], None), (["same"], 0)]
    assert routing.batch.task is None


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
        told = json.loads(result.stdout)["tasks"][0]
        assert (told["correct"], told["rows"]) == (expected.correct, expected.total)


def test_conversations_are_analyzed_and_exported(rlora, make_adapter, tmp_path):
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "task": "same"}))
    folder, data = make_adapter(), tmp_path / "rows.jsonl"
    assert rlora("analyze", folder, "--data", data).exit_code == 0
    result = rlora("export", folder, tmp_path / "out", "--task", "same", "--data", data, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["rows"] == 1, result.stderr


@pytest.mark.parametrize("command", ["eval", "analyze", "export"])
@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [{"question": "a", "answer": "b"}],
            "has the columns 'question', 'answer'; accepted are 'prompt' with 'comple",
        ),
        ([{"prompt": "a", "completion": None}], "rows.jsonl, row 1, column 'completion': it is missing or null"),
        ([{"prompt": "a", "completion": 4}], "rows.jsonl, row 1, column 'completion': it is 4, of type int"),
        ('{"prompt": "a",', "rows.jsonl, line 1: Expecting property name enclosed in double quotes"),
        ("", "rows.jsonl is empty."),
    ],
    ids=["columns", "null", "number", "broken", "empty"],
)
def test_data_of_another_form(rlora, make_adapter, tmp_path, command, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
    output = [tmp_path / "out"] if command == "export" else []
    result = rlora(command, make_adapter(), *output, "--data", path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr and "Traceback" not in result.stderr


def test_plain_text_has_no_answer_to_score(rlora, make_adapter, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w1 w2"}')
    assert "plain text has no answer to score" in rlora("eval", make_adapter(), "--data", path).stderr
    assert rlora("analyze", make_adapter("again"), "--data", path).exit_code == 0


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
    told = json.loads(rlora("eval", folder, "--data", rows_folder, "--compare-base", "--save", "--json").stdout)
    metrics = {task.name: task.metrics for task in AdapterRecord.load(folder).tasks}
    assert metrics == {
        row["task"]: {"accuracy": row["accuracy"], "base_accuracy": row["base_accuracy"]} for row in told["tasks"]
    }
    before = AdapterRecord.load(folder)
    result = rlora("eval", folder, "--data", rows_folder, "--limit", 3, "--save")
    assert result.exit_code == 1 and "same (3 rows, recorded are scores of 8)" in result.stderr
    assert "`--overwrite`" in result.stderr and AdapterRecord.load(folder) == before
    result = rlora("eval", folder, "--data", rows_folder, "--limit", 3, "--save", "--overwrite")
    assert result.exit_code == 0, result.stderr
    task = AdapterRecord.load(folder).task("same")
    assert task.metric_rows == 3 and set(task.metrics) == {"accuracy"}, "the base was scored on other rows"


def test_eval_of_rows_without_tasks(rlora, make_adapter, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, task_rows("same", 4))))
    for tasks, name in ((["same"], "same"), (["same", "first"], "rows")):
        told = json.loads(rlora("eval", make_adapter(tasks=tasks), "--data", tmp_path / "rows.jsonl", "--json").stdout)
        assert [row["task"] for row in told["tasks"]] == [name]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--task-column", "kind"], "has no column 'kind' to name tasks; it has prompt, completion, task, options."),
        (["--split", "validation"], "has no split 'validation'; it has train, test."),
        (["--data", "missing.jsonl"], "There is no data at missing.jsonl."),
        (["--data", "missing"], "There is no file or folder missing here, and no such dataset was found on the Hub"),
        (["--base", "./missing"], "./missing"),
    ],
)
def test_eval_errors(rlora, make_adapter, rows_folder, words, message):
    result = rlora("eval", make_adapter(), "--data", rows_folder, *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr and "Traceback" not in result.stderr


def test_adapters_that_are_not_there(rlora, rows_folder, tmp_path):
    result = rlora("eval", tmp_path / "nothing", "--data", rows_folder)
    assert result.exit_code == 1 and "There is no folder" in result.stderr
    result = rlora("eval", "user/nothing", "--data", rows_folder)
    assert result.exit_code == 1 and "not in the cache" in result.stderr
    result = rlora("pull", tmp_path / "nothing")
    assert result.exit_code == 1 and "There is no folder" in result.stderr
    (tmp_path / "empty").mkdir()
    result = rlora("pull", tmp_path / "empty")
    assert result.exit_code == 1 and "adapter_config.json" in result.stderr


def test_save_is_for_folders_of_the_user(rlora, make_adapter, rows_folder):
    with pytest.raises(ValueError, match="rlora pull user/name --output FOLDER"):
        local_record(check_adapter(make_adapter()), "user/name")


def test_analyze(rlora, make_adapter, rows_folder, tmp_path):
    folder = make_adapter()
    told = json.loads(rlora("analyze", folder, "--json").stdout)
    similarities = head_similarities(folder)
    assert {layer: len(matrix) for layer, matrix in told["similarities"].items()} == dict.fromkeys(similarities, 3)
    off_diagonal = [float(m[i][j]) for m in similarities.values() for i in range(3) for j in range(i)]
    assert told["mean_similarity"] == pytest.approx(sum(off_diagonal) / len(off_diagonal), abs=1e-6)
    assert told["mixtures"] is None
    assert "mean of layers" in rlora("analyze", folder).stdout
    assert rlora("analyze", folder, "--save").exit_code == 2


def test_analyze_on_data(rlora, make_adapter, rows_folder, tmp_path):
    folder = make_adapter()
    words = ["--data", rows_folder, "--save", "--output", tmp_path / "drawn"]
    result = rlora("analyze", folder, *words)
    assert result.exit_code == 0, result.stderr
    assert {"same", "colour", "first"} <= {line.split()[0] for line in result.stdout.splitlines() if line}
    assert "head 1  head 2  head 3" in result.stdout, "as figures count them"
    assert set(AdapterRecord.load(folder).mixtures.weights) == {"same", "colour", "first"}
    for name in ("head_similarity.png", "routing.png"):
        assert (tmp_path / "drawn" / "figures" / name).stat().st_size > 1000


def test_export(rlora, make_adapter, rows_folder, tmp_path):
    folder = make_adapter()
    result = rlora("export", folder, tmp_path / "given", "--weights", "0.2,0.3,0.5", "--json")
    told = json.loads(result.stdout)
    assert (told["rank"], told["kl"]) == (8, None)
    assert (tmp_path / "given" / "adapter_model.safetensors").is_file()
    result = rlora("export", folder, tmp_path / "measured", "--task", "same", "--data", rows_folder)
    assert result.exit_code == 0, result.stderr
    assert "plain LoRA of rank 8" in result.stdout and "nats a token" in result.stdout
    result = rlora("export", folder, tmp_path / "merged", "--weights", "0.2,0.3,0.5", "--merge")
    assert "merged model" in result.stdout and (tmp_path / "merged" / "model.safetensors").is_file()


def test_export_errors(rlora, make_adapter, tmp_path):
    folder = make_adapter()
    assert rlora("export", folder, tmp_path / "x", "--weights", "a,b").exit_code == 2
    assert rlora("export", folder, tmp_path / "x", "--weights", "1,0,0", "--task", "same").exit_code == 2
    result = rlora("export", folder, tmp_path / "x", "--weights", "1,0")
    assert result.exit_code == 1
    assert "Error: `--weights 1,0` must be 3 numbers, one for each head" in result.stderr
    result = rlora("export", folder, tmp_path / "x", "--weights", "0.2,0.3,0.4")
    assert "these are 3 with the sum 0.9." in result.stderr
    result = rlora("export", folder, tmp_path / "x", "--task", "colours")
    assert "There is no task 'colours'; the adapter has 'same', 'colour', 'first'. Did you mean 'colour'?" in (
        result.stderr
    )
    result = rlora("export", folder, tmp_path / "x", "--task", "same")
    assert result.exit_code == 1 and result.stderr.strip().endswith(
        "Add `--data` to measure them, or say how to mix the heads with `--weights`."
    )
    assert not (tmp_path / "x").exists()


def test_card(rlora, make_adapter):
    folder = make_adapter()
    (folder / "README.md").unlink()
    result = rlora("card", folder, "--repo", "user/words")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("---\n") and "user/words" in result.stdout
    assert not (folder / "README.md").exists()
    assert rlora("card", folder, "--write").exit_code == 0
    assert "task:colour" in (folder / "README.md").read_text()
    assert "task:colour" in json.loads(rlora("card", folder, "--json").stdout)["metadata"]["tags"]


def test_card_names_the_exports_that_are_in_the_folder(rlora, make_adapter):
    folder = make_adapter(tasks=["same", "EN fr"])
    measured = {"task": "same", "path": "exports/same", "rank": 8, "accuracy": 0.75}
    elsewhere = {
        "task": "EN fr",
        "path": f"exports/{task_slug('EN fr')}",
    }  # of a repository, whose exports stayed there
    AdapterRecord(exports=[measured, elsewhere]).save(folder)
    # At the place of a task, at one of the user's choice, and a merged model, which PEFT can't load from a subfolder.
    for name, more in (("same", []), ("by_hand", []), ("whole", ["--merge"])):
        words = ["export", folder, folder / "exports" / name, "--weights", "0.2,0.3,0.5", *more]
        assert rlora(*words).exit_code == 0

    told = json.loads(rlora("card", folder, "--json").stdout)

    assert told["metadata"]["rlora"]["exports"] == {"same": "exports/same", "exports/by_hand": "exports/by_hand"}
    for subfolder in re.findall(r'subfolder="(.*?)"', told["text"]):
        base = AutoModelForCausalLM.from_pretrained(check_adapter(folder).config.base_model_name_or_path)
        PeftModel.from_pretrained(base, str(folder), subfolder=subfolder)
    assert "75.0%" in told["text"] and "EN fr" not in told["text"].partition("exports/same")[2].partition("##")[0]

    (folder / "exports" / "same").rename(folder / elsewhere["path"])
    assert json.loads(rlora("card", folder, "--json").stdout)["metadata"]["rlora"]["exports"] == {
        "EN fr": elsewhere["path"],
        "exports/by_hand": "exports/by_hand",
    }


def test_pull_checks_and_copies_a_folder(rlora, make_adapter, tmp_path):
    folder = make_adapter()
    (folder / "notes.txt").write_text("mine")
    told = json.loads(rlora("pull", folder, "--output", tmp_path / "copy", "--json").stdout)
    assert (told["r"], told["num_heads"], told["layers"]) == (4, 3, 6)
    assert told["tasks"] == ["same", "colour", "first"]
    assert (tmp_path / "copy" / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter_model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "copy" / "notes.txt").exists()
    result = rlora("pull", folder, "--output", tmp_path / "copy")
    assert result.exit_code == 0 and "has this adapter already" in result.stderr
    assert "from_pretrained" in result.stderr and str(tmp_path / "copy") in result.stdout
    result = rlora("pull", make_adapter("other", r=2), "--output", tmp_path / "copy")
    assert result.exit_code == 1 and "is not empty" in result.stderr
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-10])
    result = rlora("pull", folder)
    assert result.exit_code == 1 and "Traceback" not in result.stderr


def test_pull_tells_repository_and_commit(rlora, make_adapter, tmp_path):
    (tmp_path / "models--user--some--words" / "snapshots").mkdir(parents=True)
    folder = make_adapter("models--user--some--words/snapshots/" + "a" * 40)
    told = json.loads(rlora("pull", folder, "--json").stdout)
    assert (told["repo_id"], told["commit"]) == ("user/some--words", "a" * 40)
    lines = rlora("pull", folder).stdout.splitlines()
    assert [line.split() for line in lines[:2]] == [["Repository", "user/some--words"], ["Commit", "a" * 40]]


def test_dtype_and_quantization_of_the_base(make_adapter, model_folders, tmp_path):
    assert load_adapter(check_adapter(make_adapter()), dtype="bfloat16").model.dtype == torch.bfloat16
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama64"])
    get_peft_model(model, RLoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "four")
    loaded = load_adapter(check_adapter(tmp_path / "four"), load_in_4bit=True)
    assert loaded.model.get_base_model().is_loaded_in_4bit
