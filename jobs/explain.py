"""What went wrong, for people: errors of the input and of the machine have one line, mistakes of the code show themselves."""
import re

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

DEVICE_ERRORS = torch.AcceleratorError, TorchDynamoException, InductorError      # a RuntimeError of any other kind is a mistake of the code


def explain(error, args):
    """One line for an exception, None for a mistake of the code.  args: of the command line, None before they are known"""
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        return f"the device is out of memory{f' for {wanted[1]} more' if wanted else ''}: choose a smaller --size or fewer --clip-frames"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "can't allocate memory" in str(error):    # Python's, PyTorch's
        return "the memory of this machine is full: choose a smaller --size, fewer --clip-frames or a smaller picture"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    if isinstance(error, DEVICE_ERRORS):
        what = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"PyTorch fails on {args.device}: {what[:300]}; try --no-compile, or a smaller --size"
    return None
