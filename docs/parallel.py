"""Who holds which tokens and heads: python docs/parallel.py > docs/parallel.svg"""
COLORS = ("#7fa8d9", "#e0a458", "#86b886", "#b58cc4")          # of the ranks of one half
RUNS, CELL, HEADS = 4, 11, 8
SEGMENTS = (("video", 24, "time t"), ("ref", 4, "time 0"), ("motion", 5, "time 0"))
N = sum(tokens for _, tokens, _ in SEGMENTS)                   # 33: no multiple of 4
EDGES = [N * i // RUNS for i in range(RUNS + 1)]


def text(x, y, words, kind="s", anchor="middle"):
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def grid(x, y, owner):
    """Tokens down, heads across; owner: function (token, head) -> rank"""
    for n in range(N):
        for k in range(HEADS):
            yield (f'<rect x="{x + k * CELL}" y="{y + n * CELL}" width="{CELL - 1}" height="{CELL - 1}" fill="{COLORS[owner(n, k)]}"/>')


def run_of(n):
    return next(i for i in range(RUNS) if n < EDGES[i + 1])


def arrow(x1, y, x2, above, below):
    yield f'<path class="w" d="M{x1} {y}H{x2}" marker-end="url(#a)"/>'
    yield text((x1 + x2) / 2, y - 8, above, "b")
    yield text((x1 + x2) / 2, y + 18, below)


def figure():
    top, height = 92, N * CELL
    left, middle, right, wide = 150, 480, 810, HEADS * CELL
    yield '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1100 560" font-family="Helvetica, Arial, sans-serif">'
    yield ('<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" '
           'fill="#556"/></marker></defs><style>.b{font-size:14px;font-weight:bold;fill:#223} .s{font-size:12.5px;fill:#334} '
           '.w{fill:none;stroke:#556;stroke-width:1.6}</style><rect width="1100" height="560" fill="white"/>')
    yield text(530, 28, "One half: four ranks share 33 tokens and 8 heads. The other half does the same for the other branch of guidance.", "b")
    for x, words, owner in ((left, "token by token", lambda n, k: run_of(n)), (middle, "attend", lambda n, k: k * RUNS // HEADS),
                            (right, "token by token", lambda n, k: run_of(n))):
        yield from grid(x, top, owner)
        yield text(x + wide / 2, top - 28, words, "b")
        yield text(x + wide / 2, top - 10, "8 heads")
    start = 0
    for name, tokens, row in SEGMENTS:
        y = top + CELL * (start + tokens / 2)
        yield text(left - 62, y, name, "b")
        yield text(left - 62, y + 15, row)
        yield f'<path class="w" d="M{left - 22} {top + CELL * start}h-8v{CELL * tokens - 3}h8"/>'
        start += tokens
    for frame in range(0, 24, 6):                              # a run begins in the midst of a latent frame
        yield f'<path d="M{left - 14} {top + CELL * frame - 0.5}h12" stroke="#c0504d" stroke-width="2"/>'
    yield from arrow(left + wide + 20, top + height / 3, middle - 20, "q, k, v", "all-to-all, uneven")
    yield from arrow(middle + wide + 20, top + height / 3, right - 20, "results", "all-to-all back")
    foot = top + height + 22
    for rank in range(RUNS):
        y = foot + 18 * rank
        yield f'<rect x="150" y="{y - 10}" width="12" height="12" fill="{COLORS[rank]}"/>'
        a, b = EDGES[rank], EDGES[rank + 1]
        yield text(172, y, f"rank {rank}: tokens {a} to {b - 1} ({b - a}), then heads {2 * rank} and {2 * rank + 1} of all 33", "s", "start")
    yield text(600, foot, "red: latent frames of 6 tokens; rank 1 begins in the midst of frame 1,", "s", "start")
    yield text(600, foot + 18, "so it keeps the audio of frames 1 and 2 and needs no exchange for it", "s", "start")
    yield text(600, foot + 36, "head: 64 numbers of every video token go to all, once a forward", "s", "start")
    yield "</svg>"


if __name__ == "__main__":
    print("\n".join(figure()))
