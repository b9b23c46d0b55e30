"""What `pip install .` and `pip install -e .` give: the pipeline and the tiny weights from any folder.

    pytest tests/test_install.py
"""
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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
    program = ("import site, sys; before = list(sys.path); site.addsitedir(sys.argv[1]); "             # before a copy that is installed already
               "sys.path[:] = [p for p in sys.path if p not in before] + before; "
               "from wan_s2v import WanS2VPipeline; import sample, train, convert_weights, tiny.faces; "
               "pipelines = [WanS2VPipeline.from_pretrained(name) for name in (None, 'weights/tiny')]; "
               "print(*[pipeline.checkpoint.folder for pipeline in pipelines])")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "site"], cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / ("source" if editable else "site") / "weights" / "tiny")] * 2
    assert len(list((Path(done.stdout.split()[0]).parent / "tiny-live").glob("live.*.safetensors"))) == 2


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
