"""Where an MP3 file is damaged, and how long it was.

Its frames have no timestamps: to every decoder what follows lost frames moves up, in the file it stands behind them.

Source  ISO 11172-3 and 13818-3: the 4 bytes that begin a frame; the Info tag as LAME writes it
"""
from pathlib import Path

BITRATES = {3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),      # kbit/s by version: 3 is MPEG-1, 2 MPEG-2, 0 MPEG-2.5
            2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}
BITRATES[0] = BITRATES[2]
TAGS = (b"ID3", b"TAG", b"APE")
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def frame(data, at):
    """-> bytes of the Layer III frame that begins there, samples in it; (0, 0) for none"""
    head = data[at:at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0, 0
    version, bitrate, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return 0, 0
    samples = 1152 if version == 3 else 576
    return samples // 8 * 1000 * BITRATES[version][bitrate - 1] // RATES[version][rate] + (head[2] >> 1 & 1), samples


def adts_frame(data, at):
    """-> bytes of the AAC frame that begins there, 0 for none"""
    head = data[at:at + 7]
    known = len(head) == 7 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0 and head[2] >> 2 & 15 < 13                  # layer 0, one of 13 rates
    return ((head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5) if known else 0


def holes(path):
    """Stretches of two frames or more that are damaged or missing.

    returns  [(samples in front of it, frames that fit into it)], samples of a frame.
             A frame is whole if another one, a tag or the end of the file follows it.
    """
    data, found, before, whole_bytes, samples, at = Path(path).read_bytes(), [], 0, [], 0, 0

    def whole(at):
        """-> bytes and samples of a whole frame, else (0, 0)"""
        n, held = frame(data, at)
        return (n, held) if n and (at + n >= len(data) or data[at + n:at + n + 3] in TAGS or frame(data, at + n)[0]) else (0, 0)

    while at < len(data):
        now, held = whole(at)
        if now:
            if whole_bytes or tag_in(data[at:at + 60]) < 0:                 # the first may hold facts, no sound
                whole_bytes.append(now)
                samples, before = held, before + held
            at += now
        elif data[at:at + 3] == b"ID3":
            at = after_id3(data, at)
        else:
            again = next((later for later in sync(data, at + 1) if whole(later)[0]), len(data))
            lost = round((again - at) * len(whole_bytes) / sum(whole_bytes)) if whole_bytes and again < len(data) else 0
            if lost > 1:                                 # less is a tag
                found.append((before, lost))
                before += lost * samples
            at = again
    return found, samples


def tag_in(head):
    """Where the Info or Xing tag stands in the first 60 bytes of a first frame, -1 without one."""
    return max(head.find(b"Info"), head.find(b"Xing"))


def tagged(path):
    """Seconds of sound that the Info or Xing tag of an MP3 file promises, without what its encoder put before and behind it; 0 without a tag."""
    with open(path, "rb") as file:
        data = file.read(10)
        file.seek(after_id3(data, 0) if data[:3] == b"ID3" else 0)
        data = file.read(1 << 12)
    at = next((at for at in sync(data, 0) if frame(data, at)[0]), len(data))
    data, (_, samples) = data[at:], frame(data, at)
    tag = tag_in(data[:60])
    if tag < 0 or not (flags := data[tag + 7]) & 1:                  # it may hold the number of bytes alone
        return 0
    fields = tag + 12 + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)         # behind frames, bytes, places, quality
    around = int.from_bytes(data[fields + 21:fields + 24], "big")    # two numbers of 12 bits, behind the encoder's name
    total = int.from_bytes(data[tag + 8:tag + 12], "big") * samples - (around >> 12) - (around & 4095)
    return max(total, 0) / RATES[data[1] >> 3 & 3][data[2] >> 2 & 3]


def after_id3(data, at):
    return at + 10 + sum((byte & 127) << shift for byte, shift in zip(data[at + 6:at + 10], (21, 14, 7, 0)))


def sync(data, at):
    """Where bytes of 0xFF stand."""
    while (at := data.find(b"\xff", at)) >= 0:
        yield at
        at += 1
