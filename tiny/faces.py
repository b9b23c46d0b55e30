"""A drawn world for training: faces of 128 x 128 pixels whose mouths follow the sound, with captions that change what is seen.

A face is a row of numbers, one per column of FIELDS; sound gives the mouth, `motions` the rest, `draw` the picture. No data files.

Axes    n faces   P pixel frames   D columns of a face   h w picture size   m pictures of the n*P, painted at once
        S samples   J windows of sound
Units   head coordinates: pixels of a face of scale 1, (0, 0) between the eyes and the nose, y down; colours 0..1, pictures -1..1
Random  numbers are made on the generator's device and then moved: the same generator gives the same faces on every device.
"""
if __name__ == "__main__":
    import fast.ctrl_c  # noqa: F401
import argparse
import math
import re
import sys

import torch
import torch.nn.functional as F
from PIL import Image

from fast.probe import any_terminal

SIZE = 128           # pixels, both ways
FPS = 16             # frame k is shown at k / FPS seconds
RATE = 16000         # Hz

# ---- sound -> mouth --------------------------------------------------------------------------------------------------
WINDOW, HOP = 400, 80             # samples: 25 ms windows, one every 5 ms, centred on sample j * HOP
BAND = 150.0, 4000.0              # Hz: voice; sibilants lie above it and do not open a mouth
FLOOR, CEILING = -17.0, 4.5       # dB relative to the mean power of the sound: closed, wide open
ROUND, SPREAD = 380.0, 1750.0     # Hz, spectral centroid of narrow lips ("oo") and of wide ones ("ee")
SMOOTH = 0.08                     # s, full width at half maximum of the Hann kernel: the inertia of jaw and lips
REST = 0.08                       # share of the smoothed range cut off at either end, so that short closures close and vowels open


def articulation(wav, times):
    """Opening and width of a mouth that says `wav`.

    wav      (..., S) float32 16 kHz mono of any level      times  (P,) float, seconds; frame k of a video is at k / FPS
    returns  (..., P, 2) float32 in 0..1: opening, width. Opening is exactly 0 in silence, before 0 and after the end;
             the closed mouth has width 0.5
    raises   ValueError if the sound is empty
    The sound is normalised to mean 0 and variance 1 as audio.normalise does. In windows of 25 ms around t, with power p(f) in BAND,
        level(t)    = 10 log10(sum p / mean power of the sound)           dB
        loud(t)     = clamp((level - FLOOR) / (CEILING - FLOOR), 0, 1)
        opening(t)  = clamp((smooth(loud) - REST) / (1 - 2 REST), 0, 1)
        centroid(t) = sum f p sqrt(f) / sum p sqrt(f)                      Hz; sqrt(f): or the lowest formant would decide alone
        spread(t)   = clamp(log(centroid / ROUND) / log(SPREAD / ROUND), 0, 1)
        width(t)    = clamp(1/2 + smooth(min(4 loud, 1) (spread - 1/2)), 0, 1)
    smooth averages over a Hann kernel centred on t, so nothing is delayed.
    """
    if wav.shape[-1] == 0:
        raise ValueError("articulation wants sound, got 0 samples: check what was read")
    x = wav.float().reshape(-1, wav.shape[-1])                                                # (n, S)
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    level, centroid = spectrum((x - mean) / torch.sqrt(var + 1e-7))                           # (n, J) each
    loud = ((level - FLOOR) / (CEILING - FLOOR)).clamp(0, 1)
    spread = (torch.log(centroid / ROUND) / math.log(SPREAD / ROUND)).clamp(0, 1)
    tracks = smooth(torch.stack([loud, (4 * loud).clamp(max=1) * (spread - 0.5)], dim=1))     # (n, 2, J)
    times = times.to(wav.device, torch.float32)
    mouth = interpolate(tracks, times * (RATE / HOP)) * ((times >= 0) & (times * RATE <= wav.shape[-1]))
    mouth = torch.stack([(mouth[:, 0] - REST) / (1 - 2 * REST), mouth[:, 1] + 0.5], dim=-1).clamp(0, 1)      # (n, P, 2)
    return mouth.reshape(*wav.shape[:-1], *mouth.shape[1:])


