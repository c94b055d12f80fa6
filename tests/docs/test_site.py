"""The site (`make docs` builds it): docstrings as reStructuredText, and what its pages must contain."""

import ast
import re
import sys
from importlib import import_module

import pytest
from processes import ROOT


sys.path.insert(0, str(ROOT / "docs"))
import docstrings

import rlora_trl


PACKAGES = ("", ".zoo", ".hub", ".export", ".convert", ".evaluation", ".analysis", ".estimate")

DOCSTRING = """
Write an adapter, see [`export_lora`] and [`Unknown`]; `x` times [the paper](https://example.org/1) of a_ and 2 * 3.

    y = s * B A x

- One item,
  on two lines
- and `another`

```python
print("*")
```

> [!NOTE]
> Be careful.

Args:
    r (`int`, *optional*, defaults to `4`):
        Rank: of each head.

    > A heading

    a (`str`), b (`dict[str, int]`, *optional*): Two.
    settings: The rest.

Returns:
    `str`: The folder.

Raises:
    ValueError: If it is wrong.
"""

RST = """
Write an adapter, see :py:obj:`export_lora <rlora_trl.export_lora>` and ``Unknown``; ``x`` times
`the paper <https://example.org/1>`__ of a\\_ and 2 \\* 3.

::

    y = s * B A x

- One item,
  on two lines
- and ``another``

.. code-block:: python

   print("*")

.. note::

   Be careful.

:Arguments:
   - ``r`` (``int``, *optional*, defaults to ``4``): Rank: of each head.
   - ``a`` (``str``), ``b`` (``dict[str, int]``, *optional*): Two.
   - ``settings``: The rest.

:Returns:
   - ``str``: The folder.

:Raises:
   - ``ValueError``: If it is wrong.
"""


def test_docstring_becomes_rst():
    assert docstrings.to_rst(DOCSTRING.strip()).split() == RST.split()
    lines = docstrings.to_rst(DOCSTRING.strip()).splitlines()
    for line in ("    y = s * B A x", '   print("*")', "   Be careful.", "  on two lines"):
        assert line in lines


def test_prose_behind_a_section():
    assert docstrings.to_rst("One.\n\nArgs:\n    x: First.\n\nMore `text`.").rstrip().endswith("\n\nMore ``text``.")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_the_page_of_the_api(package):
    module = import_module(f"rlora_trl{package}")
    objects = {name: getattr(module, name) for name in module.__all__}
    names = {name for name, value in objects.items() if hasattr(value, "__qualname__")}
    assert names and names <= docstrings.documented().keys(), names - docstrings.documented().keys()


def test_every_page_is_in_the_contents():
    """Sphinx warns about others too; this says so without it."""
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+\.md)\)", index.read_text())}
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md")} - {index.resolve()}
    assert pages <= linked, pages - linked


def test_figures_of_the_decision_page_stand_on_the_pages_of_evidence():
    """docs/choose.md repeats a few; where the measurements change, it must be read again."""
    text = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    pages = ("results", "performance", "routing", "export", "quantization")
    evidence = " ".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in pages)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    quoted = set(re.findall(r"(?<![\w.])[-+]?\d+\.\d+(?: ± \d\.\d)?(?![\w.]*\])|\[[-+]\d\.\d+, [-+]\d\.\d+\]", prose))
    assert len(quoted) >= 12
    assert not {number for number in quoted if number not in evidence}


def test_tables_of_fields_have_the_defaults():
    """docs/configuration.md and docs/migration.md, against the classes."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    configs = dict(zip(("RLoraConfig", "RLoraSFTConfig"), re.split(r"\n## ", text)[1:], strict=True))
    checked = 0
    for name, section in configs.items():
        fields = getattr(rlora_trl, name).__dataclass_fields__
        for names, values in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", section, re.MULTILINE):
            for field, value in zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True):
                assert ast.literal_eval(value) == fields[field].default, field
                checked += 1
    assert checked >= 25
