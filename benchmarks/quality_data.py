"""Rows of `quality.py` as tensors: what a run trains on, by seed, and the answers that it is scored on.

Training rows are chosen and ordered by seed, the same for all methods. Batches hold rows of similar length: the rows
of an epoch are shuffled, and sorted by length within windows of 256 rows. The order of a window's batches is the same
for all seeds, so that runs of several seeds that train together meet similar lengths.

Sequences are padded on the right and there is no attention mask: a causal model never sees the padding.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_words import WORD_TASKS

from rlora_trl.evaluation.encoding import TokenLimits, encode_row


# Tasks by suite. A suite is a folder of the data. Rows have options, or else answers, of which one must be given.
SUITES = {
    "multitask": ("sst2", "mrpc", "rte", "sick", "dpr", "trec", "cola"),
    "setting1": (
        "boolq",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "piqa",
        "siqa",
        "winogrande",
        "hellaswag",
    ),
    "words": WORD_TASKS,
    "gsm8k": ("gsm8k",),
}
# What models are scored on that were trained on another suite: tasks that have test rows only.
TRANSFER_SUITES = {
    "bbh": (
        *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages"),
        *("formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects"),
        *("logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation"),
        *("multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table"),
        *("reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks"),
        *("sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects"),
        *("tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies"),
        "word_sorting",
    )
}
# Suites whose answers are generated, and the metric of `rlora_trl.evaluation`.
GENERATED = {"gsm8k": "number"}
# Training rows of a task, and epochs.
SIZES = {"plenty": (1500, 1), "little": (300, 5)}
WINDOW = 256  # rows that are sorted by length together
MAX_LENGTH = 512
MAX_LENGTHS = {"bbh": 1024}  # of suites with longer prompts
# What a model reads of a row: its prompt, or only the input, with the task's name or without.
PROMPTS = ("instruction", "name", "input")


@dataclass(frozen=True)
class Tokens:
    """Tokens that a model reads, from where on it predicts, what, and the task."""

    ids: list[int]
    begin: int  # index of the first position whose prediction counts
    targets: list[int]
    task: int


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward pass; `K` runs side by side, rows of a run contiguous."""

    ids: torch.Tensor  # [K * rows, length], int64
    tasks: torch.Tensor  # [K * rows]
    positions: torch.Tensor  # [P], indices into K * rows * length
    targets: torch.Tensor  # [P]
    weights: torch.Tensor  # [P], float32; in training they add up to one for each run and step
    owners: torch.Tensor  # [P], the run; in scoring run * candidates + candidate


class QuickTokenizer:
    """The calls of a fast tokenizer that `encode_row` makes, without most of the time that they take."""

    def __init__(self, tokenizer: Any) -> None:
        self.eos_token, self.eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id
        self.bos_token_id, self._encode = tokenizer.bos_token_id, tokenizer.backend_tokenizer.encode

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._encode(text).ids}


