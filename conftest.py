"""pytest: one thread per process (the tests are small, two processes share two cores); every parity gap is printed, passed or not."""
import gc
import os
import signal
from functools import cache

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:                # as behind nohup or &: programs under test would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """A run frees its networks with gc.collect(): here that need not look through PyTorch and all tests, 0.1 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def ffmpeg_is_asked_once():
    """What it says of a file that is unchanged, and that it has an encoder: a start takes 20 ms, and a video has seven of these."""
    from media import ffmpeg, sound, video
    streams, check = cache(lambda path, *stamp: look(path)), cache(lambda program: check_encoder())
    look, check_encoder = ffmpeg.streams, video._check_encoder

    def program():
        try:
            return ffmpeg.imageio_ffmpeg.get_ffmpeg_exe()
        except RuntimeError:                                         # there is none
            return None

    def stamped(path):
        if not os.path.isfile(path):
            return look(path)
        seen = os.stat(path)
        return streams(path, program(), seen.st_ino, seen.st_size, seen.st_mtime_ns)
    with pytest.MonkeyPatch.context() as patch:
        for module in (ffmpeg, sound):
            patch.setattr(module, "streams", stamped)
        patch.setattr(video, "_check_encoder", lambda: check(program()))
        yield


def pytest_terminal_summary(terminalreporter):
    lines = [value for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, []) if report.when == "call"
             for name, value in report.user_properties if name == "parity"]
    if lines:
        terminalreporter.section("gaps to the official numbers")
    for line in sorted(lines):
        terminalreporter.write_line(line)
