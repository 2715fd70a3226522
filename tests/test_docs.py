"""The README's and docs' links lead somewhere, the files that they name exist, and the site is built of them."""

from __future__ import annotations

import re
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from pages import PAGES, README, ROOT, blocks, sections

SITE = ROOT / "docs" / "site" / "mkdocs.yml"
FILES = re.compile(r"\b((?:benchmarks|configs|docs|pipeline|tests)/[\w/.-]*\w\.(?:py|yaml|yml|md|txt|jsonl))\b")


def links(page: str) -> set[str]:
    """Where the links of a page lead, but for those to elsewhere."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return {to for to in re.findall(r"\]\(([^)\s]+)\)", text) if not to.startswith("https://")}


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in sections(page)}


def path_of(page: str, link: str) -> str:
    """The file that a link of a page leads to, from the project's folder."""
    file = link.partition("#")[0]
    return str((ROOT / page).parent.joinpath(file).resolve().relative_to(ROOT)) if file else page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links(page):
        to, anchor = path_of(page, link), link.partition("#")[2]
        assert (ROOT / to).is_file(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(to), f"{page} links to {link}"


def test_the_readme_leads_to_every_page() -> None:
    assert {path_of(README, link) for link in links(README)} >= {*PAGES} - {README}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    gone = [file for file in FILES.findall(PAGES[page]) if not (ROOT / file).is_file()]
    assert not gone


def test_benchmarks_that_are_named_exist() -> None:
    lines = chain.from_iterable(blocks("bash", text) for text in PAGES.values())
    named = set(re.findall(r"python -m (benchmarks\.\w+)", "\n".join([*PAGES.values(), *lines]))) - {
        "benchmarks.NAME"
    }
    assert len(named) > 5
    assert all(callable(import_module(name).main) for name in named)


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    build(load_config(str(SITE), site_dir=str(tmp_path), strict=True))
    for page in PAGES:
        name = Path(page).stem
        written = tmp_path / ("index.html" if page == README else f"{name}/index.html")
        text = written.read_text(encoding="utf-8")
        assert "| ---" not in text, f"a table of {page} is none on the site"
        assert 'src="http' not in text and 'rel="stylesheet" href="http' not in text, (
            "it takes nothing from elsewhere"
        )
    assert "find_golden_layer(" in (tmp_path / "names" / "index.html").read_text(encoding="utf-8")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("wrong", ["[x](nowhere.md)", "[x](edit.md#nowhere)", "[x](/edit.md)"])
def test_a_broken_link_ends_the_build(wrong: str, tmp_path: Path) -> None:
    config = load_config(str(SITE), site_dir=str(tmp_path), strict=True)
    config.plugins.events["page_markdown"].append(lambda text, **_: f"{text}\n\n{wrong}\n")
    with pytest.raises(Abort):
        build(config)
