"""The signal-to-noise ratio over the steps of a run, and which expert serves each: python docs/snr.py > docs/snr.svg"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from sampling import make_solver, snr  # noqa: E402

RUNS = [("T2V-A14B, shift 12, boundary 0.875", 12, 0.875), ("I2V-A14B, shift 5, boundary 0.900", 5, 0.900), ("S2V-14B, shift 3, one expert", 3, None)]
WIDTH, HEIGHT, LEFT, TOP, STEPS, DB = 860, 380, 70, 40, 40, (-60, 30)
HIGH, LOW, ONE = "#c0504d", "#3b6fb6", "#777777"


def place(step, sigma):
    decibel = min(max(10 * math.log10(snr(sigma)), DB[0]), DB[1])
    return LEFT + step * (WIDTH - LEFT - 20) / (STEPS - 1), TOP + (DB[1] - decibel) * (HEIGHT - TOP - 60) / (DB[1] - DB[0])


print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif" font-size="13">')
print(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
for decibel in range(DB[0], DB[1] + 1, 10):
    y = place(0, 1 / (1 + 10 ** (decibel / 20)))[1]
    print(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#e4e4e4"/><text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{decibel} dB</text>')
for step in range(0, STEPS, 5):
    x = place(step, 0.5)[0]
    print(f'<text x="{x:.1f}" y="{HEIGHT - 38}" text-anchor="middle">{step}</text>')
print(f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">step of 40 (UniPC); SNR = ((1 - sigma) / sigma)²; '
      f'<tspan fill="{HIGH}">high-noise expert</tspan>, <tspan fill="{LOW}">low-noise expert</tspan>, <tspan fill="{ONE}">the only one</tspan></text>')
for row, (label, shift, boundary) in enumerate(RUNS):
    solver = make_solver("unipc", STEPS, shift)
    for step, (sigma, t) in enumerate(zip(solver.levels, solver.timesteps.tolist())):
        x, y = place(step, sigma)
        color = ONE if boundary is None else HIGH if t >= boundary * 1000 else LOW
        shape = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"', f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"',
                 f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z"'][row]
        print(f'{shape} fill="{color}"/>')
    mark = ["●", "■", "▲"][row]
    high = sum(t >= boundary * 1000 for t in solver.timesteps.tolist()) if boundary else STEPS
    print(f'<text x="{LEFT + 14}" y="{TOP + 18 + 19 * row}">{mark} {label}{f": {high} of {STEPS} steps high" if boundary else ""}</text>')
print("</svg>")
