"""`audio_features` of a sound that is still being spoken: wav2vec2 over a rolling window, encoded anew for every block of video frames.

What a block hears differs from what it would hear of the whole file in three ways: nothing before the window, nothing later than AHEAD
behind its last frame, and a normalisation that knows only what was heard so far. docs/live.md has what each of them costs.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from audio import RATE_50, encode, interpolate, normalise
from media.sound import RATE

BEHIND = 8.0         # seconds of sound before a block that its window holds
AHEAD = 0.16         # seconds of sound behind a block that are waited for: they are latency


class Listening:
    """Sound comes in by `hear`, features go out block by block.

    encoder  a Wav2Vec2        fps  video frames per second        behind, ahead  seconds
    """

    def __init__(self, encoder, fps, behind=BEHIND, ahead=AHEAD):
        self.encoder, self.cfg, self.fps, self.behind, self.ahead = encoder, encoder.config, fps, behind, ahead
        self.window, self.first = torch.zeros(0), 0                  # the samples at hand, and the number of the first
        self.sums = np.zeros(3)                                      # of all samples so far: how many, their sum, the sum of their squares
        self.ended = False

    def wanted(self, end):
        """How many samples must have been heard before the features of video frames up to `end` are asked for."""
        return math.ceil((end / self.fps + self.ahead) * RATE)

    @property
    def heard(self):
        return int(self.sums[0])

    def hear(self, samples, last=False):
        """samples (n,) float32, 16 kHz mono, in [-1, 1]; last: none follow"""
        exact = samples.double()
        self.sums += [len(samples), float(exact.sum()), float(exact @ exact)]
        self.window, self.ended = torch.cat([self.window, samples]), last

    def __call__(self, first, end):
        """Features of video frames first ... end - 1: (S, C, end - first), zeros after the end of the sound. Calls go forward."""
        hop, field = self.cfg.hop, self.cfg.field
        index = np.rint(np.arange(first, end) / self.fps * 30)       # audio frames at 30 a second, as audio_frame_indices
        position = torch.from_numpy(index * (RATE_50 / 30))          # and at 50 a second
        start = max(0, int(position[0]) - int(self.behind * RATE_50))
        self.window, self.first = self.window[max(0, start * hop - self.first):], max(self.first, start * hop)
        frames = self.cfg.frames(len(self.window))
        known = int((self.cfg.frames(self.heard) / RATE_50) * 30)    # audio frames at 30 a second in all that was heard
        position = position[:int((index < known).sum())] if self.ended else position
        if not frames or not len(position):
            return torch.zeros(self.cfg.n_layer + 1, self.cfg.dim, end - first)
        mean = self.sums[1] / self.sums[0]
        var_mean = [torch.tensor(x, dtype=torch.float32) for x in (max(0.0, self.sums[2] / self.sums[0] - mean * mean), mean)]
        values = normalise(self.window[:(frames - 1) * hop + field], var_mean).to(self.encoder.project.weight.device)
        states = encode(self.encoder, values)                                                # (S, frames, C)
        features = interpolate(states, (position - self.first // hop).clamp(0, frames - 1).float()).transpose(1, 2)    # (S, C, n)
        return F.pad(features, (0, end - first - features.shape[2])).cpu()
