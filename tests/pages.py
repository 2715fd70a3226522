"""The README and the pages of docs/, as tests read them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / README, *sorted((ROOT / "docs").glob("*.md"))]
}


def blocks(language: str, text: str) -> list[str]:
    """The code of a language in a page, or in a part of one."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def sections(page: str) -> dict[str, str]:
    """The parts of a page by their headings; what stands before the first of them has the page's own."""
    found, code = dict[str, list[str]](), False
    for line in PAGES[page].splitlines():
        code ^= line.startswith("```")
        if not code and line.startswith("#"):
            title = line.lstrip("# ")
            assert title not in found, f"{page} has two sections named {title}"
            found[title] = []
        found[title].append(line)
    return {title: "\n".join(lines) + "\n" for title, lines in found.items()}
