"""Answers of many prompts at once, against `generate` of one prompt after the other."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from testing_utils import CAUSAL, build_tokenizer, perturb, task_rows
from transformers import AutoModelForCausalLM, GenerationConfig

from rlora_trl import RLoraConfig, set_task
from rlora_trl.evaluation import encoding, score_tasks
from rlora_trl.evaluation.encoding import TokenLimits
from rlora_trl.evaluation.generation import generate_answers


NO_LIMITS = TokenLimits()
ENDS = [1, 9]


def prompts_of_many_lengths():
    rows = [row["prompt"] for task in ("first", "same") for row in task_rows(task, 8)]
    return [*rows, "w1", " ".join(["w2"] * 40)]


def one_by_one(model, tokenizer, prompts, max_new_tokens):
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
        new = written[0, ids["input_ids"].shape[1] :].tolist()
        # The token that ends a sequence is no special one to the tokenizer.
        texts.append(tokenizer.decode(new[:-1] if new[-1] in ENDS else new, skip_special_tokens=True))
    return texts


def load(folder):
    """A tiny model with two tokens that end a sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = GenerationConfig(eos_token_id=ENDS, pad_token_id=0)
    return model


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_change_nothing(model_folders, name, batch_size):
    model, tokenizer, prompts = load(model_folders[name]), build_tokenizer(), prompts_of_many_lengths()
    own = model.generation_config
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=6, limits=NO_LIMITS, batch_size=batch_size)
    assert answers == one_by_one(model, tokenizer, prompts, 6)
    assert model.generation_config is own
    assert any(answers)


def test_the_models_own_settings_have_no_effect(model_folders):
    tokenizer, prompts = build_tokenizer(), prompts_of_many_lengths()
    expected = one_by_one(load(model_folders["llama"]), tokenizer, prompts, 8)
    model = load(model_folders["llama"])
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        num_beams=3,
        repetition_penalty=4.0,
        no_repeat_ngram_size=1,
        min_new_tokens=8,
        max_length=2,
        eos_token_id=ENDS,
        pad_token_id=0,
    )
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=8, limits=NO_LIMITS) == expected


def test_each_token_that_ends_a_sequence_does(model_folders):
    """Chat models have another one than the tokenizer."""
    tokenizer, model = build_tokenizer(), load(model_folders["llama"])
    (free,) = one_by_one(model, tokenizer, ["w1 w2"], 6)
    assert len(free.split()) >= 3
    second = tokenizer.convert_tokens_to_ids(free.split()[1])
    model.generation_config.eos_token_id = [second]
    (answer,) = generate_answers(model, tokenizer, ["w1 w2"], max_new_tokens=6, limits=NO_LIMITS)
    assert answer == free.split()[0]


def test_texts_to_stop_at(model_folders):
    tokenizer, model = build_tokenizer(), load(model_folders["llama"])
    prompts = prompts_of_many_lengths()
    free = generate_answers(model, tokenizer, prompts, max_new_tokens=12, limits=NO_LIMITS)
    mark = free[0].split()[2]
    cut = generate_answers(model, tokenizer, prompts, max_new_tokens=12, limits=NO_LIMITS, stop=[mark])
    assert cut == [text.partition(mark)[0] for text in free]
    assert cut != free


@pytest.mark.parametrize("router", ["softmax", "task"])
def test_adapters(model_folders, router):
    """An adapter writes other answers, those of `generate`, and each task of a task router its own."""
    tokenizer, prompts = build_tokenizer(), prompts_of_many_lengths()
    base = load(model_folders["llama"])
    plain = generate_answers(base, tokenizer, prompts, max_new_tokens=6, limits=NO_LIMITS)
    model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM", tasks=["a", "b"], router=router)).eval()
    perturb(model, scale=2.0)
    written = {}
    for task in ("a", "b") if router == "task" else (None,):
        if task:
            set_task(model, task)
        written[task] = generate_answers(model, tokenizer, prompts, max_new_tokens=6, limits=NO_LIMITS)
        assert written[task] == one_by_one(model, tokenizer, prompts, 6) != plain
    assert len({tuple(texts) for texts in written.values()}) == len(written)
    with model.disable_adapter():
        assert generate_answers(model, tokenizer, prompts, max_new_tokens=6, limits=NO_LIMITS) == plain


