"""What a program prints: nothing in it commands the terminal, whatever a file's name holds, and the work does not depend on its being read."""
import os
import re
import sys
from contextlib import suppress

from jobs.stop import fill_closed

# Control characters, and those that turn the direction of text. A bar returns to the start of its line; the others are shown as \x1b and the like.
UNSAFE = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
LONGEST = 2000               # letters of an error or warning, which is one line: names inside of files have any length


def shown(text):
    """A text as it is printed."""
    begin = "\r" if text.startswith("\r") else ""
    text = UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text[len(begin):])
    if text.startswith(("error: ", "warning: ")):
        text = text.replace("\n", "\\n").replace("\t", "\\t")
        text = text if len(text) <= LONGEST else f"{text[:LONGEST - 500]} ... {text[-400:]}"
    return begin + text


class Printed:
    """A standard stream whose reader may go away, as in `| head -1`, or whose disk may be full: what is printed from then on is lost."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, shown(text))
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        try:
            call(*args)
        except (OSError, ValueError):                                # ValueError: it was closed
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:        # where what waits in its buffer goes, then and at the end
                os.dup2(nowhere.fileno(), self.stream.fileno())


def any_letters():
    """Letters that the terminal does not have are printed as escapes, and are no error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                           # not where something else stands in their place
            stream.reconfigure(errors="backslashreplace")


def take_over():
    """Print through Printed. A stream that was closed (`2>&-`) leads nowhere."""
    fill_closed()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r" if number == 0 else "w"))
    any_letters()
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Printed):
            setattr(sys, name, Printed(getattr(sys, name)))
