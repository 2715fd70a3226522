"""What the site has beside the pages of docs/: the README as its home, and the docstring of every public name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
HOME, NAMES = "index.md", "names.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/, and the licence, which the README links to."""
    home = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, HOME, content=home))
    files.append(File.generated(config, NAMES, content=names()))
    files.append(File.generated(config, "LICENSE", abs_src_path=str(ROOT / "LICENSE")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to the README lead to the site's home."""
    return re.sub(r"\]\(\.\./README\.md", f"]({HOME}", markdown)


def names() -> str:
    """Every public name with its signature and its docstring."""
    import pipeline

    parts = ["# Every name", "What `from pipeline import …` gives."]
    for name in pipeline.__all__:
        value = getattr(pipeline, name)
        takes = "" if value is pipeline.UserError else inspect.signature(value)  # which has none of its own
        parts += [f"## {name}", f"```text\n{name}{takes}\n\n{inspect.getdoc(value)}\n```"]
    return "\n\n".join(parts) + "\n"
