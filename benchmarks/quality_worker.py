"""A process of `quality.py`: loads the base once, trains and scores groups of runs that come through a pipe."""

import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import environment
from quality_data import GENERATED, SUITES, TRANSFER_SUITES, Tasks, to_device, training_steps
from quality_methods import adapt
from quality_runs import LAB, Run
from quality_train import Adapted, Clock, score, train
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from rlora_trl.evaluation import score_tasks


# Logits of one batch in scoring, in float32: 2 GB.
MAX_LOGITS = 2**29
# PyTorch's attention without a mask. For its own name transformers compares position ids in each pass to find packed
# sequences, and waits for the device.
CAUSAL = "causal_sdpa"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


@dataclass(frozen=True)
class WorkerSettings:
    """
    What a worker is started with.

    Args:
        model (`Path`), data (`Path`): Folders of the base model with its tokenizer, and of the suites.
        device (`str`): For `torch.device`.
        cores (`tuple[int, ...]`): The CPU cores to stay on; all if empty.
        dtype (`str`): Of the base.
        train_tokens (`int`), score_tokens (`int`): Tokens of a forward pass, for all its runs together.
    """

    model: Path
    data: Path
    device: str
    cores: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    train_tokens: int = 24576
    score_tokens: int = 32768


class Trainer:
    """
    Trains and scores groups of runs on one base.

    Args:
        settings ([`WorkerSettings`]): Where, and on what.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings, self.device = settings, torch.device(settings.device)
        transformers_logging.set_verbosity_error()
        self.base = self._load()
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self.checksum = self._sum()
        self._tasks: dict[tuple[str, int, str], Tasks] = {}
        # Folders of this machine have no place in results.
        command = " ".join(Path(word).name if "/" in word else word for word in sys.argv)
        self.environment = {**environment(), "command": command}

    def _load(self) -> Any:
        """The base, frozen. It is loaded on the CPU, so that several processes do not fight for the device."""
        dtype = getattr(torch, self.settings.dtype)
        base = AutoModelForCausalLM.from_pretrained(self.settings.model, dtype=dtype, attn_implementation=CAUSAL)
        return base.eval().requires_grad_(False).to(self.device)

    def _sum(self) -> int:
        """Changes if a weight of the base does."""
        return int(sum(p.detach().view(torch.uint8).sum(dtype=torch.int64) for p in self.base.parameters()))

    def tasks(self, suite: str, test_rows: int, prompt: str = "instruction") -> Tasks:
        key = (suite, test_rows, prompt)
        if key not in self._tasks:
            names = {**SUITES, **TRANSFER_SUITES}[suite]
            self._tasks[key] = Tasks(self.settings.data / suite, names, self.tokenizer, test_rows, prompt)
        return self._tasks[key]

    def rows(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """
        The rows of a group. If it does not fit or fails, its runs are tried in smaller groups; a run that fails alone
        gets a row with its error.
        """
        started = time.time()
        try:
            return self._train_and_score(runs)
        except Exception as error:
            why = error_text(error)
        gc.collect()  # without the frames of the error, which hold tensors
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(runs) == 1:
            return [{**run_facts(runs[0]), "error": why, "seconds": {"all": round(time.time() - started, 2)}}]
        half = len(runs) // 2
        return self.rows(runs[:half]) + self.rows(runs[half:])

    def _right(self, adapted: Adapted, tasks: Tasks, suite: str) -> list[dict[str, list[bool]]]:
        """Which test rows each run has right, by task."""
        if suite in GENERATED:
            return [generated(adapted, self.tokenizer, tasks, GENERATED[suite])]
        candidates = tasks.candidates()
        limits = (self.settings.score_tokens, max(1, MAX_LOGITS // len(self.tokenizer)))
        parts = to_device(list(candidates.batches(adapted.runs, *limits)), self.device)
        found = (scores.numpy() for scores in score(adapted, parts, candidates.count))
        return [candidates.correct(*one) for one in zip(*found, strict=True)]

    def _train_and_score(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        first, clock, K = runs[0], Clock(self.device), len(runs)
        tasks = self.tasks(first.suite, first.test_rows, first.prompt)
        if first.suite not in GENERATED:
            tasks.candidates()
        clock.lap("read")

        torch.manual_seed(first.seed)  # of dropout
        adapted, losses = adapt(self.base, runs, tasks.names), None
        clock.lap("adapt")
        if first.method != "base":
            batches = {s: tasks.batches(first.rows, first.passes, first.batch, s) for s in {r.seed for r in runs}}
            steps = training_steps([batches[run.seed] for run in runs], self.settings.train_tokens)
            flat = to_device([batch for step in steps for batch in step], self.device)
            on_device = iter(flat)
            moved = [[next(on_device) for _ in step] for step in steps]
            clock.lap("prepare")
            losses = train(adapted, moved, [r.training() for r in runs], [r.learning_rate for r in runs]).cpu()
            clock.lap("train")
            del moved, flat
        right = self._right(adapted, tasks, first.suite)
        clock.lap("score")
        transferred = None
        if first.transfer:
            transferred = self._right(adapted, self.tasks(first.transfer, first.test_rows), first.transfer)
            clock.lap("score transfer")
        if self._sum() != self.checksum:
            self.base = self._load()
            raise RuntimeError("The method changed the weights of the base, which was loaded again.")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the other processes
        rows = []
        for k, run in enumerate(runs):
            history = [] if losses is None else losses[:, k].tolist()
            rows.append(
                {
                    **run_facts(run),
                    **scored(right[k]),
                    **({} if transferred is None else {"transferred": scored(transferred[k])}),
                    **similarities(None if adapted.similarity is None else adapted.similarity()),
                    "trainable": adapted.trainable(),
                    "steps": len(history),
                    "losses": thinned(history),
                    "side_by_side": K,
                    "seconds": {name: round(value, 2) for name, value in clock.seconds.items()},
                    **self.environment,
                }
            )
        return rows


def generated(
    adapted: Adapted, tokenizer: Any, tasks: Tasks, metric: str, max_new_tokens: int = 256
) -> dict[str, list[bool]]:
    """
    Which rows are right, by task, of answers that the model writes by greedy decoding.

    Args:
        adapted ([`Adapted`]): The model of one run.
        tokenizer: The model's.
        tasks ([`Tasks`]): Whose test rows.
        metric (`str`), max_new_tokens (`int`): Of `rlora_trl.evaluation`.
    """
    adapted.head.positions = None
    model = adapted.model
    # Prompts are padded on the left, which the attention without a mask does not see.
    model.set_attn_implementation("sdpa")
    try:
        with adapted.precision():
            scores = score_tasks(
                model, tokenizer, tasks.test, metric=metric, batch_size=128, max_new_tokens=max_new_tokens
            )
    finally:
        model.set_attn_implementation(CAUSAL)
    return {task: [value == 1 for value in found.values] for task, found in scores.items()}


def run_facts(run: Run) -> dict[str, Any]:
    """A run as the beginning of its row."""
    return {"key": run.key, **asdict(run), "name": run.name, "engine": "lab" if run.method in LAB else "package"}


def scored(right: dict[str, list[bool]]) -> dict[str, Any]:
    """Accuracies in percent, and which rows are right: hexadecimal digits by task, the first row the highest bit."""
    accuracy = {task: 100 * sum(rows) / len(rows) for task, rows in right.items()}
    return {
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "accuracy": {task: round(value, 3) for task, value in accuracy.items()},
        "scored_rows": {task: len(rows) for task, rows in right.items()},
        "right": {task: to_hex(rows) for task, rows in right.items()},
    }


def similarities(by_layer: dict[str, float] | None) -> dict[str, Any]:
    """The mean cosine between heads, over layers and in each, from the first layer to the last by projection."""
    if by_layer is None:
        return {"head_similarity": None}
    by_name: dict[str, list[float]] = {}
    for layer, value in by_layer.items():
        by_name.setdefault(layer.rpartition(".")[2], []).append(round(value, 3))
    return {"head_similarity": round(sum(by_layer.values()) / len(by_layer), 4), "head_similarities": by_name}


def to_hex(bits: Sequence[bool]) -> str:
    return f"{int(''.join('01'[bool(bit)] for bit in bits), 2):0{-(-len(bits) // 4)}x}"


def thinned(losses: list[float], count: int = 10) -> list[float]:
    """Means of about `count` equal parts."""
    edges = [round(i * len(losses) / count) for i in range(count + 1)]
    parts = [losses[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True) if b > a]
    return [round(sum(part) / len(part), 4) for part in parts]


def error_text(error: BaseException) -> str:
    """The last line of an error and where it happened."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error).strip()[:300]} ({Path(where.filename).name}:{where.lineno})"


def work(connection: Connection, settings: WorkerSettings) -> None:
    """The main function of a worker: groups in, rows out, until `None` comes or the other end is gone."""
    if settings.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, settings.cores)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="grad and param do not obey")
    warnings.filterwarnings("ignore", category=FutureWarning)
    if settings.device.startswith("cuda"):
        torch.cuda.set_device(settings.device)
    try:
        trainer = Trainer(settings)
        connection.send("ready")
        while (runs := connection.recv()) is not None:
            connection.send(trainer.rows(runs))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
