"""Tasks whose columns have other types, in either order; and datasets with transforms and formats."""

import itertools
import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Json, LargeList, List, Value
from datasets.table import table_cast
from testing_utils import build_tokenizer, task_datasets, task_rows
from trainer_utils import arguments, make_trainer

from rlora_trl import RLoraConfig, RLoraSFTTrainer, mix_tasks
from rlora_trl.evaluation.formats import check_rows
from rlora_trl.trainer import task_data as task_data_module
from rlora_trl.trainer import task_features
from rlora_trl.trainer import tasks as tasks_module
from rlora_trl.trainer.lost_rows import LostRows
from rlora_trl.trainer.task_evaluation import find_option_rows
from rlora_trl.trainer.task_ids import TASK_IDS, number_alike, number_tasks
from rlora_trl.trainer.tasks import columns_of, join_tasks


USER = {"role": "user", "content": "5"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
# Writes all that a template can see of a message.
TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] or 'w9' }} {% if 'tool_calls' in message %}red "
    "{{ message['tool_calls'] | tojson }} {% endif %}{% if message.name is defined %}blue {% endif %}"
    "{{ message.keys() | list | join(' ') }} <eos>{% endfor %}"
)


def chat(*messages, column="messages"):
    return Dataset.from_list([{column: list(messages)}])


def typed(messages, **kinds):
    fields = {name: kinds.get(name, Value("string")) for name in messages[0]}
    return Dataset.from_dict({"messages": [messages]}, features=Features({"messages": List(fields)}))


TASKS_OF_MESSAGES = {
    "null_content": [chat({**USER, "content": None}), chat(USER)],
    "null_field": [chat({**USER, "name": None}), chat({**USER, "name": "x"})],
    "extra_field": [chat(USER), chat({**USER, "name": "x"})],
    "extra_null_field": [chat(USER), chat({**USER, "tool_calls": None})],
    "order_of_fields": [chat(USER), chat({"content": "w1", "role": "user"})],
    "tool_calls": [
        chat(USER),
        chat({**USER, "tool_calls": [CALL]}),
        chat({**USER, "tool_calls": [{"type": "function", "function": {"name": "g", "arguments": {"y": "s"}}}]}),
    ],
    "arguments": [
        chat({**USER, "tool_calls": [{"arguments": {"x": 1}}]}),
        chat({**USER, "tool_calls": [{"arguments": '{"x": 1}'}]}),
        chat({**USER, "tool_calls": [{"arguments": None}]}),
    ],
    "empty_list": [
        chat({**USER, "tool_calls": []}),
        chat({**USER, "tool_calls": [CALL]}),
        chat({**USER, "tool_calls": None}),
    ],
    "text_or_parts": [chat(USER), chat({"role": "user", "content": [{"type": "text", "text": "w2"}]})],
    "integers": [typed([{**USER, "name": 1}], name=Value("int32")), chat({**USER, "name": 2})],
    "large_text": [typed([USER], content=Value("large_string")), chat(USER)],
    "large_list": [
        chat(USER).cast(Features({"messages": LargeList({"role": Value("string"), "content": Value("string")})})),
        chat({**USER, "name": "x"}),
    ],
    "classes": [
        typed([{**USER, "name": 1}], name=ClassLabel(names=["a", "b"])),
        typed([{**USER, "name": 0}], name=ClassLabel(names=["c", "d"])),
    ],
}


def unnamed_stream(dataset):
    """A stream that does not say what its columns are."""
    rows = dataset.to_list()
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("kind", [lambda d: d, lambda d: d.to_iterable_dataset(), unnamed_stream])
@pytest.mark.parametrize("case", TASKS_OF_MESSAGES)
def test_messages_are_joined_in_any_order(case, kind):
    alone = {str(place): dataset[0]["messages"] for place, dataset in enumerate(TASKS_OF_MESSAGES[case])}
    tasks = {str(place): kind(dataset) for place, dataset in enumerate(TASKS_OF_MESSAGES[case])}
    features = set()
    for order in itertools.permutations(tasks):
        for join in (join_tasks, mix_tasks):
            joined = join({task: tasks[task] for task in order})
            features.add(repr(joined.features))
            # `repr`, as the order of fields must stay too.
            assert {row["task"]: repr(row["messages"]) for row in joined} == {
                task: repr(messages) for task, messages in alone.items()
            }
    assert len(features) == 1


