"""Accuracy by likelihood and by greedy decoding, against the slow and obvious ways."""

import math

import pytest
import torch
from peft import get_peft_model
from testing_utils import build_tokenizer, task_rows
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MptConfig,
    MptForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from rlora_trl import RLoraConfig, set_task
from rlora_trl.evaluation import TaskScore, encoding, score_tasks, scoring
from rlora_trl.tuner.routing import find_routings


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


@pytest.mark.parametrize("metric", ["auto", "exact_match"])
def test_each_task_has_its_own_head_weights(model, monkeypatch, metric):
    """With task routers, unless the user has set a task."""
    model = get_peft_model(model, RLoraConfig(task_type="CAUSAL_LM", router="task", tasks=["a", "b"]))
    (routing,) = find_routings(model)
    seen = []
    for name in ("score_likely", "generate_answers"):
        real = getattr(scoring, name)
        monkeypatch.setattr(
            scoring, name, lambda *a, real=real, **k: (seen.append(routing.batch.task), real(*a, **k))[1]
        )
    tasks = {"b": task_rows("same", 2), "new": task_rows("same", 1), "a": task_rows("same", 3)}

    scores = score_tasks(model, build_tokenizer(), tasks, metric=metric, max_new_tokens=4)
    assert {task: score.total for task, score in scores.items()} == {"b": 2, "new": 1, "a": 3}
    assert seen == [1, None, 0] and routing.batch.task is None

    set_task(model, "b")
    again = score_tasks(model, build_tokenizer(), tasks, metric=metric, max_new_tokens=4)
    assert list(again) == ["b", "new", "a"]
    assert seen[3:] == [1] and routing.batch.task == 1


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


class Scripted(torch.nn.Module):
    """A language model that says the likelihood of each next word given the last one; others are unlikely."""

    def __init__(self, tokenizer, table):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.table = torch.full((len(tokenizer), len(tokenizer)), -20.0)
        for word, following in table.items():
            for after, likelihood in following.items():
                first, second = tokenizer.convert_tokens_to_ids([word, after])
                self.table[first, second] = math.log(likelihood)

    def forward(self, input_ids, attention_mask=None, logits_to_keep=None):
        return type("Output", (), {"logits": self.table[input_ids][:, logits_to_keep]})

    def write(self, tokenizer, prompt):
        """What greedy decoding writes."""
        ids = tokenizer(prompt)["input_ids"]
        written = []
        while len(written) < 5 and (not written or written[-1] != tokenizer.eos_token_id):
            written.append(int(self.table[(ids + written)[-1]].argmax()))
        return tokenizer.decode(written[:-1])


NESTED = {
    "one begins the other": (["red", "red blue"], {"red": {"<eos>": 0.9, "blue": 0.1}}),
    "the longer one is meant": (["red", "red blue"], {"red": {"<eos>": 0.1, "blue": 0.9}, "blue": {"<eos>": 0.9}}),
    "the other order": (["red blue", "red"], {"red": {"<eos>": 0.9, "blue": 0.1}}),
    "three in a row": (
        ["red", "red blue", "red blue green"],
        {"red": {"<eos>": 0.2, "blue": 0.8}, "blue": {"<eos>": 0.8, "green": 0.2}, "green": {"<eos>": 1.0}},
    ),
    "another in between": (
        ["red", "green", "red blue"],
        {"red": {"<eos>": 0.9, "blue": 0.1}, "green": {"<eos>": 0.9}},
    ),
    "nothing is an answer": (["", "green"], {"Answer:": {"<eos>": 0.7, "green": 0.3}, "green": {"<eos>": 1.0}}),
    "nothing is not meant": (["", "green"], {"Answer:": {"<eos>": 0.3, "green": 0.7}, "green": {"<eos>": 1.0}}),
}


@pytest.mark.parametrize("name", NESTED)
def test_an_option_is_scored_with_its_end(name):
    """What greedy decoding writes is the most likely option, also where one option's tokens begin another's."""
    tokenizer, (options, table) = build_tokenizer(), NESTED[name]
    model = Scripted(tokenizer, {"Answer:": {"red": 0.8, "green": 0.2}, **table})
    written = model.write(tokenizer, "w1 Answer:")
    assert written in options
    for completion in options:
        spaced = [f" {option}" if option else "" for option in options]
        row = {"prompt": "w1 Answer:", "completion": spaced[options.index(completion)], "options": spaced}
        assert score_tasks(model, tokenizer, {"t": [row]})["t"].correct == (completion == written)


def test_options_without_a_common_beginning_are_scored_without_their_end():
    tokenizer = build_tokenizer()
    model = Scripted(
        tokenizer, {"Answer:": {"red": 0.6, "green": 0.4}, "red": {"<eos>": 0.1}, "green": {"<eos>": 0.9}}
    )
    row = {"prompt": "w1 Answer:", "completion": " red", "options": [" red", " green"]}
    assert score_tasks(model, tokenizer, {"t": [row]})["t"] == TaskScore(1, 1)


