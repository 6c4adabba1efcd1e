"""Writes the tree of docs/layout.md from the docstrings of the files of jaxlm.

python scripts/layout.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "layout.md"
START, END = "<!-- tree: python scripts/layout.py -->\n", "<!-- end of tree -->\n"
FOLDERS = [
    "config",
    "data",
    "ops",
    "model",
    "optim",
    "sharding",
    "training",
    "decode",
    "convert",
    "parity",
    "analysis",
    "run",
    "evals",
    "reproduce",
    "cli",
]


def summary(path: Path) -> str:
    """The first sentence of a file's docstring."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).split(". ")[0].rstrip(".")


def lines(folder: Path, indent: str) -> list[str]:
    """The folder's own line, then one for each of its files; files that hold a command share one."""
    own = f"{indent + folder.name + '/':26}{summary(folder / '__init__.py')}"
    files = {path.name: summary(path) for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"}
    commands = [name for name, text in files.items() if text.startswith("`jaxlm ")]
    rows = [f"{indent + '  ' + name:26}{text}" for name, text in files.items() if name not in commands]
    inner = sorted(path.parent for path in folder.glob("*/__init__.py")) if folder.parent != ROOT else []
    rows += [line for one in inner for line in lines(one, f"{indent}  ")]
    return [own, *rows, *([f"{indent}  {' '.join(commands)}: one command each"] if commands else [])]


def tree() -> str:
    """jaxlm's folders in the order in which they may import, then torchref."""
    rows = lines(ROOT / "jaxlm", "")
    for name in FOLDERS:
        rows += lines(ROOT / "jaxlm" / name, "  ")
    return "\n".join(["```", *rows, lines(ROOT / "torchref", "")[0], "```", ""])


def page() -> str:
    """The page with a fresh tree between its two marks."""
    text = PAGE.read_text(encoding="utf-8")
    return f"{text.split(START)[0]}{START}{tree()}{END}{text.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
