"""Commands on the folders of strangers: a tokenizer, a chat template or a configuration with other contents."""

import json
import shutil
import time
from pathlib import Path

import pytest


ESCAPES = "\x1b[2J\x1b[8m"
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "yes"}]


def _edit(file, **changes):
    def edit(folder):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **changes}))

    return edit


def _write(file, text):
    return lambda folder: (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def _token_beyond_the_model(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["w1"] = 100_000
    (folder / "tokenizer.json").write_text(json.dumps(values))


PANIC = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": ESCAPES, "type_id": 0}}], "pair": []}

TOKENIZERS = {
    "class": (_edit("tokenizer_config.json", tokenizer_class=5), "AttributeError: 'int' object has no"),
    "token": (_edit("tokenizer_config.json", eos_token=5), "TypeError: Special token eos_token has to be"),
    "length": (_edit("tokenizer_config.json", model_max_length="x"), "TypeError: '>' not supported"),
    "side": (_edit("tokenizer_config.json", padding_side=ESCAPES), r"current value: \x1b[2J\x1b[8m)"),
    "special tokens": (_write("special_tokens_map.json", "[1, 2]"), "AttributeError: 'list' object has no"),
    "added tokens": (_write("added_tokens.json", '{"x": "y"}'), "TypeError: '<' not supported"),
    "no JSON": (_write("tokenizer.json", '{"version": "' + ESCAPES), "JSONDecodeError: "),
    "bytes": (_write("tokenizer.json", b"\xff\xfe\0"), "UnicodeDecodeError: "),
    "deep": (_write("tokenizer.json", "[" * 2**24 + "]" * 2**24), "RecursionError: "),
    "panic": (_edit("tokenizer.json", post_processor={**PANIC, "special_tokens": {}}), "PanicException: "),
    "template": (_write("chat_template.jinja", b"\xff\xfe"), "UnicodeDecodeError: "),
}


@pytest.fixture
def with_tokenizer(make_adapter, tokenizer):
    """Save an adapter with a tokenizer of its own, edit its files and return the folder."""

    def make(edit):
        folder = make_adapter()
        tokenizer.save_pretrained(folder)
        edit(folder)
        return folder

    return make


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "task": "same"}))
    return path


def _refused(result):
    """The message of a command that has refused a folder or a file, on one line."""
    assert (result.exit_code, result.stdout) == (1, "")
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and result.stderr.endswith(f"{lines[0]}\n"), result.stderr
    assert "Traceback" not in result.stderr and "\x1b" not in result.stderr
    return lines[0]


