"""`rlora eval` in two processes, as a launcher starts them."""

import json
import os

import processes
import pytest

from rlora_cli.ranks import Ranks
from rlora_trl.evaluation import TaskScore


def launch(*words, ranks=2):
    command = [*processes.torchrun(ranks), "-m", "rlora_cli", "eval", *map(str, words)]
    path = os.pathsep.join([str(processes.ROOT), os.environ.get("PYTHONPATH", "")])
    return processes.run(command, env={**os.environ, **processes.CPU, "PYTHONPATH": path}, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["softmax", "task"])
def test_two_processes_score_as_one(rlora, make_adapter, rows_folder, router):
    folder = make_adapter(router=router)
    # Each task has an odd number of rows, and one task a single row.
    rows = [json.loads(line) for line in (rows_folder / "test.jsonl").read_text().splitlines()]
    path = folder.parent / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows[:7], *rows[8:15], rows[16]]))
    words = (folder, "--data", path, "--compare-base", "--json", "--metric", "f1", "--max-new-tokens", 4, "--save")
    two = launch(*words)
    assert two.returncode == 0, two.stderr
    shown = json.loads(two.stdout)
    record = json.loads((folder / "rlora_record.json").read_text())
    one = rlora("eval", *words)
    assert shown == json.loads(one.stdout)
    assert [row["rows"] for row in shown["tasks"]] == [7, 7, 1]
    assert record == json.loads((folder / "rlora_record.json").read_text())
    assert two.stderr.count("Saved in") == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all", "one"])
def test_an_error_ends_all_processes_with_one_message(make_adapter, rows_folder, tmp_path, case):
    """Of all processes, and of the second one alone, whose share has a completion that is too long."""
    data, message = rows_folder, "`--max-new-tokens 500` is too many"
    if case == "one":
        rows = [{"prompt": "w1", "completion": " red", "task": "first"} for _ in range(4)]
        rows[1]["completion"] = " red" * 200
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data, message = tmp_path / "rows.jsonl", "Process 1: A completion has 201 tokens"
    words = ["--metric", "f1", "--max-new-tokens", 500] if case == "all" else []
    result = launch(make_adapter(), "--data", data, *words)
    assert result.returncode != 0 and not result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]  # the launcher adds its own
    assert len(errors) == 1 and message in errors[0], result.stderr


def test_shares_are_put_together_again(monkeypatch):
    tasks = {"a": list(range(5)), "b": [0]}
    ranks = [Ranks(), Ranks()]
    for index, rank in enumerate(ranks):
        rank.index, rank.count = index, 2
    shares = [rank.share(tasks) for rank in ranks]
    assert shares == [{"a": [0, 2, 4], "b": [0]}, {"a": [1, 3]}]
    scores = [
        {
            task: TaskScore.of_rows("f1", [row / 8 for row in rows], [str(row) for row in rows])
            for task, rows in s.items()
        }
        for s in shares
    ]
    monkeypatch.setattr(Ranks, "gather", lambda self, value: scores)
    joined = ranks[0].join(scores[0], tasks)
    assert joined["a"].values == (0, 1 / 8, 2 / 8, 3 / 8, 4 / 8) and joined["a"].answers == ("0", "1", "2", "3", "4")
    assert joined["b"].total == 1 and joined["a"].metric == "f1"


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Ranks() as ranks, ranks.quiet(), ranks.together():
        assert ranks.is_main and ranks.share({"a": [1]}) == {"a": [1]} and ranks.gather(3) == [3]
