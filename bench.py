"""How fast each part of the work is: beside what users would pick instead, and beside this machine's limit.

    python bench.py              every part, by the functions that training uses
    python bench.py --peers      beside other packages, those that are installed; the project never needs them

The candidates of a part are warmed up, then take turns, A B A B, so that a drift of the machine meets them
alike; the median stands with its range. FLOPs are counted from what ran. The limit is the best rate that
torch's own matrix products and convolutions reach here in the same precision.
"""
import argparse
import contextlib
import io
import runpy
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import augment
import data
import device
import evaluate
import features
import losses
import nets
import pretrain
import report
import runs
import train


@dataclass
class Setup:
    device: torch.device
    amp: bool                                           # networks run in bfloat16
    scale: float = 1.0                                  # of all sizes

    def size(self, n):
        return round(n * self.scale)


@dataclass
class Part:
    amount: int                                         # of units that a call handles; None: its GFLOP
    unit: str
    calls: dict                                         # {candidate: function to time}, ours first
    amp: bool = False


@dataclass
class Row:
    """A candidate as it was measured."""
    name: str
    call: callable
    flops: int
    seconds: list = field(default_factory=list)         # of a call, one for each turn


# ---------------------------------------------------------------------------------------- the limit

def limit(setup, amp):
    like = {'device': setup.device, 'dtype': torch.bfloat16 if amp else torch.float32}
    n = setup.size(4096)
    a, b = torch.rand(2, n, n, **like)
    calls = {f'{n} x {n} matrices': lambda: a @ b}
    for channels, side in (64, 28), (128, 14), (256, 7):
        x = torch.rand(setup.size(512), channels, side, side, **like)
        x = x.to(memory_format=nets.layout(setup.device))
        weight = torch.rand(channels, channels, 3, 3, **like)
        calls[f'3 x 3 convolution of {tuple(x.shape)}'] = partial(F.conv2d, x, weight, padding=1)
    return Part(None, 'GFLOP', calls, amp)


# ------------------------------------------------------------------------------- epochs of training

def images(n):
    return data.load('fashion-mnist').x_train[:n]


def arguments(setup, method):
    """All flags of a method with their defaults."""
    ssl = runpy.run_path(str(Path(__file__).with_name('ssl.py')), run_name='cli')
    args = ssl['parse'](['--method', method])[0]
    args.amp = setup.amp and args.net != 'fc'
    return args


def network(setup, args):
    config = {'args': vars(args), 'data': {'shape': (1, 28, 28)}}
    return runs.initial_model(config, setup.device)


def epoch(setup, method, n):
    """One epoch of a method, as train.py does it."""
    args = arguments(setup, method)
    x = images(setup.size(n))
    trainer = train.Trainer(network(setup, args), runs.SilentRun('bench'), train.Settings.of(args))
    resident, objective = data.Images(x, setup.device), pretrain.objective_of(args)

    def ours():
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(objective, resident, last=trainer.epoch, epochs=1000)
    calls = {'ours': ours}
    if method == 'simclr':
        calls['torchvision'] = partial(loader_epoch, setup, network(setup, args), x)
    return Part(len(x), 'images', calls, args.amp)


def torchvision_views(x, ids):
    """Two random views of each of the images, one by one, as torchvision's users make them."""
    from torchvision import transforms as t
    view = t.Compose([t.ToPILImage(), t.RandomResizedCrop(28, (0.3, 1)), t.RandomHorizontalFlip(),
                      t.RandomRotation(10), t.ColorJitter(0.4, 0.4), t.ToTensor()])
    return torch.stack([view(x[i]) for i in (*ids, *ids)])


def loader_epoch(setup, model, x):
    """An epoch of simclr as it is usually written: a DataLoader, Adam, the same network and precision."""
    import torchvision.transforms                       # noqa: F401 - its absence is told here, not by a worker
    loader = torch.utils.data.DataLoader(range(len(x)), 512, shuffle=True, num_workers=2, drop_last=True,
                                         collate_fn=partial(torchvision_views, x))
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    for views in loader:
        with device.autocast(setup.device, setup.amp):
            z1, z2 = model(views.to(setup.device)).float().chunk(2)
            loss = textbook_nt_xent(z1, z2)
        opt.zero_grad()
        loss.backward()
        opt.step()


# ------------------------------------------------------------------------------------- parts of them

def two_views(setup):
    x = images(512)
    pairs = data.to_float(x.to(setup.device)).repeat(2, 1, 1, 1)
    views = pretrain.views_of(arguments(setup, 'simclr'))
    g = device.generator(setup.device, 0)
    return Part(512, 'images', {'ours': lambda: augment.augment(pairs, views, g),
                                'torchvision': lambda: torchvision_views(x, range(512))})


def textbook_nt_xent(z1, z2, tau=0.2):
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / tau).fill_diagonal_(float('-inf'))
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def nt_xent(setup, B):
    z1, z2 = (torch.randn(B, 128, device=setup.device, requires_grad=True) for _ in range(2))

    def lightly():
        from lightly.loss import NTXentLoss
        NTXentLoss(0.2)(z1, z2).backward()
    return Part(B, 'images', {'ours': lambda: losses.nt_xent(z1, z2, 0.2).backward(),
                              'lightly': lightly,
                              'textbook': lambda: textbook_nt_xent(z1, z2).backward()})