def test_options_that_are_the_same_to_the_tokenizer():
    tokenizer = build_tokenizer()
    model = Scripted(tokenizer, {"Answer:": {"red": 0.6, "green": 0.4}})
    for completion in (" red", "  red"):
        row = {"prompt": "w1 Answer:", "completion": completion, "options": [" red", "  red", " green"]}
        assert score_tasks(model, tokenizer, {"t": [row]})["t"] == TaskScore(1, 1)


def test_an_option_without_tokens_needs_an_end():
    tokenizer = build_tokenizer()
    model = Scripted(tokenizer, {"Answer:": {"red": 0.6}})
    tokenizer.eos_token = None
    row = {"prompt": "w1 Answer:", "completion": "", "options": ["", " red"]}
    with pytest.raises(
        ValueError, match="completion '' of prompt 'w1 Answer:' has no tokens, and the tokenizer has no"
    ):
        score_tasks(model, tokenizer, {"t": [row]})


def short_model(positions):
    config = GPT2Config(
        vocab_size=80,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=positions,
        eos_token_id=1,
        bos_token_id=1,
        initializer_range=0.5,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(("max_length", "room"), [(48, 48), (None, 64), (1000, 64), (2, 2)])
@pytest.mark.parametrize("bos", [None, "<user>"])
def test_long_prompts_lose_their_beginning(caplog, max_length, room, bos):
    """Each option of a row is scored whole, on the same end of the prompt."""
    tokenizer, model = build_tokenizer(), short_model(64)
    if bos:
        tokenizer.bos_token = bos
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    encoding.logger.warning_once.cache_clear()
    words = [f"w{i % 50}" for i in range(99)]
    rows = [{"prompt": " ".join([*words[k:], "Answer:"]), "options": [" red", " red blue"]} for k in range(4)]
    for row in rows:
        kept = max(room - 3, 1)  # two tokens and the end
        ids = tokenizer(row["prompt"])["input_ids"]
        head = [ids[0], *ids[len(ids) - kept + 1 :]] if bos and kept > 1 else ids[-kept:]
        scores = []
        for option in row["options"]:
            tail = [*tokenizer(option, add_special_tokens=False)["input_ids"], 1]
            logprobs = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            scores.append(sum(float(logprobs[len(head) - 1 + i, token]) for i, token in enumerate(tail)))
        row["completion"] = row["options"][scores.index(max(scores))]
    for _ in range(2):
        assert score_tasks(model, tokenizer, {"t": rows}, max_length=max_length)["t"] == TaskScore(4, 4)
    warnings = [record.getMessage() for record in caplog.records if "without their beginning" in record.getMessage()]
    assert len(warnings) == 1 and f"more than {room} tokens" in warnings[0]


def test_prompts_that_fit_are_left_alone(caplog):
    rows = [{"prompt": " ".join(["w1"] * 61 + ["Answer:"]), "completion": " red", "options": [" red", " blue"]}]
    assert score_tasks(short_model(64), build_tokenizer(), {"t": rows})["t"].total == 1
    assert not caplog.records


def test_an_answer_longer_than_the_model_is_refused():
    row = {"prompt": "w1", "completion": " red" * 64}
    with pytest.raises(ValueError, match="A completion has 65 tokens, and the model has 64 positions"):
        score_tasks(short_model(64), build_tokenizer(), {"t": [row]})


def test_positions_of_models_that_count_otherwise():
    """RoBERTa has two rows of its table for padding, MPT another name for the number."""
    sizes = {"vocab_size": 80, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaForCausalLM(
        RobertaConfig(**sizes, intermediate_size=16, max_position_embeddings=66, is_decoder=True, pad_token_id=1)
    )
    mpt = MptForCausalLM(MptConfig(vocab_size=80, d_model=16, n_heads=2, n_layers=1, max_seq_len=64))
    rows = [{"prompt": " ".join(["w1"] * 99), "completion": " red", "options": [" red", " blue"]}]
    for model in (roberta, mpt):
        assert encoding.position_limit(model) == 64
        assert score_tasks(model.eval(), build_tokenizer(), {"t": rows})["t"].total == 1


def test_the_end_that_a_tokenizer_adds_is_not_scored_twice(model):
    """Some tokenizers end each text with the end of the sequence, prompts too."""
    plain, ending = build_tokenizer(), build_tokenizer()
    ending._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tasks = {"options": option_rows(15), "free": task_rows("first", 12)}
    assert score_tasks(model, ending, tasks) == score_tasks(model, plain, tasks)


def test_tokens_that_the_model_does_not_have_are_refused(model, tokenizer):
    encoding.refuse_unknown_tokens(model, tokenizer, [[], [79, 0]])
    with pytest.raises(ValueError, match="gives token 80, and the model has 80 tokens"):
        encoding.refuse_unknown_tokens(model, tokenizer, [[1], [80, 2]])
    encoding.refuse_unknown_tokens(torch.nn.Linear(1, 1), tokenizer, [[80]])  # a wrapper that does not show them
