"""Shares and draws of tasks, and mixed datasets and streams."""

import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from datasets import Dataset, DatasetDict, IterableDataset, NamedSplit, SplitDict, SplitInfo
from testing_utils import task_datasets
from torch.utils.data import DataLoader
from trainer_utils import arguments, rows_of

from rlora_trl.trainer.mixing import TaskMixture, count_tasks, mix_tasks, prepare_tasks


ROWS = {"small": 10, "middle": 100, "large": 1000}


def text(name, rows):
    return Dataset.from_dict({"text": [f"{name} {i}" for i in range(rows)]})


def streams(**rows):
    return {name: text(name, number).to_iterable_dataset() for name, number in rows.items()}


def tokenized(lengths):
    return Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})


def of_known_length(dataset, rows):
    """A stream that says how many rows its split has, as one from the Hub does."""
    stream = IterableDataset.from_generator(dataset.__iter__, split=NamedSplit("train"))
    stream.info.splits = SplitDict({"train": SplitInfo("train", num_examples=rows)})
    return stream


# Shares and draws


@pytest.mark.parametrize(
    ("options", "weights", "draws"),
    [
        ({}, [10, 100, 1000], [10, 100, 1000]),
        ({"cap": 50}, [10, 50, 50], [10, 50, 50]),
        ({"cap": 5000}, [10, 100, 1000], [10, 100, 1000]),
        ({"mixing": "equal"}, [1, 1, 1], [370, 370, 370]),
        ({"mixing": "temperature"}, [10, 100, 1000], [10, 100, 1000]),
        # Of 1110 rows 78.38, 247.85 and 783.77: the two left over go to the largest remainders.
        ({"mixing": "temperature", "temperature": 2}, [10**0.5, 10, 1000**0.5], [78, 248, 784]),
        # Of 210 rows 28.67, 90.66 and 90.66: of the two equal remainders, the first.
        ({"mixing": "temperature", "temperature": 2, "cap": 100}, [10**0.5, 10, 10], [29, 91, 90]),
        ({"mixing": "temperature", "temperature": math.inf}, [1, 1, 1], [370, 370, 370]),
    ],
)
def test_formulas(options, weights, draws):
    mixture = TaskMixture(ROWS, **options)
    shares = [weight / sum(weights) for weight in weights]
    assert list(mixture.shares) == list(mixture.draws) == list(ROWS)
    assert list(mixture.shares.values()) == pytest.approx(shares, rel=1e-12)
    assert list(mixture.draws.values()) == draws
    assert mixture.total == sum(draws) == sum(min(rows, options.get("cap") or rows) for rows in ROWS.values())
    assert mixture.repeats == {task: number / ROWS[task] for task, number in mixture.draws.items()}


@pytest.mark.parametrize(
    ("options", "shares", "draws"),
    [
        ({}, [1 / 4, 3 / 4], [100, 10]),
        ({"cap": 2000}, [1 / 3, 2 / 3], [100, 7]),  # 2000 tokens of rows of 300: 6.67
        ({"mixing": "equal"}, [1 / 2, 1 / 2], [200, 7]),  # 2000 tokens each: 200 and 6.67 rows
        # 4000 tokens in the ratio 1 : sqrt(3): 1464.1 and 2535.9, 146.41 and 8.45 rows, 154.86 in all
        ({"mixing": "temperature", "temperature": 2}, [1 / (1 + 3**0.5), 3**0.5 / (1 + 3**0.5)], [146, 9]),
    ],
)
def test_tokens_as_unit(options, shares, draws):
    # Rows of 10 and of 300 tokens.
    mixture = TaskMixture({"short": 100, "long": 10}, tokens={"long": 3000, "short": 1000}, unit="tokens", **options)
    assert list(mixture.shares.values()) == pytest.approx(shares)
    assert mixture.draws == dict(zip(("short", "long"), draws, strict=True))


def test_tokens_are_not_used_where_rows_are_the_unit():
    assert TaskMixture(ROWS, tokens={"other": 1}).draws == ROWS


def test_proportional_draws_are_exact_however_large():
    rows = {str(i): 3**i + 7 for i in range(18)}
    assert TaskMixture(rows).draws == rows


def test_table_of_rows():
    mixture = TaskMixture({"a": 3, "longer name": 1200}, mixing="temperature", temperature=2)
    assert mixture.table().splitlines() == [
        "task          rows    share  rows per epoch  repeats",
        "a                3    4.76%              57   19.00x",
        "longer name  1,200   95.24%           1,146    0.95x",
        "total        1,203  100.00%           1,203    1.00x",
    ]


