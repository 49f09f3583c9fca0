"""How fast each part of the work is on this machine: beside what users would pick instead, and beside its limit.

    python bench.py              every part, on Fashion-MNIST, by the functions that training uses
    python bench.py --peers      beside other packages, as far as they are installed; the product never needs them

A candidate lives in a process of its own, which warms up once. Then all candidates of a part take turns, A B A B, so
that a drift of the machine meets them alike; the median stands with its range. FLOPs are counted from what ran
(torch.utils.flop_counter); the limit is this machine's own rate of matrix products, measured in the same way.
"""
import argparse
import json
import multiprocessing
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import losses
import nets
import report
import stages
import train

HERE = Path(__file__).resolve().parent
PARTS = {}            # part: {candidate: function(quick) -> (function to time, amount, unit, precision if not float32)}
SERIES = {}           # what grows: {size: part}
KEPT = []             # temporary folders of this process


def candidate(part, name='ours', series=None):
    """Decorator: register what prepares a candidate of a part; series: (what grows, how large it is here)."""
    def add(prepare):
        PARTS.setdefault(part, {})[name] = prepare
        if series:
            SERIES.setdefault(series[0], {})[series[1]] = part
        return prepare
    return add


# ---------------------------------------------------------------------------------------- the limit

def matrix_product(dtype, quick):
    n = 4096                                                           # smaller ones don't reach the rate
    a, b = torch.rand(2, n, n).to(dtype)
    return lambda: a @ b, 2 * n ** 3 / 1e9, 'GFLOP', str(dtype)[6:]


for dtype in torch.float32, torch.bfloat16:
    candidate(f'matrix product, {str(dtype)[6:]}')(partial(matrix_product, dtype))
LIMITS = list(PARTS)


# ------------------------------------------------------------------------------------ epochs of training

class Unsaved:
    """Stands in for a run folder: training writes nothing."""
    folder = 'bench'
    load = trim_log = save = log = staticmethod(lambda *_: None)


def images(n):
    return data.load().x_train[:n]


def arguments(method, *more):
    """All flags of a method with their defaults, as training gets them."""
    args = runpy.run_path(str(HERE / 'ssl.py'), run_name='cli')['parse'](['--method', method, *more])[0]
    args.amp = args.net != 'fc' and train.amp_by_default(torch.device('cpu'))
    args.encoder = None
    return args


def network(args, classes=10):
    return stages.network_of({'args': vars(args), 'data': {'shape': (1, 28, 28), 'classes': range(classes)}}, 'cpu')


def precision(amp):
    return 'bfloat16' if amp else 'float32'


def epoch(method, n, quick):
    """One epoch of a method on n pictures."""
    args, x = arguments(method), images(n // 8 if quick else n)
    model, objective, device = network(args), stages.objective_of(args), torch.device('cpu')
    if method == 'query':
        labelled = x[:500], torch.arange(500) % 10
        objective = partial(objective, labelled=lambda: labelled)
    def once():
        stages.train_model(Unsaved, args, model, objective, data.Pictures(x, device), plan=lambda *_: 1,
                           after_step=partial(model.follow, args.ema) if method == 'query' else None)
    return once, len(x), 'pictures', precision(args.amp)


for method, n in dict(ae=60000, conv=8192, vae=8192, simclr=10240, query=5120).items():
    candidate(f'epoch of {method}')(partial(epoch, method, n))


def loader_epoch(dataset, model, objective, batch_size, workers=0, amp=False):
    """An epoch as it is usually written: a DataLoader, Adam, the same network."""
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True,
                                         multiprocessing_context='fork' if workers else None)
    opt, device = torch.optim.Adam(model.parameters(), 1e-3), torch.device('cpu')
    model.train()
    def once():
        for batch in loader:
            with train.autocast(device, amp):
                loss = objective(model, batch)
            opt.zero_grad()
            loss.backward()
            opt.step()
    return once, len(dataset), 'pictures', precision(amp)


def raw_files():
    """A folder with Fashion-MNIST's files, inflated, where torchvision looks for them; gone with the process."""
    ds, folder = data.load(), tempfile.TemporaryDirectory()
    KEPT.append(folder)
    raw = Path(folder.name) / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for name, v in (('train-images-idx3', ds.x_train[:, 0]), ('train-labels-idx1', ds.y_train.byte()),
                    ('t10k-images-idx3', ds.x_test[:, 0]), ('t10k-labels-idx1', ds.y_test.byte())):
        data.write_idx(raw / f'{name}-ubyte', v.numpy())
    return folder.name, raw


