"""What was tried and is no option: `python tests/bench_variants.py VARIANT [options of histogan.train]`.

Trains with one thing changed that the package does not offer, because it did not help; `bench_accuracy.py` then says how
well. Variants: `diffaug` shows D every real and fake in another brightness, saturation and contrast, shifted by up to an
eighth and with half of its side cut out (the policy of Zhao et al. 2020); `wide` gives every head a third convolution of
stride 2, so that it judges larger pieces. Their figures are in `56_ablate`.
"""
import sys

import torch
from torch.nn import functional as F

from histogan import step, train
from histogan.discriminator import MapHead, conv

def policy(x):
    "Colour, translation, cutout; one draw per image."
    n, _, h, w = x.shape
    u = torch.rand(3, n, 1, 1, 1, device=x.device)
    x = x + u[0] - .5
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey)*2*u[1]
    level = x.mean((1, 2, 3), keepdim=True)
    x = level + (x - level)*(u[2] + .5)
    k, each = h//8, torch.arange(n)[:, None, None]
    rows, columns = (torch.arange(h)[None] + torch.randint(2*k + 1, (n, 1)) for _ in range(2))
    x = F.pad(x, (k, k, k, k))[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    inside = [(torch.arange(h)[None] - torch.randint(h, (n, 1))).abs() < h//4 for _ in range(2)]
    return x*~(inside[0][:, :, None] & inside[1][:, None, :])[:, None].to(x.device)

def diffaug():
    def see(s, x, encode, known=None):
        aug = policy(x)
        return step.EncodedBatch(x, aug, s.encoder.encode(aug, step.wants_vector(s)) if encode else None)
    step.encode_batch = see

def wide():
    first = MapHead.__init__
    def init(self, c_in, cfg):
        first(self, c_in, cfg)
        self.conv3 = conv(cfg.head_ch, cfg.head_ch, 3, 2, norm=cfg.spectral_norm)
    def forward(self, m, y):
        stride = 2 if m.shape[-1] > self.head_px else 1
        f = F.leaky_relu(F.conv2d(F.conv2d(m, self.mix), self.conv1.weight, self.conv1.bias, stride, 1), .2)
        f = F.leaky_relu(self.conv3(F.leaky_relu(self.conv2(f), .2)), .2).mean((2, 3))
        return self.to_logit(f[:, :, None, None]).flatten() + (F.normalize(self.embed(y), dim=1)*f).sum(1)
    MapHead.__init__, MapHead.forward = init, forward

VARIANTS = dict(diffaug=diffaug, wide=wide)

def main():
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS: sys.exit(f'{__doc__}\nerror: name one of {", ".join(VARIANTS)}')
    VARIANTS[sys.argv[1]]()
    return train.main(sys.argv[2:])

if __name__ == '__main__': sys.exit(main())
