"""pytest: one thread per process (the tests are small, two processes share two cores); every parity gap is printed, passed or not."""
import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:                # as behind nohup or &: programs under test would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """A run frees its networks with gc.collect(): here that need not look through PyTorch and all tests, 0.1 s each time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    lines = [value for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, []) if report.when == "call"
             for name, value in report.user_properties if name == "parity"]
    if lines:
        terminalreporter.section("gaps to the official numbers")
    for line in sorted(lines):
        terminalreporter.write_line(line)
