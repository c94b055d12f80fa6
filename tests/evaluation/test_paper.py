"""The paper's data sets, from small replicas of the repositories with their schemas and layout."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from rlora_trl.evaluation import loading, paper
from rlora_trl.evaluation.loading import load_splits
from rlora_trl.evaluation.paper import SETS, load_paper_data, paper_metrics
from rlora_trl.evaluation.rows import load_task_rows


def choices(*texts, labels="ABCDE"):
    return {"text": list(texts), "label": list(labels[: len(texts)])}


# A row of each repository that has an answer, and what becomes of it.
REPLICAS = {
    "boolq": (
        {"question": "is ice cold", "answer": True, "passage": "Ice is frozen water."},
        ("Ice is frozen water.\nQuestion: is ice cold?\nAnswer:", " yes", [" no", " yes"]),
    ),
    "piqa": (
        {"goal": "Open a jar", "sol1": "Twist  the lid.", "sol2": "Twist the jar's base.", "label": 0},
        (
            "Goal: Open a jar\nWhich way works?\nOptions:\n- Twist the lid.\n- Twist the jar's base.\nAnswer:",
            " Twist the lid.",
            [" Twist the lid.", " Twist the jar's base."],
        ),
    ),
    "siqa": (
        {
            "context": "Kai fell.",
            "question": "How?",
            "answerA": "sad",
            "answerB": "hurt",
            "answerC": "ok",
            "label": "2",
        },
        ("Kai fell.\nHow?\nOptions:\n- sad\n- hurt\n- ok\nAnswer:", " hurt", [" sad", " hurt", " ok"]),
    ),
    "hellaswag": (
        {
            "ind": 1,
            "activity_label": "Cooking",
            "ctx": "[header] Boil [title] water. Then",
            "ctx_a": "a",
            "ctx_b": "b",
            "endings": ["[step] stir.", "run."],
            "label": "0",
        },
        (
            "Text: Cooking: Boil. water. Then\nHow does it go on?\nOptions:\n- stir.\n- run.\nAnswer:",
            " stir.",
            [" stir.", " run."],
        ),
    ),
    "winogrande": (
        {"sentence": "The _ was red.", "option1": "car", "option2": "sky", "answer": "1"},
        (
            "Sentence: The _ was red.\nWhat belongs in the blank?\nOptions:\n- car\n- sky\nAnswer:",
            " car",
            [" car", " sky"],
        ),
    ),
    "arc_easy": (
        {"id": "x", "question": "Which is a star?", "choices": choices("Moon", "Sun", labels="12"), "answerKey": "2"},
        ("Question: Which is a star?\nOptions:\n- Moon\n- Sun\nAnswer:", " Sun", [" Moon", " Sun"]),
    ),
    "arc_challenge": (
        {"id": "x", "question": "Which?", "choices": choices("a", "b", "c"), "answerKey": "C"},
        ("Question: Which?\nOptions:\n- a\n- b\n- c\nAnswer:", " c", [" a", " b", " c"]),
    ),
    "openbookqa": (
        {"id": "x", "question_stem": "Rain is", "choices": choices("wet", "dry"), "answerKey": "A"},
        ("Question: Rain is\nOptions:\n- wet\n- dry\nAnswer:", " wet", [" wet", " dry"]),
    ),
    "gsm8k": (
        {"question": "2 and 3?", "answer": "They are 2+3=<<2+3=5>>5.\n#### 5"},
        (
            "Problem: 2 and 3?\nSolve it step by step; end with #### and the number.\nAnswer:",
            " They are 2+3=5.\n#### 5",
            [],
        ),
    ),
}
GLUE_ROWS = {
    "sst2": (
        {"sentence": "so good ", "label": 1},
        ("Review: so good\nIs the review positive or negative?", "positive"),
    ),
    "cola": ({"sentence": "Me eat.", "label": 0}, ("Sentence: Me eat.\nIs it acceptable English?", "no")),
    "mnli": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        ("Premise: It rains.\nHypothesis: It is wet.\nDoes the first imply the second?", "yes"),
    ),
    "qnli": (
        {"question": "Who?", "sentence": "Ann.", "label": 1},
        ("Question: Who?\nSentence: Ann.\nDoes the sentence answer the question?", "no"),
    ),
    "mrpc": (
        {"sentence1": "a", "sentence2": "b", "label": 1},
        ("Sentence 1: a\nSentence 2: b\nDo the two sentences say the same thing?", "yes"),
    ),
    "qqp": (
        {"question1": "a", "question2": "b", "label": 0},
        ("Question 1: a\nQuestion 2: b\nDo they ask the same thing?", "no"),
    ),
    "rte": (
        {"sentence1": "a", "sentence2": "b", "label": 1},
        ("Sentence 1: a\nSentence 2: b\nDoes the first imply the second?", "no"),
    ),
}
BBH_ROWS = {
    "boolean_expressions": ("not True is", "False", [" False", " True"]),
    "navigate": ("Do you return?\nOptions:\n- Yes\n- No", "No", [" Yes", " No"]),
    "formal_fallacies": ("Is it valid?\nOptions:\n- valid \n- invalid", "invalid", [" valid", " invalid"]),
    "snarks": ("Which?\nOptions:\n(A) this one\n(B) (C) that", "(B)", [" (A)", " (B)"]),
    "web_of_lies": ("Does Ann lie?", "No", [" No", " Yes"]),
    "sports_understanding": ("Is it plausible?", "yes", [" no", " yes"]),
    "object_counting": ("How many?", "7", []),
}
EXAMPLE = "Say the answer.\n\nQ: a question\nA: its answer\n"


def save(root, repository, files, features=None):
    """A repository with Parquet files, `{(configuration, split): rows}`, and their list in its README."""
    folder, configs = Path(root, repository), {}
    for (name, split), rows in files.items():
        path = f"{name or 'data'}/{split}-00000-of-00001.parquet"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(folder / path)
        configs.setdefault(name or "default", []).append({"split": split, "path": path})
    listed = [{"config_name": name, "data_files": data_files} for name, data_files in configs.items()]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Replicas of all repositories, which the Hub's names lead to."""
    by_repository = {}
    for task, (row, _) in REPLICAS.items():
        source = SETS[task]
        for split in source.splits.values():
            by_repository.setdefault(source.repository, {})[source.configuration, split] = [row] * 2
    for task, source in SETS.items():
        if source.repository == "SaylorTwift/bbh":
            question, answer, _ = BBH_ROWS.get(task, ("What?", "this", []))
            rows = [{"input": question, "target": answer}]
            by_repository.setdefault(source.repository, {})[task, "test"] = rows
    examples = [{"dataset_name": task, "answer_only_prompt": EXAMPLE, "chain_of_thought_prompt": "x"} for task in SETS]
    by_repository["Joschka/big_bench_hard"] = {("few_shot_prompts", "few_shot_prompts"): examples}
    for repository, files in by_repository.items():
        save(tmp_path, repository, files)
    real = paper._read
    monkeypatch.setattr(paper, "_read", lambda source, root: real(source, tmp_path))
    return tmp_path


