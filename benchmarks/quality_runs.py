"""What a run of `quality.py` is: its specification, its key, and which runs can train side by side."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from quality_data import GENERATED, PROMPTS, SIZES, SUITES, TRANSFER_SUITES
from quality_lab import OPTION_NAMES, LabOptions
from quality_train import TRAINING_NAMES, TrainingOptions


# Methods of the lab with names of their own: some settings of `LabOptions`. All have about 1.9 million parameters.
LAB = {
    "lab": {},
    "lab_lora": {"r": 10, "heads": 1, "gate": "uniform", "init": "zero_b"},
    "lab_rlora": {"r": 4, "heads": 3, "dropout": 0.2},
    "lab_ranks": {"r": 1, "heads": 8, "share_a": False},
}
# Methods of the library and of PEFT, with the settings that their configurations get by default.
PACKAGED: dict[str, dict[str, Any]] = {
    "lora": {"r": 10, "lora_alpha": 32, "use_rslora": True, "lora_dropout": 0.0},
    "rlora": {"r": 4, "num_heads": 3, "head_dropout": 0.2},
    "hydra": {"r": 4, "num_heads": 3},
    "multi_lora": {"r": 2, "num_heads": 5},
    "moe_lora": {"r": 3, "num_heads": 3},
    "mtl_lora": {"r": 3, "num_heads": 5},
    "lily": {"r": 36, "stride_A": 4, "num_B": 8, "scaling": 1.0},
}
METHODS = ("base", *LAB, *PACKAGED)
# Of a run, beside its options, and what is not part of its key.
_UNKEYED = ("label", "wave")
_USUAL = TrainingOptions()


@dataclass(frozen=True)
class Run:
    """
    One training and its scores.

    Args:
        method (`str`): One of `METHODS`.
        suite (`str`), size (`str`): See `SUITES` and `SIZES`.
        learning_rate (`float`), batch (`int`), seed (`int`): Of the training.
        options (`dict`): Settings of the adapter, and those of [`TrainingOptions`].
        train_rows (`int`), epochs (`int`), test_rows (`int`): In place of those of the size.
        model (`str`): Name of the base model.
        prompt (`str`): One of `PROMPTS`.
        transfer (`str`): A suite of `TRANSFER_SUITES` that the trained model is scored on too.
        label (`str`): Name of the method in tables.
        wave (`int`): Runs of lower waves come first.
    """

    method: str
    suite: str = "multitask"
    size: str = "plenty"
    learning_rate: float = 1e-3
    batch: int = 32
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    train_rows: int | None = None
    epochs: int | None = None
    test_rows: int = 400
    model: str = ""
    prompt: str = "instruction"
    transfer: str = ""
    label: str = ""
    wave: int = 0

    def __post_init__(self) -> None:
        known = {"method": METHODS, "suite": tuple(SUITES), "size": tuple(SIZES), "prompt": PROMPTS}
        known["transfer"] = ("", *TRANSFER_SUITES)
        for name, accepted in known.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"`{name}` must be one of {', '.join(accepted)}, got {getattr(self, name)!r}.")
        self.training()
        if self.method in LAB:
            self.lab()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Run":
        """A run from JSON, for example from a row of results."""
        names = {option.name for option in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    @property
    def key(self) -> str:
        """The same for the same run, whatever its label, and in all versions of Python."""
        values = {name: value for name, value in asdict(self).items() if name not in _UNKEYED}
        # A default that is written out is the same run.
        defaults = {option.name: option.default for option in fields(self) if option.name != "options"}
        values = {name: value for name, value in values.items() if value != defaults.get(name, None)}
        training = {name: value for name, value in asdict(self.training()).items() if value != getattr(_USUAL, name)}
        values["options"] = {**self.adapter_options(), **training}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """For tables: the label, or the method with its options."""
        options = ", ".join(f"{name} {value}" for name, value in sorted(self.options.items()))
        return self.label or (f"{self.method} ({options})" if options else self.method)

    @property
    def rows(self) -> int:
        """Training rows of a task, at most."""
        return SIZES[self.size][0] if self.train_rows is None else self.train_rows

    @property
    def passes(self) -> int:
        """Epochs."""
        return SIZES[self.size][1] if self.epochs is None else self.epochs

    def training(self) -> TrainingOptions:
        """The settings of the training."""
        return TrainingOptions(**{name: value for name, value in self.options.items() if name in TRAINING_NAMES})

    def adapter_options(self) -> dict[str, Any]:
        """The settings of the adapter, with the method's own."""
        given = {name: value for name, value in self.options.items() if name not in TRAINING_NAMES}
        return {**LAB.get(self.method, PACKAGED.get(self.method, {})), **given}

    def lab(self) -> LabOptions:
        """
        The settings of a lab adapter.

        Raises:
            ValueError: If one is unknown.
        """
        options = self.adapter_options()
        unknown = sorted(set(options) - OPTION_NAMES)
        if unknown:
            raise ValueError(f"`{self.method}` has no options {', '.join(unknown)}; see `LabOptions`.")
        return LabOptions(**options)

    def together(self) -> tuple:
        """Runs with the same value can train side by side."""
        if self.method not in LAB or self.suite in GENERATED:
            return (self.key,)
        data = (self.model, self.suite, self.size, self.rows, self.passes, self.test_rows, self.batch)
        data = (*data, self.prompt, self.transfer)
        return (*data, self.lab().shape(), self.training().dropout_until, self.training().precondition)

    def cost(self) -> int:
        """About the work of a run, in rows of the suite that are read; a row that is trained on counts thrice."""
        trained = 0 if self.method == "base" else self.rows * self.passes
        return len(SUITES[self.suite]) * (3 * trained + 3 * self.test_rows)


def groups_of(runs: Iterable[Run], most: int) -> list[list[Run]]:
    """
    Runs that train side by side, at most `most` of them; lower waves first, and within a wave the largest first.

    Runs of one seed, which see the same rows, are kept together as far as possible.
    """
    alike: dict[tuple, list[Run]] = {}
    for run in runs:
        alike.setdefault((run.wave, run.together()), []).append(run)
    groups = []
    for members in alike.values():
        members = sorted(members, key=lambda run: run.seed)
        count = -(-len(members) // most)
        edges = [round(i * len(members) / count) for i in range(count + 1)]
        groups += [members[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return sorted(groups, key=lambda group: (group[0].wave, -group_cost(group)))


def group_cost(group: list[Run]) -> float:
    """About the time of a group: a run side by side with others costs less than one alone."""
    return group[0].cost() * (0.6 + 0.4 * len(group))


def with_model(runs: Iterable[Run], model: str) -> list[Run]:
    """The runs on a base model, each once."""
    found = {}
    for run in runs:
        run = replace(run, model=model)
        found.setdefault(run.key, run)
    return list(found.values())
