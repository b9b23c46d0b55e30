"""Many videos from one command: `python sample.py --batch FILE`, or FOLDER. A bad job gets its line, the others go on.

    FILE     a job a line, as JSON: options of the command line under their long names, {"audio": "a.wav", "image": "b.png", "seed": 3};
             what the command line itself says holds for all jobs; names of files are looked for from the folder of FILE
    FOLDER   a job for every sound in it; --image is one picture, or a folder with pictures of the same names

First every job is checked, which reads sound and picture and no weights. Then those that are good are made in their order, but those of one
checkpoint together: its networks are loaded once. After every job FILE.summary.json or FOLDER/batch.json says how all of them stand, and
what each finished video was made from. So the same command again makes what is missing, and a file that is no result of the same job is
never written over unless --restart says so.
"""
import argparse
import glob
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, fields
from difflib import get_close_matches
from io import StringIO
from pathlib import Path

from tqdm import tqdm

from fast.estimate import estimate_seconds, forward_flops, other_seconds
from fast.plan import RunConfig
from fast.probe import cap_memory
from jobs import lock, stop
from jobs.explain import explain
from jobs.live_plan import check_stream
from jobs.parts import difference, made_from, safely
from media.ffmpeg import FFmpegError, probe
from media.video import check_output, is_folder

SOUNDS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".ac3", ".wma", ".mka")     # no films: those are results
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
PATHS = ("audio", "image", "pose_video", "out")
MACHINE = ("ckpt", "device", "dtype", "vae_dtype", "vram", "fp8", "resident", "attention8", "compile")      # jobs of one pipeline share them
FOR_ALL = ("help", "batch", "restart", "parallel")                             # what a job cannot say


@dataclass
class Job:
    """A line of FILE or a sound of FOLDER, and what has become of it."""
    number: int
    given: dict                  # option -> value as JSON has it
    name: str                    # for people
    said: str = ""               # what is wrong with it, if it failed
    state: str = "waiting"       # then "running", and "done", "failed" or "stopped"; "done before" in an earlier run
    out: str = ""
    args: argparse.Namespace = None
    pipeline: object = None
    made: dict = None            # from `made_from`
    earlier: dict = None         # its record of a run before this one, see Summary
    work: float = 0.0            # operations of its denoising
    seconds: float = 0.0         # that it took

    def __str__(self):
        return f"{self.state:<11} {self.name}" + (f": {self.said}" if self.said else f" -> {self.out}")


def run_batch(args, program):
    """args: of the command line; program: the module sample.py, under whatever name it runs -> exit status, 0 if all jobs are done"""
    folder, jobs = read_jobs(args)
    world = args.world                                               # under torchrun, see jobs/ranks.py
    path = Path(args.batch, "batch.json") if folder is args.batch else Path(f"{args.batch}.summary.json")
    with only_one(path) if not (world and world.rank) else nullcontext():        # rank 0 locks for all
        summary = Summary(path, jobs, world and world.rank)
        try:
            check_all(jobs, args, folder, program, summary)
            if world:
                world.all_have("checked")                            # before the first result is there
            make_all(jobs, program, summary, world)
            if world:
                world.all_have("made")
                if world.rank:
                    return 0
                summary.merge()
        finally:
            if not (world and world.rank):
                try:
                    summary.write()
                finally:
                    print(summary)
    return 0 if all(job.state.startswith("done") for job in jobs) else 2


@contextmanager
def only_one(path):
    """A batch is made by one process at a time.  raises ValueError naming the other, or if the summary's folder cannot be written"""
    file = path.with_name(f".{path.name}.lock")
    try:
        held = lock.take(file)
    except OSError as error:
        raise ValueError(f"cannot write beside {path} ({error.strerror}), which says what is done: copy the batch to a folder that can be "
                         "written") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.give(held)


# ------------------------------------------------------------------------------------------------------------------ what is to be done

def read_jobs(args):
    """-> the folder from which names are looked for, [Job, ...] not checked yet.  raises ValueError if there is nothing to do"""
    path = args.batch
    if args.out != "out.mp4" and not (args.out.endswith(("/", os.sep)) or os.path.isdir(args.out)):
        raise ValueError(f"--out is the folder for all videos of a batch, got {args.out}: end it in /, or give every job its own \"out\"")
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.lower().endswith(SOUNDS) and os.path.isfile(os.path.join(path, name)))
        jobs = [Job(n, {"audio": name}, printable(name)) for n, name in enumerate(names, 1)]
        for job in jobs:
            if args.image is not None and os.path.isdir(args.image):
                give_picture(job, args.image)
        wanted = f"sounds ({', '.join(SOUNDS)})"
    else:
        if not os.path.isfile(path):
            raise ValueError(f"wanted a file with a job a line, or a folder of sounds, got {path}, which is neither")
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
        if b"\0" in data:
            raise ValueError(f"wanted a text file with a job a line, in UTF-8, got {path}, which is none")
        lines = data.splitlines()
        jobs = [read_line(n, line) for n, line in enumerate(filter(bytes.strip, lines), 1)]
        wanted = 'a job a line, such as {"audio": "a.wav", "image": "b.png"}'
    if not jobs:
        raise ValueError(f"{path} holds no job: wanted {wanted}")
    return path if os.path.isdir(path) else os.path.dirname(path) or ".", jobs