def test_table_of_tokens():
    mixture = TaskMixture({"short": 100, "long": 10}, tokens={"short": 1000, "long": 3000}, unit="tokens", cap=2000)
    assert mixture.table().splitlines() == [
        "task   rows  tokens    share  rows per epoch  repeats",
        "short   100   1,000   33.33%             100    1.00x",
        "long     10   3,000   66.67%               7    0.70x",
        "total   110   4,000  100.00%             107    0.97x",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": "even"}, "`mixing` must be one of 'proportional', 'equal', 'temperature', got 'even'"),
        ({"unit": "bytes"}, "`unit` must be one of 'rows', 'tokens', got 'bytes'"),
        ({"mixing": "temperature", "temperature": 0.5}, "`temperature` must be a number of at least 1, got 0.5"),
        ({"mixing": "temperature", "temperature": math.nan}, "`temperature` must be .* got nan"),
        ({"mixing": "temperature", "temperature": "2"}, "`temperature` must be .* got '2'"),
        ({"mixing": "temperature", "temperature": True}, "`temperature` must be .* got True"),
        ({"temperature": 2.0}, "`temperature=2.0` has no effect with `mixing='proportional'`"),
        ({"mixing": "equal", "temperature": 2}, "`temperature=2` has no effect .* leave `temperature` at 1"),
        ({"cap": 0}, "`cap` must be a whole number of at least 1, or None, got 0. It counts rows"),
        ({"cap": 2.5}, "`cap` must be a whole number .* got 2.5"),
        ({"cap": True}, "`cap` must be a whole number .* got True"),
        ({"mixing": "equal", "cap": 5}, '`cap=5` has no effect with `mixing="equal"`.*unset'),
        ({"unit": "tokens"}, "needs the tokens of each task \\(small, middle, large\\), got those of: none"),
        ({"unit": "tokens", "tokens": {"small": 1}}, "got those of: small. Give them as `tokens="),
        ({"unit": "tokens", "tokens": {**ROWS, "large": 0}}, "`tokens\\['large'\\]` must be .* got 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TaskMixture(ROWS, **options)
    if "tokens" not in options and options != {"unit": "tokens"}:
        with pytest.raises(ValueError, match=message):
            mix_tasks(task_datasets(3), **options)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="`rows` names no task.*{task: number}"):
        TaskMixture({})
    with pytest.raises(ValueError, match="`rows\\['b'\\]` must be a whole number of at least 1, got 0. Remove"):
        TaskMixture({"a": 1, "b": 0})
    with pytest.raises(ValueError, match="`rows\\['a'\\]` must be .* got 1.5"):
        TaskMixture({"a": 1.5})


def test_task_without_a_row():
    """Rows longer than the task's part of an epoch."""
    sizes = {"a": 1, "b": 1000}
    with pytest.raises(ValueError, match="Task 'a' would have no row.*50% is 20 tokens.*500 on average.*raise `cap`"):
        TaskMixture(sizes, tokens={"a": 500, "b": 9000}, unit="tokens", cap=20)
    tokens = {"a": 500, **dict.fromkeys("bcde", 1)}
    with pytest.raises(ValueError, match="Task 'a' would have no row.*20% is 100.8 tokens.*Remove.*`unit=\"rows\"`"):
        TaskMixture(dict.fromkeys("abcde", 1), tokens=tokens, unit="tokens", mixing="equal")


# Counting


def test_count_tasks():
    lengths = [3, 1, 4, 1, 5, 9]
    dataset = tokenized(lengths).add_column("task_ids", [2, 0, 2, 0, 0, 2])
    assert count_tasks(dataset, 4) == ([3, 0, 3, 0], [7, 0, 16, 0])
    # The rows that are seen, not those that are stored.
    chosen = dataset.rename_column("task_ids", "cluster").select([5, 0, 0])
    assert count_tasks(chosen, 3, column="cluster") == ([0, 0, 3], [0, 0, 15])


def test_count_tasks_over_batches():
    lengths, tasks = np.arange(25_000) % 7, np.arange(25_000) % 3
    dataset = tokenized(lengths.tolist()).add_column("task_ids", tasks.tolist())
    rows, tokens = count_tasks(dataset, 3)
    assert rows == np.bincount(tasks).tolist()
    assert tokens == np.bincount(tasks, weights=lengths).astype(int).tolist()


# Datasets


def test_datasets_are_mixed():
    tasks = {"a": text("a", 4), "b": text("b", 36)}
    options = {"mixing": "temperature", "temperature": 2}
    mixed = mix_tasks(tasks, **options)
    assert isinstance(mixed, Dataset)
    assert mixed.column_names == ["text", "task"]
    assert Counter(mixed["task"]) == TaskMixture({"a": 4, "b": 36}, **options).draws == {"a": 10, "b": 30}
    assert all(row["text"].split()[0] == row["task"] for row in mixed)
    assert mix_tasks(tasks, **options)["text"] == mixed["text"]
    assert mix_tasks(tasks, **options, seed=1)["text"] != mixed["text"]
    # Of b, epoch 0 leaves 6 rows out, which come first in epoch 1.
    second = mix_tasks(tasks, **options, epoch=1)
    assert second["text"] != mixed["text"]
    assert set(mixed["text"]) | set(second["text"]) == {*tasks["a"]["text"], *tasks["b"]["text"]}


def test_datasets_in_proportion_are_all_of_their_rows():
    tasks = task_datasets(7)
    mixed = mix_tasks(tasks, task_column="kind")
    assert set(mixed.column_names) == {"prompt", "completion", "kind"}
    for name, dataset in tasks.items():
        assert sorted(row["prompt"] for row in mixed if row["kind"] == name) == sorted(dataset["prompt"])


def test_datasets_are_mixed_by_tokens():
    tasks = {"short": tokenized([10] * 100), "long": tokenized([100, 500] * 5)}
    mixed = mix_tasks(tasks, unit="tokens", mixing="equal")
    assert Counter(mixed["task"]) == {"short": 200, "long": 7}  # 2000 tokens each: see test_tokens_as_unit
    with pytest.raises(ValueError, match="counts the column 'input_ids', and task 'a' has text, task. Tokenize"):
        mix_tasks({"a": text("a", 3)}, unit="tokens")


def test_what_can_not_be_mixed():
    with pytest.raises(ValueError, match="Task 'empty' has no rows"):
        mix_tasks({"empty": text("a", 1).select([])})
    with pytest.raises(ValueError, match="dictionary without tasks"):
        mix_tasks({})
    with pytest.raises(ValueError, match="splits train, test, which are not tasks"):
        mix_tasks(DatasetDict({"train": text("a", 3), "test": text("b", 3)}))
    with pytest.raises(ValueError, match="`epoch` must be 0 or more, got -1"):
        mix_tasks(streams(a=2), epoch=-1)
    with pytest.raises(ValueError, match="`sizes` is for streams"):
        mix_tasks({"a": text("a", 3)}, sizes={"a": 3})
    with pytest.raises(TypeError, match="mix streamed and map-style"):
        mix_tasks({"a": text("a", 3), **streams(b=3)})
    with pytest.raises(ValueError, match='`unit="tokens"` needs datasets whose tokens can be counted, got streams'):
        mix_tasks({"a": tokenized([1]).to_iterable_dataset()}, unit="tokens")


# Streams


@pytest.mark.parametrize("options", [{}, {"mixing": "temperature", "sizes": {"a": 9, "b": 9}}])
def test_streams_in_proportion_are_all_of_their_rows(options):
    mixed = mix_tasks(streams(a=3, b=8), **options)
    assert isinstance(mixed, IterableDataset)
    seen = [row["text"] for row in mixed]
    assert sorted(seen) == sorted([f"a {i}" for i in range(3)] + [f"b {i}" for i in range(8)])
    assert seen[:4] == ["a 0", "b 0", "a 1", "b 1"]


@pytest.mark.parametrize(
    ("options", "size"),
    [({"cap": 400}, 800), ({"mixing": "temperature", "temperature": 3}, 2000), ({"mixing": "equal"}, 2000)],
)
def test_streams_are_drawn_with_their_shares(options, size):
    rows = {"a": 400, "b": 1600}
    mixed = mix_tasks(streams(**rows), sizes=dict(reversed(rows.items())), **options)
    mixture = TaskMixture(rows, **options)
    seen = Counter(row["task"] for row in mixed)
    assert seen.total() == mixture.total == size
    share = mixture.shares["a"]
    # Draws are independent, so the share has a binomial spread; 4 standard deviations are passed once in 16,000.
    assert abs(seen["a"] / size - share) < 4 * (share * (1 - share) / size) ** 0.5


def test_streams_repeat_in_order():
    mixed = mix_tasks(streams(a=3, b=30), mixing="equal", sizes={"a": 3, "b": 30})
    seen = [row["text"] for row in mixed if row["task"] == "a"]
    assert len(seen) > 6
    assert seen == [f"a {i % 3}" for i in range(len(seen))]


@pytest.mark.parametrize("sizes", [None, {"a": 6, "b": 20}])
def test_epochs_of_streams(sizes):
    """`set_epoch` draws tasks anew, from the seed and the epoch, also below a `map` as TRL's preparation adds."""

    def epochs(seed, start=0):
        mixed = mix_tasks(streams(a=6, b=20), mixing="equal", sizes=sizes, seed=seed, epoch=start)
        first = [row["text"] for row in mixed]
        mixed = mixed.map(lambda row: {"text": row["text"]})
        orders = []
        for epoch in (0, 1, 2):
            mixed.set_epoch(epoch)
            orders.append([row["text"] for row in mixed])
            assert orders[-1] == [row["text"] for row in mixed]
        assert first == orders[start]
        return orders

    one, other = epochs(seed=0), epochs(seed=1, start=2)
    assert one == epochs(seed=0, start=1)
    # Without `skip` or `take` on top, `datasets` would draw the later epochs of all seeds alike.
    assert len({tuple(order[:15]) for order in one + other}) == 6


def test_equal_streams_of_unknown_length():
    seen = Counter(row["text"] for row in mix_tasks(streams(a=5, b=60), mixing="equal"))
    assert len(seen) == 65  # each row at least once
    assert max(seen[f"b {i}"] for i in range(60)) == 1  # the epoch ends as the longest does
    assert min(seen[f"a {i}"] for i in range(5)) > 5


@pytest.mark.parametrize("epoch", [0, 1])
def test_resume_of_a_stream(epoch):
    def build():
        tasks = {"a": tokenized(range(6)), "b": tokenized(range(6, 46))}  # each row of its own length
        parts = {name: dataset.to_iterable_dataset() for name, dataset in tasks.items()}
        return mix_tasks(parts, mixing="temperature", temperature=2, sizes={"a": 6, "b": 40}, epoch=epoch)

    def lengths(rows):
        return torch.tensor([len(row["input_ids"]) for row in rows])

    expected = lengths(build()).tolist()
    stopped = build()
    assert lengths(islice(stopped, 17)).tolist() == expected[:17]
    # By the state of the stream, and by skipping, as transformers.Trainer does.
    resumed = build()
    resumed.load_state_dict(stopped.state_dict())
    assert lengths(resumed).tolist() == expected[17:]
    prepared = Accelerator(cpu=True).prepare(DataLoader(build(), batch_size=2, collate_fn=lengths))
    assert rows_of(skip_first_batches(prepared, 8), epoch) == expected[16:]


def test_sizes_of_streams():
    tasks = {"a": of_known_length(text("a", 10), 10), "b": of_known_length(text("b", 30), 30)}
    assert sum(1 for _ in mix_tasks(tasks, cap=20)) == 30
    # What `info` says is of the whole split, so `sizes` goes before it.
    tasks["b"] = tasks["b"].take(12)
    assert sum(1 for _ in mix_tasks(tasks, cap=20)) == 30
    assert sum(1 for _ in mix_tasks(tasks, cap=20, sizes={"a": 10, "b": 12})) == 22


def test_unknown_sizes_of_streams():
    known = of_known_length(text("a", 10), 10)
    remedy = '`sizes={task: rows}`, or use `mixing="proportional"` without `cap`, or `mixing="equal"`'
    with pytest.raises(ValueError, match="Task 'b' is a stream of unknown length.*" + remedy):
        mix_tasks({"a": known, **streams(b=3)}, cap=5)
    with pytest.raises(ValueError, match="Task 'b' is a stream of unknown length"):
        mix_tasks(streams(b=3), mixing="temperature", temperature=2)
    with pytest.raises(ValueError, match="`sizes` names the tasks a, c, and the datasets are a, b. Give"):
        mix_tasks(streams(a=3, b=3), cap=5, sizes={"a": 3, "c": 3})
    with pytest.raises(ValueError, match="`rows\\['b'\\]` must be a whole number of at least 1, got 0"):
        mix_tasks(streams(a=3, b=3), cap=5, sizes={"a": 3, "b": 0})


# The training data of a trainer


def test_training_data_are_joined_or_mixed(tmp_path):
    datasets = {"a": text("a", 4), "b": text("b", 36)}
    parts = streams(a=4, b=36)
    plain, equal = (arguments(tmp_path, mixing=mixing) for mixing in ("proportional", "equal"))

    # Map-style data are joined, and mixed as they are sampled; their rows are checked.
    for args in (plain, equal):
        rows = prepare_tasks(datasets, args)
        assert rows.names == ["a", "b"] and rows.are_checked
        assert Counter(rows.dataset["task"]) == {"a": 4, "b": 36}
    # Streams are mixed here.
    assert Counter(row["task"] for row in prepare_tasks(parts, plain).dataset) == {"a": 4, "b": 36}
    mixed = prepare_tasks(parts, equal)
    assert mixed.names == ["a", "b"] and not mixed.are_checked
    assert Counter(row["task"] for row in mixed.dataset)["a"] > 4
    # One dataset is left as it is.
    joined = prepare_tasks(datasets, plain).dataset
    assert prepare_tasks(joined, equal) == (joined, ["a", "b"], False)
    assert prepare_tasks(parts["a"], plain) == (parts["a"], None, False)
    with pytest.raises(ValueError, match="`mixing='equal'` needs a stream for each task"):
        prepare_tasks(parts["a"], equal)
    with pytest.raises(ValueError, match="has 10001 tasks, and an adapter has at most 10000. Combine some"):
        prepare_tasks(dict.fromkeys(range(10_001), parts["a"]), equal)
