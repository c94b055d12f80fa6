"""The pages of docs/integrations: named in the README, and every link leads to a file."""

import re

from processes import ROOT


PAGES = sorted((ROOT / "docs" / "integrations").glob("*.md"))


def links(path):
    return re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))


def test_every_page_is_in_the_readme():
    named = {(ROOT / link).resolve() for link in links(ROOT / "README.md") if not link.startswith("http")}
    assert len(PAGES) >= 5 and not [page.name for page in PAGES if page.resolve() not in named]


def test_links_lead_to_files():
    broken = [
        (page.name, link)
        for page in PAGES
        for link in links(page)
        if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert not broken


def test_every_page_of_a_tool_begins_with_a_block():
    for page in PAGES:
        if page.name != "README.md":
            assert re.match(r"# .+\n\n```(yaml|bash|python)\n", page.read_text(encoding="utf-8")), page.name
