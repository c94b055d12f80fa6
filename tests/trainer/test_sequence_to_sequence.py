"""T5 and BART through `Seq2SeqTrainer`, with the task of each row."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from testing_utils import build_tokenizer
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Seq2SeqTrainer
from transformers import Seq2SeqTrainingArguments as Arguments

from rlora_trl import MultiHeadAdapter, RLoraCallback, RLoraConfig


TASKS = ["same", "next"]
START, WORDS, LENGTH = 5, 6, 3
SIZES = {
    "vocab_size": 80,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "forced_eos_token_id": None,
    "initializer_factor": 1.0,
    "init_std": 0.2,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "dropout_rate": 0.0,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
}


def build(model_type):
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **SIZES)).eval()


def rows(count, seed=0):
    """The answer to a word, said three times, is that word or the next one: only the task says which."""
    draw = np.random.default_rng(seed)
    listed = []
    for index in range(count):
        word, task = int(draw.integers(0, WORDS)), index % 2
        tokens = [word + START] * LENGTH + [1]
        answer = (word + task) % WORDS + START
        listed.append(
            {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": [answer, 1], "task_ids": task}
        )
    return Dataset.from_list(listed)


def accuracy(prediction):
    # Generated tokens begin with the start token.
    right = prediction.predictions[:, 1] == prediction.label_ids[:, 0]
    return {task: float(right[index::2].mean()) for index, task in enumerate(TASKS)}


def make_trainer(model, folder, **settings):
    arguments = Arguments(
        str(folder),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        max_steps=120,
        learning_rate=5e-3,
        logging_steps=50,
        predict_with_generate=True,
        generation_max_length=3,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
        **settings,
    )
    return Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=rows(200),
        eval_dataset=rows(64, seed=1),
        data_collator=DataCollatorForSeq2Seq(build_tokenizer()),
        compute_metrics=accuracy,
    )


def adapters_of(model):
    return [module for module in model.modules() if isinstance(module, MultiHeadAdapter)]


@pytest.mark.parametrize("model_type", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_the_task_decides_the_answer(tmp_path, model_type):
    config = RLoraConfig(
        task_type="SEQ_2_SEQ_LM",
        router="task",
        router_init="kaiming_uniform",
        tasks=TASKS,
        target_modules="all-linear",
        r=8,
        head_dropout=0.0,
    )
    model = get_peft_model(build(model_type), config)
    trainer = make_trainer(model, tmp_path)
    trainer.add_callback(RLoraCallback(trainer))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for task in TASKS:
        assert before[f"eval_{task}"] < 0.5 and after[f"eval_{task}"] > 0.9, (before, after)
    assert {"router_entropy", "head_load_max"} <= set(trainer.state.log_history[1])

    # Rows of both tasks in one batch are generated with their own head weights: with the other's the answer differs.
    swapped = trainer.eval_dataset.map(lambda row: {"task_ids": 1 - row["task_ids"]})
    assert all(trainer.evaluate(swapped)[f"eval_{task}"] < 0.6 for task in TASKS)
    assert trainer.evaluate(num_beams=2)["eval_same"] > 0.9

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build(model_type), tmp_path / "adapter")
    again = make_trainer(loaded, tmp_path).evaluate()
    assert {name: again[name] for name in ("eval_loss", "eval_same", "eval_next")} == {
        name: after[name] for name in ("eval_loss", "eval_same", "eval_next")
    }


def test_each_task_trains_its_own_row(tmp_path):
    config = RLoraConfig(task_type="SEQ_2_SEQ_LM", router="task", tasks=TASKS)
    model = get_peft_model(build("t5"), config).train()
    batch = {name: torch.tensor(rows(4)[name]) for name in ("input_ids", "labels")}
    model(**batch, task_ids=["next"] * 4).loss.backward()
    moved = [(adapter.router.grad.abs().sum(1) > 0).tolist() for adapter in adapters_of(model)]
    assert moved == [[False, True]] * len(moved) and moved
