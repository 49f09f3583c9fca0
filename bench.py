"""How fast each part of the work is: beside what users would pick instead, and beside this machine's limit.

    python bench.py              every part, by the functions that training uses
    python bench.py --peers      beside other packages, those that are installed; the project never needs them

The candidates of a part are warmed up, then take turns, A B A B, so that a drift of the machine meets them
alike; the median stands with its range. FLOPs are counted from what ran. The limit is the best rate that
torch's own matrix products and convolutions reach here in the same precision. On a GPU (--device cuda) sizes
are larger and CUDA events take the times; that has never been tried.
"""
import argparse
import contextlib
import io
import runpy
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
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
import query
import report
import runs
import train


@dataclass
class Setup:
    device: torch.device
    amp: bool                                           # networks run in bfloat16
    quick: bool                                         # only to see it run

    def size(self, n, gpu=1):
        """n on a CPU, gpu times as many on a GPU, to fill it; an eighth if quick."""
        n = n * gpu if self.device.type == 'cuda' else n
        return n // 8 if self.quick else n


class Part(NamedTuple):
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
    a, b = torch.rand(2, *[setup.size(4096, gpu=2)] * 2, **like)
    calls = {f'{len(a)} x {len(a)} matrices': lambda: a @ b}
    for channels, side in (64, 28), (128, 14), (256, 7):
        x = torch.rand(setup.size(512, gpu=8), channels, side, side, **like)
        x = x.to(memory_format=nets.layout(setup.device))
        weight = torch.rand(channels, channels, 3, 3, **like)
        calls[f'3 x 3 convolution of {tuple(x.shape)}'] = partial(F.conv2d, x, weight, padding=1)
    return Part(None, 'GFLOP', calls, amp)


# ------------------------------------------------------------------------------- epochs of training

@cache
def images(n):
    return data.load('fashion-mnist').x_train[:n]


def arguments(setup, method):
    """All flags of a method with their defaults."""
    ssl = runpy.run_path(str(Path(__file__).with_name('ssl.py')), run_name='cli')
    args = ssl['parse'](['--method', method])[0]
    args.amp = setup.amp and args.net != 'fc'
    return args


def network(setup, args):
    config = {'args': vars(args), 'data': {'shape': (1, 28, 28), 'classes': range(10)}}
    return runs.initial_model(config, setup.device)


def epoch(setup, method, n):
    """One epoch of a method, as train.py does it."""
    args, few = arguments(setup, method), images(setup.size(n))
    x = data.Images(few, setup.device)
    model, follow = network(setup, args), None
    if method == 'query':
        labelled = x.at(torch.arange(500)), torch.arange(500, device=setup.device) % 10
        objective = partial(query.consistency, labelled=labelled, views=pretrain.views_of(args))
        follow = partial(model.follow, args.ema)
    else:
        objective = pretrain.objective_of(args)
    trainer = train.Trainer(model, runs.SilentRun('bench'), train.Settings.of(args))

    def ours():
        trainer.fit(objective, x, last=trainer.epoch, of=1000, after_step=follow)
    calls = {'ours': ours}
    if method == 'simclr':
        calls['torchvision'] = partial(loader_epoch, setup, network(setup, args), few)
    return Part(len(x), 'images', calls, args.amp)


def torchvision_views(x, ids):
    """Two random views of each of the images, one by one, as torchvision's users make them."""
    from torchvision import transforms as t
    view = t.Compose([t.ToPILImage(), t.RandomResizedCrop(28, (0.3, 1)), t.RandomHorizontalFlip(),
                      t.RandomRotation(10), t.ColorJitter(0.4, 0.4), t.ToTensor()])
    return torch.stack([view(x[i]) for i in (*ids, *ids)])


def loader_epoch(setup, model, x):
    """An epoch of simclr as it is usually written: a DataLoader, Adam, the same network and precision."""
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
    views, g = pretrain.views_of(arguments(setup, 'simclr')), device.generator(setup.device, 0)

    def kornia():
        import kornia.augmentation as k
        k.AugmentationSequential(
            k.RandomResizedCrop((28, 28), (0.3, 1), p=1.0), k.RandomHorizontalFlip(),
            k.RandomRotation(10.0, p=1.0), k.RandomBrightness((0.6, 1.4), p=1.0),
            k.RandomContrast((0.6, 1.4), p=1.0))(pairs)
    return Part(512, 'images', {'ours': lambda: augment.augment(pairs, views, g), 'kornia': kornia,
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
    return Part(B, 'images', {'ours': lambda: losses.nt_xent(z1, z2, 0.2).backward(), 'lightly': lightly,
                              'textbook': lambda: textbook_nt_xent(z1, z2).backward()})


def ssim(setup):
    x = data.to_float(images(setup.size(10000)).to(setup.device))
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)

    def pytorch_msssim():
        from pytorch_msssim import ssim
        ssim(x, y, data_range=1.0, size_average=False)

    def skimage():
        from skimage.metrics import structural_similarity
        for a, b in zip(x[:, 0].cpu().numpy(), y[:, 0].cpu().numpy()):
            structural_similarity(a, b, data_range=1.0, gaussian_weights=True, sigma=1.5,
                                  use_sample_covariance=False)
    return Part(len(x), 'pairs', {
        'ours': lambda: [evaluate.ssim(a, b) for a, b in zip(x.split(1000), y.split(1000))],
        'pytorch-msssim': pytorch_msssim, 'scikit-image': skimage})


def like_features(n, setup):
    """n rows of 256 numbers like an encoder's: clusters that overlap."""
    g = device.generator('cpu', n)
    centres = torch.randn(50, 256, generator=g)
    x = centres[torch.randint(50, (n,), generator=g)] + 1.5 * torch.randn(n, 256, generator=g)
    return x.to(setup.device)


def kmeans(setup, k):
    x = like_features(setup.size(60000), setup)
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
        'scikit-learn': sklearn, 'faiss': faiss})


