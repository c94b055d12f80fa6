"""`examples/flan_v2.py` on a replica of the collection's files, read by `datasets` itself and without a network."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError


def _load_example() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "flan_v2.py"
    spec = importlib.util.spec_from_file_location("flan_v2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


flan = _load_example()

# The paper's list, and how many names each of its datasets has in the collection where that is more than one.
PAPER = {
    "struct_to_text": "common_gen dart e2e_nlg web_nlg",
    "translation": "wmt14_en_fr wmt16_en_de wmt16_en_tr wmt16_en_ru wmt16_en_fi wmt16_en_ro paracrawl_en_es",
    "commonsense": "copa hellaswag piqa story_cloze",
    "sentiment": "imdb sentiment140 sst2 yelp",
    "paraphrase": "mrpc qqp paws_wiki",
    "coreference": "dpr wsc",
    "reading_comprehension": "boolq drop multirc obqa squad_v1 squad_v2",
    "reading_comprehension_commonsense": "cosmos_qa record",
    "nli": "anli cb mnli qnli snli wnli rte",
    "closed_book_qa": "arc nq trivia_qa",
}
SEVERAL_NAMES = {"anli": 3, "mnli": 2, "arc": 2}

ROWS = 20  # of each file


def _rows(name: str) -> list[dict[str, str]]:
    # Space around both texts, as some templates of the collection leave it.
    return [{"inputs": f" {name} question {i}?\n", "targets": f"\nanswer {i} ", "task": name} for i in range(ROWS)]


def _write(root: Path, name: str, rows: list[dict[str, str]], split: str = "train") -> Path:
    path = root / split / f"{name}_10templates_{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the layout and schema of `Muennighoff/flan`, training split."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    root = tmp_path / "flan"
    for tasks in flan.FLAN_CLUSTERS.values():
        for names in tasks.values():
            for name in names:
                _write(root, name, _rows(name))
    return root


def _sources(rows: Dataset) -> Counter[str]:
    return Counter(prompt.split()[0] for prompt in rows["prompt"])


def test_table_is_the_papers_list():
    assert {cluster: list(tasks) for cluster, tasks in flan.FLAN_CLUSTERS.items()} == {
        cluster: tasks.split() for cluster, tasks in PAPER.items()
    }
    assert sum(len(tasks) for tasks in flan.FLAN_CLUSTERS.values()) == 42


def test_table_names_are_unique():
    tasks = [task for cluster in flan.FLAN_CLUSTERS.values() for task in cluster]
    names = [name for cluster in flan.FLAN_CLUSTERS.values() for names in cluster.values() for name in names]
    assert len(set(tasks)) == len(tasks)
    assert len(set(names)) == len(names)
    for cluster in flan.FLAN_CLUSTERS.values():
        for task, task_names in cluster.items():
            assert len(task_names) == SEVERAL_NAMES.get(task, 1), task


def test_all_clusters_are_loaded_in_prompt_completion_format(replica: Path):
    loaded = flan.load_flan(repo_id=str(replica), rows_per_task=None)
    assert list(loaded) == " ".join(PAPER.values()).split()
    for cluster, tasks in flan.FLAN_CLUSTERS.items():
        for task, names in tasks.items():
            rows = loaded[task]
            assert isinstance(rows, Dataset)
            assert rows.column_names == ["prompt", "completion", "cluster"]
            assert set(rows["cluster"]) == {cluster}
            expected = {(f"{name} question {i}?", f" answer {i}") for name in names for i in range(ROWS)}
            assert set(zip(rows["prompt"], rows["completion"], strict=True)) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_clusters_select_tasks_and_only_their_files_are_read(replica: Path, streaming: bool):
    for path in replica.glob("train/*"):
        if not path.name.startswith(("definite", "wsc", "cosmos", "record")):
            path.unlink()
    loaded = flan.load_flan(
        clusters=["reading_comprehension_commonsense", "coreference"],
        repo_id=str(replica),
        rows_per_task=5,
        streaming=streaming,
    )
    assert list(loaded) == ["dpr", "wsc", "cosmos_qa", "record"]
    assert all(rows.column_names == ["prompt", "completion", "cluster"] for rows in loaded.values())
    assert loaded["wsc"][0]["prompt"].startswith("wsc question")
    assert loaded["wsc"][0]["completion"].startswith(" answer")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("asked", "got"), [(1, 1), (7, 7), (ROWS, ROWS), (1000, ROWS)])
def test_rows_per_task(replica: Path, streaming: bool, asked: int, got: int):
    loaded = flan.load_flan(clusters=["coreference"], repo_id=str(replica), rows_per_task=asked, streaming=streaming)
    for rows in loaded.values():
        assert len(rows) == len(set(rows["prompt"])) == got


@pytest.mark.parametrize("streaming", [False, True])
def test_a_sample_draws_on_every_file_of_its_task(replica: Path, streaming: bool):
    loaded = flan.load_flan(clusters=["nli"], repo_id=str(replica), rows_per_task=30, streaming=streaming)
    assert set(_sources(loaded["anli"])) == {"anli_r1", "anli_r2", "anli_r3"}
    assert set(_sources(loaded["mnli"])) == {"mnli_matched", "mnli_mismatched"}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_follow_from_the_seed(replica: Path, streaming: bool):
    def prompts(seed: int, clusters: list[str]) -> list[str]:
        loaded = flan.load_flan(
            clusters=clusters, repo_id=str(replica), rows_per_task=10, streaming=streaming, seed=seed
        )
        return list(loaded["arc"]["prompt"])

    first = prompts(0, ["closed_book_qa"])
    assert prompts(0, ["closed_book_qa"]) == first
    assert prompts(0, ["closed_book_qa", "coreference"]) == first
    assert prompts(1, ["closed_book_qa"]) != first


def test_split_names_folder_and_file(replica: Path):
    for name in ("definite_pronoun_resolution", "wsc"):
        _write(replica, name, _rows(name)[:3], split="validation")
    loaded = flan.load_flan(clusters=["coreference"], split="validation", repo_id=str(replica))
    assert {task: len(rows) for task, rows in loaded.items()} == {"dpr": 3, "wsc": 3}


@pytest.mark.parametrize("clusters", [["nli", "summarization"], "summarization"])
def test_unknown_cluster_is_refused(replica: Path, clusters: list[str] | str):
    with pytest.raises(ValueError, match=r"`clusters` must be among .*'closed_book_qa'\], got \['summarization'\]"):
        flan.load_flan(clusters=clusters, repo_id=str(replica))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("state", ["missing", "empty"])
def test_task_without_rows_is_named(replica: Path, state: str, streaming: bool):
    path = _write(replica, "anli_r2", [])
    if state == "missing":
        path.unlink()
    with pytest.raises(
        ValueError, match=r"Task `anli` has no rows: looked for `train/anli_r2_10templates_train.jsonl`"
    ):
        flan.load_flan(clusters=["nli"], repo_id=str(replica), rows_per_task=2, streaming=streaming)


def test_missing_repository_is_not_taken_for_a_missing_file(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **kwargs):
        raise DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(flan, "load_dataset", load_dataset)
    with pytest.raises(DatasetNotFoundError, match="doesn't exist on the Hub"):
        flan.load_flan(clusters=["nli"], repo_id="nobody/nothing")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rows_per_task": 0}, "`rows_per_task` must be at least 1, or None for all rows, got 0"),
        ({"rows_per_task": None, "streaming": True}, "`streaming=True` needs a number of rows to stop at"),
    ],
)
def test_row_limits_are_checked(kwargs: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        flan.load_flan(**kwargs)
