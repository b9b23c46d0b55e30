"""What `pip install .` and `pip install -e .` give: the pipeline and the tiny weights from any folder.

    pytest tests/test_install.py
"""
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ranks import as_program, forget

HERE = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "golden", "docs", "data", "runs", "build", "tiny-[!l]*", "__pycache__")


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_installed_and_used_from_another_folder(tmp_path, editable):
    """Built and installed as pip does it; then a program in an empty folder finds the pipeline and the trained tiny weights."""
    shutil.copytree(HERE, tmp_path / "source", ignore=LEFT_OUT)
    (tmp_path / "elsewhere").mkdir()
    made = subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "site",
                           *["-e"] * editable, tmp_path / "source"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr

    def elsewhere():
        forget()
        os.chdir(tmp_path / "elsewhere")
        before = list(sys.path)
        site.addsitedir(str(tmp_path / "site"))
        sys.path[:] = [path for path in sys.path if path not in before] + before                     # before a copy that is installed already
        import convert_weights, sample, train, tiny.faces  # noqa: E401, F401
        from wan_s2v import WanS2VPipeline
        print(*[WanS2VPipeline.from_pretrained(name).checkpoint.folder for name in (None, "weights/tiny")])
    _, said, errors = as_program(elsewhere)
    assert said.split() == [str(tmp_path / ("source" if editable else "site") / "weights" / "tiny")] * 2, errors
    found = Path(said.split()[0])
    assert all((found / path.name).read_bytes() == path.read_bytes() for path in (HERE / "weights" / "tiny").iterdir())      # not random numbers
    assert len(list((found.parent / "tiny-live").glob("live.*.safetensors"))) == 2


def test_every_module_is_installed():
    """A file that pyproject.toml forgets would be missing only at the user's."""
    listed = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(listed["py-modules"]) == {path.stem for path in HERE.glob("*.py")} - {"conftest", "test_parity"}
    folders = {path.parent.name for path in HERE.glob("*/*.py")} - {"tests", "docs", "build"}
    assert set(listed["packages"]) == folders | {"weights.tiny", "weights.tiny-live"}


def test_every_package_is_locked_with_its_hashes():
    """requirements.lock has the versions that pyproject.toml pins, and pip would take every line of it under --require-hashes."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    locked = re.sub(r"\\\n *", "", re.sub(r"^ *#.*\n", "", (HERE / "requirements.lock").read_text(), flags=re.MULTILINE)).splitlines()
    line = re.compile(r"([\w-]+)==([\w.]+)( ;[^#]*?)?( --hash=sha256:[0-9a-f]{64})+")
    assert all(line.fullmatch(text) for text in locked)
    versions = {line.match(text)[1]: line.match(text)[2] for text in locked}
    pinned = [pin.split("==") for pin in project["dependencies"] + project["optional-dependencies"]["test"] if "==" in pin]
    assert len(pinned) == 12 and all(versions[name] == version for name, version in pinned)
