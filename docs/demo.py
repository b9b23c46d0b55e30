"""Three people who were never trained on, one voice: python docs/demo.py writes docs/demo.webp"""
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import faces  # noqa: E402
from wan_s2v import WanS2VPipeline  # noqa: E402

HERE, SEEDS = Path(__file__).parent, ("3", "5", "8")
pipeline, videos = WanS2VPipeline.from_pretrained(device_map="cpu"), []
with tempfile.TemporaryDirectory() as folder:
    for seed in SEEDS:
        faces.main([f"{folder}/face.png", "--held-out", "--seed", seed])
        videos.append(pipeline(HERE.parent / "samples" / "voice.flac", f"{folder}/face.png").frames)
video = torch.cat(videos, dim=3)[:, :61]                             # (3, P, height, 3 * width): 3.81 s, as long as the sound
first, *others = (faces.to_picture(frame) for frame in video.unbind(1))
first.save(HERE / "demo.webp", save_all=True, append_images=others, duration=[62, 63] * 30 + [62], loop=0, quality=80, method=6)
print(f"wrote {HERE / 'demo.webp'}: {video.shape[1]} frames of {video.shape[3]}x{video.shape[2]}")
