"""Speed-up against lip sync, from the table of docs/speed.json: python docs/speed.py > docs/speed.svg"""
import json
from pathlib import Path

ROWS = json.loads(Path(__file__).with_suffix(".json").read_text())
NAMES = {"forecast=0.75": "balanced: forecast=0.75", "steps=0.2": "draft: steps=0.2"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 400, 70, 190, 46, 56
MOST = 6.0
LOW = min(0.85, min(r["opening_p10"] for r in ROWS.values()) - 0.02)
HIGH = max(r["opening"] for r in ROWS.values()) + 0.02
GUESSED, FEWER, EXACT = "#c0504d", "#3b6fb6", "#444444"


def place(times, r):
    return LEFT + (times - 1) * (WIDTH - LEFT - RIGHT) / (MOST - 1), TOP + (HIGH - r) * (HEIGHT - TOP - BOTTOM) / (HIGH - LOW)


print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif" font-size="13">')
print(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
print(f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">Lips against speed-up, tiny model: r of the mouth with '
      'what the sound asks for</text>')
step = 0.02 if HIGH - LOW < 0.25 else 0.1
for k in range(int(LOW / step) + 1, int(HIGH / step) + 1):
    y = place(1, k * step)[1]
    print(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/><text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{k * step:.2f}</text>')
for times in range(1, int(MOST) + 1):
    x = place(times, HIGH)[0]
    print(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{times}x</text>')
print(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">forwards of the reference / forwards computed; ● median of 24 '
      f'videos, ○ 10th percentile; <tspan fill="{GUESSED}">guessed steps</tspan>, <tspan fill="{FEWER}">fewer steps</tspan></text>')
for name, r in ROWS.items():
    color = EXACT if name == "reference" else FEWER if name.startswith("steps") else GUESSED
    (x, y), (_, low) = place(r["times"], r["opening"]), place(r["times"], r["opening_p10"])
    bold = ' font-weight="bold"' if name in NAMES or name == "reference" else ""
    print(f'<path d="M{x:.1f} {y:.1f}V{low:.1f}" stroke="{color}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>')
    print(f'<circle cx="{x:.1f}" cy="{low:.1f}" r="4" fill="white" stroke="{color}" stroke-width="1.5"/>')
    y += 16 if color == FEWER else -5                                # two that are alike lie on each other
    print(f'<text x="{x + 8:.1f}" y="{y:.1f}" fill="{color}"{bold}>{NAMES.get(name, name)}</text>')
print("</svg>")
