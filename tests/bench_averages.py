"""Which half-life for the average? `python tests/bench_averages.py --run.steps 2500 --out RUN …`, with any option of histogan.train.

One training keeps an average of G's weights for each half-life of `HALF_LIVES`; 0 is G itself. They differ in nothing else,
so one seed tells them apart. Each becomes RUN/averages/N.pt, which `bench_variety.py` and `histogan.generate` read.
"""
import copy, sys
from dataclasses import replace
from pathlib import Path

from histogan.checkpoint import generator_card, save_checkpoint
from histogan.config import parse_args
from histogan.guards import ema_beta_at, ema_update
from histogan.train import train

HALF_LIVES = 0, 750, 1500, 3000, 6000, 12000  # images

class Averages:
    "A hook for `train`."
    def __init__(self): self.kept = {}

    def __call__(self, s, row, verdicts):
        self.kept = self.kept or {n: copy.deepcopy(s.G_ema) for n in HALF_LIVES}
        for n, G in self.kept.items():
            how = replace(s.cfg.ema, half_life_img=float(n))
            beta = ema_beta_at(how, s.cfg.data.batch_size, s.n_img) if n else 0.
            ema_update(G, s.G, beta)

def main(argv):
    cfg, averages = parse_args(argv, 'modern').config, Averages()
    s = train(cfg, hook=averages)
    folder = Path(cfg.out, 'averages')
    folder.mkdir(exist_ok=True)
    for n, G in averages.kept.items():
        save_checkpoint(folder/f'{n}.pt', dict(G_ema=G.state_dict(), card=generator_card(G, s.classes, step=s.step)))
        print(folder/f'{n}.pt')

if __name__ == '__main__': main(sys.argv[1:])
