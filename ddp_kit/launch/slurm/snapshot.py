"""The code as it is submitted, copied into the run directory: a queued job sees no later edits.

The code is the recipe's repository, or its folder where there is none. Data and installed
packages are not copied.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp_kit.launch.environment import environment
from ddp_kit.launch.plan import LaunchError

GIT_TIMEOUT_S = 30.0
# what git says where there is none; of one that belongs to somebody else it says another thing
OUTSIDE = "not a git repository"


@dataclass(frozen=True, kw_only=True)
class Code:
    """Where a recipe's code lives and where its copy goes.

    `is_tracked`: the root is that of a git repository.
    """

    recipe: Path
    root: Path
    copy: Path
    is_tracked: bool

    @property
    def copied_recipe(self) -> Path:
        """The recipe inside the copy."""
        return self.copy / self.recipe.relative_to(self.root)

    def folders(self, chdir: Path, *, paths: Sequence[str] = ()) -> tuple[str, ...]:
        """Returns the copy's folders that Python looks into.

        First for modules beside where the user stands, then for those of `paths` that are in the
        repository (`src` on PYTHONPATH, an editable install), then at the root.
        """
        looked = [chdir, *(Path(path).resolve() for path in paths)]
        inside = [path for path in looked if path.is_relative_to(self.root)]
        copies = [str(self.copy / path.relative_to(self.root)) for path in inside]
        return tuple(dict.fromkeys([*copies, str(self.copy)]))

    def take(self) -> None:
        """Copies the code; an earlier copy gives way once the new one is whole.

        Raises: LaunchError if it cannot be written, or git refuses to list the files.
        """
        unfinished = self.copy.with_name(f".{self.copy.name}.tmp")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for path in self._files():
                target = unfinished / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.root / path, target, follow_symlinks=False)
            if self.copy.exists():
                shutil.rmtree(self.copy)
            unfinished.rename(self.copy)
        except OSError as error:
            raise LaunchError(
                f"{self.copy}: the code cannot be copied there ({error.strerror}). "
                "Type another --run-dir."
            ) from error
        if self.is_tracked:
            self._tell_revision()

    def _tell_revision(self) -> None:
        """Writes down beside the copy which commit it is, and how it differs from that."""
        head = _git(self.root, "rev-parse", "--verify", "--quiet", "HEAD", check=False)
        about = {"revision": head.decode().strip(), "root": str(self.root)}
        text = json.dumps(about, indent=2) + "\n"
        self.copy.with_name("code.json").write_text(text, encoding="utf-8")
        difference = _git(self.root, "diff", "HEAD", check=False)
        self.copy.with_name("code.diff").write_bytes(difference)

    def _files(self) -> Iterator[Path]:
        """The files of the code, relative to the root.

        In a repository what git tracks, and Python files beside the recipe that it does not yet.
        """
        if self.is_tracked:
            beside = self.recipe.parent.relative_to(self.root) / "*.py"
            new = ("--others", "--", f":(glob,top){beside.as_posix()}")
            listed = _git(self.root, "ls-files", "-z").split(b"\0")
            listed += _git(self.root, "ls-files", "-z", *new).split(b"\0")
            found = [Path(os.fsdecode(name)) for name in dict.fromkeys(listed) if name]
        else:
            found = [path.relative_to(self.root) for path in sorted(self.root.glob("*.py"))]
        for path in found:
            whole = self.root / path
            # else it is deleted, or a repository of its own
            if whole.is_symlink() or whole.is_file():
                yield path


def code_of(recipe: Path, *, copy: Path) -> Code:
    """Returns the code that a recipe belongs to, and changes nothing.

    Raises: LaunchError if git refuses to read the repository around it.
    """
    recipe = recipe.resolve()
    top = b""
    if recipe.parent.is_dir():
        top = _git(recipe.parent, "rev-parse", "--show-toplevel", allows=OUTSIDE).rstrip(b"\n")
    root = recipe.parent
    if top:
        root = Path(os.fsdecode(top)).resolve()
    return Code(recipe=recipe, root=root, copy=copy, is_tracked=bool(top))


def code_of_module(name: str, *, copy: Path, paths: Sequence[str]) -> Code | None:
    """Returns the code that a module (`package.module`) belongs to, found in `paths`.

    The module is not imported. None if it is not there, or if the repository that it is in does
    not hold that folder of `paths` too. Raises: LaunchError as `code_of`.
    """
    parts = Path(*name.split("."))
    for folder in (Path(path).resolve() for path in paths):
        for path in (folder / parts / "__init__.py", folder / f"{parts}.py"):
            if not path.is_file():
                continue
            code = code_of(path, copy=copy)
            if code.is_tracked and folder.is_relative_to(code.root):
                return code
            return None
    return None


def _git(folder: Path, *arguments: str, check: bool = True, allows: str = "\0") -> bytes:
    """What git says, in any encoding.

    b"" without git, with `check` off where git refuses, or where it refuses with what is allowed.
    """
    command = ["git", "-C", str(folder), *arguments]
    environ = {**environment(), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, check=False, timeout=GIT_TIMEOUT_S
        )
    except FileNotFoundError:
        return b""
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"git {arguments[0]} in {folder} takes more than {GIT_TIMEOUT_S:g} s. "
            "--no-snapshot goes without a copy."
        ) from error
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.decode(errors="replace").strip()
    if check and allows not in said:
        raise LaunchError(
            f"git {arguments[0]} in {folder}: {said}. --no-snapshot goes without a copy."
        )
    return b""