@pytest.mark.parametrize("case", ["extra_null_field", "tool_calls", "order_of_fields", "arguments"])
def test_templates_see_what_they_see_of_a_task_alone(model_folders, tmp_path, case):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def tokens(train):
        trainer = RLoraSFTTrainer(
            model_folders["llama"], arguments(tmp_path), train_dataset=train, processing_class=tokenizer
        )
        return {row[TASK_IDS]: row["input_ids"] for row in trainer.train_dataset}

    tasks = {str(place): dataset for place, dataset in enumerate(TASKS_OF_MESSAGES[case])}
    alone = {place: tokens({task: dataset})[0] for place, (task, dataset) in enumerate(tasks.items())}
    assert tokens(tasks) == alone
    assert tokens(dict(reversed(tasks.items()))) == dict(enumerate(reversed(alone.values())))


def test_prompts_and_completions_of_messages(model_folders, tmp_path):
    def rows(**fields):
        answer = {"role": "assistant", "content": "yes", **fields}
        return Dataset.from_list([{"prompt": [USER], "completion": [answer]}] * 8)

    trainer = make_trainer(model_folders, tmp_path, train={"a": rows(), "b": rows(tool_calls=None)}, max_steps=2)
    trainer.train()
    assert {tuple(row["input_ids"]) for row in trainer.train_dataset} == {tuple(trainer.train_dataset[0]["input_ids"])}


def test_plain_columns_take_the_wider_type():
    def joined(*features):
        rows = {
            str(place): Dataset.from_dict({"input_ids": [[1, 2]]}).cast(Features({"input_ids": List(feature)}))
            for place, feature in enumerate(features)
        }
        return {repr(join_tasks(dict(order)).features["input_ids"]) for order in itertools.permutations(rows.items())}

    assert joined(Value("int32"), Value("int64"), Value("uint8")) == {"List(Value('int64'))"}
    assert joined(Value("float32"), Value("float64")) == {"List(Value('float64'))"}


def test_columns_of_classes_for_a_formatting_function():
    """As integers, as which they are read; beside texts as their names."""
    labels = ClassLabel(names=["no", "yes"])
    classes = Dataset.from_dict({"label": [1, None]}, features=Features({"label": labels}))
    other = Dataset.from_dict({"label": [0]}, features=Features({"label": ClassLabel(names=["x"])}))
    texts = Dataset.from_dict({"label": ["maybe"]})

    def values(**tasks):
        found = []
        for order in itertools.permutations(tasks.items()):
            joined = join_tasks(dict(order), any_format=True)
            found.append(sorted((str(row["label"]), row["task"]) for row in joined))
        assert all(values == found[0] for values in found)
        return found[0]

    assert values(a=classes, b=other) == [("0", "b"), ("1", "a"), ("None", "a")]
    assert values(a=classes, b=texts) == [("None", "a"), ("maybe", "b"), ("yes", "a")]
    streams = {"a": classes.to_iterable_dataset(), "b": texts.to_iterable_dataset()}
    assert values(**streams) == values(a=classes, b=texts)


def test_what_has_no_type_in_common_is_named():
    numbers, texts = Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]}), Dataset.from_dict({"input_ids": [[1]]})
    texts = texts.add_column("labels", ["a"])
    for tasks in ({"a": texts, "b": numbers}, {"b": numbers, "a": texts}):
        with pytest.raises(ValueError, match="can't be joined: their column 'labels' has the types .*cast_column"):
            join_tasks(tasks)


def test_a_stream_of_rows_with_more_and_more_fields():
    rows = [{"messages": [USER]}] * 6 + [{"messages": [{**USER, "tool_calls": [CALL]}]}]
    joined = join_tasks({"a": IterableDataset.from_generator(lambda: iter(rows))})
    assert [row["messages"] for row in joined] == [row["messages"] for row in rows]
    assert joined.features["messages"] == List(Json())


