"""Tables of the README and plots, from the raw rows in `results/`.

python benchmarks/report.py                 # prints the tables
python benchmarks/report.py --update        # writes them into README.md and docs/performance.md, and draws the plot
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
ROOT = HERE.parent
BEGIN, END = "<!-- {name}: written by benchmarks/report.py -->", "<!-- end of {name} -->"


def read(name: str) -> list[dict]:
    """The rows of a file in `results/`."""
    path = HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_table(rows: list[dict], shape: str, base: str, setting: str, short: bool = False) -> str:
    """Step time, its ratio to the floor of the same run, and peak memory, for one shape and setting."""
    chosen = [r for r in rows if r["shape"] == shape and r["setting"] == setting and r.get("base") == base]
    # A floor belongs to the rows of its own run.
    lines = ["| form | ms a step | x floor | peak GiB |", "|---|---|---|---|"]
    floors = {row["command"]: row["median_ms"] for row in chosen if row["family"] == "floor"}
    for row in chosen:
        if (
            short
            and row["family"] == "ours"
            and (row["num_heads"], row["r"]) not in ((3, 4), (5, 4), (10, 4), (10, 16))
        ):
            continue
        if row["median_ms"] is None or row["command"] not in floors:
            continue
        ratio = row["median_ms"] / floors[row["command"]]
        name = f"**{row['variant']}**" if row["family"] == "ours" else row["variant"]
        lines.append(f"| {name} | {row['median_ms']:.0f} | {ratio:.2f} | {row['peak_gib']:.1f} |")
    return "\n".join(lines)


def decode_table(rows: list[dict]) -> str:
    """Milliseconds and tokens per second of a decoding step."""
    lines = ["| form | batch | ms a step | tokens/s |", "|---|---|---|---|"]
    for row in rows:
        if row["family"] != "floor":
            lines.append(
                f"| {row['variant']} | {row['batch']} | {row['median_ms']:.1f} | {row['tokens_per_second']:.0f} |"
            )
    return "\n".join(lines)


def host_table(rows: list[dict]) -> str:
    """The same steps on several machines of one kind: short steps follow the host's CPU."""
    hosts = sorted({row["host"] for row in rows})
    lines = ["| form | " + " | ".join(f"host {host}, ms" for host in hosts) + " |", "|---|" + "---|" * len(hosts)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        times = {row["host"]: f"{row['median_ms']:.0f}" for row in rows if row["variant"] == variant}
        lines.append(f"| {variant} | " + " | ".join(times.get(host, "") for host in hosts) + " |")
    return "\n".join(lines)


def machine(rows: list[dict]) -> str:
    """Device and versions, in one line."""
    row = rows[0]
    return (
        f"{row['device']}, torch {row['torch']}, triton {row['triton']}, transformers {row['transformers']}, "
        f"peft {row['peft']}, {row['date']}"
    )


def replace_block(path: Path, name: str, text: str) -> None:
    """Put a generated block between its marks."""
    begin, end = BEGIN.format(name=name), END.format(name=name)
    old = path.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{path} has no block between {begin!r} and {end!r}. Add both lines where the table belongs.")
    path.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", old))


def draw(train: list[dict], layer: list[dict], path: Path) -> None:
    """How the cost grows with heads and rank (a whole model) and with tokens (one layer)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2 if layer else 1, figsize=(10 if layer else 6, 4), squeeze=False)
    left = axes[0, 0]
    rows = [r for r in train if r["shape"] == "qwen2.5-3b" and r["setting"] == "8x2048" and r["base"] == "bfloat16"]
    floor = next(row["median_ms"] for row in rows if row["family"] == "floor")
    for rank in (4, 8, 16):
        points = sorted(
            (r["num_heads"], r["median_ms"] / floor) for r in rows if r["family"] == "ours" and r["r"] == rank
        )
        left.plot(*zip(*points, strict=True), marker="o", label=f"rlora_trl, r={rank}")
    loops = sorted((r["num_heads"], r["median_ms"] / floor) for r in rows if r["family"] == "rlora_loop")
    left.plot(*zip(*loops, strict=True), marker="s", color="0.4", label="R-LoRA as a loop, r=4")
    lora = next(r["median_ms"] / floor for r in rows if r["family"] == "lora_16bit")
    left.axhline(lora, color="0.6", linestyle="--", label="PEFT LoRA r=10, 16-bit adapter")
    left.set(
        xlabel="heads N", ylabel="step time / frozen base", title="3B shape, 8x2048, checkpointing", ylim=(0.95, None)
    )
    left.legend(fontsize=8)
    if layer:
        draw_layer(axes[0, 1], layer)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_layer(right: Any, layer: list[dict]) -> None:
    """How one layer's time grows with tokens."""
    for variant in dict.fromkeys(row["variant"] for row in layer):
        same = [r for r in layer if r["variant"] == variant]
        points = sorted({(r["tokens"], r["forward_backward_ms"]) for r in same})
        if len(points) > 1:
            right.plot(*zip(*points, strict=True), marker="o", label=variant)
    right.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="One layer, 2048 to 11008, forward + backward"
    )
    right.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write into the documents and draw the plot")
    args = parser.parse_args()
    train, layer, decode = read("train_step"), read("layer"), read("decode")
    note = f"{machine(train)}; Qwen2.5-3B shape, bfloat16, gate/up/down, 8 x 2048 tokens with checkpointing."
    short = f"{train_table(train, 'qwen2.5-3b', 'bfloat16', '8x2048', short=True)}\n\n{note}"
    sections = []
    for shape, base, setting in dict.fromkeys((r["shape"], r.get("base"), r["setting"]) for r in train):
        if base is not None:
            sections.append(f"### {shape}, {base} base, {setting}\n\n{train_table(train, shape, base, setting)}")
    full = f"{machine(train)}\n\n" + "\n\n".join(sections)
    full += f"\n\n### qwen2.5-3b, 6x512, on three hosts\n\n{host_table(read('train_step_6x512_hosts'))}"
    full += f"\n\n### Decoding, qwen2.5-3b, bfloat16\n\n{decode_table(decode)}"
    print(full)
    if args.update:
        replace_block(ROOT / "README.md", "step times", short)
        replace_block(ROOT / "docs" / "performance.md", "all tables", full)
        draw(train, layer, ROOT / "docs" / "figures" / "cost.png")


if __name__ == "__main__":
    main()
