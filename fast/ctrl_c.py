"""Imported first by every program: Ctrl-C ends it with one word in place of a traceback, during the long imports too. Exit status 130.

Imports are left at once, for some packages take a KeyboardInterrupt for a module that is missing. They are over when the program has its `main`;
from then on it is Python's own KeyboardInterrupt, so that what is open is closed.
"""
import os
import signal
import sys


def handle(number, frame):
    if hasattr(sys.modules["__main__"], "main"):
        raise KeyboardInterrupt
    os.write(2, b"stopped\n")
    os._exit(130)


def hook(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:    # not where it is ignored, as behind nohup
    signal.signal(signal.SIGINT, handle)
    sys.excepthook = hook
