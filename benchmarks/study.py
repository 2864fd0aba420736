"""docs/study.md and its figures, from the results of `comatch ablate` in benchmarks/results/study/.

    comatch ablate runs/study/methods.yaml --out out/methods --jobs 2 && cp out/methods/results.json benchmarks/results/study/methods.json
    python benchmarks/study.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comatch.studies.report import draw, gap_table, markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, FIGURES = ROOT / "benchmarks" / "results" / "study", ROOT / "docs" / "study.md", ROOT / "docs" / "study"

ALSO = {"methods": ("matching, as long",), "comatch": ("comatch",), "pairs": ("matching, as long",), "emoji": ("comatch",)}
"""Arms that the others are compared with besides the study's own baseline."""
ORDER = ("methods", "comatch", "tokens", "formats", "pairs", "emoji")
HEAD = """# What the methods do, at nano scale

Made by `python benchmarks/study.py` from the results of `comatch ablate runs/study/*.yaml` (docs/ablate.md says how to read the tables).
comatch-nano has 1.5 million parameters and answers 94.5 % of questions about its generated world: what holds here need not hold for 3B
and 7B models, and what fails here may work there. Every study can be done again on a laptop."""


def load(name: str) -> dict[str, Any]:
    """The results of a study."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def studies() -> list[str]:
    """Names of the studies with results, in the order of the page."""
    there = {path.stem for path in RESULTS.glob("*.json")}
    return [name for name in ORDER if name in there] + sorted(there - {*ORDER})


def page() -> str:
    """The whole page: tables from the results, findings from the Markdown file beside them."""
    parts = [HEAD]
    for name in studies():
        parts.append(markdown(load(name)).replace("# ", "## ", 1).rstrip("\n"))
        for other in ALSO.get(name, ()):
            parts += [f"The same differences to {other}:", gap_table(load(name), other)]
        parts += [f"![{path.stem}](study/{path.name})" for path in sorted(FIGURES.glob(f"{name}-*.png"))]
        parts.append((RESULTS / f"{name}.md").read_text(encoding="utf-8").rstrip("\n"))
    return "\n\n".join(parts) + "\n"


def figures() -> None:
    """Draw every study's figures anew."""
    for name in studies():
        for path in draw(load(name), FIGURES / "new"):
            path.replace(FIGURES / f"{name}-{path.name}")
    (FIGURES / "new").rmdir()


def main() -> None:
    """Write page and figures."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    figures()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
