"""One output, one writer: a lock that vanishes with the process that holds it, and whose text says who that is.

flock is kept by the system, so the lock of a killed process is none. It holds between the processes of one machine, and between machines
where the disk passes it on (NFS does). Where a disk knows no locks, the text counts: of a process of this machine that lives, or of another
machine.
"""
import errno
import fcntl
import os
import re
import socket
import time
from contextlib import contextmanager, suppress


def take(path):
    """Lock the file at `path`, made if it is not there -> its descriptor, for `give`.

    raises  ValueError naming the process that has it
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            if not is_free(file):
                raise ValueError(f"{os.path.dirname(path)} is in use by {holder(file) or 'another process'}: wait for it, or choose another output")
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):     # else its holder has just removed it
                os.ftruncate(file, 0)
                try:
                    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode(), 0)
                except OSError:                                      # a full disk; nobody else holds it
                    os.unlink(path)
                    raise
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


@contextmanager
def one_at_a_time(folder):
    """Of the programs that do this in a folder, each waits for the others. Leaves nothing in it."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):                                      # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def give(file):
    os.ftruncate(file, 0)
    os.close(file)


def is_free(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
    found = re.match(r"process (\d+) on (\S+) since", holder(file))                          # a disk without locks
    return not found or found[2] == socket.gethostname() and not os.path.exists(f"/proc/{found[1]}")


def holder(file):
    """What the lock says, without what a terminal would take for a command."""
    return "".join(letter for letter in os.pread(file, 200, 0).decode(errors="replace") if letter.isprintable())