class Tasks:
    """
    The tasks of a suite, tokenized when they are first needed.

    Args:
        folder (`Path`): Has a folder for each task.
        names (`Sequence[str]`): The tasks.
        tokenizer: The model's tokenizer.
        test_rows (`int`): Rows of each task to score, chosen once and for all.
        prompt (`str`): One of `PROMPTS`.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], tokenizer: Any, test_rows: int, prompt: str = "instruction"
    ) -> None:
        self.names, self.tokenizer, self.prompt = tuple(names), QuickTokenizer(tokenizer), prompt
        self.folder, self.limits = folder, TokenLimits(MAX_LENGTHS.get(folder.name, MAX_LENGTH))
        self.test = {task: fixed_rows(read_rows(folder / task / "test.jsonl"), test_rows) for task in names}
        self._encoded: dict[tuple[int, int], Tokens] = {}
        self._candidates: Candidates | None = None

    @cached_property
    def train(self) -> dict[str, list[dict[str, Any]]]:
        """The training rows of each task."""
        return {task: read_rows(self.folder / task / "train.jsonl") for task in self.names}

    def chosen(self, rows: int, seed: int) -> list[tuple[int, int]]:
        """Task and index of the rows to train on, at most `rows` of each task."""
        found = []
        for number, (task, all_rows) in enumerate(self.train.items()):
            count = min(rows, len(all_rows))
            found += [(number, i) for i in random.Random(f"{task}-{seed}").sample(range(len(all_rows)), count)]
        return found

    def example(self, task: int, index: int) -> Tokens:
        """A training row: the loss is that of the completion and the end of the sequence."""
        key = (task, index)
        if key not in self._encoded:
            row = self.train[self.names[task]][index]
            prompt = prompt_of(row, self.names[task], self.prompt)
            [ids], begin = encode_row(self.tokenizer, prompt, [row["completion"]], self.limits, end=True)
            self._encoded[key] = Tokens(ids[:-1], begin - 1, ids[begin:], task)
        return self._encoded[key]

    def batches(self, rows: int, epochs: int, batch: int, seed: int) -> list[list[Tokens]]:
        """The batches of a run. What an epoch leaves over is dropped."""
        chosen = [self.example(*key) for key in self.chosen(rows, seed)]
        found = []
        for epoch in range(epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(chosen))
            for window, start in enumerate(range(0, len(order), WINDOW)):
                members = sorted((chosen[i] for i in order[start : start + WINDOW]), key=lambda row: len(row.ids))
                parts = [members[i : i + batch] for i in range(0, len(members) - batch + 1, batch)]
                found += [parts[i] for i in np.random.default_rng([epoch, window]).permutation(len(parts))]
        return found

    def candidates(self) -> "Candidates":
        """The options of all test rows."""
        if self._candidates is None:
            self._candidates = Candidates(self)
        return self._candidates


def prompt_of(row: dict[str, Any], task: str, kind: str) -> str:
    """
    The prompt of a row.

    Args:
        row (`dict`): Has `prompt`; the other kinds need `input`.
        task (`str`): The name of its task.
        kind (`str`): One of `PROMPTS`.
    """
    if kind == "instruction":
        return row["prompt"]
    name = f"Task: {task}\n" if kind == "name" else ""
    return f"{name}Input: {row['input']}\nAnswer:"


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fixed_rows(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, always the same ones, in their order."""
    kept = sorted(random.Random(0).sample(range(len(rows)), min(count, len(rows))))
    return [rows[i] for i in kept]


class Candidates:
    """
    The options of test rows, as `rlora_trl.evaluation` defines their likelihood.

    Options that differ in their last token only are read once: the last token is never read. A row without options has
    answers: it is right if greedy decoding would give one of them, which is so if each of its tokens is the likeliest
    after those before it.

    Args:
        tasks ([`Tasks`]): Whose test rows.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.task_names = tasks.names
        self.rows: dict[str, list[tuple[int, int, list[bool]]]] = {}  # first candidate, one past, which are right
        self.inputs: list[Tokens] = []
        self.members: list[list[tuple[int, int, list[int]]]] = []  # of an input: candidate, begin, targets
        self.free: set[str] = set()  # tasks without options
        self.count = 0
        seen: dict[tuple[int, ...], int] = {}
        for number, task in enumerate(tasks.names):
            if not all(row["options"] for row in tasks.test[task]):
                self.free.add(task)
            self.rows[task] = [self._add(row, number, tasks, seen) for row in tasks.test[task]]

    def _add(self, row: dict, task: int, tasks: Tasks, seen: dict) -> tuple[int, int, list[bool]]:
        name = tasks.names[task]
        free = name in self.free
        options = list(row.get("answers") or [row["completion"]]) if free else list(row["options"])
        prompt = prompt_of(row, name, tasks.prompt)
        sequences, begin = encode_row(tasks.tokenizer, prompt, options, tasks.limits, end=free)
        first = self.count
        for ids in sequences:
            key = (task, *ids[:-1])
            if key not in seen:
                seen[key] = len(self.inputs)
                self.inputs.append(Tokens(ids[:-1], begin - 1, [], task))
                self.members.append([])
            self.members[seen[key]].append((self.count, begin - 1, ids[begin:]))
            self.count += 1
        if free:
            return first, self.count, [True] * len(options)
        # By tokens: options may differ in spaces that a tokenizer drops.
        answer = sequences[options.index(row["completion"])]
        return first, self.count, [ids == answer for ids in sequences]

    def correct(self, scores: np.ndarray, misses: np.ndarray) -> dict[str, list[bool]]:
        """Which rows are right, by task, from the two results of `score` for a run."""

        def is_right(task: str, first: int, end: int, right: list[bool]) -> bool:
            if task in self.free:
                return bool((misses[first:end] == 0).any())
            return right[int(np.argmax(scores[first:end]))]

        return {task: [is_right(task, *row) for row in rows] for task, rows in self.rows.items()}

    def batches(self, runs: int, max_tokens: int, max_targets: int) -> Iterator[MicroBatch]:
        """Batches of similar length for `runs` runs side by side, with a limit of tokens and of predictions."""
        order = sorted(range(len(self.inputs)), key=lambda i: len(self.inputs[i].ids))
        part: list[int] = []
        targets = 0
        for i in order:
            more = sum(len(tail) for _, _, tail in self.members[i])
            full = runs * (len(part) + 1) * len(self.inputs[i].ids) > max_tokens
            if part and (full or runs * (targets + more) > max_targets):
                yield self._batch(part, runs)
                part, targets = [], 0
            part.append(i)
            targets += more
        if part:
            yield self._batch(part, runs)

    def _batch(self, part: list[int], runs: int) -> MicroBatch:
        ids = padded([self.inputs[i].ids for i in part])
        rows, length = ids.shape
        positions, targets, owners = [], [], []
        for row, i in enumerate(part):
            for candidate, begin, tail in self.members[i]:
                positions += range(row * length + begin, row * length + begin + len(tail))
                targets += tail
                owners += [candidate] * len(tail)
        shift = np.arange(runs)[:, None]
        return MicroBatch(
            torch.from_numpy(np.tile(ids, (runs, 1)).astype(np.int64)),
            torch.tensor([self.inputs[i].task for i in part] * runs),
            torch.from_numpy((np.array(positions) + shift * rows * length).reshape(-1)),
            torch.tensor(targets * runs),
            torch.ones(runs * len(targets)),
            torch.from_numpy((np.array(owners) + shift * self.count).reshape(-1)),
        )


def padded(sequences: Sequence[list[int]]) -> np.ndarray:
    """Token ids `[rows, length]`, padded on the right with token 0."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
    return ids