def spectrum(x):
    """x (n, S) of variance 1 -> level (n, J) dB and centroid (n, J) Hz of the windows centred on sample j * HOP."""
    hann = torch.hann_window(WINDOW, device=x.device)
    frames = F.pad(x, (WINDOW // 2, WINDOW // 2 + HOP)).unfold(-1, WINDOW, HOP)               # (n, J, WINDOW)
    power = torch.view_as_real(torch.fft.rfft(frames * hann)).square().sum(-1)                # (n, J, WINDOW/2 + 1)
    hz = torch.arange(WINDOW // 2 + 1, device=x.device) * (RATE / WINDOW)
    lo, hi = math.ceil(BAND[0] * WINDOW / RATE), math.floor(BAND[1] * WINDOW / RATE) + 1
    power, hz = power[..., lo:hi], hz[lo:hi]
    unit = WINDOW * 0.375 * WINDOW / 2                  # what sum over half the spectrum is for a signal of variance 1: sum hann^2 = 3/8
    level = 10 * torch.log10(power.sum(-1) / unit + 1e-10)
    tilted = power * hz.sqrt()
    return level, ((tilted * hz).sum(-1) + 1e-6 * ROUND) / (tilted.sum(-1) + 1e-6)      # sums, no matmul: float32 on every device


def smooth(tracks):
    """tracks (n, c, J) -> same, each averaged over a Hann kernel whose full width at half maximum is SMOOTH; closed outside."""
    half = round(SMOOTH * RATE / HOP)
    kernel = torch.hann_window(2 * half + 1, periodic=False, device=tracks.device)
    return (F.pad(tracks, (half, half)).unfold(-1, 2 * half + 1, 1) * (kernel / kernel.sum())).sum(-1)


def interpolate(tracks, where):
    """tracks (n, c, J) at fractional positions `where` (P,) -> (n, c, P), linear between columns, clamped at the ends."""
    where = where.clamp(0, tracks.shape[-1] - 1)
    left = where.floor().long().clamp(max=max(tracks.shape[-1] - 2, 0))
    return torch.lerp(tracks[..., left], tracks[..., (left + 1).clamp(max=tracks.shape[-1] - 1)], (where - left).to(tracks))


# ---- faces -----------------------------------------------------------------------------------------------------------
HAIR = {"black": (36, 34, 42), "brown": (92, 56, 34), "yellow": (238, 198, 70), "red": (202, 82, 28), "grey": (150, 154, 164)}
BACKGROUND = {"blue": (112, 164, 218), "green": (124, 188, 138), "purple": (164, 136, 206), "yellow": (248, 222, 140),
              "white": (232, 234, 236)}
MOODS = ("neutral", "happy", "sad")
ANGRY = 3            # a mood that is never drawn for training from nothing: films.py shows it for fine-tuning
STYLES = ("short", "bob", "long", "bun", "round")
SKIN = (252, 220, 194), (236, 188, 150), (204, 148, 108), (150, 100, 70)                      # tone 0, 1/3, 2/3, 1
LIPS, INSIDE = (206, 70, 92), (132, 2, 50)       # the mouth's two colours: no face, cloth or background comes near them
INK = (44, 34, 36)                               # lashes, pupils, frames of glasses

# Per style: half width, half height, centre y and corner radius of the hair behind the head, radius of a bun on top,
# hairline y in the middle, its slope and its bend, ears seen or not. Head coordinates.
STYLE = torch.tensor([[30.5, 27.0, -15.0, 26.0, 0.0, -22.0, 0.16, 0.012, 1.0],      # short, parted at one side
                      [36.5, 37.0, -6.0, 29.0, 0.0, -20.5, 0.00, 0.002, 0.0],       # bob with a straight fringe
                      [36.0, 55.0, 12.0, 29.0, 0.0, -27.0, 0.00, 0.028, 0.0],       # long, middle of the forehead free
                      [30.5, 27.0, -15.0, 26.0, 12.0, -26.0, 0.00, 0.014, 1.0],     # bun
                      [43.0, 41.0, -13.0, 38.0, 0.0, -24.0, 0.00, 0.012, 0.0]])     # round and big
FIELDS = ("style tone wide hair_name background_name mood "                         # discrete numbers are indices into the tables above
          "x y scale jaw eye_x eye_y eye_size brow_y brow_size nose mouth_y neckline glasses "
          "skin_r skin_g skin_b hair_r hair_g hair_b iris_r iris_g iris_b clothes_r clothes_g clothes_b "
          "background_r background_g background_b "
          "back_w back_h back_y back_r bun line_y line_slope line_bend ears").split()
COLUMN = {name: i for i, name in enumerate(FIELDS)}
BINS = 5             # of tone and of width, for the rule below


def colours(table):
    """Table of 0..255 triples -> (rows, 3) float32 0..1."""
    return torch.tensor(list(table.values() if isinstance(table, dict) else table), dtype=torch.float32) / 255


def columns(name, count=3):
    """Slice of `count` columns from the one called `name`; a colour has 3."""
    return slice(COLUMN[name], COLUMN[name] + count)


def is_held_out(identity):
    """(n, D) -> (n,) bool. The rule: a face is held out when style + bin of tone + bin of width is a multiple of BINS.

    Every style, tone and width, and every pair of them, is seen in training; these triples, a fifth of all, never are.
    None of the three can be changed by a caption. Held-out faces keep to the middle half of their bins, so at least
    a twentieth of the whole range of tone or width lies between them and any training face of their style.
    """
    tone, wide = (identity[:, COLUMN[name]].mul(BINS).floor() for name in ("tone", "wide"))
    return (identity[:, COLUMN["style"]] + tone + wide) % BINS == 0


def identities(n, generator, device="cpu"):
    """n random training faces, mood neutral: (n, D) float32 on `device`, columns as FIELDS; never one that is_held_out."""
    return people(n, generator, held_out=False).to(device)


def held_out_identities(n, seed=0):
    """n faces that `identities` never draws (is_held_out says by which rule): (n, D) float32 on the CPU, the same for the same seed."""
    return people(n, torch.Generator().manual_seed(seed), held_out=True)


def people(n, generator, held_out):
    """The faces of both functions above, made on the CPU: the generator's device is synchronised once."""
    u = iter(torch.rand(n, 40, generator=generator, device=generator.device).cpu().unbind(1))

    def uniform(lo, hi, count=0):
        return lo + (hi - lo) * (torch.stack([next(u) for _ in range(count)], dim=1) if count else next(u))

    def choose(count, first=0):
        return uniform(first, count).long().clamp(max=count - 1)

    style, tone_bin = choose(len(STYLES)), choose(BINS)
    rest = torch.zeros_like(style) if held_out else choose(BINS, 1)
    wide_bin = (rest - style - tone_bin) % BINS
    edge = 0.25 if held_out else 1e-3
    tone, wide = (tone_bin + uniform(edge, 1 - edge)) / BINS, (wide_bin + uniform(edge, 1 - edge)) / BINS
    hair, background = choose(len(HAIR)), choose(len(BACKGROUND))
    face = torch.zeros(n, len(FIELDS))

    def put(**values):
        for name, value in values.items():
            value = value.float().reshape(n, -1)
            face[:, columns(name, value.shape[1])] = value

    put(style=style, tone=tone, wide=wide, hair_name=hair, background_name=background,
        x=uniform(-3, 3), y=uniform(-2, 2), scale=uniform(0.95, 1.06), jaw=uniform(0.06, 0.2), eye_x=uniform(12, 13.8),
        eye_y=uniform(-4.5, -2), eye_size=uniform(0.92, 1.12), brow_y=uniform(-16.5, -15), brow_size=uniform(0.9, 1.2),
        nose=uniform(0.85, 1.25), mouth_y=uniform(18.5, 21), neckline=uniform(5, 15), glasses=(uniform(0, 1) < 0.25).float())
    jitter = 0.03                                                     # of a colour: its name stays plain to see
    ramp = colours(SKIN)
    low = (tone * 3).floor().long().clamp(max=2)
    put(skin_r=torch.lerp(ramp[low], ramp[low + 1], (tone * 3 - low)[:, None]) + uniform(-jitter / 2, jitter / 2, 3),
        hair_r=colours(HAIR)[hair] + uniform(-jitter, jitter, 3), iris_r=hue(uniform(0.06, 0.62), 0.55, 0.65),
        clothes_r=hue(uniform(0.14, 0.74), uniform(0.35, 0.65), uniform(0.3, 0.6)),         # no red: the mouth's; darker than backgrounds
        background_r=colours(BACKGROUND)[background] + uniform(-jitter, jitter, 3), back_w=STYLE[style])
    return face


def hue(h, saturation, value):
    """Hue (n,) in 0..1, saturation and value -> (n, 3) colours."""
    saturation, value = (torch.as_tensor(v).expand(h.shape)[:, None] for v in (saturation, value))
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * h[:, None]) % 6
    return value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))


