"""`torchrun --nproc-per-node N sample.py ...` starts N processes of one command line: which does what, who speaks, how one that fails ends all.

Rank 0 prints the plan, the bar and the result and writes the video; the others are silent. Every rank says twice a second that it lives, through
the store of torchrun, which none of the exchanges uses. The first to fail, or to see that another is gone, claims the word: one line names the
rank, and all others end: by their own error where an exchange breaks off, else by an interrupt, and in the end whatever they are doing. SIGTERM is
what torchrun ends the others with when one has failed; where none has, somebody wants all to stop, which nobody need wait for.
"""
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fast.parallel import Ranks, choose_split
from fast.probe import pick_device
from jobs import stop
from jobs.explain import explain
from wan_s2v import Nothing

BEAT, SILENT = 0.5, 20.0     # seconds between two signs of life, and without one until a rank is given up
INTERRUPT, EXIT = 10.0, 25.0 # seconds from a failure elsewhere until the work is interrupted, and until the process ends; torchrun kills after 30


class World:
    """All processes that torchrun has started, seen from one of them."""

    def __init__(self):
        self.rank, self.size, self.local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        self.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        if self.rank:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
        self.pairing, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=120)))
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30))
        self.store.set(f"who/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
        self.over, self.ending, self.done, self.beats, self.speaking = False, False, threading.Event(), {}, threading.Lock()
        signal.set_wakeup_fd(-1)                                     # else jobs/stop.py ends this process before it has named who failed
        for which in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(which, self.told)                          # torchrun ends all at once when one has failed
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=self.watch, daemon=True).start()

    def told(self, *_):
        self.over = True

    # ---- life and death

    def watch(self):
        """A thread: say that this rank lives, see whether the others do; when one is gone, end this process too."""
        number = 0
        try:
            while not (self.over or self.has("failed")):
                if self.done.wait(BEAT):
                    return
                number += 1
                self.store.set(f"beat/{self.rank}", str(number))
                self.name_the_dead()
        except RuntimeError:                                         # the store is gone, and torchrun with it
            if self.rank == 0:
                print("error: torchrun has ended, so all ranks end", file=self.stderr)
        stopped, self.over = self.stopped(), True
        interrupt, end, status = (BEAT, stop.GRACE if stop.working else 2 * BEAT, 130) if stopped else (INTERRUPT, EXIT, 2)
        if self.done.wait(interrupt):
            return
        try:
            self.name_the_dead(absent=not stopped)
        except RuntimeError:
            pass
        if not self.ending:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)            # also out of a read that waits
        if not self.done.wait(end - interrupt):
            os._exit(status)

    def stopped(self):
        """Is the end of all somebody's wish, not a failure?"""
        try:
            if not self.has("failed") and self.over and not self.done.wait(BEAT) and all(self.has(f"who/{rank}") for rank in range(self.size)):
                self.name_the_dead()
                self.store.compare_set("failed", "", "stopped")
            return self.has("failed") and self.store.get("failed") == b"stopped"
        except RuntimeError:                                         # the store is gone
            return False

    def has(self, key):
        return self.store.check([key])

    def name_the_dead(self, absent=False):
        """absent: those that never came, too"""
        for rank in set(range(self.size)) - {self.rank}:
            here = self.has(f"who/{rank}")
            how = self.is_gone(rank) if here else "ended before it knew the others; all others end" if absent else None
            if how and not self.has(f"ended/{rank}"):                # asked last: it may have ended well meanwhile
                self.claim(rank, how)

    def is_gone(self, rank):
        """A few words if a rank lives no more, else None."""
        host, pid = self.store.get(f"who/{rank}").decode().split()
        if host == socket.gethostname() and not lives(pid):
            return f"process {pid} on {host} was killed or ended without a word; all others end"
        beat, now = self.store.get(f"beat/{rank}") if self.has(f"beat/{rank}") else b"", time.monotonic()
        if self.beats.get(rank, (None,))[0] != beat:
            self.beats[rank] = beat, now
        if now - self.beats[rank][1] > SILENT:
            return f"process {pid} on {host} has been silent for {SILENT:.0f} s; all others end"
        return None

    def claim(self, rank, line):
        """Print the one line, if no one has. The other thread does not end this process before it is out, see `end`."""
        mine = f"{self.rank}, thread {threading.get_ident()}, of rank {rank}: {line}"
        with self.speaking:
            if self.store.compare_set("failed", "", mine).decode() == mine:
                print(f"\nerror: rank {rank}: {line}", file=self.stderr, flush=True)     # behind the bar of rank 0

    def failed(self, error, args):
        """An exception has ended the work of this rank -> exit status. What comes from an exchange that broke off is another rank's failure."""
        line, patience, self.ending = explain(error, args), time.monotonic() + INTERRUPT, True
        try:
            if isinstance(error, KeyboardInterrupt):
                self.store.compare_set("failed", "", "stopped")
            while True:
                self.name_the_dead()
                if self.has("failed"):
                    stopped = self.store.get("failed") == b"stopped"
                    if stopped and self.rank == 0:
                        print("stopped", file=self.stderr)
                    return 130 if stopped else 2
                if line is not None or not isinstance(error, RuntimeError) or time.monotonic() > patience:
                    break
                time.sleep(BEAT)
            if line is None:
                traceback.print_exception(error, file=self.stderr)
                line = f"{type(error).__name__}: {error}"
            self.claim(self.rank, line)
        except RuntimeError:                                         # the store is gone; see `watch`
            pass
        return 2

    def end(self, status):
        """Others need not miss this rank. One that has failed leaves at once: exchanges that others have left may never end."""
        try:
            self.store.set(f"ended/{self.rank}", str(status))
        except RuntimeError:
            pass
        self.done.set()
        if status:
            self.speaking.acquire(timeout=BEAT * 10)
            sys.stdout.flush()
            os._exit(status)
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- one video by all

    def arrange(self, args, checkpoint):
        """Connect all ranks for videos of a checkpoint -> Ranks"""
        guidance = args.guidance or checkpoint.sampling["guidance"]
        guidance = guidance if isinstance(guidance, (tuple, list)) else (guidance,)
        split, device = choose_split(self.size, args.parallel, checkpoint.configs["denoiser"].n_head, guidance), torch.device(args.device)
        self.connect(device, "nccl" if device.type == "cuda" else "gloo")
        return Ranks(self.rank, split)

    def connect(self, device, backend, **options):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=self.pairing, rank=self.rank, world_size=self.size, **options)
        stop.working = True

    # ---- a stream, of which each makes some steps

    def line_up(self, device):
        """Connect all ranks for a stream, see fast/relay.py, which waits for its sound however long that pauses."""
        self.connect(device, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=365))

    # ---- many videos, each by one

    def takes(self, job):
        """Is this job of a batch this rank's? It is the first's to ask."""
        return self.store.compare_set(f"job/{job.number}", "", str(self.rank)).decode() == str(self.rank)

    def all_have(self, what):
        """Wait until every rank has come here; a rank that is gone ends this, see `watch`."""
        self.store.set(f"{what}/{self.rank}", "1")
        while not self.store.check([f"{what}/{rank}" for rank in range(self.size)]):
            time.sleep(BEAT)


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self").exists()                       # no such folder on this system: the signs of life must do