@pytest.mark.parametrize("kind", ["shuffled", "in_memory"])
def test_each_batch_is_cast_as_a_whole(monkeypatch, kind):
    """`datasets` casts a part for each row of shuffled data, and of a slice of a list all its values."""
    rows = [{"messages": [{**USER, "content": f"w{number}"}] * (number % 3)} for number in range(2500)]
    dataset = Dataset.from_list(rows)
    dataset = dataset.shuffle(seed=0) if kind == "shuffled" else dataset
    wanted = dataset["messages"][:]
    parts = []

    def cast(batch, schema):
        (column,) = batch.columns
        parts.append([(part.offset, len(part), len(part.values)) for part in column.chunks])
        return table_cast(batch, schema)

    monkeypatch.setattr(task_features, "table_cast", cast)
    tasks = {"a": dataset, "b": chat({**USER, "name": "x"})}
    aligned = task_features.align_features(tasks)["a"]
    assert aligned.features["messages"] == List(Json()) and aligned["messages"][:] == wanted
    sizes = [sum(map(len, wanted[start : start + 1000])) for start in (0, 1000, 2000)]
    lengths = [1000, 1000, 500]
    assert parts[:3] == [[(0, length, size)] for length, size in zip(lengths, sizes, strict=True)]


# Transforms and formats


def shout(batch):
    return {name: [f"{text} red" for text in texts] for name, texts in batch.items()}


def test_a_transform_is_not_dropped(model_folders, tmp_path):
    tasks = task_datasets(8)
    for transformed in (tasks["same"].with_transform(shout), tasks["same"].with_format("custom", transform=shout)):
        train = {**tasks, "same": transformed}
        with pytest.raises(ValueError, match="Task 'same' is a dataset with a transform.*Dataset.map.*with_format"):
            make_trainer(model_folders, tmp_path, train=train)
        for join in (join_tasks, mix_tasks):
            with pytest.raises(ValueError, match="Task 'same' is a dataset with a transform"):
                join(train)
    in_place = Dataset.from_list(task_rows("first", 4))
    in_place.set_transform(shout)
    with pytest.raises(ValueError, match="Task 'only' is a dataset with a transform"):
        join_tasks({"only": in_place})