# ---- captions --------------------------------------------------------------------------------------------------------
OPENINGS = ("a person with {}", "a face with {}", "portrait with {}", "a person, {}", "a face talking, {}", "{}")
PLAIN = ("a person talking", "a face", "a person speaking, video")        # captions that name nothing


def warn_unless_known(prompt):
    """What the captions of training never said moves the picture to no good: name it."""
    said = " ".join((*OPENINGS, *PLAIN, *HAIR, *BACKGROUND, *MOODS, "hair background angry")).replace("{}", "")    # angry: of fine-tuning
    known = set(re.findall(r"\w+", said))
    if unknown := [word for word in re.findall(r"\w+", prompt.lower()) if word not in known]:
        print(f"warning: this checkpoint was not trained on the words {', '.join(unknown)}: expect a poor video. It knows {', '.join(HAIR)} hair; "
              f"{', '.join(BACKGROUND)} background; {', '.join(MOODS[1:])}", file=sys.stderr)


def say(parts, opening):
    """A caption of what is named, in the order given.  parts  one to three of "red hair", "blue background", "happy" """
    parts = [part for part in parts if part]
    if parts[0] in MOODS and opening.endswith("with {}"):                 # "a person with happy" is no English
        opening = opening.replace(" with", ",")
    return opening.format(", ".join(parts))


