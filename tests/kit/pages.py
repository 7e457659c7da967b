"""The pages of the documentation, for tests: their texts, and the modules beside them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")]
OTHERS += [ROOT / folder / "README.md" for folder in ("recipes", "slurm", "launch")]


def module(name: str) -> ModuleType:
    """Returns a module of docs/, which is no package."""
    path = DOCS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def text(page: str) -> str:
    """Returns the text of a page of docs/."""
    return (DOCS / page).read_text(encoding="utf-8")


def shown(path: Path) -> str:
    """Returns a path as people write it."""
    return str(path.relative_to(ROOT))
