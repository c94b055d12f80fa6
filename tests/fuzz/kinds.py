"""Inputs of known malicious kinds, each made at random from the grammar of its kind."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from .mutations import TEXTS, JsonMutator, count, rarely_many, text
from .samples import SIZE


# Regular expressions

# Each is slow or large with a backtracking engine, on a name of some hundred "a" or on none.
SLOW_PATTERNS = (
    *("(a+)+b", "(a|a)+b", "(a|aa)+b", "(a*)*b", "(a+)(?#)+b", "(?:a+)(?# x)*b", "([a-z]+)*!", "(.*a){20}b"),
    *("(a?){25}a{25}", "a*a*a*a*a*a*b", ".*.*.*.*.*b", "(?=(a+))a*b\\1", "(?:(?:a{1,9}){1,9}){1,9}b", "(?>a+)+b"),
    *("(?:(?:){9999}){9999}.*", "(?:(?:(?:a{99}){99}){99}){99}", "a{1,65535}{1,9}", "(a|b|ab)*c", "(?:a|.)*b"),
    *("(a|A|[a]|.|\\w|(?:a)|a?|aa){4}" * 1 + "b", "(?i:(a|A)+)b", "(?x)( a + ) + b", "(a++)+b", "(?:a*?)*?b"),
    *("(.|a)(.|a)(.|a)(.|a)(.|a)(.|a)(.|a)(.|a)(.|a)b" * 3, "(?<=a)+b", "(?!(a+)+b)x", "(?(1)a|b)+c", "\\b(a+)+\\B"),
    *(
        "(" * 90 + "a" + ")" * 90 + "+b",
        "(?:" * 5_000 + ")" * 5_000,
        "|".join(["a"] * 400) + "b",
        "[a-z]*" * 150 + "B",
    ),
)
_ATOMS = (
    *("a", "a", "a", ".", ".", "[a-z]", "\\w", "[^b]", "(?:a|a)", "(a|aa)", "(?:)", "()", "(?#)", "aa", "(?:a|b|.)"),
    *("\\1", "(?P=n)", "(?P<n>a)", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)", "(?>a*)", "^", "$", "\\b", "[a", "\\Z", "b"),
    *("proj", "layers", "\\.", "\\d+", "up_proj"),
)
_QUANTIFIERS = ("*", "+", "?", "*?", "+?", "*+", "{2}", "{1,9}", "{0,}", "{9999}", "{,99}", "(?#)+", "{65535}", "")


def regular_expression(rng: Random) -> str:
    """An expression that a backtracking engine may take forever, or much memory, to compile or match."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(SLOW_PATTERNS)
    if kind < 0.35:
        return (rng.choice(_ATOMS) + rng.choice(_QUANTIFIERS)) * count(rng, 200) + rng.choice(("b", "", "$"))
    return _expression(rng, rng.randrange(1, 5))


def _expression(rng: Random, depth: int) -> str:
    if depth == 0:
        return rng.choice(_ATOMS)
    parts = []
    for _ in range(rng.randrange(1, 4)):
        inner = _expression(rng, depth - 1)
        form = rng.choice(("{}", "({})", "(?:{})", "(?:{}|{})", "({}|{}|a)", "(?={})", "(?>{})", "(?i:{})"))
        parts.append(form.replace("{}", inner) + rng.choice(_QUANTIFIERS))
    return "".join(parts)


def patterns(rng: Random) -> dict[str, Any]:
    """Fields of a configuration that PEFT takes for regular expressions."""
    one = regular_expression(rng)
    several = [regular_expression(rng) for _ in range(count(rng, 5))]
    if rng.random() < 0.02:  # each quick to match, but there are many
        several = [f".*.*{'a' * 3}{i:05}" for i in range(rarely_many(rng))]
    return rng.choice(
        (
            {"target_modules": one},
            {"target_modules": several},
            {"exclude_modules": one},
            {"exclude_modules": several},
            {"rank_pattern": dict.fromkeys(several, 2)},
            {"alpha_pattern": dict.fromkeys(several, 8)},
            {"rank_pattern": dict.fromkeys(several, 2), "alpha_pattern": dict.fromkeys(several, 8)},
            {"modules_to_save": several},
            {"layers_to_transform": [0, 1], "layers_pattern": one},
            {"layers_to_transform": 0, "layers_pattern": several},
        )
    )