def ae_by_torchvision(workers, quick):
    from torchvision import datasets, transforms
    dataset = datasets.FashionMNIST(raw_files()[0], transform=transforms.ToTensor())
    dataset = torch.utils.data.Subset(dataset, range(60000 // (8 if quick else 1)))
    return loader_epoch(dataset, network(arguments('ae')), lambda model, batch: F.mse_loss(model(batch[0]), batch[0]),
                        128, workers)


for workers in 0, 2:
    candidate('epoch of ae', f'torchvision, DataLoader of {workers} workers')(partial(ae_by_torchvision, workers))


def torchvision_views():
    """SimCLR's views of one picture (H, W) uint8 by torchvision's transforms, as its users write them."""
    from torchvision import transforms as t
    one = t.Compose([t.ToPILImage(), t.RandomResizedCrop(28, (0.3, 1)), t.RandomHorizontalFlip(), t.RandomRotation(10),
                     t.ColorJitter(0.4, 0.4), t.ToTensor()])
    return lambda x: (one(x), one(x))


def textbook_nt_xent(z1, z2, tau=0.2):
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / tau).fill_diagonal_(float('-inf'))
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


def simclr_by_torchvision(equal, quick):
    views, x = torchvision_views(), images(10240 // (8 if quick else 1))
    class Views(torch.utils.data.Dataset):
        __len__, __getitem__ = lambda self: len(x), lambda self, i: views(x[i])
    model = nets.build('simclr', 'resnet', (1, 28, 28))
    model = model.to(memory_format=torch.channels_last) if equal else model
    def objective(model, batch):
        return textbook_nt_xent(*model(torch.cat(batch)).float().chunk(2))
    return loader_epoch(Views(), model, objective, 512, 2, equal and train.amp_by_default(torch.device('cpu')))


candidate('epoch of simclr', 'torchvision, DataLoader of 2 workers')(partial(simclr_by_torchvision, False))
candidate('epoch of simclr', 'the same at our precision')(partial(simclr_by_torchvision, True))


# ----------------------------------------------------------------------------------------- parts of it

@candidate('two views of 512 pictures')
def views_by_ours(quick):
    x, views, g = data.to_float(images(512)), stages.views_of(arguments('simclr')), data.generator('cpu', 0)
    return lambda: data.augment(torch.cat([x, x]), views, g), 512, 'pictures'


@candidate('two views of 512 pictures', 'torchvision, picture by picture')
def views_by_torchvision(quick):
    x, views = images(512), torchvision_views()
    return lambda: [views(one) for one in x], 512, 'pictures'


@candidate('two views of 512 pictures', 'kornia, batched')
def views_by_kornia(quick):
    import kornia.augmentation as k
    views = k.AugmentationSequential(
        k.RandomResizedCrop((28, 28), (0.3, 1), p=1.0), k.RandomHorizontalFlip(), k.RandomRotation(10.0, p=1.0),
        k.RandomBrightness((0.6, 1.4), p=1.0), k.RandomContrast((0.6, 1.4), p=1.0))
    x = data.to_float(images(512))
    return lambda: views(torch.cat([x, x])), 512, 'pictures'


def nt_xent(loss, B, quick):
    z1, z2 = (torch.randn(B, 128, generator=data.generator('cpu', i)).requires_grad_() for i in range(2))
    return lambda: loss()(z1, z2).backward(), B, 'pictures'


def lightly_loss():
    from lightly.loss import NTXentLoss
    return NTXentLoss(0.2)


for B in 512, 1024, 2048, 4096, 8192:
    part = f'NT-Xent, B = {B:,}'
    candidate(part, series=('NT-Xent', B))(partial(nt_xent, lambda: partial(losses.nt_xent, tau=0.2), B))
    if B in (512, 4096):
        candidate(part, 'lightly')(partial(nt_xent, lightly_loss, B))
        candidate(part, 'textbook')(partial(nt_xent, lambda: textbook_nt_xent, B))


def pairs(n):
    x = data.to_float(data.load().x_test[:n])
    return x, (x + 0.1 * torch.randn(x.shape, generator=data.generator('cpu', 0))).clamp(0, 1)


def ssim(measure, quick):
    x, y = pairs(1000 if quick else 10000)
    def once():
        with torch.no_grad():
            return measure()(x, y)
    return once, len(x), 'pairs'


def ssim_by_ours():
    return lambda x, y: torch.cat([evaluate.ssim(a, b) for a, b in zip(x.split(1000), y.split(1000))])


def ssim_by_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure as measure
    return lambda x, y: measure(x, y, data_range=1.0, reduction='none')


def ssim_by_pytorch_msssim():
    from pytorch_msssim import ssim as measure
    return lambda x, y: measure(x, y, data_range=1.0, size_average=False)


def ssim_by_skimage():
    from skimage.metrics import structural_similarity as measure
    return lambda x, y: [measure(a, b, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
                         for a, b in zip(x[:, 0].numpy(), y[:, 0].numpy())]


for name, measure in (('ours', ssim_by_ours), ('torchmetrics', ssim_by_torchmetrics),
                      ('pytorch-msssim', ssim_by_pytorch_msssim), ('scikit-image', ssim_by_skimage)):
    candidate('SSIM of 10,000 pairs', name)(partial(ssim, measure))


def features(n, D=256):
    """n rows like an encoder's: clusters that overlap, D numbers each."""
    g = data.generator('cpu', n)
    centres = torch.randn(50, D, generator=g)
    return centres[torch.randint(50, (n,), generator=g)] + 1.5 * torch.randn(n, D, generator=g)


def kmeans(fit, N, k, quick):
    x = features(N // (10 if quick else 1))
    return partial(fit(), x, k, x[:k].clone()), 10 * len(x), 'rows in 10 iterations'


def kmeans_by_ours():
    return lambda x, k, start: evaluate.kmeans(x, k, iterations=10, tol=-1, centres=start)


def kmeans_by_sklearn():
    from sklearn.cluster import KMeans
    return lambda x, k, start: KMeans(k, init=start.numpy(), n_init=1, max_iter=10, tol=0).fit(x.numpy())


def kmeans_by_faiss():
    import faiss
    def fit(x, k, start):
        kmeans = faiss.Kmeans(x.shape[1], k, niter=10, max_points_per_centroid=len(x))
        kmeans.train(x.numpy(), init_centroids=start.numpy())
        kmeans.assign(x.numpy())
    return fit


for N, k in (15000, 10), (30000, 10), (60000, 10), (60000, 100), (60000, 1000):
    part = f'k-means, {N:,} x 256, k = {k:,}'
    candidate(part, series=('k-means', N) if k == 10 else None)(partial(kmeans, kmeans_by_ours, N, k))
    if N == 60000:
        candidate(part, 'scikit-learn')(partial(kmeans, kmeans_by_sklearn, N, k))
        candidate(part, 'faiss')(partial(kmeans, kmeans_by_faiss, N, k))


def knn(search, N, quick):
    bank, x = features(N), F.normalize(features(1000 if quick else 10000), dim=1)
    return partial(search(), F.normalize(bank, dim=1), torch.arange(N) % 10, x), len(x), 'rows'


def knn_by_sklearn():
    from sklearn.neighbors import KNeighborsClassifier
    return lambda bank, y, x: KNeighborsClassifier(20, algorithm='brute', weights='distance').fit(
        bank.numpy(), y.numpy()).predict(x.numpy())


def knn_by_faiss():
    import faiss
    def search(bank, y, x):
        index = faiss.IndexFlatIP(bank.shape[1])
        index.add(bank.numpy())
        s, i = index.search(x.numpy(), 20)
        votes = torch.zeros(len(x), 10)
        return votes.scatter_add_(1, y[torch.from_numpy(i)], (torch.from_numpy(s) / 0.07).exp()).argmax(1)
    return search


for N in 15000, 30000, 60000:
    candidate(f'kNN, 10,000 against {N:,} x 256', series=('kNN', N))(partial(knn, lambda: evaluate.knn, N))
candidate('kNN, 10,000 against 60,000 x 256', 'scikit-learn')(partial(knn, knn_by_sklearn, 60000))
candidate('kNN, 10,000 against 60,000 x 256', 'faiss')(partial(knn, knn_by_faiss, 60000))


@candidate('load Fashion-MNIST')
def load_by_ours(quick):
    return data.load, 70000, 'pictures'


@candidate('load Fashion-MNIST', 'ours, inflated files')
def load_raw_by_ours(quick):
    return partial(data.load, raw_files()[1]), 70000, 'pictures'


@candidate('load Fashion-MNIST', 'torchvision, inflated files')
def load_by_torchvision(quick):
    from torchvision import datasets
    folder = raw_files()[0]
    return lambda: [datasets.FashionMNIST(folder, train=part) for part in (True, False)], 70000, 'pictures'


@candidate('ssl.py --help')
def help_by_ours(quick):
    return partial(subprocess.run, [sys.executable, HERE / 'ssl.py', '--help'], stdout=subprocess.DEVNULL), 1, 'start'


# ------------------------------------------------------------------------------------------- measuring

def serve(pipe, part, name, quick):
    """A candidate's process: prepares it, then times it once for each message."""
    sys.stdout = open(os.devnull, 'w')
    try:
        if name.startswith('ours'):
            train.keep_memory()                                        # as ssl.py does
        once, amount, unit, *kind = PARTS[part][name](quick)
        plain = mock.patch.object(nets.NarrowConv, 'apply', lambda x, weight, *flags: F.conv2d(x, weight, None, *flags))
        with FlopCounterMode(display=False) as counted, plain:         # its zeros between maps are no work
            once()
        began = time.perf_counter()
        once()                                                         # warm by now: how often fills a turn?
        times = 1 if quick else max(1, round(0.2 / (time.perf_counter() - began)))
    except Exception as e:                                             # a package may fail in any way
        pipe.send(' '.join(f'{type(e).__name__}: {e}'.split()))
        return
    pipe.send((amount, unit, kind[0] if kind else 'float32', counted.get_total_flops()))
    while pipe.recv():
        time.sleep(0.1)                                                # threads of the one before go to sleep
        began = time.perf_counter()
        for _ in range(times):
            once()
        pipe.send((time.perf_counter() - began) / times)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    for folder in KEPT:
        folder.cleanup()


def measure(part, names, repeats, quick):
    """[{'part', 'name', 'seconds': [...], 'amount', 'unit', 'flops', 'mib'}] of a part's candidates, in turns."""
    context, rows = multiprocessing.get_context('forkserver'), []
    for name in names:
        pipe, theirs = context.Pipe()
        worker = context.Process(target=serve, args=(theirs, part, name, quick))
        worker.start()
        theirs.close()
        try:
            ready = pipe.recv()
        except EOFError:
            ready = 'it ended'
        if isinstance(ready, str):
            print(f'{part}, {name}: left out ({ready})', flush=True)
            worker.join()
            continue
        rows.append((pipe, worker, {'part': part, 'name': name, 'seconds': [],
                                    **dict(zip(('amount', 'unit', 'precision', 'flops'), ready))}))
    for _ in range(repeats):
        for pipe, _, row in rows:
            pipe.send(True)
            row['seconds'].append(pipe.recv())
    for pipe, worker, row in rows:
        pipe.send(False)
        row['mib'] = pipe.recv()
        worker.join()
    return [row for _, _, row in rows]


def median(row):
    return statistics.median(row['seconds'])


def table(rows):
    """The rows as a table. Peers stand beside ours by the median ratio of the times of a turn."""
    rate = {row['precision']: row['amount'] * 1e9 / median(row) for row in rows if row['part'] in LIMITS}
    lines = [('part', 'by', 'seconds', 'range', 'a second', 'of', 'of the limit', 'slower than ours', 'MiB')]
    for row in rows:
        ours, each = next(r for r in rows if r['part'] == row['part']), median(row)
        ratio = statistics.median(b / a for a, b in zip(ours['seconds'], row['seconds']))
        share = row['flops'] / each / rate[row['precision']] if row['precision'] in rate else 0
        lines.append((row['part'], row['name'], f'{each:.3g}', f'{min(row["seconds"]):.3g}-{max(row["seconds"]):.3g}',
                      f'{row["amount"] / each:,.0f}', row['unit'],
                      f'{100 * share:.0f} %' if share and row['part'] not in LIMITS else '',
                      '' if row is ours else f'{ratio:.1f} x', f'{row["mib"]:,}'))
    return report.table(lines)


def slopes(rows):
    """How time grows with size: the exponent of a power, fitted to the logarithms."""
    times, lines = {row['part']: median(row) for row in rows if row['name'] == 'ours'}, []
    for what, sizes in SERIES.items():
        some = [(n, times[part]) for n, part in sorted(sizes.items()) if part in times]
        if len(some) > 2:
            power = np.polyfit(*np.log(some).T, 1)[0]
            lines.append(f'{what}: from {some[0][0]:,} to {some[-1][0]:,} time grows as size^{power:.2f}')
    return '\n'.join(lines)


def compared(rows, old):
    """Times of ours against those of an older --json file, also with the machine's drift taken out."""
    def times(rows):
        return {row['part']: median(row) for row in rows if row['name'] == 'ours'}
    new, old = times(rows), times(old)
    drift = statistics.median([new[p] / old[p] for p in LIMITS if p in new and p in old] or [1.0])
    lines = [('part', 'then', 'now', 'now / then', f'with the machine\'s drift of {drift:.2f} taken out')]
    lines += [(p, f'{old[p]:.3g}', f'{new[p]:.3g}', f'{new[p] / old[p]:.2f}', f'{new[p] / old[p] / drift:.2f}')
              for p in new if p in old]
    return report.table(lines)


def processes(most, method, quick):
    """Pictures a second of a method on 1, 2, 4, ... processes that share this machine's cores."""
    lines, world = [('processes', 'threads each', 'pictures a second')], 1
    with tempfile.TemporaryDirectory() as folder:
        while world <= most:
            threads = max(1, torch.get_num_threads() // world)
            command = f'-m torch.distributed.run --standalone --nproc-per-node {world}'.split() + [
                HERE / 'ssl.py', *f'--method {method} --name {world} --epochs 2 --perplexity 0'.split(), '--limit',
                '3000' if quick else '12000', '--data', Path(data.find('fashion-mnist')).resolve()]
            subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                           env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
            rows = [json.loads(row) for row in (Path(folder) / 'runs' / str(world) / 'log.jsonl').open()]
            lines.append((str(world), str(threads), f'{rows[-1]["images_per_s"]:,.0f}'))
            world *= 2
    return report.table(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('words', nargs='*', metavar='WORD', help='only parts that have one of these in their names; the '
                   'matrix products that shares of the limit need are always measured')
    p.add_argument('--peers', action='store_true', help='beside torchvision, kornia, lightly, scikit-learn, faiss, '
                   'scikit-image, torchmetrics and pytorch-msssim, as far as they are installed')
    p.add_argument('--quick', action='store_true', help='small sizes and one turn: under two minutes, to see it run')
    p.add_argument('--repeats', type=int, default=5, metavar='N', help='turns (default: 5)')
    p.add_argument('--json', metavar='FILE', help='keep the figures')
    p.add_argument('--compare', metavar='OLD', help='a file that --json wrote: show what changed')
    p.add_argument('--processes', type=int, default=0, metavar='N', help='instead: one method on 1, 2, 4, ... N '
                   'processes under torchrun')
    p.add_argument('--method', default='simclr', help='of --processes (default: simclr)')
    args = p.parse_args(argv)
    if args.repeats < 1 or args.processes < 0:
        p.error('--repeats is a number from 1, --processes one from 0')
    try:
        old = json.loads(Path(args.compare).read_text())['rows'] if args.compare else None
        compared([], old or [])
        data.load(limit=20)
    except (OSError, ValueError) as e:
        p.error(e)
    except (KeyError, TypeError, statistics.StatisticsError):
        p.error(f'{args.compare} was not written by --json')
    if args.processes:
        try:
            print(processes(args.processes, args.method, args.quick))
        except subprocess.CalledProcessError:
            sys.exit(2)                                                    # ssl.py has said why
        return
    rows = []
    for part, candidates in PARTS.items():
        if part in LIMITS or not args.words or any(word in part for word in args.words):
            names = [n for n in candidates if args.peers or n.startswith('ours')]
            rows += measure(part, names, 1 if args.quick else args.repeats, args.quick)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {1 if args.quick else args.repeats} turns')
    print(table(rows), slopes(rows), *[compared(rows, old)] if old else [], sep='\n\n')
    if args.json:
        Path(args.json).write_text(json.dumps({'torch': torch.__version__, 'threads': torch.get_num_threads(),
                                               'quick': args.quick, 'rows': rows}))


if __name__ == '__main__':
    main()
