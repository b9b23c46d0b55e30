"""Where a checkpoint is: a folder, one that comes along, or one on the hub."""
from pathlib import Path

WEIGHTS = Path(__file__).parents[1] / "weights"      # the tiny checkpoints: of a checkout, or as `pip install .` copies them


def local_folder(path=None):
    """The folder of a checkpoint on this machine.

    path  a folder; None or "weights/tiny" for the one that comes along, from wherever; "weights/tiny-t2v", -i2v, -ti2v: random numbers, made
          on first use; or a hub id, which huggingface_hub fetches if it is installed
    """
    folder = WEIGHTS / "tiny" if path is None else Path(path)
    if not folder.exists() and folder.parent == Path("weights"):
        folder = WEIGHTS / folder.name
    if not folder.exists() and folder.parent.resolve() == WEIGHTS.resolve():
        from tiny.random_weights import ensure_tiny                  # here: only where it is asked for
        ensure_tiny(folder)
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(path)))
    except ImportError:
        raise ValueError(f"no checkpoint folder {path}: give a folder, or install huggingface_hub to use a hub id") from None
    except Exception as error:                                       # of that package: network, login, unknown id
        raise ValueError(f"no checkpoint folder {path}, and the hub did not give it ({type(error).__name__}): give a local folder") from None