def knn(setup):
    bank, x = (F.normalize(like_features(setup.size(n), setup), dim=1) for n in (60000, 10000))
    y = torch.arange(len(bank), device=setup.device) % 10
    rows, labels, new = bank.cpu().numpy(), y.cpu().numpy(), x.cpu().numpy()

    def sklearn():
        from sklearn.neighbors import KNeighborsClassifier
        KNeighborsClassifier(20, algorithm='brute', weights='distance').fit(rows, labels).predict(new)

    def faiss():
        import faiss
        index = faiss.IndexFlatIP(256)
        index.add(rows)
        s, i = map(torch.from_numpy, index.search(new, 20))
        torch.zeros(len(new), 10).scatter_add_(1, y.cpu()[i], (s / 0.07).exp()).argmax(1)
    return Part(len(x), 'rows', {'ours': lambda: features.knn(bank, y, x), 'scikit-learn': sklearn,
                                 'faiss': faiss})


LIMITS = {False: 'limit, float32', True: 'limit, bfloat16'}
PARTS = {                                               # name: function(setup) -> Part
    **{name: partial(limit, amp=amp) for amp, name in LIMITS.items()},
    **{f'epoch of {method}': partial(epoch, method=method, n=n)
       for method, n in dict(ae=60000, conv=8192, vae=8192, simclr=10240, query=5120).items()},
    'two views of 512 images': two_views,
    **{f'NT-Xent, B = {B:,}': partial(nt_xent, B=B) for B in (512, 4096)},
    'SSIM of 10,000 pairs': ssim,
    **{f'k-means, 60,000 x 256, k = {k:,}, 10 iterations': partial(kmeans, k=k) for k in (10, 100, 1000)},
    'kNN, 10,000 against 60,000 x 256': knn}


# ---------------------------------------------------------------------------------------- measuring

def plain_convolution(x, weight, stride, padding):
    return F.conv2d(x, weight, None, stride, padding)


def prepare(name, call):
    """The candidate's Row, with its FLOPs counted, and warm; None and a line on stderr if it can't be had."""
    try:
        with FlopCounterMode(display=False) as counter, \
                mock.patch.object(nets.NarrowConv, 'apply', plain_convolution):     # its zeros are no work
            call()
        call()
    except Exception as e:                              # other packages may fail in any way
        print(f'left out: {name} ({" ".join(str(e).split())[:80]})', file=sys.stderr)
        return None
    return Row(name, call, counter.get_total_flops())


def timed(call, times, setup):
    """Seconds of a call, a mean over so many."""
    on_gpu = setup.device.type == 'cuda'
    if on_gpu:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
    began = time.perf_counter()
    for _ in range(times):
        call()
    took = time.perf_counter() - began
    if on_gpu:
        end.record()
        torch.cuda.synchronize()
        took = start.elapsed_time(end) / 1000
    return took / times


def measure(part, setup, peers, repeats):
    """Rows of a part's candidates, which take turns of 0.2 s or of one call."""
    names = [name for name in part.calls if peers or name == 'ours' or part.amount is None]
    rows = [row for name in names if (row := prepare(name, part.calls[name]))]
    for _ in range(repeats):
        for row in rows:
            time.sleep(0.1)                             # threads of the one before go to sleep
            once = timed(row.call, 1, setup)
            times = 1 if setup.quick else round(0.2 / once)
            row.seconds.append(timed(row.call, times, setup) if times > 1 else once)
    return rows


def table(measured):
    """{name: (Part, Rows)} as text; peers stand beside ours by the median ratio of the times of a turn."""
    limits = {}                                         # FLOPs a second of the fastest routine
    for amp, name in LIMITS.items():
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
    p.add_argument('words', nargs='*', metavar='WORD', help='only the limits and the parts with one of these '
                   'in their names')
    p.add_argument('--peers', action='store_true', help='beside torchvision, kornia, lightly, '
                   'pytorch-msssim, scikit-image, scikit-learn and faiss')
    p.add_argument('--quick', action='store_true', help='small sizes and one turn, to see it run')
    p.add_argument('--repeats', type=int, default=5, metavar='N', help='turns (default: 5)')
    p.add_argument('--device', default='cpu', help='cpu or cuda (default: cpu)')
    args = p.parse_args(argv)
    device.limit_threads()
    device.keep_memory()
    where = device.pick_device(args.device)
    setup, repeats = Setup(where, device.amp_by_default(where), args.quick), 1 if args.quick else args.repeats
    measured = {}
    for name, make in PARTS.items():
        if name in LIMITS.values() or not args.words or any(word in name for word in args.words):
            try:
                with contextlib.redirect_stdout(io.StringIO()):         # what training says
                    part = make(setup)
                    measured[name] = part, measure(part, setup, args.peers, repeats)
            except OSError as e:                        # no images, and no network to download them
                print(f'left out: {name} ({e})', file=sys.stderr)
    on = 'a GPU, which has never been tried' if where.type == 'cuda' else f'{torch.get_num_threads()} threads'
    print(f'torch {torch.__version__} on {on}, {repeats} turns, networks in '
          f'{"bfloat16" if setup.amp else "float32"}\n\n{table(measured)}')


if __name__ == '__main__':
    main()
