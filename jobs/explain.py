"""What went wrong, for people: errors of the input and of the machine have one line, mistakes of the code show themselves."""
import errno
import re
import sys

import torch

COMPILER_ERRORS = {"torch._dynamo.exc": "TorchDynamoException", "torch._inductor.exc": "InductorError"}


def device_errors():
    """Kinds of RuntimeError that are no mistakes of the code. The compiler, 2 s to import, raises none where it is not imported yet."""
    return torch.AcceleratorError, *(getattr(sys.modules[module], name) for module, name in COMPILER_ERRORS.items() if module in sys.modules)


def explain(error, args):
    """One line for an exception, None for a mistake of the code.  args: of the command line, None before they are known"""
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        return f"the device is out of memory{f' for {wanted[1]} more' if wanted else ''}: choose a smaller --size or fewer --clip-frames"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "can't allocate memory" in str(error):    # Python's, PyTorch's
        return "the memory of this machine is full: choose a smaller --size, fewer --clip-frames or a smaller picture"
    if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EIO):
        return f"cannot read or write {error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    if isinstance(error, device_errors()):
        what = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"PyTorch fails on {args.device}: {what[:300]}; try --no-compile, or a smaller --size"
    return None
