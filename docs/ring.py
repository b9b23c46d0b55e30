"""The ring of one step: which frames a block sees, and where it writes: python docs/ring.py > docs/ring.svg"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from live import BLOCK, STEPS, WINDOW, Stream, schedule  # noqa: E402

WIDTH, HEIGHT, SIDE, LEFT, TOP = 1000, 640, 30, 250, 96
OWN, PAST, SINK, EMPTY = "#c0504d", "#8fb08c", "#e3b75e", "#f1f1f1"


def box(x, y, width, fill, text="", color="#ffffff"):
    print(f'<rect x="{x}" y="{y}" width="{width - 3}" height="{SIDE - 3}" rx="3" fill="{fill}"/>')
    print(f'<text x="{x + width / 2 - 1.5}" y="{y + 18}" text-anchor="middle" fill="{color}" font-size="12">{text}</text>')


def label(x, y, text, anchor="start", size=13, weight="normal", color="#222222"):
    print(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{color}">{text}</text>')


print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif">')
print(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
label(20, 30, "What a block sees in the ring of its step", size=17, weight="bold")
label(20, 52, f"One row per block of {BLOCK} latent frames (12 pixel frames, 0.48 s). Numbers are latent frames of the video, counted for ever.")
label(LEFT, 84, "condition", color="#946a10")
label(LEFT + 3 * SIDE, 84, f"ring of {WINDOW} frames, in the order of memory", color="#4c7049")
held, stream = {}, Stream.__new__(Stream)
stream.window = WINDOW
for row in range(7):
    y, stream.frame = TOP + row * (SIDE + 6), BLOCK * row
    slot, seen, time = stream.place(ahead=20)
    held |= {slot + i: stream.frame + i for i in range(BLOCK)}
    label(20, y + 18, f"block {row}: frames {stream.frame} to {stream.frame + BLOCK - 1}")
    box(LEFT, y, SIDE * 2.4, SINK, "ref, motion", "#222222")
    for i in range(WINDOW):
        own = slot <= i < slot + BLOCK
        box(LEFT + 3 * SIDE + i * SIDE, y, SIDE, OWN if own else PAST if i < seen else EMPTY, held.get(i, ""))
    label(LEFT + (3.4 + WINDOW) * SIDE, y + 18, f"reference at {time} (20 ahead)", size=12, color="#946a10")
y = TOP + 7 * (SIDE + 6) + 14
for i, (fill, text) in enumerate(((OWN, "the block itself, written first, in the place of the oldest"), (PAST, "what earlier blocks left"),
                                  (SINK, "condition tokens, written once"))):
    box(20 + (0, 430, 650)[i], y, SIDE, fill)
    label(56 + (0, 430, 650)[i], y + 18, text, size=12)
y += 64
label(20, y, "One ring per step: step i of a block sees what step i of the blocks before it saw of themselves", size=17, weight="bold")
sigmas, timesteps = schedule()
for step in range(STEPS):
    top = y + 18 + step * (SIDE + 8)
    label(20, top + 18, f"step {step}: t {timesteps[step]:.1f}, noise {100 * sigmas[step]:.1f}%")
    for block in range(5):
        x = LEFT + block * 140
        noise = int(255 - 175 * float(sigmas[step]))
        box(x, top, 100, f"rgb({noise - 60},{noise - 20},{noise - 40})" if step < 3 else PAST, f"block {block}")
        if block < 4:
            print(f'<path d="M{x + 100} {top + 13}h32m-7 -5l7 5l-7 5" stroke="#8fb08c" stroke-width="2" fill="none"/>')
        if step < STEPS - 1:
            print(f'<path d="M{x + 48} {top + SIDE - 3}v9" stroke="{OWN}" stroke-width="2"/>')
label(LEFT, y + 18 + STEPS * (SIDE + 8) + 16, "→ keys and values, to the next block at the same step", size=12, color="#4c7049")
label(LEFT + 330, y + 18 + STEPS * (SIDE + 8) + 16, "| latents, to the next step of the same block", size=12, color=OWN)
print("</svg>")
