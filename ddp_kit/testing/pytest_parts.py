"""What the ranks borrow from pytest: rewritten assertions and its way of printing a traceback.

Every use of pytest's private names is here, so that a new pytest can break one file only. The
user's plugins and conftest hooks have no part in ranks: fixtures live in the pytest process.
"""

import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from _pytest import assertion
from _pytest._io import TerminalWriter

HERE = str(Path(__file__).parent)


def small_config() -> pytest.Config:
    """Returns a pytest configuration that has read no files.

    It is enough to rewrite assertions and to print differences.
    """
    without = []
    for name in ("capture", "faulthandler", "cacheprovider", "terminal"):
        without += ["-p", f"no:{name}"]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.pop("PYTEST_PLUGINS", None)
    return pytest.Config.fromdictargs({}, ["-c", os.devnull, "--noconftest", *without])


def rewritten_modules() -> dict[str, str]:
    """Returns name and file of the modules whose assertions this pytest process has rewritten.

    They are tests, conftests and plugins.
    """
    found = {}
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if spec is None or not spec.origin:
            continue
        if isinstance(spec.loader, assertion.rewrite.AssertionRewritingHook):
            found[name] = spec.origin
    return found


class _TestModules:
    """Finds test modules by the names that pytest knows them by, in every import mode."""

    def __init__(self, files: Mapping[str, str], *, hook: Any) -> None:
        self.files = files
        self.hook = hook

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in self.files:
            file = Path(self.files[name])
            inside = [str(file.parent)] if file.name == "__init__.py" else None
            return importlib.util.spec_from_file_location(
                name, file, loader=self.hook, submodule_search_locations=inside
            )
        if any(other.startswith(f"{name}.") for other in self.files):
            return PathFinder.find_spec(name, path) or ModuleSpec(name, None, is_package=True)
        return None


@contextmanager
def as_pytest(
    config: pytest.Config, *, files: Mapping[str, str], options: Mapping[str, object]
) -> Iterator[None]:
    """Makes this rank import `files` (module name -> file) with rewritten assertions.

    Failed ones are explained as pytest does.
    """
    vars(config.option).update(options)
    sys.meta_path.insert(0, _TestModules(files, hook=config.pluginmanager.rewrite_hook))
    item: Any = SimpleNamespace(ihook=config.hook, config=config)
    # While it is suspended, `assert a == b` is explained.
    explaining = assertion.pytest_runtest_protocol(item)
    next(explaining)
    try:
        yield
    finally:
        explaining.close()


def traceback_of(error: BaseException, *, config: pytest.Config) -> tuple[str, str, int]:
    """Returns pytest's text for an exception, and the file and line where it was raised."""
    info = pytest.ExceptionInfo.from_exception(error)
    outside = info.traceback.filter(lambda entry: not str(entry.path).startswith(HERE))
    # Where nothing is outside the kit the fault is its own, and its frames are kept.
    if outside:
        info.traceback = outside
    style = config.option.tbstyle
    if style == "auto":
        style = "long"
    text = io.StringIO()
    shown = info.getrepr(style=style, showlocals=config.option.showlocals)
    shown.toterminal(TerminalWriter(text))
    last = info.traceback[-1]
    return text.getvalue().strip("\n"), str(last.path), last.lineno + 1