def apply(reference, hair=None, background=None, mood=None):
    """reference (n, D) -> (n, D): the same people with what is named changed. Named colours are exact, without jitter."""
    shown = reference.clone()
    for what, name, table in (("hair", hair, HAIR), ("background", background, BACKGROUND)):
        if name is not None:
            shown[:, COLUMN[f"{what}_name"]] = list(table).index(name)
            shown[:, columns(f"{what}_r")] = colours(table)[list(table).index(name)].to(shown)
    if mood is not None:
        shown[:, COLUMN["mood"]] = MOODS.index(mood)
    return shown


def captioned(reference, generator):
    """A random caption for each reference face, and the face it asks for.

    reference  (n, D), moods neutral           generator  torch.Generator
    returns    shown (n, D) on the device of the reference; captions, n strings. What a caption names is never what the reference has;
               what it does not name stays. About 40% are "", a few more name nothing, the rest name one to three things in any order
    Reading the references' colours synchronises with their device: pass them on the CPU where that matters.
    """
    faces = reference.cpu()
    names = faces[:, [COLUMN["hair_name"], COLUMN["background_name"]]].long().tolist()
    u = torch.rand(len(faces), 7, generator=generator, device=generator.device).tolist()
    rows, captions = [], []
    for row, (hair, background), (plain, subset, order, opening, a, b, c) in zip(faces, names, u):
        if plain < 0.43:
            rows.append(row)
            captions.append("" if plain < 0.40 else PLAIN[int(opening * len(PLAIN))])
            continue
        subset = 1 + int(subset * 7)                                      # bits: hair, background, mood
        hair = list(HAIR)[(hair + 1 + int(a * (len(HAIR) - 1))) % len(HAIR)] if subset & 1 else None
        background = list(BACKGROUND)[(background + 1 + int(b * (len(BACKGROUND) - 1))) % len(BACKGROUND)] if subset & 2 else None
        mood = MOODS[1 + int(c * 2)] if subset & 4 else None
        parts = [hair and f"{hair} hair", background and f"{background} background", mood]
        turn = int(order * 6)                                             # one of the 6 orders of three parts
        parts = (parts[turn % 3:] + parts[:turn % 3])[::1 if turn < 3 else -1]
        rows.append(apply(row[None], hair, background, mood)[0])
        captions.append(say(parts, OPENINGS[int(opening * len(OPENINGS))]))
    return torch.stack(rows).to(reference.device), captions


