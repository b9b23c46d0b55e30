"""How long a sound file says it is, without decoding it."""
import os
import struct

import soundfile

from media.mp3 import tagged


def held_share(path):
    """How much of the sound chunk that its header promises a wav or aiff file holds, up to 1; 1 for other formats."""
    with open(path, "rb") as f:
        order = {b"RIFF": "<", b"FORM": ">"}.get(f.read(12)[:4])
        while order and len(head := f.read(8)) == 8:
            name, size = struct.unpack(f"{order}4sI", head)
            if name in (b"data", b"SSND"):
                held = os.path.getsize(path) - f.tell()
                return min(held / size, 1) if 0 < size < 0x7FFF0000 else 1      # programs that write to a pipe leave 0 or a huge size
            f.seek(size + size % 2, os.SEEK_CUR)
    return 1


def announced(path):
    """Seconds that the header of a file promises, as libsndfile reads it, and whether they are no guess (an mp3 without a tag does not say); 0 if it
    cannot."""
    if seconds := tagged(path):
        return seconds, True
    try:
        with open(path, "rb") as f, soundfile.SoundFile(f) as file:      # opened here, so that libsndfile goes by the content, not by the name
            frames = file.frames if file.frames < 2**40 else 0           # flac written to a pipe says 2**63
            return frames / (held_share(path) or 1) / file.samplerate, file.format != "MP3"
    except (soundfile.LibsndfileError, TypeError):                       # TypeError: a name ending in .raw
        return 0, False
