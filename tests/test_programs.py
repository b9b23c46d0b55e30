"""What all programs share: Ctrl-C is quiet, and each says what it wrote.

    pytest tests/test_programs.py
"""
import dataclasses
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

import convert_weights
from fast import bench, bench_live
from tiny import faces, random_weights

HERE = Path(__file__).parents[1]
PROGRAMS = ["train.py", "convert_weights.py", "test_parity.py",
            *(f"{path.parent.name}.{path.stem}" for folder in ("tiny", "fast") for path in sorted((HERE / folder).glob("*.py"))
              if '__name__ == "__main__"' in path.read_text())]


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_imports_is_quiet(tmp_path, program):
    """While torch is imported: one word, exit status 130. Some packages would take the interruption for a missing module."""
    (tmp_path / "torch.py").write_text("import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
                                       "except KeyboardInterrupt:\n    raise ImportError\n")
    command = [program] if program.endswith(".py") else ["-m", program]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command], cwd=HERE, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("own", ({}, {"GOMP_SPINCOUNT": "5"}))
def test_threads_that_wait_leave_the_cores_to_others(tmp_path, own):
    """What the program sets is there before torch is, unless it was set already: two streams on two cores made 5 frames a second each, for 20."""
    (tmp_path / "torch.py").write_text("import os\nprint(os.environ['GOMP_SPINCOUNT'])\nraise SystemExit\n")
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | {"PYTHONPATH": str(tmp_path)} | own
    done = subprocess.run([sys.executable, "sample.py"], cwd=HERE, env=env, capture_output=True, text=True)
    assert done.stdout == own.get("GOMP_SPINCOUNT", "1000") + "\n", done.stderr


def test_ctrl_c_during_the_work_is_quiet_and_closes_what_is_open(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import fast.ctrl_c\nimport os, signal\n\n\ndef main():\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n    finally:\n"
                       "        print('closed')\n\n\nmain()\n")
    done = subprocess.run([sys.executable, program], env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True, timeout=60)
    assert done.returncode in (130, -2) and (done.stdout, done.stderr) == ("closed\n", "stopped\n")


def test_programs_say_what_they_wrote(tmp_path, capsys):
    for main, arguments, target in (
            (faces.main, [], tmp_path / "face.png"),
            (random_weights.main, ["s2v-14B", "--tiny", "--ours"], tmp_path / "ours"),
            (random_weights.main, ["s2v-14B", "--tiny"], tmp_path / "official"),
            (convert_weights.main, [str(HERE / "weights" / "tiny")], tmp_path / "converted"),
            (convert_weights.main, [str(HERE / "weights" / "tiny"), "--to", "comfy"], tmp_path / "comfy")):
        place = [*arguments[:1], str(target), *arguments[1:]]
        assert main(place) == 0, place
        said = capsys.readouterr().out
        assert target.exists() and f"wrote {target}" in said.replace("wrote    ", "wrote "), (place, said)


@pytest.fixture
def small_vae(monkeypatch):
    """As what takes time is not what is tested."""
    configs = random_weights.tiny("s2v-14B")
    configs["vae"] = dataclasses.replace(configs["vae"], dim=4, dec_dim=4)
    monkeypatch.setattr(random_weights, "tiny", lambda task: configs)


def test_the_benchmark_on_a_cpu_finishes_or_says_what_it_wants(capsys, monkeypatch, small_vae):
    def run(*arguments):
        bench.main(bench.parser().parse_args(["--device", "cpu", "--size", "64x64", "--repeats", "1", "--frames", "4", *arguments]))
        return capsys.readouterr().out
    assert "tiny at 64x64" in run()
    said = run("--simulate", "2,4")
    assert "2 = 2 x 1: step " in said and "4 = 2 x 2: step " in said and json.loads(said.splitlines()[-1])["simulated"][2]["bytes_sent"][0] > 0
    with pytest.raises(ValueError, match="--against runs all ways there are, got --fp8: leave it out"):
        run("--against", "/nowhere", "--fp8")
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu", "--preset", "ti2v-5B", "--stage", "all"])
    monkeypatch.setitem(sys.modules, "fast.ctrl_c", types.ModuleType("ctrl_c"))            # this process keeps its own Ctrl-C
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(bench.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "wants a GPU" in error, error


def test_the_benchmark_of_streams(capsys, small_vae):
    """Ways that ranks do not have are refused; on a CPU one is measured."""
    with pytest.raises(ValueError, match="--ways of --ranks are beside, rings8.beside, graphs.beside, rings8.graphs.beside, got graphs"):
        bench_live.main(bench_live.parser().parse_args(["--ranks", "2", "--ways", "graphs"]))
    with pytest.raises(ValueError, match="--ways rings8,beside want a GPU: a CPU measures plain"):
        bench_live.main(bench_live.parser().parse_args(["--device", "cpu", "--ways", "rings8,beside"]))
    bench_live.main(bench_live.parser().parse_args(["--device", "cpu", "--size", "64x64", "--steps", "1", "--window", "3", "--blocks", "1"]))
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1])["plain"]["frames_per_s"] > 0 and "frames/s" in said
