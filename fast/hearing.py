"""`audio_features` of a sound of any length in constant memory: a window is read and encoded when a clip asks for it. Same numbers."""
import torch
import torch.nn.functional as F

from audio import RATE_50, WINDOW, audio_frame_indices, encode, interpolate, normalise, positions_30, windows
from media.sound import RATE


class Hearing:
    """The features of one window at a time.

    speech    a Speech        cfg     AudioConfig of the encoder        load     function that gives the encoder, which is let go after each window
    device    where windows are encoded; features wait on the CPU       clip_frames, window  as in `audio_features`
    """

    def __init__(self, speech, cfg, load, device, fps, clip_frames, window=WINDOW):
        self.speech, self.cfg, self.load, self.device = speech, cfg, load, device
        T = cfg.frames(len(speech))
        self.position, self.windows = positions_30(T), windows(T, int(window * RATE_50))
        indices, _ = audio_frame_indices(len(self.position), fps, clip_frames)
        self.heard = indices[indices < len(self.position)]           # (n,) the audio frame at 30/s of every video frame until the sound ends
        ends = torch.tensor([keep_to for *_, keep_to in self.windows])
        self.window = torch.bucketize(self.position[self.heard], ends, right=True)           # (n,) and the window in which that is kept
        self.number, self.features, self.coming = -1, None, None     # of the window at hand, (S, C, its video frames); the windows behind it

    def __call__(self, first, end):
        """Features of video frames first ... end - 1: (S, C, end - first) float32 on the CPU, zeros after the sound. Later ones come later."""
        pieces = [torch.zeros(self.cfg.n_layer + 1, self.cfg.dim, 0)]                        # the sound may have ended
        for number in self.window[first:end].unique().tolist():
            if number != self.number:
                self.advance(number)
            mine = (self.window == number).nonzero()[:, 0]
            pieces.append(self.features[..., (mine >= first) & (mine < end)])
        found = torch.cat(pieces, dim=2)
        return F.pad(found, (0, end - first - found.shape[2]))

    def advance(self, number):
        """Encode window `number`."""
        self.features = None                                         # first, or both would be there
        if self.coming is None or number != self.number + 1:
            self.coming = self.read(number)
        values, (begin, _, keep_from, keep_to) = next(self.coming), self.windows[number]
        states = encode(self.load(), values)                                                 # (S, T, C)
        mine = (self.position >= keep_from) & (self.position < keep_to)
        states = interpolate(states, self.position[mine] - begin)                            # (S, audio frames of the window at 30/s, C)
        chosen = self.heard[self.window == number] - mine.nonzero()[0, 0]
        self.number, self.features = number, states[:, chosen.to(states.device)].transpose(1, 2).cpu()

    def read(self, number):
        """Yield the normalised samples of window `number` and those behind it."""
        hop, field, speech = self.cfg.hop, self.cfg.field, self.speech
        whole = None if speech.samples is None else torch.var_mean(speech.samples.to(self.device), correction=0)
        var_mean = whole or tuple(torch.tensor(x, dtype=torch.float32, device=self.device) for x in (speech.variance, speech.mean))
        for piece in speech.pieces([(first * hop, (end - 1) * hop + field) for first, end, *_ in self.windows[number:]]):
            yield normalise(piece.to(self.device), var_mean)


def hearing_bytes(checkpoint, fps, samples):
    """Of encoding a window of a sound of so many samples: bytes of the device; of what waits on the host; whether there are later windows."""
    if not samples:
        return 0, 0, False
    cfg, n = checkpoint.configs["audio"], min(samples, int(WINDOW * RATE))
    convolved = 16 * cfg.conv_dim[0] * n // cfg.conv_stride[0]       # four times the first layer's output (measured: 1.46 of 1.46 GiB)
    features = 4 * (cfg.n_layer + 1) * cfg.dim * (n * fps // RATE) + 4 * n
    return 4 * checkpoint.parts["audio"].parameters + convolved, features, cfg.frames(samples) > WINDOW * RATE_50