@pytest.mark.parametrize("task", REPLICAS)
def test_rows_of_each_set(root, task):
    prompt, completion, options = REPLICAS[task][1]
    data = load_paper_data(task)
    assert set(data) == {"train", "test"}
    for split in data.values():
        assert split.to_list() == 2 * [{"task": task, "prompt": prompt, "completion": completion, "options": options}]


def test_setting_1(root):
    rows = load_task_rows("paper:setting1", limit=1, answers=True)
    assert list(rows) == list(REPLICAS)
    for row in (rows[0] for rows in rows.values()):
        assert not row["options"] or row["completion"] in row["options"]
    assert paper_metrics("paper:setting1") == {"gsm8k": "number"} and paper_metrics("setting1") == {}


@pytest.mark.parametrize("task", GLUE_ROWS)
def test_glue(tmp_path, task):
    """Rows of the test split have the label -1 and are not read; neither are rows of other splits without a label."""
    row, (prompt, answer) = GLUE_ROWS[task]
    splits = {"train": [row, {**row, "label": -1}], SETS[task].splits["test"]: [row], "test": [{**row, "label": -1}]}
    save(
        tmp_path,
        "nyu-mll/glue",
        {(task, split): [{**one, "idx": 3} for one in rows] for split, rows in splits.items()},
    )
    data = load_paper_data(task, root=tmp_path)
    assert SETS[task].splits["test"] == ("validation_matched" if task == "mnli" else "validation")
    for split in data.values():
        (found,) = split.to_list()
        options = found["options"]
        listed = ", ".join(option.strip() for option in options)
        assert found["prompt"] == f"{prompt} Options: {listed}.\nAnswer:"
        assert found["completion"] == f" {answer}" and found["completion"] in options