@pytest.mark.parametrize(("edit", "cause"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_does_not_load(rlora, with_tokenizer, rows_folder, edit, cause):
    folder, start = with_tokenizer(edit), time.process_time()
    message = _refused(rlora("eval", folder, "--data", rows_folder))
    assert message.startswith(f"Error: The tokenizer in {folder} can't be used (") and cause in message
    assert "takes the tokenizer of its base model" in message
    assert time.process_time() - start < 30  # seconds; 1 where nothing else runs


def test_keys_that_tokenizers_prints_are_escaped(rlora, with_tokenizer, rows_folder, capfd):
    """It is written in Rust, and prints to the descriptor of stdout."""
    token = json.dumps({"pad_token": {"content": "x", ESCAPES: 1}})
    folder = with_tokenizer(_write("special_tokens_map.json", token))
    result = rlora("eval", folder, "--data", rows_folder, "--json")
    assert json.loads(result.stdout)["tasks"], "nothing else on stdout"
    assert r"unknown kwarg option \x1b[2J\x1b[8m" in result.stderr
    assert "kwarg" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("command", ["eval", "analyze", "export"])
def test_a_tokenizer_of_another_model(rlora, with_tokenizer, rows_folder, tmp_path, command):
    output = [tmp_path / "out"] if command == "export" else []
    result = rlora(command, with_tokenizer(_token_beyond_the_model), *output, "--data", rows_folder)
    assert "The tokenizer gives token 100000, and the model has 80 tokens" in _refused(result)


TEMPLATES = {
    "range": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
    "raises": ("{{ raise_exception('" + ESCAPES + "\nError: no') }}", r"TemplateError: \x1b[2J\x1b[8m Error: no)"),
    "syntax": ("{% for", "TemplateSyntaxError: "),
    "undefined": ("{{ a.b.c }}", "UndefinedError: 'a' is undefined"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError: "),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: "),
    "file": ("{% include '/etc/passwd' %}", "TypeError: no loader"),
    "size": ("{{ 'x' * 10**8 }}", "it writes 100000000 characters, and at most 16777216"),
}


@pytest.mark.parametrize(("template", "cause"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_fails(rlora, with_tokenizer, chats, template, cause):
    folder = with_tokenizer(_write("chat_template.jinja", template))
    message = _refused(rlora("eval", folder, "--data", chats))
    assert message.startswith("Error: Task 'same', row 1: the tokenizer's chat template does not write this")
    assert cause in message


@pytest.mark.parametrize("command", ["analyze", "export"])
def test_a_chat_template_that_fails_in_other_commands(rlora, with_tokenizer, chats, tmp_path, command):
    output = [tmp_path / "out", "--task", "same"] if command == "export" else []
    folder = with_tokenizer(_write("chat_template.jinja", TEMPLATES["attributes"][0]))
    assert TEMPLATES["attributes"][1] in _refused(rlora(command, folder, *output, "--data", chats))


CONFIGURATIONS = {
    "deep": ("[" * 100_000, "RecursionError: "),
    "number": ('{"model_type": "llama", "num_hidden_layers": ' + "9" * 5000 + "}", "ValueError: Exceeds the limit"),
    "layers": ({"num_hidden_layers": 10**9}, "it has 1000000000 layers, and at most 10000"),
    "text": ({"hidden_size": ESCAPES}, r"expected int, got str (value: '\x1b[2J\x1b[8m')"),
    "heads": ({"num_attention_heads": 0}, "ZeroDivisionError: "),
    "dtype": ({"dtype": "os.system"}, "AttributeError: module 'torch' has no attribute 'os.system'"),
    "activation": ({"hidden_act": ESCAPES}, r"KeyError: '\x1b[2J\x1b[8m'"),
    "vocabulary": ({"vocab_size": -5}, "RuntimeError: Trying to create tensor with negative"),
    "quantization": ({"quantization_config": 5}, "AttributeError: 'int' object has no attribute 'to_dict'"),
    "code": ({"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}, "contains custom code which must be"),
}


@pytest.mark.parametrize(("values", "cause"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_an_estimate_of_a_hostile_configuration(rlora, model_folders, tmp_path, values, cause):
    if isinstance(values, dict):
        base = json.loads((Path(model_folders["llama"]) / "config.json").read_text())
        values = json.dumps({**base, **values})
    (tmp_path / "config.json").write_text(values)
    message = _refused(rlora("estimate", tmp_path))
    assert cause in message and message.endswith("Check its `config.json`.")


@pytest.mark.parametrize("of", ["base", "tokenizer"])
def test_code_of_a_base_model_does_not_run_and_nothing_asks_for_it(rlora, make_adapter, rows_folder, tmp_path, of):
    """transformers asks on a terminal whether to run it."""
    folder, base, ran = make_adapter(), tmp_path / "base", tmp_path / "ran"
    shutil.copytree(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"], base)
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    if of == "base":
        classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        _edit("config.json", model_type="evil", auto_map=classes)(base)
    else:
        classes = {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}
        _edit("tokenizer_config.json", tokenizer_class="Evil", auto_map=classes)(base)
    result = rlora("eval", folder, "--base", base, "--data", rows_folder, input="y\n")
    assert "contains custom code which must be executed" in _refused(result)
    assert "[y/N]" not in result.stderr and not ran.exists()


def test_an_estimate_of_an_adapter(rlora, make_adapter):
    assert "Should have a `model_type` key in its config.json" in _refused(rlora("estimate", make_adapter()))


DATA = {
    "deep.jsonl": (
        '{"prompt": "a", "completion": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "line 1: it is nested more",
    ),
    "deep.json": ("[" * 100_000, "line 1: it is nested more than 500 deep"),
    "number.json": ('[{"prompt": "a", "completion": ' + "9" * 5000 + "}]", "has a value that can't be read: Exceeds"),
    "surrogate.jsonl": (r'{"prompt": "\ud800", "completion": "a"}', "can't be read (ArrowInvalid: JSON parse error"),
    "nul.csv": ("pro\0mpt,completion\na,b\n", r"can't be read (CastError: Couldn't cast pro\x00mpt"),
    "tools.jsonl": (json.dumps({"messages": CHAT, "tools": "[" * 100_000}), "row 1, column 'tools': it is '[["),
    "options.csv": ("prompt,completion,options\na,b," + "[" * 50_000, "row 1, column 'options': it is '[["),
    "kwargs.jsonl": (json.dumps({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}), "TypeError: "),
    "columns.csv": (",".join(f"c{i}" for i in range(1000)) + "\n1\n", "'c19' and 980 more; accepted are"),
    "esc\x1b[2J.jsonl": ("{", r"esc\x1b[2J.jsonl, line 1: Expecting"),
    "esc.jsonl": (json.dumps({ESCAPES: 1, "\u202e": 2}), r"has the columns '\x1b[2J\x1b[8m', '\u202e'"),
}


@pytest.mark.parametrize("name", DATA, ids=lambda name: name.split("\x1b")[0])
def test_data_that_can_not_be_read(rlora, make_adapter, tmp_path, name):
    text, cause = DATA[name]
    (tmp_path / name).write_text(text)
    assert cause in _refused(rlora("eval", make_adapter(), "--data", tmp_path / name))


@pytest.mark.parametrize("task", ["x\x1b[2J", "x\u202e", "x\ny"])
def test_tasks_of_data_are_escaped(rlora, make_adapter, tmp_path, task):
    row = {"prompt": "w1", "completion": " yes", "task": task}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    folder = make_adapter()
    result = rlora("eval", folder, "--data", tmp_path / "rows.jsonl", "--save")
    shown = task.encode("unicode_escape").decode()
    assert shown in result.stdout and f"trained on them: {shown}\n" in result.stderr
    assert not set(task[1:]) & set("\x1b\u202e") & set(result.output) and result.stdout.count("\n") == 2
    result = rlora("eval", folder, "--data", tmp_path / "rows.jsonl", "--json")
    assert json.loads(result.stdout)["tasks"][0]["task"] == task
