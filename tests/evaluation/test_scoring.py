"""Accuracy by likelihood and by greedy decoding, against the slow and obvious ways."""

import pytest
import torch
from testing_utils import build_tokenizer, task_rows
from transformers import AutoModelForCausalLM

from rlora_trl.evaluation import TaskScore, score_tasks


@pytest.fixture
def model(model_folders):
    return AutoModelForCausalLM.from_pretrained(model_folders["llama"])


def option_rows(count):
    options = [" yes", " no", " red blue"]  # of different lengths
    return [{**row, "options": options, "completion": " yes"} for row in task_rows("same", count)]


def best_option(model, tokenizer, row):
    """One forward pass for each option, unpadded."""
    scores = []
    for option in row["options"]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + option, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)
        scores.append(sum(logprobs[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1])))
    return row["options"][scores.index(max(scores))]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_options_by_likelihood(model, batch_size):
    tokenizer, rows = build_tokenizer(), option_rows(15)
    for row in rows[:8]:
        row["completion"] = best_option(model, tokenizer, row)
    expected = sum(best_option(model, tokenizer, row) == row["completion"] for row in rows)
    score = score_tasks(model, tokenizer, {"same": rows}, batch_size=batch_size)["same"]
    assert score == TaskScore(expected, 15)
    assert score.accuracy == expected / 15
    assert expected >= 8


def test_free_answers_by_greedy_decoding(model):
    """A row is correct if and only if `generate` gives its completion and then stops."""
    tokenizer = build_tokenizer()
    # Half of the weight on <eos>, so that answers of different lengths come to an end.
    rows = task_rows("first", 12)
    for i, row in enumerate(rows):
        ids = tokenizer(row["prompt"], return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=1 + i % 3, do_sample=False)[0, ids["input_ids"].shape[1] :]
        if i % 2:
            row["completion"] = " " + tokenizer.decode(written)
    expected = 0
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        target = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        written = model.generate(**ids, max_new_tokens=len(target), do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected += written.tolist() == target
    assert score_tasks(model, tokenizer, {"first": rows})["first"] == TaskScore(expected, 12)


def test_greedy_answer_that_ends_counts(model):
    """A model that says "red" after "Answer:" and <eos> after "red" is right about "red" and wrong about "blue"."""
    tokenizer = build_tokenizer()

    class Scripted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask, logits_to_keep):
            red, answer = tokenizer.convert_tokens_to_ids(["red", "Answer:"])
            logits = torch.zeros(*input_ids.shape, 80)
            logits[..., red] += 5.0 * (input_ids == answer)
            logits[..., tokenizer.eos_token_id] += 5.0 * (input_ids == red)
            return type("Output", (), {"logits": logits[:, logits_to_keep]})

    rows = [{"prompt": "w1 w2 Answer:", "completion": " red"}, {"prompt": "w1 Answer:", "completion": " blue"}]
    assert score_tasks(Scripted(), tokenizer, {"t": rows})["t"] == TaskScore(1, 2)


def test_mode_is_restored(model):
    model.train()
    score_tasks(model, build_tokenizer(), {"t": option_rows(2)})
    assert model.training


def test_errors(model):
    with pytest.raises(ValueError, match="Task 'none' has no rows"):
        score_tasks(model, build_tokenizer(), {"none": []})
    rows = option_rows(1)
    rows[0]["completion"] = " maybe"
    with pytest.raises(ValueError, match="' maybe', which is not among its options"):
        score_tasks(model, build_tokenizer(), {"t": rows})