def kmeans(setup, k):
    x = torch.randn(setup.size(60000), 256, device=setup.device)
    rows = x.cpu().numpy()

    def sklearn():
        from sklearn.cluster import KMeans
        KMeans(k, init=rows[:k], n_init=1, max_iter=10, tol=0).fit(rows)

    def faiss():
        import faiss
        kmeans = faiss.Kmeans(256, k, niter=10, min_points_per_centroid=1, max_points_per_centroid=len(rows))
        kmeans.train(rows, init_centroids=rows[:k])
        kmeans.assign(rows)
    return Part(10 * len(x), 'rows', {
        'ours': lambda: evaluate.kmeans(x, k, iterations=10, tol=-1, centres=x[:k].clone()),
        'scikit-learn': sklearn,
        'faiss': faiss})


def knn(setup):
    bank, x = (F.normalize(torch.randn(setup.size(n), 256, device=setup.device)) for n in (60000, 10000))
    y = torch.arange(len(bank), device=setup.device) % 10
    rows, new = bank.cpu().numpy(), x.cpu().numpy()

    def faiss():
        import faiss
        index = faiss.IndexFlatIP(256)
        index.add(rows)
        index.search(new, 20)
    return Part(len(x), 'rows', {'ours': lambda: features.knn(bank, y, x), 'faiss': faiss})


LIMITS = {False: 'limit, float32', True: 'limit, bfloat16'}
PARTS = {                                               # name: function(setup) -> Part
    LIMITS[False]: partial(limit, amp=False),
    LIMITS[True]: partial(limit, amp=True),
    'epoch of ae': partial(epoch, method='ae', n=60000),
    'epoch of conv': partial(epoch, method='conv', n=8192),
    'epoch of vae': partial(epoch, method='vae', n=8192),
    'epoch of simclr': partial(epoch, method='simclr', n=10240),
    'two views of 512 images': two_views,
    'NT-Xent, B = 512': partial(nt_xent, B=512),
    'NT-Xent, B = 4,096': partial(nt_xent, B=4096),
    'k-means, 60,000 x 256, k = 10, 10 iterations': partial(kmeans, k=10),
    'k-means, 60,000 x 256, k = 1,000, 10 iterations': partial(kmeans, k=1000),
    'kNN, 10,000 against 60,000 x 256': knn}


# ---------------------------------------------------------------------------------------- measuring

def plain_convolution(x, weight, stride, padding):
    return F.conv2d(x, weight, None, stride, padding)


def prepare(name, call):
    """The candidate's Row, with its FLOPs counted, and warm; None if its package is not installed."""
    counter = FlopCounterMode(display=False)
    try:
        with counter, mock.patch.object(nets.NarrowConv, 'apply', plain_convolution):    # zeros are no work
            call()
    except ImportError as e:
        print(f'left out: {name} ({e})', file=sys.stderr)
        return None
    call()
    return Row(name, call, counter.get_total_flops())


def timed(call, times, cuda=False):
    """Seconds of a call, a mean over so many."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def measure(part, setup, peers, repeats):
    """Rows of a part's candidates, which take turns of 0.2 s or of one call."""
    cuda = setup.device.type == 'cuda'
    names = [name for name in part.calls if peers or name == 'ours' or part.amount is None]
    rows = [row for name in names if (row := prepare(name, part.calls[name]))]
    for _ in range(repeats):
        for row in rows:
            time.sleep(0.1)                             # threads of the one before go to sleep
            seconds = timed(row.call, 1, cuda)
            if seconds < 0.1:
                seconds = timed(row.call, round(0.2 / seconds), cuda)
            row.seconds.append(seconds)
    return rows


def table(measured):
    """{name: (Part, Rows)} as text; peers stand beside ours by the median ratio of the times of a turn."""
    limits = {}                                         # FLOPs a second of the fastest routine
    for amp, name in LIMITS.items():
        if name in measured:
            limits[amp] = max(row.flops / statistics.median(row.seconds) for row in measured[name][1])
    lines = [('part', 'by', 'seconds', 'range', 'a second', 'of', 'of the limit', 'slower than ours')]
    for name, (part, rows) in measured.items():
        for row in rows:
            median = statistics.median(row.seconds)
            ratio = statistics.median(b / a for a, b in zip(rows[0].seconds, row.seconds))
            share = row.flops / median / limits[part.amp]
            is_peer = row is not rows[0] and part.amount
            lines.append((name, row.name, f'{median:.3g}', f'{min(row.seconds):.3g}-{max(row.seconds):.3g}',
                          f'{(part.amount or row.flops / 1e9) / median:,.0f}', part.unit,
                          f'{share:.0%}' if row.flops else '', f'{ratio:.1f} x' if is_peer else ''))
    return report.table(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('words', nargs='*', metavar='WORD', help='only parts with one of these in the name')
    p.add_argument('--peers', action='store_true', help='beside torchvision, lightly, scikit-learn and faiss')
    p.add_argument('--scale', type=float, default=1.0, help='of all sizes, for instance 8 to fill a GPU')
    p.add_argument('--repeats', type=int, default=5, metavar='N', help='turns (default: 5)')
    p.add_argument('--device', default='cpu', help='cpu or cuda (default: cpu)')
    args = p.parse_args(argv)
    device.prepare_cpu()
    where = device.pick_device(args.device)
    setup = Setup(where, device.amp_by_default(where), args.scale)
    measured = {}
    for name, make in PARTS.items():
        if name == LIMITS[True] and not setup.amp:      # a processor without it may take minutes a product
            continue
        if name in LIMITS.values() or not args.words or any(word in name for word in args.words):
            part = make(setup)
            measured[name] = part, measure(part, setup, args.peers, args.repeats)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {args.repeats} turns, networks in '
          f'{"bfloat16" if setup.amp else "float32"}\n\n{table(measured)}')


if __name__ == '__main__':
    main()