def test_long_prompts_lose_their_beginning(model_folders, caplog):
    tokenizer, model = build_tokenizer(), load(model_folders["llama"])  # 128 positions
    encoding.logger.warning_once.cache_clear()
    words = " ".join(f"w{i % 50}" for i in range(200))
    (answer,) = generate_answers(model, tokenizer, [words], max_new_tokens=8, limits=TokenLimits(positions=128))
    assert [answer] == one_by_one(model, tokenizer, [" ".join(words.split()[-120:])], 8)
    assert "more than 128 tokens" in caplog.text
    with pytest.raises(ValueError, match="`max_new_tokens=128` is too many: the model has 128 positions"):
        generate_answers(model, tokenizer, ["w1"], max_new_tokens=128, limits=TokenLimits(positions=128))


def test_an_empty_prompt_and_none(model_folders):
    tokenizer, model = build_tokenizer(), load(model_folders["llama"])
    (answer,) = generate_answers(model, tokenizer, [""], max_new_tokens=4, limits=NO_LIMITS)
    assert [answer] == one_by_one(model, tokenizer, ["<eos>"], 4)
    assert generate_answers(model, tokenizer, [], max_new_tokens=4, limits=NO_LIMITS) == []


# Scores of generated answers


def rows_the_model_knows(model, tokenizer, count=10):
    """Rows of which every second has the answer of the model as its completion."""
    rows = task_rows("first", count)
    answers = generate_answers(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=5, limits=NO_LIMITS)
    for row, answer in list(zip(rows, answers, strict=True))[::2]:
        row["completion"] = f" {answer.upper()} . "
    return rows, answers


def test_scores_of_generated_answers(model_folders):
    tokenizer, model = build_tokenizer(), load(model_folders["llama"])
    rows, answers = rows_the_model_knows(model, tokenizer)
    options = [{**row, "completion": " yes", "options": [" yes", " no"]} for row in task_rows("same", 4)]
    tasks = {"free": rows, "options": options}
    scores = score_tasks(model, tokenizer, tasks, metric="exact_match", max_new_tokens=5)
    assert list(scores) == ["free", "options"]
    free = scores["free"]
    assert (free.metric, free.total, free.answers) == ("exact_match", 10, tuple(answers))
    assert free.values[::2] == (1.0,) * 5 and free.correct == sum(free.values) >= 5
    assert free.score == free.accuracy == free.correct / 10
    # Tasks with options keep the likelihood, unless they are named.
    assert scores["options"] == score_tasks(model, tokenizer, {"options": options})["options"]
    assert scores["options"].metric == "accuracy"
    named = score_tasks(model, tokenizer, tasks, metric={"options": "exact_match"}, max_new_tokens=5)
    assert named["options"].metric == "exact_match" and named["free"].metric == "accuracy"


def test_score_of_f1_is_a_mean(model_folders):
    tokenizer, model = build_tokenizer(), load(model_folders["llama"])
    rows, _ = rows_the_model_knows(model, tokenizer)
    score = score_tasks(model, tokenizer, {"free": rows}, metric="f1", max_new_tokens=5)["free"]
    assert score.score == pytest.approx(sum(score.values) / 10) and score.score >= score.accuracy


def test_mode_is_restored(model_folders):
    model = load(model_folders["llama"]).train()
    score_tasks(model, build_tokenizer(), {"t": task_rows("first", 2)}, metric="f1", max_new_tokens=2)
    assert model.training


def test_wrong_metrics(model_folders):
    tokenizer, model = build_tokenizer(), load(model_folders["llama"])
    tasks = {"t": task_rows("same", 2)}
    with pytest.raises(
        ValueError, match="`metric` is 'bleu', and must be one of auto, accuracy, exact_match, f1, numb"
    ):
        score_tasks(model, tokenizer, tasks, metric="bleu")
    with pytest.raises(ValueError, match="`metric` names the task 'other'; the tasks are t. Use"):
        score_tasks(model, tokenizer, tasks, metric={"other": "f1"})
    with pytest.raises(ValueError, match="Task 't', row 1: its completion .* has no number"):
        score_tasks(model, tokenizer, tasks, metric="number")


def test_loaded_adapters(model_folders, tmp_path):
    model = get_peft_model(load(model_folders["llama"]), RLoraConfig(task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(torch.tensor([[5, 6]])).logits, model.eval()(torch.tensor([[5, 6]])).logits)
    tokenizer, prompts = build_tokenizer(), prompts_of_many_lengths()
    expected = generate_answers(model, tokenizer, prompts, max_new_tokens=4, limits=NO_LIMITS)
    loaded.base_model.model.generation_config.eos_token_id = ENDS
    assert generate_answers(loaded, tokenizer, prompts, max_new_tokens=4, limits=NO_LIMITS) == expected
