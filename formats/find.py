"""Where a checkpoint is: a folder, one that comes along, or one in the cache of huggingface_hub. Nothing is downloaded."""
import re
from pathlib import Path

WEIGHTS = Path(__file__).parents[1] / "weights"      # the tiny checkpoints: of a checkout, or as `pip install .` copies them
PUBLISHED = {"Wan2.2-S2V-14B": 46, "Wan2.2-T2V-A14B": 126, "Wan2.2-I2V-A14B": 126, "Wan2.2-TI2V-5B": 34}     # by Wan-AI, GB on disk (docs/formats.md)


def local_folder(path=None):
    """The folder of a checkpoint on this machine.

    path    a folder, or a GGUF file in one; None or "weights/tiny" for the one that comes along, from wherever; "weights/tiny-t2v", -i2v,
            -ti2v: random numbers, made on first use; or a hub id such as Wan-AI/Wan2.2-S2V-14B, if huggingface_hub is installed and has it in its cache
    raises  ValueError with the command that gets it
    """
    folder = WEIGHTS / "tiny" if path is None else Path(path)
    if not folder.exists() and folder.parent == Path("weights"):
        folder = WEIGHTS / folder.name
    if not folder.exists() and folder.parent.resolve() == WEIGHTS.resolve():
        from tiny.random_weights import ensure_tiny                  # here: only where it is asked for
        ensure_tiny(folder)
    return folder if folder.exists() else cached(str(path)) or refuse(folder, str(path))


def cached(name):
    """The folder of a hub id in the cache of huggingface_hub, or None."""
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, local_files_only=True))
    except (ImportError, ValueError, OSError):                       # not installed; no hub id; not in the cache (its errors are of these kinds)
        return None


def refuse(folder, name):
    known = folder.name in PUBLISHED
    if known or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        hub = f"Wan-AI/{folder.name}" if known else name
        raise ValueError(f"no checkpoint folder {name}: get it by `hf download {hub} --local-dir {folder.name}`"
                         f"{f', {PUBLISHED[folder.name]} GB' if known else ''} (`pip install huggingface_hub` brings hf), then give {folder.name}")
    raise ValueError(f"no checkpoint folder {name}: give a folder, or one of {', '.join(f'Wan-AI/{name}' for name in PUBLISHED)}")