def test_bbh(root):
    data = load_splits("paper:bbh")
    assert set(data) == {"test"}, "nothing to train on"
    rows = {row["task"]: row for row in data["test"]}
    assert len(rows) == 27
    for task, (question, answer, options) in BBH_ROWS.items():
        expected = {"prompt": f"{question}\nAnswer:", "completion": f" {answer}", "options": options}
        assert rows[task] == {"task": task, **expected}
    assert paper_metrics("paper:bbh")["object_counting"] == "number"


def test_bbh_with_its_examples(root):
    rows = {row["task"]: row for row in load_paper_data("bbh-few-shot")["test"]}
    question, answer, options = BBH_ROWS["navigate"]
    assert rows["navigate"]["prompt"] == f"Say the answer.\n\nQ: a question\nA: its answer\n\nQ: {question}\nA:"
    assert (rows["navigate"]["completion"], rows["navigate"]["options"]) == (f" {answer}", options)


def test_rows_without_an_answer_are_left_out(root):
    row = REPLICAS["winogrande"][0]
    wrong = [{**row, "answer": ""}, {**row, "answer": "3"}, {**row, "option1": "sky"}]
    save(root, "allenai/winogrande", {("winogrande_xl", split): [*wrong, row] for split in ("train", "validation")})
    assert len(load_paper_data("winogrande")["test"]) == 1
    rows = [{"input": "Which?\nOptions:\n(A) x\n(B) y", "target": answer} for answer in ("(C)", "(A)")]
    rows.append({"input": "Which?\nOptions:\n(A) The", "target": "(A)"})  # one row is broken off
    save(root, "SaylorTwift/bbh", {("snarks", "test"): rows})
    assert load_paper_data("snarks")["test"]["completion"] == [" (A)"]


def test_labels_may_be_classes(root):
    row = REPLICAS["piqa"][0]
    features = Features({**dict.fromkeys(("goal", "sol1", "sol2"), Value("string")), "label": ClassLabel(2)})
    save(root, "baber/piqa", {(None, split): [{**row, "label": 1}] for split in ("train", "validation")}, features)
    assert load_paper_data("piqa")["train"]["completion"] == [" Twist the jar's base."]


def test_a_folder_instead_of_the_hub(root, monkeypatch):
    monkeypatch.undo()
    assert len(load_paper_data("gsm8k", root=root)["train"]) == 2


def test_changed_repositories(root):
    row = dict(REPLICAS["boolq"][0])
    save(root, "google/boolq", {(None, "train"): [row]})
    with pytest.raises(ValueError, match="google/boolq has no split 'validation'; it has train"):
        load_paper_data("boolq")
    del row["passage"]
    save(root, "google/boolq", {(None, split): [row] for split in ("train", "validation")})
    with pytest.raises(
        ValueError, match="google/boolq, split 'train', has no column 'passage'; it has question, answer"
    ):
        load_paper_data("boolq")
    row = {**REPLICAS["siqa"][0], "label": "B"}
    save(root, "lighteval/siqa", {(None, split): [row] for split in ("train", "validation")})
    with pytest.raises(ValueError, match="lighteval/siqa, row 1: .* can't be read .ValueError: invalid literal"):
        load_paper_data("siqa")
    examples = [{"dataset_name": "snarks", "answer_only_prompt": "x"}]
    save(root, "Joschka/big_bench_hard", {("few_shot_prompts", "few_shot_prompts"): examples})
    with pytest.raises(ValueError, match="big_bench_hard has no examples of the task 'boolean_expressions'"):
        load_paper_data("bbh-few-shot")


def test_other_names(monkeypatch):
    with pytest.raises(
        ValueError, match="no data .paper:setting2.; there are setting1, glue, bbh, bbh-few-shot, and their"
    ):
        load_splits("paper:setting2")
    with pytest.raises(ValueError, match="paper:gsm8k can't be streamed"):
        load_splits("paper:gsm8k", streaming=True)

    def unreachable(*names, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(paper, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match="The dataset openai/gsm8k can't be loaded from the Hub: no network"):
        load_splits("paper:gsm8k")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("paper:rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert loading.load_splits("paper:rows.jsonl")["train"].to_list() == [{"prompt": "a", "completion": "b"}]
