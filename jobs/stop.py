"""Ctrl-C, SIGTERM and SIGHUP: the running step ends, then the program; what is finished is on disk already (jobs/parts.py).

The first signal raises Stopped in the main thread, at once or at the end of a block that is worth finishing (`finish_first`). A second one
ends the process where it stands, and so do GRACE seconds: a call into a GPU cannot be interrupted, so a thread of its own looks on.
A program that imports this and calls nothing keeps Python's own handling. Only the standard library is imported: this comes before torch.
"""
import os
import select
import signal
import sys
import threading
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 8.0          # seconds from the first signal to the end, whatever is running

number = 0           # of the first signal; 0: none came
working = False      # set by a program that has begun its work: before it nothing is there to be kept
finishing = False    # inside finish_first
closed = []          # standard streams that were, by number
abrupt = False       # a thread may be in a call into PyTorch: taken down with Python's end it would abort the process
kept = "what was finished before the running step is kept, the same command goes on"           # said by a program that is ended where it stands


class Stopped(KeyboardInterrupt):
    """One of SIGNALS came; `number` says which."""


def status():
    """The exit status of a program that was stopped: 130, 143 or 129, as shells say it."""
    return 128 + (number or signal.SIGINT)


def fill_closed():
    """A standard stream that was closed leads nowhere: else the next file opened got its number, and all that ffmpeg says."""
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:
        closed.append(spare)
    os.close(spare)


def watch():
    """For the first lines of a program: from here on a signal ends it without a traceback, and once `working` as described above."""
    fill_closed()                                                    # or the pipe below would be what is read as standard input
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)           # written to at once, even while the main thread is in a long call
    for which in SIGNALS:
        if signal.getsignal(which) is not signal.SIG_IGN:            # as nohup and background jobs of a shell have it
            signal.signal(which, handle)
    threading.Thread(target=look_on, args=(read,), daemon=True).start()


def end(code):
    """All is written, what comes now finds nothing to stop. A program that was stopped ends here: taking PyTorch down may take seconds."""
    for which in SIGNALS:
        if signal.getsignal(which) is handle:
            signal.signal(which, signal.SIG_IGN)
    if number or abrupt:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def handle(which, frame):
    global number
    first, number = not number, number or which
    if first and working and not finishing:                          # else `finish_first` or `look_on` will end it
        raise Stopped


def look_on(pipe):
    global number
    came, words = os.read(pipe, 1)[0], "stopped\n"                   # before `handle` is called, maybe, whose number must be the first
    if working:
        select.select([pipe], [], [], GRACE)                         # until the second one comes, or time is up
        words = f"\nstopped at once: {kept}\n"
    number = number or came
    with suppress(OSError):                                          # the terminal is gone
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, words.encode())
    os._exit(status())


@contextmanager
def finish_first():
    """A signal that comes inside raises Stopped when the block is done."""
    global finishing
    finishing = True
    try:
        yield
    finally:
        finishing = False
    if number and working:
        raise Stopped