def layer_name(rng: Random) -> str:
    """The name of a layer that makes expressions slow."""
    most = rng.choice((20, 60, 200, 250, 256))
    return rng.choice(
        (
            "a" * most,
            "model." + "a" * (most - 6),
            ".".join("a" * (most // 2)),
            "layers." * (most // 8) + "0.up_proj",
            "a" * (most - 8) + ".up_proj",
            "model.layers.0." + "aA" * (most // 3),
        )
    )


# YAML

_ITEMS = ("{},", "[],", "? a\n", "- \n", "a,", "!!str a,", "&x a,", "190:20:30.15,", "1,", '"",', "~,", "? ", "- ")
_SCALARS = (
    *("!!int ''", "!!int x", "!!float ''", "!!float x", "!!timestamp x", "!!bool x", "!!binary '=='", "!!binary \xff"),
    *("!!python/object:os.system x", "!!python/object/apply:os.system [id]", "!!python/name:os.system", "!x y"),
    *(
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!pairs [a: 1, a: 2]",
        "!!map []",
        "!!seq {}",
        "!!null x",
        "!!merge x",
        "!!str",
    ),
    *("2024-13-45", "2024-01-01T99:99:99Z", "0001-01-01 00:00:00 +99:99", "9999-12-31T23:59:59-23:59", "2024-02-30"),
    *("190:20:30", "-1:59:59.9", "1" + ":59" * 2_000, "9" * 5_000, "0b" + "1" * 5_000, "0o7", "0x" + "f" * 5_000),
    *("1_" * 1_000 + "1", "1e999", ".inf", "-.INF", ".nan", "1e99999999", "=", "<<", "yes", "On", "~", "|", ">-"),
    *("*a", "&a [*a]", "&a {b: *a}", "{<<: [{a: 1}, {b: 2}]}", "{<<: 5}", "{[a]: 1}", "{{a: b}: c}", "? [a, b]"),
    *(
        '"\\x00"',
        '"\\ud800"',
        '"\\U0010ffff"',
        '"\\U00110000"',
        "'\x85'",
        "\t",
        "%YAML 9.9",
        "--- ---",
        "a: b: c",
        "@x",
    ),
)
_KEYS = ("tags", "rlora", "model-index", "base_model", "license", "datasets", "metrics", "language", "self", "x")


def yaml_bomb(rng: Random) -> str:
    """Metadata that takes a parser of YAML long, much memory, or an unexpected path."""
    key = rng.choice(_KEYS)
    if rng.random() < 0.7:
        scalar = rng.choice(_SCALARS)
        return rng.choice(
            (f"{key}: {scalar}", f"{key}: [{scalar}]", f"{scalar}: 1", f"rlora: {{r: {scalar}}}", scalar)
        )
    # Rarely as many as the limit on a card's size allows.
    times = count(rng, 120_000, 10_000) if rng.random() < 0.01 else count(rng, 300)
    item = rng.choice(_ITEMS)
    levels = min(times, 40)
    aliases = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels))
    return rng.choice(
        (
            f"{key}: [{item * times}]",
            f"{key}: {{{item * times}}}",
            f"{key}:\n{item * times}",
            item * times,
            f"{key}: " + "[" * times + "]" * times,
            f"{key}: " + "{a: " * times + "}" * times,
            "- " * times + "a",
            "? " * times + "a",
            "\n".join(" " * min(i, 500) + "a:" for i in range(times)),
            "a0: &a0 [x]\n" + aliases,
            "\n".join(f"k{i}: {i}:{i % 60}:30" for i in range(times)),
            f'{key}: "' + "\\x41" * times + '"',
            f"{key}: |\n" + "  a\n" * times,
            f"{key}: {'a' * times}: b",
            "#" * times + "\n" + key + ": a",
            f"{key}: '" + "''" * times,
        )
    )


def to_yaml(rng: Random, mutator: JsonMutator, tree: Any) -> str:
    """A tree as YAML: in blocks where it is a dictionary, else as JSON, of which YAML is a superset."""
    if not isinstance(tree, dict) or rng.random() < 0.1:
        return mutator.write(tree)
    lines = []
    for key, value in tree.items():
        name = key if key.isidentifier() or key == "model-index" else mutator.write(key)
        if isinstance(value, list) and value and rng.random() < 0.5:
            lines += [f"{mutator.write(name) if '@@' in name else name}:", *(f"- {mutator.write(v)}" for v in value)]
        else:
            lines.append(f"{mutator.write(name) if '@@' in name else name}: {mutator.write(value)}")
    return "\n".join(lines)


# Numbers and names


def claims(rng: Random) -> dict[str, Any]:
    """Fields of a configuration that claim far more than a file holds."""
    large = (4_096, 4_097, 16_384, 16_385, 10**6, 10**9, 2**31, 2**63, 10**30)
    tasks = [f"t{i}" for i in range(rng.choice((9_000, 10_000)) if rng.random() < 0.01 else rarely_many(rng))]
    router = rng.choice(("task", "softmax", "top_k", "uniform"))
    return rng.choice(
        (
            {"num_heads": rng.choice(large)},
            {"r": rng.choice(large)},
            {"r": rng.choice(large), "num_heads": rng.choice(large), "router": router},
            {"router": "task", "tasks": tasks, "num_heads": rng.choice(large)},
            {"router": "top_k", "router_top_k": rng.choice(large), "num_heads": rng.choice(large)},
            {"rank_pattern": {f"layer{i}": rng.choice(large) for i in range(len(tasks))}},
            {"lora_alpha": rng.choice((0, -1, 1e308, 10**30)), "init_gamma": rng.choice((0, 1e-308, 10**30))},
            {"trainable_token_indices": [rng.choice(large) for _ in range(rarely_many(rng))]},
            {"layers_to_transform": list(range(rarely_many(rng))), "target_modules": ["up_proj"]},
            {"modules_to_save": [f"m{i}" for i in range(rarely_many(rng))]},
            {"target_modules": [f"m{i}" for i in range(rarely_many(rng))]},
        )
    )


def header(rng: Random) -> str:
    """The header of a safetensors file with wrong sizes, types or offsets, or with many tensors."""
    huge = (0, 1, SIZE, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**64 - 1, 1.5, None, "4", [], True)
    shape = [rng.choice(huge) for _ in range(rng.choice((0, 1, 2, 3, 8, 9, 300)))]
    entry = {
        "dtype": rng.choice(("F32", "F32", "F64", "I8", "F4", "U64", "", "f32", "E8M0", None, 5)),
        "shape": shape,
        "data_offsets": [rng.choice(huge), rng.choice(huge)],
    }
    name = f"base_model.model.{layer_name(rng)}.rlora_adapters.A"
    many = {f"base_model.model.l{i}.rlora_adapters.A": entry for i in range(rarely_many(rng))}
    tree = rng.choice(({name: entry}, {text(rng): entry}, many, {"__metadata__": entry}, {"__metadata__": {"a": 5}}))
    source = json.dumps(tree)
    return rng.choice(
        (source, source, source + " " * count(rng, 4_000), source[:-1] + "," + source[1:], f"[{source}]")
    )


_PARTS = (
    *("exports", "figures", "additional_chat_templates", "first", "adapter_config.json", "README.md", "a.png", "x.py"),
    *("adapter_model.safetensors", "EXPORTS", "readme.md", "Adapter_Config.json", "a.jinja", "training_args.bin"),
    *("con", "nul.txt", "COM1", ".git", ".GIT", "..", ".", "", " ", "a.", "a ", "a:b", "a\\b", "*", "?", "[a]", "~"),
    *("optimizer.pt", "x.bin", "x.PY", "x.pkl", "x.png.exe", "tokenizer.json", "tokenizer_config.json", "LICENSE"),
)


def path(rng: Random) -> str:
    """A path as a repository may list it."""
    parts = [rng.choice(_PARTS if rng.random() < 0.8 else TEXTS) for _ in range(rng.choice((1, 1, 2, 3, 3, 4, 12)))]
    name = rng.choice(("/", "/", "/", "//", "\\")).join(parts)
    return name if rng.random() < 0.97 else (name * count(rng, 500))[:100_000]
