"""What the pages name is there."""

import json
import re

import pytest

from tests.helpers import ROOT, help_of

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
    if page.parent.name == "docs":
        assert f"docs/{page.name}" in (ROOT / "README.md").read_text("utf-8"), "the README does not lead to this page"


def test_the_badge_opens_the_notebook_of_the_repository_that_it_clones():
    notebook = json.loads((ROOT / "scripts/perennial.ipynb").read_text())
    text = "".join(line for cell in notebook["cells"] for line in cell["source"])
    owner = re.search(r'REPO = "https://github.com/([\w.-]+/[\w.-]+)"', text)[1]
    badge = f"https://colab.research.google.com/github/{owner}/blob/main/scripts/perennial.ipynb"
    for page in (text, (ROOT / "README.md").read_text(), (ROOT / "docs/colab.md").read_text()):
        assert set(re.findall(r"https://colab\.research\.google\.com/github/[^)\s]+", page)) == {badge}
    assert f"git clone --depth 1 https://github.com/{owner} " in (ROOT / "docs/colab.md").read_text()


def test_programs_and_their_flags_exist():
    """`python scripts/x.py --flag`, as people copy it."""
    named: dict[str, set[str]] = {}
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        for script, arguments in re.findall(r"python3? ((?:prep|train|scripts)/\w+\.py)([^\n`|#;&]*)", text):
            named.setdefault(script, set()).update(re.findall(r"(?<=\s)--[a-z][a-z-]*", arguments))
    assert len(named) > 8
    for script, flags in named.items():
        assert (ROOT / script).exists(), script
        known = help_of(script)
        missing = {f for f in flags - {"--help"} if not re.search(rf"{f}\b", known)}
        assert not missing, f"{script} has no {missing}"
