"""Rows of the tests of this folder, and files of them."""

import json


ROWS = [{"prompt": f"p{i}", "completion": f" c{i}", "task": ("b", "a")[i % 2]} for i in range(6)]


PAIR = {"prompt": "a", "completion": "b"}


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(path, content):
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)