def test_transforms_of_evaluation_data_and_of_one_data_set_are_refused_as_by_trl(model_folders, tmp_path):
    column = Dataset.from_list([{**row, "task": task} for task in ("a", "b") for row in task_rows("same", 4)])
    scored = task_datasets(4)["same"].add_column("options", [[" yes", " no"]] * 4)

    def fails(batch):
        raise KeyError("read before it was refused")

    message = "SFTTrainer cannot prepare a dataset that uses `Dataset.with_transform\\(\\)`"
    for options in (
        {"train": column.with_transform(shout)},
        {"evaluate": {"same": scored.with_transform(shout)}},
        {"evaluate": column.with_transform(shout)},
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(model_folders, tmp_path, **options)
    trainer = make_trainer(model_folders, tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate({"same": scored.with_transform(shout)})
    with pytest.raises(ValueError, match="Task 'a' is a dataset with a transform"):
        make_trainer(model_folders, tmp_path, train={"a": column.with_transform(fails)})


def test_a_transform_that_makes_ready_rows_passes_tasks_on(model_folders, tmp_path):
    """`SFTTrainer` takes it where preparation is skipped."""
    tokenizer = build_tokenizer()

    def tokenize(batch):
        ids = tokenizer(batch["prompt"])["input_ids"]
        return {"input_ids": ids, "labels": ids}

    rows = [{**row, "task": task} for task in ("a", "b") for row in task_rows("first", 8)]
    trainer = make_trainer(
        model_folders,
        tmp_path,
        train=Dataset.from_list(rows).with_transform(tokenize),
        evaluate=Dataset.from_list(rows[::4]).with_transform(tokenize),
        peft_config=RLoraConfig(router="task"),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_steps=2,
    )
    trainer.train()
    assert trainer.tasks_seen()["a"]["rows"] == trainer.tasks_seen()["b"]["rows"] == 8
    assert {"eval_a_loss", "eval_b_loss"} <= set(trainer.evaluate())


@pytest.mark.parametrize("name", ["torch", "numpy", "pandas", "arrow"])
def test_formats_do_not_change_what_is_joined(model_folders, tmp_path, name):
    tasks = task_datasets(6)
    plain = make_trainer(model_folders, tmp_path, train=tasks, max_steps=1)
    tasks["same"] = tasks["same"].with_format(name)
    mixed = make_trainer(model_folders, tmp_path, train=tasks, max_steps=1)
    assert mixed.train_dataset.to_list() == plain.train_dataset.to_list()
    mixed.train()


@pytest.mark.parametrize("name", ["torch", "numpy", "pandas", "arrow"])
def test_formats_do_not_change_what_is_prepared(model_folders, tmp_path, name):
    messages = [USER, {"role": "assistant", "content": "w2"}]
    dataset = Dataset.from_list([{"messages": messages}] * 4)
    plain = make_trainer(model_folders, tmp_path, train=dataset)
    formatted = make_trainer(model_folders, tmp_path, train=dataset.with_format(name), max_steps=1)
    assert formatted.train_dataset.to_list() == plain.train_dataset.to_list()
    formatted.train()


@pytest.mark.parametrize("name", ["torch", "numpy", "pandas", "arrow"])
def test_formats_of_streams_do_not_change_what_is_joined(name):
    plain = {task: dataset.to_iterable_dataset() for task, dataset in task_datasets(3).items()}
    wanted = list(join_tasks(plain))
    assert list(join_tasks({**plain, "same": plain["same"].with_format(name)})) == wanted
    assert list(join_tasks({task: stream.with_format(name) for task, stream in plain.items()})) == wanted


def test_formats_do_not_change_the_tasks_of_a_column(model_folders, tmp_path):
    rows = [{**row, "task": task} for task in (0, 1) for row in task_rows("same", 4)]
    dataset = Dataset.from_list(rows).with_format("torch")
    trainer = make_trainer(model_folders, tmp_path, train=dataset, evaluate=dataset, max_steps=1)
    assert sorted(trainer.eval_dataset) == ["0", "1"] and trainer._task_data.names == ["0", "1"]
    trainer.train()
    assert sum(counts["rows"] for counts in trainer.tasks_seen().values()) == 8


# Large data: what is shuffled or selected from is not copied


@pytest.mark.parametrize("by_column", [False, True])
def test_no_copy_of_shuffled_data_before_preparation(model_folders, tmp_path, monkeypatch, by_column):
    """Of a million rows a copy takes 45 s."""
    monkeypatch.delattr(Dataset, "flatten_indices")
    tasks = {name: dataset.shuffle(seed=0) for name, dataset in task_datasets(12).items()}
    column = join_tasks(tasks)
    train = column.filter(lambda row: row["task"] != "same") if by_column else tasks
    trainer = make_trainer(model_folders, tmp_path, train=train, evaluate=column.shuffle(seed=1))
    assert trainer._task_data.names == (["colour", "first"] if by_column else ["first", "colour", "same"])
    assert sorted(trainer.eval_dataset) == ["colour", "first", "same"]
    # The answers of a task say which it is.
    tokenizer, answers = build_tokenizer(), {"colour": {"red", "blue", "green"}, "same": {"yes", "no"}}
    for row in trainer.train_dataset:
        answer = tokenizer.convert_ids_to_tokens(row["input_ids"])[-2]
        task = next((name for name, words in answers.items() if answer in words), "first")
        assert trainer._task_data.names[row[TASK_IDS]] == task


def test_joined_rows_are_checked_once(model_folders, tmp_path, monkeypatch):
    checked = []

    def note(dataset, where, **kwargs):
        checked.append(where)
        return check_rows(dataset, where, **kwargs)

    for module in (tasks_module, task_data_module):
        monkeypatch.setattr(module, "check_rows", note)
    make_trainer(model_folders, tmp_path, train=task_datasets(4), evaluate=task_datasets(2)["same"])
    assert checked == ["Task 'first'", "Task 'colour'", "Task 'same'", "The dataset 'eval'"]
    checked.clear()
    streams = {task: dataset.to_iterable_dataset() for task, dataset in task_datasets(4).items()}
    make_trainer(model_folders, tmp_path, train=streams, max_steps=1)
    make_trainer(model_folders, tmp_path, train=task_datasets(4)["same"])
    assert checked == ["The dataset 'train'"] * 2


@pytest.mark.parametrize("number", ["number_tasks", "number_alike", "renumber"])
def test_streams_keep_their_features(number):
    """Without them each look at the columns opens the stream."""
    opened = []

    def rows():
        opened.append(1)
        yield from ({"text": "a", "task": task} for task in ("x", "y"))

    features = Features({"text": Value("string"), "task": Value("string")})
    stream = IterableDataset.from_generator(rows, features=features)
    numbered = number_alike(stream, 1) if number == "number_alike" else number_tasks(stream, ["y", "x"], "task")
    wanted = [1, 1] if number == "number_alike" else [1, 0]
    if number == "renumber":
        lost = LostRows(None, labels_are_used=True, routes_by_task=False)
        lost.places = np.array([-1, 0])
        numbered, wanted = lost.renumber(numbered), [0, -1]
    assert numbered.features == {**features, TASK_IDS: Value("int64")}
    assert columns_of(numbered) == ["text", "task", TASK_IDS] and not opened
    assert [row[TASK_IDS] for row in numbered] == wanted
    unknown = number_alike(IterableDataset.from_generator(rows), 1)
    assert unknown.features is None and [row[TASK_IDS] for row in unknown] == [1, 1]


OPTIONS = [" yes", " no"]
SCORED = {"prompt": "a", "completion": " no", "options": OPTIONS}


@pytest.mark.parametrize("order", [range(6), range(1, 6), [5, 0, 2, 4, 1, 3], [3, 1] * 2])
@pytest.mark.parametrize("types", ["list", "large", "json"])
@pytest.mark.parametrize(
    "rows, scorable, outside",
    [
        ({}, True, 0),
        ({3: {"completion": "no"}}, False, 1),
        ({1: {"options": [" yes", None]}, 3: {"options": ["x"]}}, False, 2),
        ({1: {"options": []}}, False, 0),
        ({1: {"options": None}, 3: {"completion": "no"}}, False, 0),
        ({3: {"completion": None}}, False, 0),
        ({3: {"prompt": None}}, False, 0),
        ({3: {"options": [" no", " no", " no"]}}, True, 0),
    ],
)
def test_which_rows_can_be_scored(caplog, order, types, rows, scorable, outside):
    text = Value("large_string" if types == "large" else "string")
    options = {"list": List(text), "large": LargeList(text), "json": Json()}[types]
    features = Features({"prompt": text, "completion": text, "options": options})
    dataset = Dataset.from_list([{**SCORED, **rows.get(place, {})} for place in range(6)], features=features)
    dataset = dataset.select(order)
    caplog.clear()
    assert bool(find_option_rows({"x": dataset}, "task")) == scorable
    times = list(order).count(3)
    warned = f"has {outside * times} rows with a completion that is not among their `options`" in caplog.text
    assert warned == bool(outside) and bool(caplog.text) == bool(outside)


def test_spread_rows_of_each_task(model_folders, tmp_path):
    trainer = make_trainer(model_folders, tmp_path, train=task_datasets(9))
    ids = trainer._task_data.sample_rows(trainer.train_dataset, 3)[TASK_IDS][:]
    assert sorted(ids) == [0] * 3 + [1] * 3 + [2] * 3


TOOLS = [{"type": "function", "function": {"name": "é", "parameters": None}}]


@pytest.mark.parametrize("streaming", [False, True])
def test_tools_as_text_and_as_lists(streaming):
    """TRL reads both; each row has the tools that it has in the data of its task."""
    train = {
        "text": Dataset.from_list(
            [{"messages": [USER], "tools": json.dumps(TOOLS[:1])}, {"messages": [USER], "tools": None}]
        ),
        "list": Dataset.from_list([{"messages": [USER], "tools": TOOLS}, {"messages": [USER], "tools": None}]),
        "none": Dataset.from_list([{"messages": [USER], "tools": None}]),
    }
    if streaming:
        train = {task: dataset.to_iterable_dataset() for task, dataset in train.items()}
    read = {"text": [], "list": [], "none": []}
    for row in join_tasks(train):
        read[row["task"]].append(None if row["tools"] is None else json.loads(row["tools"]))
    assert {task: [tools for tools in listed if tools] for task, listed in read.items()} == {
        "text": [TOOLS],
        "list": [TOOLS],
        "none": [],
    }
    assert sum(map(len, read.values())) == 5


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_of_one_mode_beside_others(streaming):
    pytest.importorskip("PIL.Image")
    from PIL import Image as pictures

    picture = pictures.new("RGBA", (2, 2), "red")
    train = {}
    for task, feature in (("any", Image()), ("rgb", Image(mode="RGB"))):
        features = Features({"text": Value("string"), "image": feature})
        train[task] = Dataset.from_dict({"text": ["w1"], "image": [picture]}, features=features)
    if streaming:
        train = {task: dataset.to_iterable_dataset() for task, dataset in train.items()}
    for tasks in (train, dict(reversed(train.items()))):
        assert {row["task"]: row["image"].mode for row in join_tasks(tasks)} == {"any": "RGB", "rgb": "RGB"}
    gray = train["rgb"].cast_column("image", Image(mode="L"))
    with pytest.raises(ValueError, match="can't be joined: their column 'image' has the types"):
        join_tasks({"rgb": train["rgb"], "gray": gray})