def run_rank(argv, program):
    """`sample.cli` of one rank.  program: the module sample.py -> exit status"""
    world, args, status = World(), None, 0
    try:
        args = program.parser().parse_args(argv)
        status = work(world, args, program)
    except SystemExit:                                               # --help
        pass
    except BaseException as error:
        status = world.failed(error, args)
    world.end(status)
    return status


def work(world, args, program):
    if args.parallel == "batch" and args.batch is None or args.batch is not None and args.parallel not in ("auto", "batch"):
        raise ValueError("--batch gives every rank its own videos, which is --parallel batch; the others make one video together: leave one out")
    if args.live and args.parallel != "auto":
        raise ValueError(f"--live gives every process some of the steps of a block: leave out --parallel {args.parallel}")
    args.device = str(pick_device(args.device, world.local))
    args.world = world
    stop.working = args.batch is not None                            # whose ranks need no connection; else see `connect`
    if world.rank == 0 or args.batch is not None or args.live:
        return program.main(args)
    pipeline = program.open_pipeline(args)
    plan = program.plan_of(pipeline, args)
    for _ in pipeline.generate(plan, keep=Followed(*pipeline.networks.ranks.once(None))):        # rank 0 writes
        pass
    return 0


class Followed(Nothing):
    """What rank 0 has found of an earlier run, for the others.  done: clips; states: {name: tensors} of its Parts"""

    def __init__(self, done, states):
        self.done, self.states = done, states

    def load(self, name, **shapes):
        return self.states.pop(name, None)                           # later clips begin anew