def training_steps(batches: Sequence[Sequence[list[Tokens]]], max_tokens: int) -> list[list[MicroBatch]]:
    """
    The micro-batches of each step of runs that train side by side.

    Args:
        batches: For each run, its batches, as many for all.
        max_tokens (`int`): A step of more tokens is split into micro-batches, whose losses are added.
    """
    return [_split_step(list(rows), max_tokens) for rows in zip(*batches, strict=True)]


def _split_step(rows: list[list[Tokens]], max_tokens: int) -> list[MicroBatch]:
    """A step: `rows[k]` are those of run k, sorted by length."""
    count, length = len(rows[0]), max(len(row.ids) for batch in rows for row in batch)
    parts = min(count, -(-len(rows) * count * length // max_tokens))
    edges = [round(i * count / parts) for i in range(parts + 1)]
    weights = [1.0 / sum(len(row.targets) for row in batch) for batch in rows]
    return [_micro_batch([batch[a:b] for batch in rows], weights) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _micro_batch(rows: list[list[Tokens]], weights: list[float]) -> MicroBatch:
    flat = [row for batch in rows for row in batch]
    ids = padded([row.ids for row in flat])
    length = ids.shape[1]
    owners = [k for k, batch in enumerate(rows) for row in batch for _ in row.targets]
    return MicroBatch(
        torch.from_numpy(ids),
        torch.tensor([row.task for row in flat]),
        torch.tensor([i * length + row.begin + j for i, row in enumerate(flat) for j in range(len(row.targets))]),
        torch.tensor([target for row in flat for target in row.targets]),
        torch.tensor([weights[k] for k in owners]),
        torch.tensor(owners),
    )


def to_device(batches: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """All batches on the device by one copy of integers and one of weights."""
    integers = ("ids", "tasks", "positions", "targets", "owners")
    tensors = [getattr(batch, name) for batch in batches for name in integers]
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(torch.int32)
    weights = torch.cat([batch.weights for batch in batches])
    if device.type == "cuda":
        whole, weights = whole.pin_memory(), weights.pin_memory()
    whole = whole.to(device, non_blocking=True).long()
    weights = weights.to(device, non_blocking=True)

    parts = iter(whole.split([tensor.numel() for tensor in tensors]))
    weight_parts = iter(weights.split([batch.weights.numel() for batch in batches]))
    moved = []
    for batch in batches:
        ids, tasks, positions, targets, owners = (next(parts) for _ in integers)
        moved.append(MicroBatch(ids.view(batch.ids.shape), tasks, positions, targets, next(weight_parts), owners))
    return moved
