"""How the data flows, with the file at each box: python docs/dataflow.py > docs/dataflow.svg"""
from html import escape

WIDTH, HEIGHT = 1240, 680
COLORS = {"in": ("#eef3fb", "#7b93b8"), "net": ("#fdf3e1", "#c39a4a"), "dit": ("#eef7ee", "#6fa36f"), "out": ("#f6eef8", "#a07ab0"),
          "fast": ("#f4f4f4", "#8a8a8a"), "part": ("#ffffff", "#6fa36f"), "seam": ("#fff1f0", "#c0504d")}
LINE = 17                    # pixels between two lines of text

BOXES = (                    # kind, x, y, width, height, lines; a line: "= bold", "> file", or plain
    ("in", 36, 84, 120, 56, "= picture", "who is seen"),
    ("in", 36, 160, 120, 56, "= pose video", "optional"),
    ("in", 36, 272, 120, 56, "= prompt", "any language"),
    ("in", 36, 388, 120, 56, "= sound", "speech or song"),

    ("net", 200, 84, 180, 132, "= VAE encoder", "causal in time", "4x8x8, 16 channels", "> vae.py"),
    ("net", 200, 260, 180, 80, "= umT5 encoder", "up to 512 rows", "> text.py"),
    ("net", 200, 372, 180, 88, "= wav2vec2", "25 hidden states", "for every video frame", "> audio.py"),

    ("dit", 430, 60, 530, 450),
    ("part", 446, 100, 186, 52, "= video tokens", "latents + pose, time t"),
    ("part", 446, 160, 186, 52, "= reference tokens", "RoPE time 30, time 0"),
    ("part", 446, 220, 186, 66, "= motion tokens", "FramePack 1 | 2 | 16 latents", "RoPE time −1 … −19, time 0"),
    ("part", 446, 378, 186, 76, "= audio tokens", "mix of states, causal convs:", "4 local + 1 pad, 1 global", "per latent frame"),
    ("dit", 694, 96, 246, 362),
    ("part", 708, 126, 218, 102),
    ("seam", 724, 180, 186, 36, "> attend(q, k, v, layer)"),
    ("part", 708, 282, 218, 36, "= text cross-attention"),
    ("part", 708, 334, 218, 36, "= feed-forward"),
    ("part", 708, 388, 218, 56, "= audio cross-attention", "12 blocks, within a latent frame"),
    ("part", 708, 468, 218, 32, "= head: velocity"),

    ("out", 1010, 60, 210, 206),
    ("part", 1020, 90, 92, 50, "high-noise", "expert"),
    ("part", 1118, 90, 92, 50, "low-noise", "expert"),
    ("net", 1010, 316, 210, 92, "= VAE decoder", "behind motion or reference", "latents, 80 frames kept", "> vae.py"),
    ("out", 1072, 446, 148, 74, "= mp4, 16 fps", "with the sound", "> media/video.py"),

    ("fast", 430, 544, 530, 92, "= fast/: the same, quickly and in little memory", "blocks.py: token chunks, in place, compiled; fp8.py: float8 matrices;",
     "attention8.py, kernels.py: attention; offload.py: streams blocks;", "plan.py: what fits. Tests say that it equals model.py."),
    ("in", 36, 544, 344, 92, "= plan, stages, clip loop", "text, audio, picture, then per clip:", "denoise, decode, encode the last frames", "> wan_s2v.py"),
)

WIRES = (                    # path, is it dashed?
    ("M156 112H198", False), ("M156 188H198", True), ("M156 300H198", False), ("M156 416H198", False),
    ("M380 126C410 126 416 130 444 130", True), ("M380 150C412 150 412 186 444 186", False), ("M380 176C412 176 412 253 444 253", False),
    ("M380 300H706", False), ("M380 416H444", False), ("M632 416H706", False),
    ("M632 126C670 126 670 150 706 150", False), ("M632 186C670 186 670 168 706 168", False), ("M632 253C676 253 664 186 706 186", False),
    ("M817 228V280", False), ("M817 318V332", False), ("M817 370V386", False), ("M817 444V466", False),
    ("M926 484H985V163H1008", False),                                # velocity
    ("M1060 60V34H539V98", False),                                   # latents, each step
    ("M1115 266V314", False), ("M1146 408V444", False),
    ("M1040 408V656H14V34H290V82", False),                           # the last frames, each clip
    ("M910 198H950V542", True),                                      # the seam
)

LABELS = (                   # x, y, line
    (817, 80, "= model.py: the denoiser"), (817, 116, "block, 40 times"),
    (817, 148, "= self-attention"), (817, 166, "RoPE, modulation by time"), (538, 318, "keys and values, once per clip"),
    (1115, 80, "= experts, guidance"), (1115, 158, "one, or two by SNR"),
    (1115, 184, "v = u + scale (c − u)"), (1115, 202, "x = solver.step(v, i, x)"), (1115, 224, "UniPC, DPM++ 2M, Euler"), (1115, 252, "> sampling.py"),
    (800, 26, "x: noise at first, then the latents of each step"), (690, 674, "last 73 frames, as floats: motion of the next clip"),
    (1174, 294, "clean latents"),
)


def text(x, y, line):
    style = {"=": "b", ">": "f"}.get(line[0], "s")
    return f'<text class="{style}" x="{x}" y="{y}">{escape(line if style == "s" else line[2:])}</text>'


def box(kind, x, y, width, height, *lines):
    fill, stroke = COLORS[kind]
    top = y + height / 2 - LINE * (len(lines) - 1) / 2 + 4.5
    dash = ' stroke-dasharray="6 3"' if kind == "seam" else ""
    yield f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{stroke}" stroke-width="1.4"{dash}/>'
    yield from (text(x + width / 2, top + LINE * i, line) for i, line in enumerate(lines))


def figure():
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif" text-anchor="middle">'
    yield ('<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
           '<path d="M0 0L10 5L0 10z" fill="#556"/></marker></defs>')
    yield ('<style>.b{font-size:14.5px;font-weight:bold;fill:#223} .s{font-size:12.5px;fill:#334} .f{font-size:13px;fill:#8a4a00;'
           'font-family:monospace} .w{fill:none;stroke:#556;stroke-width:1.6} .d{stroke-dasharray:5 4}</style>')
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    for entry in BOXES:
        yield from box(*entry)
    for path, dashed in WIRES:
        yield f'<path class="{"w d" if dashed else "w"}" d="{path}" marker-end="url(#a)"/>'
    yield from (text(*label) for label in LABELS)
    yield "</svg>"


if __name__ == "__main__":
    print("\n".join(figure()))