# ---- motion ----------------------------------------------------------------------------------------------------------
SWAY, ROLL = 0.7, math.radians(0.8)      # standard deviations: pixels, radians. Small: nobody can know them from the sound
BLINK = 2.0                              # frames from open to shut; an eye is back open after twice that


def motions(n, P, generator, device="cpu", fps=FPS):
    """(n, P, 4) float32: head sway x and y (pixels, at most about 2), roll (radians), blink 0 (open) .. 1 (shut).

    Each of the first three is a sum of three slow waves of 0.1-0.4 Hz, so it starts and ends anywhere; a blink comes every 2-5 s.
    """
    def uniform(lo, hi, *shape):
        return lo + (hi - lo) * torch.rand(n, *shape, generator=generator, device=generator.device).to(device)

    seconds = torch.arange(P, device=device) / fps
    waves = torch.sin(2 * math.pi * (uniform(0.1, 0.4, 3, 3, 1) * seconds + uniform(0, 1, 3, 3, 1))).sum(2)    # (n, 3, P), variance 3/2
    std = torch.stack([torch.full((P,), value, device=device) for value in (SWAY, SWAY, ROLL)])
    blinks = uniform(2, 5, 3 + P // (2 * fps)).cumsum(1) - uniform(2, 5, 1)                                    # (n, K) seconds
    shut = (1 - (seconds - blinks[:, :, None]).abs() * (FPS / BLINK)).clamp(0, 1).amax(1)                      # (n, P)
    shut = shut * shut * (3 - 2 * shut)
    return torch.cat([waves * std * (2 / 3) ** 0.5, shut[:, None]], dim=1).transpose(1, 2).contiguous()


# ---- picture ---------------------------------------------------------------------------------------------------------
PIVOT = 36.0                             # head coordinates: the head rolls about the chin
HEAD = 28.0, 36.0                        # half width and half height of a face of middle width
OPEN, NARROW, WIDE = 6.5, 8.0, 14.0      # half height of an open mouth, half widths of the narrowest and the widest
LIP = 2.5                                # thickness of a lip


@torch.no_grad()
def draw(identity, motion, mouth, window=None):
    """Paint videos.

    identity (n, D)   motion (n, P, 4) as `motions`   mouth (n, P, 2) as `articulation`      all on one device
    window   None, or (top (n,), left (n,), h, w): only this part of each picture, as if cut out of it
    returns  (n, 3, P, h, w) float32 in [-1, 1]
    """
    return in_chunks(paint, 3, identity, motion, mouth, window)


@torch.no_grad()
def importance(identity, motion, mouth, window=None):
    """Loss weights of `draw`'s pixels: (n, 1, P, h, w) float32; mean 1 over a picture, the mouth 7 times and the eyes 3 times the rest."""
    return in_chunks(weigh, 1, identity, motion, mouth, window)


def reference(identity, generator):
    """(n, D) -> (n, 3, SIZE, SIZE) in [-1, 1]: the picture of a calm person, mouth closed, eyes open, head anywhere in its sway."""
    motion = motions(len(identity), 1, generator, identity.device)
    motion[..., 3] = 0
    mouth = torch.zeros_like(motion[..., :2])
    mouth[..., 1] = 0.5
    neutral = identity.clone()
    neutral[:, COLUMN["mood"]] = 0
    return draw(neutral, motion, mouth)[:, :, 0]


def in_chunks(painter, channels, identity, motion, mouth, window):
    """Run a painter over all n * P frames, in chunks of a few million pixels."""
    n, P = motion.shape[:2]
    if identity.shape != (n, len(FIELDS)) or motion.shape != (n, P, 4) or mouth.shape != (n, P, 2):
        raise ValueError(f"draw wants a face (n, {len(FIELDS)}), motion (n, P, 4) and a mouth (n, P, 2), "
                         f"got {tuple(identity.shape)}, {tuple(motion.shape)}, {tuple(mouth.shape)}: a row per video, a column per frame")
    zeros = torch.zeros(n, device=identity.device)
    top, left, h, w = window or (zeros, zeros, SIZE, SIZE)
    corner = torch.stack([top, left], dim=1).to(identity)
    rows = torch.cat([identity, corner], dim=1)[:, None].expand(-1, P, -1).flatten(0, 1)      # (n*P, D + 2)
    frames = torch.cat([motion, mouth], dim=2).flatten(0, 1)                                  # (n*P, 6)
    chunk = max(1, (1 << 24 if rows.is_cuda else 1 << 17) // (h * w))                         # 1 GB on a GPU, the cache on a CPU
    out = rows.new_empty(n * P, channels, h, w)
    for i in range(0, n * P, chunk):
        out[i:i + chunk] = painter(rows[i:i + chunk], frames[i:i + chunk], h, w)
    return out.unflatten(0, (n, P)).transpose(1, 2).contiguous()                              # (n, channels, P, h, w)


def ellipse(x, y, rx, ry):
    """About the distance in pixels to an ellipse around (0, 0), negative inside; exact to first order at its edge."""
    u, v = x / rx, y / ry
    return (u * u + v * v - 1) / (2 * torch.hypot(u / rx, v / ry) + 1e-6)


def box(x, y, half_w, half_h, radius):
    """Distance to a box with round corners around (0, 0), negative inside."""
    x, y = x.abs() - (half_w - radius), y.abs() - (half_h - radius)
    return torch.hypot(x.clamp(min=0), y.clamp(min=0)) + torch.maximum(x, y).clamp(max=0) - radius


def coverage(y, half):
    """Share of the pixel [y - 1/2, y + 1/2] that lies in [-half, half]; exact for gaps thinner than a pixel too."""
    return (torch.minimum(y + 0.5, half) - torch.maximum(y - 0.5, -half)).clamp(0, 1)


def by_name(rows, frames):
    """rows (m, D + 2), frames (m, 6) -> dict of (m, 1, 1) numbers; moods become flags and the mouth lengths."""
    names = FIELDS + ["top", "left"] + ["sway_x", "sway_y", "roll", "blink", "opening", "width"]
    f = dict(zip(names, torch.cat([rows, frames], dim=1)[:, :, None, None].unbind(1)))
    f["happy"], f["sad"], f["angry"] = ((f["mood"] == mood).float() for mood in (1, 2, ANGRY))
    f["head_w"] = HEAD[0] * (0.92 + 0.16 * f["wide"])
    f["gap"] = OPEN * f["opening"]                                                            # half height
    f["mouth_w"] = NARROW + (WIDE - NARROW) * f["width"]                                      # half width
    return f


def coordinates(f, h, w):
    """-> x, y (m, h, w) in head coordinates; body_x (m, 1, w), body_y (m, h, 1): the same for a head that keeps still."""
    px = torch.arange(w, device=f["x"].device) + f["left"] - (SIZE - 1) / 2 - f["x"]          # (m, 1, w) from the middle of the picture
    py = torch.arange(h, device=f["x"].device)[:, None] + f["top"] - (SIZE - 1) / 2 + 2 - f["y"]      # the head sits a little high
    dx, dy = px - f["sway_x"], py - f["sway_y"] - PIVOT * f["scale"]
    c, s = torch.cos(f["roll"]) / f["scale"], torch.sin(f["roll"]) / f["scale"]
    return c * dx + s * dy, c * dy - s * dx + PIVOT, px / f["scale"], py / f["scale"]


def paint(rows, frames, h, w):
    """rows (m, D + 2) faces and window corners, frames (m, 6) motion and mouth -> (m, 3, h, w) in [-1, 1], back to front."""
    f = by_name(rows, frames)
    x, y, body_x, body_y = coordinates(f, h, w)
    side = x.abs()                                                     # a face is symmetric
    skin, hair, iris, clothes, background = (rows[:, columns(name + "_r")] for name in ("skin", "hair", "iris", "clothes", "background"))
    picture = background[:, :, None, None].expand(-1, -1, h, w).clone()

    def lay(colour, alpha):
        """Cover the picture with colour (m, 3) or a triple of 0..255 where alpha (m, h, w) is 1."""
        if isinstance(colour, tuple):
            colour = torch.stack([picture.new_full((len(picture),), c / 255) for c in colour], dim=1)
        picture.lerp_(colour[:, :, None, None], alpha[:, None])

    def fill(colour, distance):
        lay(colour, (0.5 - distance * f["scale"]).clamp(0, 1))

    bun = ellipse(x, y + 42, f["bun"] + 0.1, f["bun"] + 0.1)
    fill(hair, torch.minimum(box(x, y - f["back_y"], f["back_w"], f["back_h"], f["back_r"]), bun))
    fill(0.86 * skin, box(body_x, body_y - 46, 12.0, 22.0, 4.0))                              # neck, in the shadow of the chin
    fill(clothes, torch.maximum(box(body_x, body_y - 79, 47.0, 32.0, 24.0), -ellipse(body_x, body_y - 46, 14.0, f["neckline"])))
    fill(0.93 * skin, ellipse(side - f["head_w"] + 0.5, y - 3, 5.5 * f["ears"] + 0.1, 7.5 * f["ears"] + 0.1))
    fill(skin, ellipse(x / (1 - f["jaw"] * y / HEAD[1]), y, f["head_w"], HEAD[1]))
    fill(0.84 * skin, ellipse(x, y - 9, 4.2 * f["nose"], 2.8 * f["nose"]))
    eyes(f, side, y, iris, fill)
    lips(f, x, y, lay)
    line = f["line_y"] + f["line_slope"] * x + f["line_bend"] * x * x
    fill(hair, torch.maximum(ellipse(x, y + 3, f["head_w"] + 3.5, HEAD[1] + 3.5), y - line))
    along = side - f["eye_x"]
    slope = 0.04 + 0.42 * f["sad"] - 0.5 * f["angry"]                  # sad brows rise to the nose, angry ones fall
    brow = y - f["brow_y"] + 2.5 * f["happy"] - 4 * f["angry"] - slope * along - 0.016 * along.square()
    fill(0.55 * hair, box(along, brow, 6.8, 1.7 * f["brow_size"], 1.5))
    return picture.mul_(2).sub_(1)


def eyes(f, side, y, iris, fill):
    """Both eyes, and glasses where worn. Shut, an eye is a dark line of 2.4 pixels."""
    x, y = side - f["eye_x"], y - f["eye_y"]
    lids = ellipse(x, y, 7.6 * f["eye_size"], (1 - f["blink"]) * 5.4 * f["eye_size"] + 1.2)
    white = ellipse(x, y, 6.5 * f["eye_size"], (1 - f["blink"]) * 4.8 * f["eye_size"] + 0.05)
    shut = 2 * (f["blink"] > 0.9).float()                                                     # pushes what is left of the white outside
    fill(INK, lids)
    fill((250, 250, 250), white + shut)
    ball = ellipse(x, y, 4.2 * f["eye_size"], 4.2 * f["eye_size"])
    fill(iris, torch.maximum(ball, white + shut))
    fill(INK, torch.maximum(ball + 2.2, white + shut))
    ring = box(x, y, 10.6, 9.2, 7.0).abs() - 1.1
    bridge = box(x + f["eye_x"], y + 2, f["eye_x"] - 9.5, 1.1, 1.0)
    fill(INK, torch.minimum(ring, bridge) + 99 * (1 - f["glasses"]))


def lips(f, x, y, lay):
    """Lips around an opening of one dark red; the lower lip goes further than the upper; moods bend the corners."""
    outer_w = f["mouth_w"] + LIP
    bend = 4.0 * f["happy"] - 4.0 * f["sad"] - 3.0 * f["angry"] + 0.6
    y = (y - f["mouth_y"] - 0.25 * f["gap"] + bend * ((x / outer_w).square() - 0.35)) * f["scale"]
    for colour, half_w, half_h in ((LIPS, outer_w, f["gap"] + LIP), (INSIDE, f["mouth_w"], f["gap"])):
        lay(colour, coverage(y, half_h * f["scale"] * (1 - (x / half_w).square()).clamp(min=0).sqrt()))


def weigh(rows, frames, h, w):
    """As paint, but (m, 1, h, w) loss weights of mean 1 over a whole picture."""
    f = by_name(rows, frames)
    x, y = coordinates(f, h, w)[:2]
    mouth, eye = (WIDE + LIP + 1, OPEN + LIP + 3), (9.0, 8.0)                                 # half axes
    weights = 1 + 6 * (0.5 - ellipse(x, y - f["mouth_y"] - 1, *mouth)).clamp(0, 1)
    weights += 2 * (0.5 - ellipse(x.abs() - f["eye_x"], y - f["eye_y"], *eye)).clamp(0, 1)
    area = math.pi * (6 * mouth[0] * mouth[1] + 2 * 2 * eye[0] * eye[1]) * f["scale"] ** 2    # pixels; all of it lies inside
    return (weights / (1 + area / SIZE ** 2))[:, None]


# ---- command line ----------------------------------------------------------------------------------------------------

def to_picture(frame):
    """(3, h, w) in [-1, 1] -> PIL image"""
    return Image.fromarray(((frame.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def main(argv=None):
    any_terminal()
    parser = argparse.ArgumentParser(description="Draw a face, to be made to speak by sample.py --image.")
    parser.add_argument("out", help="picture to write, e.g. face.png")
    parser.add_argument("--seed", type=int, default=0, help="another number, another face (default: 0)")
    parser.add_argument("--held-out", action="store_true", help="a face of the kind that training never sees")
    parser.add_argument("--sheet", default="1x1", metavar="ROWSxCOLS", help="that many faces in one picture (default: 1x1)")
    args = parser.parse_args(argv)
    try:
        rows, _, cols = args.sheet.partition("x")
        if not (rows.isdecimal() and cols.isdecimal() and 0 < int(rows) * int(cols) <= 400):
            raise ValueError(f"--sheet wants ROWSxCOLS of at most 400 faces, e.g. 4x10, got {args.sheet}")
        rows, cols = int(rows), int(cols)
        if not 0 <= args.seed < 2 ** 63:
            raise ValueError(f"--seed wants a number from 0 to 2^63 - 1, got {args.seed}")
        generator = torch.Generator().manual_seed(args.seed)
        faces = held_out_identities(rows * cols, args.seed) if args.held_out else identities(rows * cols, generator)
        sheet = reference(faces, generator).unflatten(0, (rows, cols)).permute(2, 0, 3, 1, 4)         # (3, rows, h, columns, w)
        to_picture(sheet.flatten(3, 4).flatten(1, 2)).save(args.out)
        print(f"wrote {args.out}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
