"""A balance loss means the same on one process and on two: with DDP, and with DeepSpeed ZeRO-2 and ZeRO-3, on CPU."""

import random
from importlib.util import find_spec

import pytest
import torch
from cases import ON_GPU
from peft import get_peft_model
from testing_utils import perturb, task_rows
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig


pytestmark = pytest.mark.slow

LOSSES = ("switch", "importance", "mutual_information", "z")
TASKS = ("first", "colour")
# A case of two ranks is named `<strategy>.<rows>-<loss>[@<what differs>]`; its reference is `<rows>-<loss>`.
STAGES = {"ddp": None, "zero2": 2, "zero3": 3}
# Seconds for the launch of two ranks, which takes about 60.
TIMEOUT = 300
# Relative to the largest element of an update; updates are sums of float32 in another order. On GPUs, products of
# other sizes take other kernels, and each of the two layers adds to the difference.
TOLERANCE = 2e-4 if ON_GPU else 2e-5


def uneven_rows(count=8, seed=0):
    """Rows of which the first half are short and the second half long, all of different lengths."""
    draw = random.Random(seed)
    lengths = [2 + i if i < count // 2 else 14 + 2 * i for i in range(count)]
    rows = []
    for i, length in enumerate(lengths):
        words = [f"w{draw.randrange(20)}" for _ in range(length)]
        rows.append({"prompt": f"{' '.join(words)} Answer:", "completion": f" {words[0]}", "task": TASKS[i % 2]})
    return rows


def twice(rows):
    """What two ranks get is the same: with batches of 4, rank 0 has the first four rows and rank 1 the other four."""
    return rows[:4] + rows[:4]


# A mixture of experts: rows of the cases, and their loss.
EXPERTS = [("experts", uneven_rows, "z"), ("experts_same", lambda: twice(uneven_rows()), "switch")]


def by_task():
    """Four rows of one task, then four of the other, so that each rank has one task."""
    return [{**row, "task": task} for task in TASKS for row in task_rows(task, 4, seed=3)]


def case(name, rows, kind, *, coef=1.0, **kwargs):
    """A case for `balance_run.py`; all keywords but the four here are arguments of the trainer."""
    entry = {"name": name, "rows": rows}
    for key in ("stage", "by_name", "save", "experts"):
        if key in kwargs:
            entry[key] = kwargs.pop(key)
    defaults = {"max_steps": 1, "per_device_train_batch_size": 4, "balance_loss": kind, "balance_coef": coef}
    entry["arguments"] = {**defaults, **kwargs}
    return entry


@pytest.fixture(scope="module")
def start(model_folders, tmp_path_factory):
    """Folders of a model, and of an adapter that has left its initial values."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    config = RLoraConfig(task_type="CAUSAL_LM", head_dropout=0.0, router_init="kaiming_uniform", tasks=list(TASKS))
    model = get_peft_model(model, config)
    perturb(model)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return model_folders["llama"], str(folder)


@pytest.fixture(scope="module")
def alone(launch, start, tmp_path_factory):
    """All references: one process with the whole batch of 8."""
    whole = {"per_device_train_batch_size": 8}
    uneven, same = uneven_rows(), twice(uneven_rows())
    cases = [case("uneven-none", uneven, "none", **whole), case("same-none", same, "none", **whole)]
    cases += [case("uneven-z", uneven, "z", **whole)]
    cases += [case(f"same-{kind}", same, kind, **whole) for kind in LOSSES]
    cases += [case("logs-z", uneven + uneven_rows(seed=1), "z", max_steps=2, **whole)]
    cases += [case("logs-switch", same * 2, "switch", max_steps=2, **whole)]
    cases += [case("tasks", by_task() * 2, "switch", max_steps=2, balance_scope="global", **whole)]
    cases += [case("by_name-z", uneven, "z", by_name=True, **whole)]
    cases += [case("by_name-none", uneven, "none", by_name=True, **whole)]
    for name, rows, kind in EXPERTS:
        cases += [case(f"{name}-{loss}", rows(), loss, experts=True, **whole) for loss in (kind, "none")]
    outcomes = launch(tmp_path_factory.mktemp("alone"), "balance_run", cases, *start)
    return {name: ranks[0] for name, ranks in outcomes.items()}


def updates(outcome):
    return {name: outcome["after"][name] - outcome["before"][name] for name in outcome["after"]}


def assert_same_update(expected, outcome, plain):
    """
    The update on two processes is the one on one process; and that of routers is another without the balance loss.

    Args:
        expected, outcome (`dict`): Outcomes of one process, and of a rank of two.
        plain (`dict`): Outcome of one process without a balance loss.
    """
    assert outcome["processes"] == 2 and expected["processes"] == 1
    want, have, without = updates(expected), updates(outcome), updates(plain)
    assert want.keys() == have.keys() and any(name.endswith("router") for name in want)
    for name in want:
        torch.testing.assert_close(outcome["before"][name], expected["before"][name], rtol=0, atol=0)
        largest = want[name].abs().max().item()
        assert largest > 0, name
        # A weight is itself rounded to float32.
        slack = TOLERANCE * largest + 2**-23 * expected["after"][name].abs().max().item()
        difference = (want[name] - have[name]).abs().max().item()
        assert difference <= slack, f"{name}: {difference:.2e} beside an update of {largest:.2e}"
        if name.endswith("router"):
            # Not negligible: what the balance loss adds is far beyond that.
            assert (want[name] - without[name]).abs().max().item() > 100 * slack, name


def assert_cases_agree(alone, ranks, strategy):
    """Each case of a strategy that is a change to rows and a loss agrees with its reference, on each rank."""
    agreeing = [entry["name"] for entry in agreement_cases(strategy)]
    for name in agreeing:
        reference = name.partition(".")[2].partition("@")[0]
        for rank in ranks[name]:
            assert_same_update(alone[reference], rank, alone[f"{reference.partition('-')[0]}-none"])
    return agreeing


def agreement_cases(strategy):
    """
    Cases whose update is that of one process: one loss on rows of different lengths, each where ranks have the same
    rows, and one where rank 0 has rows 0, 1, 4, 5, and rank 1 the others, in two micro-batches each.

    Args:
        strategy (`str`): A key of `STAGES`, with "-checkpointing" behind it for ZeRO-3 with gradient checkpointing.
    """
    name, _, checkpointing = strategy.partition("-")
    kwargs = {"stage": STAGES[name]}
    if name == "zero3":
        kwargs |= {"gradient_checkpointing": bool(checkpointing)}
    saved = {"save": True} if name == "zero3" else {}
    cases = [case(f"{strategy}.uneven-z", uneven_rows(), "z", **kwargs, **saved)]
    cases += [case(f"{strategy}.same-{kind}", twice(uneven_rows()), kind, **kwargs, **saved) for kind in LOSSES]
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    cases.append(case(f"{strategy}.uneven-z@accumulation", uneven_rows(), "z", **sizes, **kwargs))
    for rows, make, kind in EXPERTS:
        cases.append(case(f"{strategy}.{rows}-{kind}", make(), kind, experts=True, **kwargs, **saved))
    if name == "ddp":
        cases.append(case("ddp.uneven-z@checkpointing", uneven_rows(), "z", gradient_checkpointing=True))
    return cases


def cases_of(strategy):
    """All cases of DDP or of a stage of DeepSpeed."""
    cases = agreement_cases(strategy)
    if strategy == "ddp":
        settings = {"average_tokens_across_devices": False}
        cases += [case(f"ddp.own-{kind}", uneven_rows(), kind, **settings) for kind in ("z", "none")]
    if strategy == "zero3":
        cases += agreement_cases("zero3-checkpointing")
        cases.append(case("zero3.by_name-z", uneven_rows(), "z", stage=3, by_name=True))
    rest = {"max_steps": 2, "stage": STAGES[strategy]}
    cases += [
        case(f"{strategy}.tasks", by_task() * 2, "switch", balance_scope="global", **rest),
        case(f"{strategy}.micro", by_task() * 2, "switch", **rest),
        case(f"{strategy}.none", by_task() * 2, "none", **rest),
        case(f"{strategy}.logs-z", uneven_rows() + uneven_rows(seed=1), "z", **rest),
        case(f"{strategy}.logs-switch", twice(uneven_rows()) * 2, "switch", **rest),
    ]
    return cases


@pytest.fixture(scope="module")
def ranks(launch, start, tmp_path_factory):
    """Outcomes of two ranks, by case, in one launch."""
    strategies = STAGES if find_spec("deepspeed") else ("ddp",)
    cases = [entry for strategy in strategies for entry in cases_of(strategy)]
    return launch(tmp_path_factory.mktemp("ranks"), "balance_run", cases, *start, ranks=2, timeout=TIMEOUT)


def require_deepspeed(strategy):
    if strategy != "ddp":
        pytest.importorskip("deepspeed")


def test_each_case_has_its_strategy(ranks):
    """All run in the same processes: what one leaves behind would make the next one another."""
    for name, outcome in ranks.items():
        stage = STAGES[name.partition(".")[0].partition("-")[0]]
        kind = "DEEPSPEED" if stage else "MULTI_GPU" if ON_GPU else "MULTI_CPU"
        assert [(rank["type"], rank["stage"]) for rank in outcome] == [(kind, stage)] * 2, name


def test_ddp_update_is_that_of_one_process(alone, ranks):
    assert len(assert_cases_agree(alone, ranks, "ddp")) == 9


def test_ddp_balance_part_where_ranks_divide_by_their_own_tokens(alone, ranks):
    """The loss then differs from that of one process; what the balance loss adds to a step does not."""
    with_one, without_one = updates(alone["uneven-z"]), updates(alone["uneven-none"])
    for outcome, plain in zip(ranks["ddp.own-z"], ranks["ddp.own-none"], strict=True):
        with_two, without_two = updates(outcome), updates(plain)
        for name in with_one:
            added = with_one[name] - without_one[name]
            # Differences of differences, each rounded to float32 about the weights.
            slack = TOLERANCE * added.abs().max() + 2**-21 * outcome["after"][name].abs().max()
            assert (with_two[name] - without_two[name] - added).abs().max() <= slack, name
            if name.endswith("router"):
                assert added.abs().max() > 100 * slack, name


def test_zero_2_update_is_that_of_one_process(alone, ranks):
    pytest.importorskip("deepspeed")
    assert len(assert_cases_agree(alone, ranks, "zero2")) == 8


@pytest.mark.parametrize("strategy", ["zero3", "zero3-checkpointing"])
def test_zero_3_update_is_that_of_one_process(alone, ranks, strategy):
    pytest.importorskip("deepspeed")
    names = assert_cases_agree(alone, ranks, strategy)
    saved = [ranks[name][0] for name in names if "saved" in ranks[name][0]]
    assert len(names) == 8 and len(saved) == 7
    for outcome in saved:
        trained = {name.replace(".default", ""): value for name, value in outcome["after"].items()}
        for name, value in trained.items():
            assert torch.equal(outcome["saved"][name], value), name


def test_zero_3_model_loaded_in_parts(alone, ranks):
    """The trainer loads the model, which DeepSpeed divides among ranks at once, and makes the adapter on it."""
    pytest.importorskip("deepspeed")
    for rank in ranks["zero3.by_name-z"]:
        assert_same_update(alone["by_name-z"], rank, alone["by_name-none"])


def shares(records, num_heads):
    """Shares f and P of each layer, `[L, 2 N]`, from the records of all ranks."""
    record = torch.stack(records).double().sum(0)
    return (record[:, 3 : 3 + 2 * num_heads] / record[:, :1]).float()


@pytest.mark.parametrize("strategy", STAGES)
def test_global_scope_takes_shares_from_both_ranks(alone, ranks, strategy):
    require_deepspeed(strategy)
    tasks, micro, none = (ranks[f"{strategy}.{name}"] for name in ("tasks", "micro", "none"))
    first, second = tasks
    heads, layers = first["num_heads"], len(first["records"][0])
    assert len(first["priors"]) == len(second["priors"]) == 2
    assert first["priors"][0] is None and second["priors"][0] is None  # no step was made
    # What the second step begins with is what the first left behind.
    closed = [outcome["records"][1] for outcome in tasks]
    assert all((record[:, 0] > 0).all() for record in closed)
    expected = shares(closed, heads)
    for outcome in tasks:
        assert torch.equal(outcome["priors"][1], first["priors"][1])
        torch.testing.assert_close(outcome["priors"][1][:, 1:], expected, rtol=1e-6, atol=1e-7)
    # The ranks differ, so that neither alone has these shares.
    for record in closed:
        assert (shares([record], heads) - expected).abs().max() > 1e-3
    # And one process, which has all rows in one batch, finds the same.
    torch.testing.assert_close(first["priors"][1], alone["tasks"]["priors"][1], rtol=1e-5, atol=1e-6)

    for outcome in tasks:
        assert outcome["reduces"] == [[1 + layers * (1 + 2 * heads)]] * 2
    for outcome in micro:
        assert outcome["reduces"] == [[1]] * 2
    for outcome in none:
        assert outcome["reduces"] == [[]] * 2
    # Nor is anything summed over ranks behind the accelerator's back.
    for with_balance, without in zip(tasks + micro, none * 2, strict=True):
        more = [len(a) - len(b) for a, b in zip(with_balance["all_reduces"], without["all_reduces"], strict=True)]
        assert all(extra <= 1 for extra in more), more


@pytest.mark.parametrize("strategy", STAGES)
def test_logs_and_counts_are_those_of_one_process(alone, ranks, strategy):
    require_deepspeed(strategy)
    for name in ("logs-z", "logs-switch"):
        expected, outcome = alone[name], ranks[f"{strategy}.{name}"]
        assert len(expected["logs"]) == 2
        assert all(counts["rows"] == 8 and counts["tokens"] > 0 for counts in expected["seen"].values())
        for rank in outcome:
            assert rank["seen"] == expected["seen"] and set(rank["seen"]) == set(TASKS)
        logs = [entry for rank in outcome for entry in rank["logs"]]
        for entry, one in zip(logs, expected["logs"] * 2, strict=True):
            names = ("loss", "balance_loss", "router_entropy", "head_load_max", "head_load_cv")
            for key in (*names, *(f"{task}_loss" for task in TASKS)):
                assert entry[key] == pytest.approx(one[key], rel=1e-5), (name, key)
            assert one["head_load_max"] > 1 / 3 + 1e-3 and one["balance_loss"] > 1e-3
