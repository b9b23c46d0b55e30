"""How a checkpoint is found by its name, and what is said where it is not.

    pytest tests/test_find.py
"""
import json
import shutil
import sys
import types
from pathlib import Path

import pytest

import sample
from formats.find import PUBLISHED, WEIGHTS, local_folder
from wan_s2v import WanS2VPipeline

HERE = Path(__file__).parents[1]
ID = "Wan-AI/Wan2.2-S2V-14B"
GIVEN = ["--audio", str(HERE / "samples" / "voice.flac"), "--image", str(HERE / "samples" / "face.png")]


class NotThere(FileNotFoundError, ValueError):
    """As huggingface_hub.errors.LocalEntryNotFoundError."""


def hub(monkeypatch, folders):
    """A huggingface_hub whose cache holds {id: folder}; None: not installed."""
    def snapshot_download(name, local_files_only):
        assert local_files_only, "46 GB would be downloaded without a question"
        if name not in folders:
            raise NotThere(name)
        return str(folders[name])
    monkeypatch.setitem(sys.modules, "huggingface_hub", folders if folders is None else types.SimpleNamespace(snapshot_download=snapshot_download))


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch, capsys):
    """By the command line as from Python."""
    shutil.copytree(WEIGHTS / "tiny", tmp_path / "snapshots" / "42bf4cf")
    hub(monkeypatch, {ID: tmp_path / "snapshots" / "42bf4cf"})
    assert WanS2VPipeline.from_pretrained(ID).checkpoint.folder == tmp_path / "snapshots" / "42bf4cf"
    out = tmp_path / "out.mp4"
    assert sample.cli([*GIVEN, "--ckpt", ID, "--out", str(out), "--size", "64x64", "--steps", "1", "--clip-frames", "16", "--clips", "1"]) == 0
    assert out.exists()


@pytest.mark.parametrize("installed", [{}, None], ids=["not in the cache", "not installed"])
@pytest.mark.parametrize("name", [ID, "Wan2.2-S2V-14B", "models/Wan2.2-S2V-14B"])
def test_else_the_command_is_said_that_gets_it(tmp_path, monkeypatch, capsys, installed, name):
    """Exactly, on one line, by the command line and from Python; likewise for README's folder name before it is there."""
    hub(monkeypatch, installed)
    monkeypatch.chdir(tmp_path)
    assert sample.cli([*GIVEN, "--ckpt", name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "`hf download Wan-AI/Wan2.2-S2V-14B --local-dir Wan2.2-S2V-14B`, 46 GB (" in said
    with pytest.raises(ValueError, match="hf download Wan-AI/Wan2.2-S2V-14B --local-dir Wan2.2-S2V-14B`"):
        WanS2VPipeline.from_pretrained(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, words", [("someone/else", "hf download someone/else --local-dir else"), ("nonsense", "give a folder, or one of Wan-AI/"),
                                         ("a/b/c", "give a folder")])
def test_other_names(tmp_path, monkeypatch, name, words):
    hub(monkeypatch, {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        local_folder(name)


def test_a_gguf_file_is_a_checkpoint_too(tmp_path):
    """With the folder that it lies in, see `open_checkpoint`, which names what is wrong with other files."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert local_folder(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"


def test_sizes_on_disk():
    """From the published tensor shapes: S2V in bfloat16, the other denoisers in float32; umT5 in bfloat16, VAE and wav2vec2 in float32."""
    count = {name: entry["parameters"] for name, entry in json.loads((HERE / "golden" / "manifest_summary.json").read_text()).items()}
    umt5, vae21 = 2 * count["umt5-xxl-encoder"], 4 * count["vae2_1"]
    wanted = {"Wan2.2-S2V-14B": 2 * count["s2v-14B"] + umt5 + vae21 + 4 * count["wav2vec2-large-xlsr-53"],
              "Wan2.2-TI2V-5B": 4 * count["ti2v-5B"] + umt5 + 4 * count["vae2_2"]}
    wanted |= {f"Wan2.2-{task}": 2 * 4 * count[task.lower().replace("a14b", "A14B")] + umt5 + vae21 for task in ("T2V-A14B", "I2V-A14B")}
    assert PUBLISHED == {name: round(size / 1e9) for name, size in wanted.items()}


def test_readme_has_the_links_and_the_command():
    text = (HERE / "README.md").read_text()
    assert "(https://github.com/Wan-Video/Wan2.2)" in text and "(LICENSE)" in text
    assert "hf download Wan-AI/Wan2.2-S2V-14B --local-dir Wan2.2-S2V-14B" in text
    for name, size in PUBLISHED.items():
        assert f"https://huggingface.co/Wan-AI/{name})" in text and f"{size} GB" in text