def read_line(number, line):
    """A line of FILE, bytes -> Job"""
    try:
        given = json.loads(line.decode())
        if not isinstance(given, dict):
            raise ValueError("no object in braces")
    except (ValueError, RecursionError) as error:
        return Job(number, {}, f'"{printable(line[:40].decode(errors="replace"))}"', f"no JSON ({error})")
    names = [given[name] for name in ("audio", "image", "out", "prompt") if isinstance(given.get(name), str)] + [f"job {number}"]
    return Job(number, given, printable(os.path.basename(names[0].rstrip("/"))[:60]))


def give_picture(job, folder):
    """The picture of a folder that is named as the job's sound is."""
    stem = os.path.splitext(job.given["audio"])[0]
    found = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[0] == stem and name.lower().endswith(PICTURES))
    if len(found) == 1:
        job.given["image"] = os.path.abspath(os.path.join(folder, found[0]))
    else:
        job.said = f"wanted one picture {printable(stem)}.* in {folder}, there are {len(found)}"


def printable(name):
    """A file's own name may hold what a terminal takes for commands."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def parse(job, args, folder, parser, inputs):
    """Sets job.args: the command line's options, over them the job's; and adds to inputs {path: job that reads it}.

    raises  ValueError naming the option
    """
    if job.said:
        raise ValueError(job.said)
    actions = {action.option_strings[0]: action for action in parser._actions}
    argv, off = [], []
    for name, value in job.given.items():
        option = "--" + name.replace("_", "-")
        action = actions.get(option)
        if action is None or action.dest in FOR_ALL:
            near = get_close_matches(option, actions, 1)
            hint = f": did you mean {json.dumps(near[0][2:])}?" if near else " (see --help)"
            raise ValueError(f"{json.dumps(name)} is no option of a job{hint}")
        if action.dest in PATHS and isinstance(value, str) or action.dest == "ckpt" and os.path.isdir(os.path.join(folder, str(value))):
            value = os.path.join(folder, value)
        if value is None:
            continue
        if isinstance(value, (list, dict)) or isinstance(value, bool) != (action.nargs == 0):
            wanted = "true or false" if action.nargs == 0 else "a number or a text, as on the command line"
            raise ValueError(f"{json.dumps(name)} wants {wanted}, got {json.dumps(value)[:60]}")
        if action.nargs != 0:
            argv.append(f"{option}={value}")
        elif value:
            argv.append(option)
        else:
            off.append(action.dest)
    job.args = parser.parse_args(argv, argparse.Namespace(**vars(args)))
    for name in off:
        setattr(job.args, name, False)
    if check_stream(job.args):
        raise ValueError("\"live\" is no option of a job: a batch makes no streams")
    if "out" not in job.given:
        source = job.given.get("audio") or job.given.get("image") or job.args.audio or job.args.image or f"{job.number:03d}"
        job.args.out = os.path.join(folder if args.out == "out.mp4" else args.out, os.path.splitext(os.path.basename(source))[0] + ".mp4")
    job.out = job.args.out
    inputs |= {os.path.realpath(path): job.number for path in (job.args.audio, job.args.image, job.args.pose_video) if path is not None}


def check_all(jobs, args, folder, program, summary):
    """Every job gets a pipeline and a state: "waiting", "done before" or "failed"."""
    parser, pipelines, outs, inputs = program.parser(), {}, {}, {}
    for job in jobs:
        guarded(job, lambda: parse(job, args, folder, parser, inputs))
    for job in jobs:
        if job.state != "failed":
            guarded(job, lambda: check(job, program, pipelines, outs, inputs, summary))
    print(f"batch    {len(jobs)} jobs: {summary.count('waiting')} to make, {summary.count('done before')} done before, "
          f"{summary.count('failed')} cannot be made")


def check(job, program, pipelines, outs, inputs, summary):
    """Plan a job, and see what has become of it in an earlier run.  raises ValueError"""
    args, real = job.args, os.path.realpath(job.out)
    if (first := outs.setdefault(real, job.number)) != job.number:
        remedy = "rename one of the sounds" if os.path.isdir(args.batch) else "give another \"out\""
        raise ValueError(f"{job.out} is written by job {first} already: {remedy}")
    if real in inputs:
        raise ValueError(f"{job.out} is read by job {inputs[real]}: give another \"out\"")
    machine = tuple(getattr(args, name) for name in MACHINE)
    if machine not in pipelines:
        pipelines[machine] = program.open_pipeline(args)
    job.pipeline = pipelines[machine]
    with redirect_stderr(StringIO()):                                # warnings come when the job does
        plan = job.pipeline.plan(**{field.name: getattr(args, field.name) for field in fields(RunConfig) if field.name not in job.pipeline.choices})
    job.made = made_from(plan, job.pipeline.checkpoint) | dict(av_offset=args.av_offset)
    if summary.is_done(job, plan):
        job.state = "done before"
        return
    check_output(job.out, inputs=(args.audio, args.image, args.pose_video))
    job.work = plan.forwards * sum(forward_flops(plan.denoiser, plan.tokens[-1], plan.video_tokens))
    if summary.rate is None:                                         # until one is done
        summary.rate = (estimate_seconds(plan) + other_seconds(plan, job.pipeline.checkpoint.configs["vae"], is_folder(job.out))) / job.work


def guarded(job, do):
    """Do something for a job; if it fails, say so in a line. Only a mistake of the code shows more, and the others go on all the same."""
    try:
        do()
    except Exception as error:
        if stop.number:                                              # a signal may show itself as an error of what it has ended
            raise
        job.state, job.said = "failed", explain(error, job.args)
        if job.said is None:
            traceback.print_exc()
            job.said = f"{type(error).__name__}: {error}"
        print(f"error: job {job.number}, {job.name}: {job.said}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------------ doing it

def make_many(pipeline, jobs):
    """`WanS2VPipeline.batch`"""
    results, outs = [], set()
    for job in jobs:
        try:
            if not isinstance(job, Mapping):
                raise ValueError(f"every job is a dict of arguments, got {job!r:.60}")
            job = dict(job)
            if job.get("out") is None or (real := os.path.realpath(job["out"])) in outs:
                raise ValueError(f"every job wants an out of its own, got {job.get('out')}")
            results.append(pipeline(**job | dict(keep_frames=False)))
            outs.add(real)
        except Exception as error:
            if stop.number:
                raise
            error.__traceback__ = error.__context__ = error.__cause__ = None             # which would keep what the job held
            results.append(error)
    return results


def make_all(jobs, program, summary, world=None):
    """Make what is waiting, job after job; of many ranks each what no other has taken."""
    pipelines = list(dict.fromkeys(job.pipeline for job in jobs if job.state == "waiting"))
    todo = sorted((job for job in jobs if job.state == "waiting"), key=lambda job: pipelines.index(job.pipeline))
    for n, job in enumerate(todo):
        if world and not world.takes(job):
            continue
        for other in pipelines:
            if other is not job.pipeline:
                other.networks.kept.clear()                          # leaves the memory to this one's
        if job.pipeline.device.type == "cuda":
            cap_memory(job.pipeline.device, job.args.vram or 1e9)    # 1e9: what another job's --vram has set no longer holds
        left = summary.rate * sum(later.work for later in todo[n:])
        print(f"\njob {job.number}/{len(jobs)}  {job.name} -> {job.out}, about {tqdm.format_interval(left)} left for all", flush=True)
        begin = time.perf_counter()
        try:
            summary.begin(job)
            guarded(job, lambda: program.make_video(job.pipeline, job.args))
            job.seconds = time.perf_counter() - begin
            if job.state == "running":
                summary.finish(job)
        except BaseException:                                        # Ctrl-C
            if job.state == "running":
                job.state = "stopped"
                summary.forget(job)
            raise
        if job.state == "failed":
            summary.forget(job)
        summary.write()


class Summary:
    """How all jobs stand, and what finished videos were made from: a JSON file that is renewed after every job.

    {"done": 9, "failed": 3, "left": 0, "jobs": [{"job", "name", "state", "out", "error", "seconds"}, ...], "made": {out: record, ...}}
    A record outlives the run: {"from": what it is made from, "before": stamp of the file before that, "after": stamp of the result}
    """

    def __init__(self, path, jobs, rank=None):
        self.path, self.jobs, self.made, self.rate, self.spent = path, jobs, {}, None, (0.0, 0.0)
        try:
            for file in [path] * path.exists() + self.others():
                found = json.loads(file.read_text(encoding="utf8"))
                self.made |= found["made"] if file == path else self.own(found)
            if not all(isinstance(record, dict) and isinstance(record.get("from"), dict) for record in self.made.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} is no summary of a batch: move it") from None
        self.path = path.with_suffix(f".{rank}.json") if rank else path
        self.write()
        for file in self.others() if rank is None else ():           # of a run over ranks that was killed
            file.unlink()

    def others(self):
        """The summaries that ranks 1, 2, ... keep beside that of rank 0, each of what it makes."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.[0-9]*.json"))

    def merge(self):
        """On rank 0, when all have done their jobs: the summaries become one."""
        for file in self.others():
            theirs = json.loads(file.read_text(encoding="utf8"))
            self.made |= self.own(theirs)
            for job, other in zip(self.jobs, theirs["jobs"]):
                if job.state == "waiting" and other["state"] in ("done", "failed"):
                    job.state, job.said, job.seconds = other["state"], other["error"] or "", other["seconds"]
        self.write()
        for file in self.others():
            file.unlink()

    def own(self, theirs):
        """Of another rank's summary the records of the jobs that it took: of the others it has what was so when all began."""
        keys = [self.key_of(job["out"]) for job in theirs["jobs"] if job["state"] not in ("waiting", "done before")]
        return {key: theirs["made"][key] for key in keys if key in theirs["made"]}

    def key(self, job):
        return self.key_of(job.out)

    def key_of(self, out):
        return os.path.relpath(os.path.realpath(out), os.path.realpath(self.path.parent))            # so that the folder can be moved

    def count(self, state):
        return sum(job.state.startswith(state) for job in self.jobs)

    def is_done(self, job, plan):
        """Whether its result is there.  raises ValueError if something else is there"""
        record, there, unfinished = self.made.get(self.key(job)), stamp(job.out), os.path.exists(job.out.rstrip("/") + ".parts")
        if there is None:
            return False
        same = record is not None and record["from"] == job.made
        if same and "after" in record and there[0] == record["after"][0]:
            return True
        if same and "after" not in record and there != record.get("before") and looks_like(job.out, plan):   # killed behind the last rename
            return not unfinished
        if job.args.restart:
            return False
        if record is None:
            raise ValueError(f"{job.out} is there already and not made by this batch: move it, or add --restart to write over it")
        what = "was changed since" if same else f"was made from something else ({difference(record['from'], job.made)})"
        raise ValueError(f"{job.out} {what}: move it, give another \"out\", or add --restart to make it again")

    def begin(self, job):
        job.state, job.earlier = "running", self.made.get(self.key(job))
        self.made[self.key(job)] = {"from": job.made, "before": stamp(job.out)}
        self.write()

    def forget(self, job):
        """It was not made: what comes to lie there later must not be taken for it."""
        record = self.made.get(self.key(job), {})
        if "after" not in record and record.get("before") == stamp(job.out):
            self.made.pop(self.key(job), None)
            if job.earlier is not None:
                self.made[self.key(job)] = job.earlier

    def finish(self, job):
        job.state = "done"
        self.made[self.key(job)]["after"] = stamp(job.out)
        seconds, work = self.spent
        self.spent = seconds + job.seconds, work + job.work
        self.rate = self.spent[0] / self.spent[1]

    def write(self):
        jobs = [dict(job=job.number, name=job.name, state=job.state, out=job.out, error=job.said or None, seconds=round(job.seconds, 1))
                for job in self.jobs]
        counts = dict(done=self.count("done"), failed=self.count("failed"))
        text = json.dumps(counts | dict(left=len(jobs) - sum(counts.values()), jobs=jobs, made=self.made), indent=1)
        try:
            with safely(self.path) as path:
                path.write_text(text + "\n", encoding="utf8")
        except OSError as error:
            raise OSError(f"cannot write {self.path}, which says what is done ({error.strerror or error}): once it can be, the same command goes on") \
                from None

    def __str__(self):
        counts = ", ".join(f"{count} {words}" for state, words in (("failed", "failed"), ("waiting", "not begun"), ("stopped", "stopped"))
                           if (count := self.count(state)))
        lines = [f"{job.number:>8}  {job}" for job in self.jobs]
        return "\n".join((f"\nbatch    {self.count('done')} of {len(self.jobs)} done{', ' if counts else ''}{counts}; see {self.path}", *lines))


def looks_like(path, plan):
    """Could this video, or folder of PNG frames, be what a plan has made?"""
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        return names == [f"{n:06d}.png" for n in range(len(names))] and len(names) <= plan.frames
    try:
        info = probe(path)
    except (OSError, ValueError, FFmpegError):
        return False
    return (info.width, info.height) == (plan.width, plan.height) and 0 < info.frames <= plan.frames


def stamp(path):
    """[bytes, time of the last change] of a file or folder, None if it is not there; an empty folder is none yet."""
    if not os.path.lexists(path) or os.path.isdir(path) and not os.listdir(path):
        return None
    found = os.lstat(path)
    return [found.st_size, found.st_mtime_ns]
