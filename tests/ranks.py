"""Functions run by several processes that know each other through torch.distributed, on gloo; and the two programs that tests give them."""
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import sample
import test_parity
from fast.parallel import ParallelDenoiser, Ranks
from jobs import stop
from vae import VAE


def on_ranks(n, folder, function, *args, limit=240):
    """function(rank, *args) in n forks of this process -> what each returned. A test fails with what the first to fail has said."""
    folder = Path(folder)
    failed = forked(n, limit, run_child, n, folder, function, args)
    said = [path.read_text() for path in sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime)]
    assert not failed, said[0] if said else f"no answer within {limit} s"
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(n)]


def forked(n, limit, function, *args):
    """function(rank, *args), which never returns, in n forks of this process -> whether one of them failed"""
    children = []
    for rank in range(n):
        if (pid := os.fork()) == 0:
            function(rank, *args)
        children.append(pid)
    end, left, failed = time.monotonic() + limit, set(children), False
    while left and not failed:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                failed = failed or status != 0
        failed = failed or time.monotonic() > end
        time.sleep(0.02)
    for pid in left:                                                 # they wait for one that is gone
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return failed


def as_program(function, *args, limit=60):
    """function(*args) in a fork of this process, as a program of its own but for the start of Python -> whether it failed, stdout, stderr"""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("said", "errors")]
        failed = forked(1, limit, run_alone, files, function, args)
        return failed, *(file.read_text(errors="replace") for file in files)


def run_alone(rank, files, function, args):
    """Never returns, as run_child."""
    status = 1
    try:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))             # in place of pytest's
        function(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def stoppable(arguments, files=(os.devnull, os.devnull)):
    """`python sample.py ARGUMENTS`, which hears signals, but for its start, in a fork in a process group of its own: stdout and stderr are added to
    these files -> the process, as subprocess.Popen has it"""
    process = multiprocessing.get_context("fork").Process(target=stop_or_end, args=(arguments, files))
    process.start()

    def wait(limit=None):
        process.join(limit)
        if process.exitcode is None:
            raise subprocess.TimeoutExpired("sample.py", limit)
        return process.exitcode
    return SimpleNamespace(pid=process.pid, poll=lambda: process.exitcode, wait=wait)


def stop_or_end(arguments, files):
    """Never returns, as run_child."""
    os.setsid()
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))                 # in place of pytest's
    stop.watch()
    code = sample.cli(arguments)
    stop.end(code)
    sys.stdout.flush()
    os._exit(code)


def forget(folder=Path(__file__).parents[1]):
    """In a fork: what was imported from a folder was not, and is not found there; but for the packages of an environment in it."""
    def there(place):
        return Path(place).is_relative_to(folder) and "site-packages" not in str(place)
    for name, module in list(sys.modules.items()):
        places = [getattr(module, "__file__", None)] if getattr(module, "__file__", None) else list(getattr(module, "__path__", []))
        if any(there(str(place)) for place in places):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path and not there(path)]
    sys.path_importer_cache.clear()


def run_child(rank, n, folder, function, args):
    """Never returns: the fork must not go on with its parent's tests."""
    status = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=n)
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(function(rank, *args)))
        dist.barrier()
        status = 0
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(status)


def as_torchrun(n, folder, arguments, limit=240):
    """torchrun --nproc-per-node n sample.py ARGUMENTS, but for the start of n + 1 processes of Python: what it prints is added to folder/said and
    folder/errors -> whether a rank failed"""
    (reader, writer), parent = os.pipe(), os.getpid()
    if (agent := os.fork()) == 0:                                    # its threads in this process would be forked with it, and their locks
        keep_store(writer, parent)
    os.close(writer)
    try:
        return forked(n, limit, run_program, n, folder, int(os.read(reader, 9)), arguments)
    finally:
        os.close(reader)
        os.kill(agent, 9)
        os.waitpid(agent, 0)


def keep_store(writer, parent):
    """Never returns, as run_child: what torchrun itself does, until it is killed or its parent has gone."""
    try:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        while os.getppid() == parent:
            time.sleep(0.5)
    finally:
        os._exit(1)


def run_program(rank, n, folder, port, arguments):
    """Never returns, as run_child."""
    status = 1
    try:
        for number, name in ((1, "said"), (2, "errors")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))             # in place of pytest's
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
        torch.set_num_threads(1)
        status = sample.cli(arguments)
        sys.stdout.flush()
    finally:
        os._exit(status)


class Watched(test_parity.Watched):
    """Of a network that computes both branches at once."""

    def both(self, *args):
        self.results += (found := self.function.both(*args))
        return found


def golden_rows(rank, split, names):
    """Reference cases of the official code by name, made by all ranks together -> {name: rows}"""
    ranks, network = Ranks(rank, split), test_parity.network

    def shared(module):
        net = network(module)
        if isinstance(net, VAE):
            net.ranks = ranks
        return net
    test_parity.network, test_parity.Watched = shared, Watched
    test_parity.FastDenoiser = None                                  # not once more by one process
    return {name: rows_of(name, ranks) for name in names}


def rows_of(name, ranks):
    path = test_parity.GOLDEN / f"{name}.json"
    meta = test_parity.json.loads(path.read_text())
    case = next(test_parity.CASES[prefix] for prefix in test_parity.CASES if name.startswith(prefix))
    with torch.inference_mode():
        golden = test_parity.load_file(path.with_suffix(".safetensors"))
        return [test_parity.compare(name, *row) for row in case(meta, golden, lambda net: ParallelDenoiser(net, chunk=37, ranks=ranks))]
