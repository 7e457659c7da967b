"""What `pip install` brings: ddp_kit, all of it, and nothing else at the top."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv builds the wheel")
def test_a_wheel_installs_every_module_of_ddp_kit_and_nothing_beside_it(tmp_path: Path) -> None:
    """A `launch` at the top would hide a user's own, and a file that git ignores would be missing."""
    words = ["uv", "build", "--wheel", "--offline", "--quiet", "--out-dir", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    (about,) = [top for top in tops if top.endswith(".dist-info")]
    assert tops == {"ddp_kit", about}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ddp_kit").rglob("*.py")}
    assert modules - set(names) == set()
    folder = ROOT / "recipes"
    recipes = {f"ddp_kit/_recipes/{path.relative_to(folder)}" for path in folder.rglob("*.py")}
    assert recipes - set(names) == set()
