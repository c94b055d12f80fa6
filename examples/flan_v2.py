"""Flan v2 as in Setting 2 of the R-LoRA paper (arXiv 2502.15455): ten clusters, 42 tasks, a dictionary of datasets.

All ten clusters belong to the Flan 2021 part of the Flan v2 collection (arXiv 2301.13688), whose tasks are defined in
https://github.com/google-research/FLAN (`flan/v2/task_configs_v1.py`). `Muennighoff/flan` on the Hub has that part as
one JSON-lines file per dataset and split, `{split}/{name}_10templates_{split}.jsonl`, so single tasks can be
downloaded. Its rows are zero-shot, written with ten templates per dataset, with the columns `inputs`, `targets` and
`task`; it lacks the few-shot and chain-of-thought forms of Flan v2.

    from flan_v2 import load_flan
    train = load_flan(clusters=["nli", "coreference"], rows_per_task=500)
    trainer = RLoraSFTTrainer(model="Qwen/Qwen2.5-0.5B", train_dataset=train, ...)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets, load_dataset
from datasets.exceptions import DatasetNotFoundError


Rows: TypeAlias = Dataset | IterableDataset

FLAN_REPO_ID = "Muennighoff/flan"
FILE_PATTERN = "{split}/{name}_10templates_{split}.jsonl"

# Cluster -> task -> names of its datasets in the collection. A task has several if the collection separates rounds,
# difficulties or domains of one dataset.
FLAN_CLUSTERS: dict[str, dict[str, tuple[str, ...]]] = {
    "struct_to_text": {
        "common_gen": ("common_gen",),
        "dart": ("dart",),
        "e2e_nlg": ("e2e_nlg",),
        "web_nlg": ("web_nlg_en",),
    },
    "translation": {
        "wmt14_en_fr": ("wmt14_enfr",),
        "wmt16_en_de": ("wmt16_translate_deen",),
        "wmt16_en_tr": ("wmt16_translate_tren",),
        "wmt16_en_ru": ("wmt16_translate_ruen",),
        "wmt16_en_fi": ("wmt16_translate_fien",),
        "wmt16_en_ro": ("wmt16_translate_roen",),
        "paracrawl_en_es": ("para_crawl_enes",),
    },
    "commonsense": {
        "copa": ("copa",),
        "hellaswag": ("hellaswag",),
        "piqa": ("piqa",),
        "story_cloze": ("story_cloze",),
    },
    "sentiment": {
        "imdb": ("imdb_reviews",),
        "sentiment140": ("sentiment140",),
        "sst2": ("sst2",),
        "yelp": ("yelp_polarity_reviews",),
    },
    "paraphrase": {
        "mrpc": ("glue_mrpc",),
        "qqp": ("glue_qqp",),
        "paws_wiki": ("paws_wiki",),
    },
    "coreference": {
        "dpr": ("definite_pronoun_resolution",),
        # The paper lists WSC273, which has only a test split and is in no training mixture of the collection. For
        # coreference, the collection trains on the Winograd schema task of SuperGLUE.
        "wsc": ("wsc",),
    },
    "reading_comprehension": {
        "boolq": ("bool_q",),
        "drop": ("drop",),
        "multirc": ("multirc",),
        "obqa": ("openbookqa",),
        "squad_v1": ("squad_v1",),
        "squad_v2": ("squad_v2",),
    },
    "reading_comprehension_commonsense": {
        "cosmos_qa": ("cosmos_qa",),
        "record": ("record",),
    },
    "nli": {
        "anli": ("anli_r1", "anli_r2", "anli_r3"),
        "cb": ("cb",),
        # Both have the same 30,000 training rows of MNLI; only their test splits differ.
        "mnli": ("mnli_matched", "mnli_mismatched"),
        "qnli": ("qnli",),
        "snli": ("snli",),
        "wnli": ("wnli",),
        "rte": ("rte",),
    },
    "closed_book_qa": {
        "arc": ("arc_challenge", "arc_easy"),
        "nq": ("natural_questions",),
        "trivia_qa": ("trivia_qa",),
    },
}

# Byte-level BPE and SentencePiece tokenizers attach a space to the following word, so the tokens of the prompt are a
# prefix of those of prompt + completion, which TRL's masking requires. A newline is not safe: the tokenizers of Qwen
# and Llama 3 merge it with a preceding punctuation mark, across the boundary.
SEPARATOR = " "

# Size of a stream's shuffle buffer as a multiple of the requested rows: larger shuffles better, smaller reads less.
_BUFFER_FACTOR = 10


def load_flan(
    *,
    clusters: Sequence[str] | None = None,
    split: str = "train",
    repo_id: str = FLAN_REPO_ID,
    rows_per_task: int | None = 1000,
    streaming: bool = False,
    seed: int = 0,
    revision: str | None = None,
) -> dict[str, Dataset]:
    """
    Load the tasks of the given clusters, each shuffled and limited to `rows_per_task` rows.

    Only the files of these tasks are read. Without `streaming` they are downloaded whole and cached, and the sample is
    uniform over all rows of the task. With `streaming`, reading stops after about eleven times `rows_per_task` rows:
    less is downloaded, nothing is cached, and the sample is from the start of the files, equally from each file of a
    task.

    Args:
        clusters (`Sequence[str]`, *optional*): Keys of `FLAN_CLUSTERS`. Defaults to all ten.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"validation"` or `"test"`.
        repo_id (`str`, *optional*, defaults to `"Muennighoff/flan"`): Dataset on the Hub, or a local folder, with one
            file per dataset at `FILE_PATTERN` and the columns `inputs` and `targets`.
        rows_per_task (`int`, *optional*, defaults to 1000): Maximum number of rows per task. `None` keeps all rows, at
            most 30,000 per file of the training split.
        streaming (`bool`, *optional*, defaults to `False`): Read only as much of each file as needed; see above.
        seed (`int`, *optional*, defaults to 0): Seed of the samples. The same seed gives the same rows in the same
            order; they differ with and without `streaming`.
        revision (`str`, *optional*): Branch, tag or commit of `repo_id`; pin a commit for reproducible runs.

    Returns:
        `dict[str, Dataset]`: Rows by task, in TRL's prompt-completion format, with the `str` columns `prompt`,
        `completion` (starting with a space) and `cluster`. Tasks are in the order of `FLAN_CLUSTERS`.

    Raises:
        ValueError: If a cluster is unknown, `rows_per_task` is below 1 or missing although `streaming` is set, or
            `repo_id` has no file or no rows of a task.
    """
    if rows_per_task is not None and rows_per_task < 1:
        raise ValueError(f"`rows_per_task` must be at least 1, or None for all rows, got {rows_per_task}.")
    if streaming and rows_per_task is None:
        raise ValueError("`streaming=True` needs a number of rows to stop at, got `rows_per_task=None`. Set one.")
    tasks = {}
    for cluster in _checked_clusters(clusters):
        for task, names in FLAN_CLUSTERS[cluster].items():
            files = [_open_file(task, name, split, repo_id, revision, streaming) for name in names]
            rows = _sample_stream(files, rows_per_task, seed) if streaming else _sample(files, rows_per_task, seed)
            if not len(rows):
                raise ValueError(_no_rows_message(task, names, split, repo_id))
            tasks[task] = rows.map(
                _to_prompt_completion, fn_kwargs={"cluster": cluster}, remove_columns=["inputs", "targets"]
            )
    return tasks


def _checked_clusters(clusters: Sequence[str] | None) -> list[str]:
    """The clusters to load, in the order of the table, so that the result doesn't depend on the caller's order."""
    if clusters is None:
        return list(FLAN_CLUSTERS)
    # A string is a sequence of letters.
    wanted = [clusters] if isinstance(clusters, str) else list(clusters)
    unknown = [cluster for cluster in wanted if cluster not in FLAN_CLUSTERS]
    if unknown:
        raise ValueError(f"`clusters` must be among {list(FLAN_CLUSTERS)}, got {unknown}.")
    return [cluster for cluster in FLAN_CLUSTERS if cluster in wanted]


def _open_file(task: str, name: str, split: str, repo_id: str, revision: str | None, streaming: bool) -> Rows:
    """The rows of one dataset's file, with the columns `inputs` and `targets`."""
    path = FILE_PATTERN.format(name=name, split=split)
    try:
        rows = load_dataset(
            repo_id,
            data_files={split: path},
            split=split,
            revision=revision,
            streaming=streaming,
            # A card may record the sizes of the whole repository, which a single file doesn't have.
            verification_mode="no_checks",
        )
    except DatasetNotFoundError:  # a FileNotFoundError too, but it is the repository that is missing, not the file
        raise
    except (FileNotFoundError, StopIteration) as error:  # StopIteration: an empty file, as of datasets 5.2
        raise ValueError(_no_rows_message(task, [name], split, repo_id)) from error
    return rows.select_columns(["inputs", "targets"])


def _no_rows_message(task: str, names: Iterable[str], split: str, repo_id: str) -> str:
    paths = ", ".join(f"`{FILE_PATTERN.format(name=name, split=split)}`" for name in names)
    return f"Task `{task}` has no rows: looked for {paths} in `{repo_id}`. Check `repo_id`, `split` and `revision`."


def _sample(files: list[Dataset], rows_per_task: int | None, seed: int) -> Dataset:
    rows = concatenate_datasets(files).shuffle(seed=seed)
    return rows if rows_per_task is None else rows.select(range(min(rows_per_task, len(rows))))


def _sample_stream(files: list[IterableDataset], rows_per_task: int, seed: int) -> Dataset:
    # Without interleaving, the buffer would be filled from the first file only.
    stream = interleave_datasets(files, stopping_strategy="all_exhausted_without_replacement")
    stream = stream.shuffle(seed=seed, buffer_size=_BUFFER_FACTOR * rows_per_task)
    return Dataset.from_list(list(stream.take(rows_per_task)))


def _to_prompt_completion(row: dict[str, str], cluster: str) -> dict[str, str]:
    return {
        "prompt": row["inputs"].strip(),
        "completion": SEPARATOR + row["targets"].strip(),
        "cluster": cluster,
    }
