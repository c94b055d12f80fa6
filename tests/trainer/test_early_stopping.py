"""Early stopping on a dictionary of tasks: it sees its metric once for each evaluation, and warns of a missing one."""

import logging

import pytest
from testing_utils import task_datasets
from trainer_utils import make_trainer, scored_rows
from transformers import EarlyStoppingCallback


WARNING = "early stopping is disabled"


class Watching(EarlyStoppingCallback):
    """Keeps the names of metrics of each evaluation that it sees."""

    def __init__(self):
        super().__init__(early_stopping_patience=2)
        self.seen = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.seen.append({name for name in metrics if name.endswith("_loss")})
        super().on_evaluate(args, state, control, metrics, **kwargs)


def run(model_folders, folder, metric, evaluate=None, **options):
    defaults = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    trainer = make_trainer(
        model_folders,
        folder,
        evaluate=task_datasets(4, seed=3) if evaluate is None else evaluate,
        metric_for_best_model=metric,
        greater_is_better=False,
        load_best_model_at_end=True,
        mixture_rows=0,
        learning_rate=0.0,
        **{**defaults, **options},
    )
    callback = Watching()
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize("metric", ["eval_loss", "loss", "eval_same_loss", "same_loss"])
def test_it_stops_without_a_warning(model_folders, tmp_path, caplog, metric):
    """Nothing is learned, so that the first evaluation stays the best and two more are enough."""
    with caplog.at_level(logging.WARNING):
        trainer, callback = run(model_folders, tmp_path, metric)
    assert WARNING not in caplog.text
    expected = {"eval_same_loss"} if "same" in metric else {"eval_loss"}
    assert callback.seen == [expected] * 3
    assert trainer.state.global_step == 3


def test_names_that_begin_other_names(model_folders, tmp_path, caplog):
    data = task_datasets(4, seed=3)
    evaluate = {"same": data["same"], "same_too": data["same"], "first": data["first"]}
    with caplog.at_level(logging.WARNING):
        trainer, callback = run(model_folders, tmp_path, "eval_same_too_loss", evaluate)
    assert WARNING not in caplog.text and callback.seen == [{"eval_same_too_loss"}] * 3


def test_a_single_data_set_is_as_before(model_folders, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, callback = run(model_folders, tmp_path, "eval_loss", task_datasets(4, seed=3)["same"])
    assert WARNING not in caplog.text and callback.seen == [{"eval_loss"}] * 3


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_evaluation_of_test_data_does_not_count(model_folders, tmp_path, caplog, as_dictionary):
    trainer, callback = run(model_folders, tmp_path, "eval_loss")
    seen = list(callback.seen)
    data = task_datasets(4, seed=4)
    with caplog.at_level(logging.WARNING):
        trainer.evaluate(data if as_dictionary else data["same"], metric_key_prefix="test")
    assert WARNING not in caplog.text and callback.seen == seen


def test_a_missing_metric_is_warned_of_once(model_folders, tmp_path, caplog):
    trainer = make_trainer(
        model_folders,
        tmp_path,
        evaluate=task_datasets(4, seed=3),
        max_steps=1,
        eval_strategy="steps",
        metric_for_best_model="eval_nothing",
    )
    trainer.add_callback(EarlyStoppingCallback())
    with caplog.at_level(logging.WARNING):
        trainer.evaluate()
    assert sum(WARNING in record.getMessage() for record in caplog.records) == 1
    assert any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks)


def test_other_callbacks_see_every_evaluation(model_folders, tmp_path):
    from transformers import TrainerCallback

    class All(TrainerCallback):
        seen = 0

        def on_evaluate(self, *args, **kwargs):
            All.seen += 1

    trainer = make_trainer(model_folders, tmp_path, evaluate=task_datasets(4, seed=3))
    trainer.add_callback(All())
    trainer.add_callback(EarlyStoppingCallback())
    trainer.args.metric_for_best_model = "eval_loss"
    trainer.evaluate()
    assert All.seen == 4  # three tasks and their means


@pytest.mark.parametrize(
    "metric, by_task", [("eval_same_accuracy", True), ("eval_accuracy", True), ("eval_accuracy", False)]
)
def test_it_stops_by_accuracy(model_folders, tmp_path, metric, by_task):
    evaluate = {task: scored_rows(task, 6) for task in ("colour", "same")}
    trainer, _ = run(model_folders, tmp_path, metric, evaluate if by_task else evaluate["same"])
    assert trainer.state.global_step == 3
