"""Clusters without labels. scan: linear heads on frozen features that neighbours agree with, propagated.
cluster: a network trained on pseudo-labels, assigned anew in turns. `learn` trains, `measure` scores.
"""
import math
import time
from functools import partial

import torch
import torch.nn.functional as F

import data
import distributed
import evaluate
import features
import losses
import report
import runs
import train
from device import generator, progress
from pretrain import views_of
from query import classification

HEADS = 144                     # linear heads of scan, of which the better half decides together
ENTROPY = 5.0                   # weight of clusters being equally large
HEADS_BYTES = 1 << 30           # of the probabilities of a batch by all heads
PROPAGATED = 10                 # neighbours that a cluster is propagated from


# ---------------------------------------------------------------------------------------------- scan

def scan_heads(h, near, K, heads=HEADS, entropy=ENTROPY, steps=800, batch=1024, lr=3e-3, seed=0):
    """Probabilities (N, K) by the consensus of linear cluster heads on frozen features h (N, D).

    All heads are trained at once by SCAN's loss (arXiv 2005.12320, eq. 2) on pairs of a row and one of its
    neighbours near (N, k), nearest first. What each says is propagated, and the half whose clusters then
    have the lowest criterion is kept, so that no label chooses. The clusters of each take the names of those
    of the best head that they overlap most; the consensus is the mean over the heads, propagated.
    """
    g = generator(h.device, seed, 'scan')
    x, batch = 16 * F.normalize(h.float(), dim=1), min(batch, max(128, len(h) // 8))
    heads = max(1, min(heads, HEADS_BYTES // (4 * batch * K)))
    weight = (0.05 * torch.randn(h.shape[1], K * heads, generator=g, device=h.device)).requires_grad_()
    bias = torch.zeros(K * heads, device=h.device, requires_grad=True)
    opt = torch.optim.Adam([weight, bias], lr=lr)

    def all_probs(x):                                   # (heads, n, K); softmax over a short last dim is slow
        return (x @ weight + bias).unflatten(1, (K, -1)).softmax(1).permute(2, 0, 1)
    update = progress('cluster heads', steps)
    for step in range(steps):
        update(step)
        opt.param_groups[0]['lr'] = lr * (1 - step / steps)
        i = torch.randint(len(x), (batch,), generator=g, device=h.device)
        j = near[i, torch.randint(near.shape[1], i.shape, generator=g, device=h.device)]
        opt.zero_grad()
        losses.scan(all_probs(x[i]), all_probs(x[j]), entropy).sum().backward()
        opt.step()
    update(steps)
    with torch.no_grad():
        return consensus(x, weight, bias, near, K, heads, entropy)


def consensus(x, weight, bias, near, K, heads, entropy):
    """Probabilities (N, K) by the better half of the heads, as scan_heads says."""
    def head_probs(head):                               # one at a time: memory need not hold them all
        return (x @ weight[:, head::heads] + bias[head::heads]).softmax(1)
    judged, update = [], progress('choosing heads', heads)
    for head in range(heads):
        judged.append(criterion(propagate(head_probs(head), near).argmax(1), near, K, entropy))
        update(head + 1)
    best = torch.tensor(judged).argsort(stable=True)[:math.ceil(heads / 2)].tolist()
    first, total = head_probs(best[0]).argmax(1), 0
    for head in best:
        probs = head_probs(head)
        total = total + probs[:, matching(probs.argmax(1), first, K).argsort()]
    return propagate(total / len(best), near)


def propagate(probs, near, times=5):
    """probs (N, K) after each row took the mean over those of its nearest neighbours, again and again: label
    propagation (Zhu & Ghahramani 2002) with no label held fixed."""
    for _ in range(times):
        probs = neighbour_mean(probs, near[:, :PROPAGATED])
    return probs


def neighbour_mean(probs, near):
    """The mean over the neighbours near (N, k) of their probs (N, K): (N, K)."""
    return torch.cat([probs[part].mean(1) for part in near.split(4096)])


def criterion(pred, near, K, entropy=ENTROPY):
    """SCAN's loss of hard assignments pred (N,): minus the log share of neighbours in the same cluster, minus
    `entropy` times that of the cluster sizes. Sees no label; lower is better, one cluster is worst."""
    same = (pred[near] == pred.unsqueeze(1)).float().mean().clamp(min=1e-8)
    sizes = torch.bincount(pred, minlength=K).float() / len(pred)
    return (-same.log() + entropy * torch.special.xlogy(sizes, sizes).sum()).item()


def matching(pred, before, K):
    """For each of K clusters of pred (N,) the one of `before` that it overlaps most, one to one (Hungarian):
    (K,) int64."""
    found = {int(a): int(b) for a, b in evaluate.hungarian_accuracy(pred, before)[1].items()}
    left = [c for c in range(K) if c not in found.values()]
    return torch.tensor([found[c] if c in found else left.pop() for c in range(K)], device=pred.device)


def scan(run, args, ds, device):
    """Clusters of all training images; returns a network in which neighbours vote on new images."""
    model = runs.initial_model(run.config, device)
    if distributed.rank() == 0:
        h = runs.start_network(run.config, device).encode(ds.x_train)
        near = features.neighbours(centred(h), args.neighbours)
        probs = scan_heads(centred(h), near, args.clusters, HEADS, seed=args.seed)
        model.remember(h, probs)
        run.save({'model': model.state_dict()})
        row = {'epoch': 0, 'iteration': 0, **numbers_of(probs.argmax(1), None, near, args.clusters, ds)}
        run.trim_log(-1)
        run.log(row)
        say(row)
    return model


def centred(h):
    """Features (N, D) around their mean, each of length 1: their cosines tell more."""
    return F.normalize(h - h.mean(0), dim=1)


# ------------------------------------------------------------------------------------------- cluster

def cluster(run, args, ds, device):
    """Pseudo-labelling: clusters by k-means on the features, or those of a finished scan; then --iterations
    times train on them for --epochs and assign all images anew, by what the network predicts. Returns the
    network of the assignment with the lowest criterion, which sees no label."""
    model = runs.initial_model(run.config, device)
    x = data.Images(ds.x_train, device)
    trainer = train.start(run, args, model, x)
    start = runs.start_network(run.config, device)
    h = centred(start.encode(ds.x_train))
    near = features.neighbours(h, args.neighbours)
    if not trainer.kept:
        keep(trainer, first_clusters(start, h, args, ds), 0, near, args, ds)
    objective = partial(classification, views=views_of(args), mixup=args.mixup)
    while True:
        now, pred = trainer.kept['row']['iteration'], trainer.kept['pred'].to(device)
        if trainer.epoch == now * args.epochs + 1:              # a resumed run that is further has logged it
            run.log({'epoch': trainer.epoch, **trainer.kept['row']})
        if now == args.iterations:
            break
        trainer.fit(objective, x, y=pred, last=(now + 1) * args.epochs, epochs=args.iterations * args.epochs)
        probs = runs.Network(run.config, model, device).predict(ds.x_train)
        keep(trainer, probs.argmax(1), now + 1, near, args, ds)
    model.load_state_dict(distributed.from_first(load_best(run))['model'])
    return model


def first_clusters(start, h, args, ds):
    """(N,) cluster ids: by a finished scan with as many clusters, else by k-means on h (N, D)."""
    if start.args.method == 'scan' and start.args.clusters == args.clusters:
        same = start.config['data']['digest'] == ds.digest
        return (start.model.probs if same else start.predict(ds.x_train)).argmax(1)
    return evaluate.kmeans(h, args.clusters, seed=args.seed)[0]


def keep(trainer, pred, now, near, args, ds):
    """Keep an assignment with the state, and in iteration-NN.pt, final.pt and, if it is that, best.pt."""
    pred = distributed.from_first(pred.cpu())
    before = trainer.kept.get('pred')
    row = {'iteration': now, **numbers_of(pred, before, near.cpu(), args.clusters, ds)}
    best = trainer.kept['best'] if now > 1 else math.inf        # no network made the first assignment
    trainer.kept = {'pred': pred, 'row': row, 'best': min(best, row['criterion'])}
    if distributed.rank() == 0:
        state = {'model': trainer.model.state_dict(), 'pred': pred}
        names = [f'iteration-{now:02}', 'final', *(['best'] if row['criterion'] < best else [])]
        for name in names:
            runs.write_state(trainer.run.folder / f'{name}.pt', state)
        say(row)
    trainer.save()


def load_best(run):
    """best.pt of a run of cluster; None on the processes after the first."""
    return runs.load_checkpoint(run.folder / 'best.pt') if distributed.rank() == 0 else None


def numbers_of(pred, before, near, K, ds):
    """An assignment pred (N,) in numbers: the share that is as `before`, sizes, criterion; and, to be looked
    at and never used, its scores where there are labels."""
    pred = pred.cpu()
    sizes = torch.bincount(pred, minlength=K)
    row = {'stable': 0.0 if before is None else (pred == before.cpu()).float().mean().item(),
           'live_clusters': int((sizes > 0).sum()), 'sizes': sizes.tolist(),
           'criterion': criterion(pred, near.cpu(), K)}
    if ds.y_train is not None:
        known = ds.labelled()
        both = pred[known], ds.y_train[known]
        row.update(acc=float(evaluate.hungarian_accuracy(*both)[0]), nmi=evaluate.nmi(*both),
                   ari=evaluate.ari(*both), purity=evaluate.purity(*both))
    return row


def say(row):
    """Print an assignment, loudly when clusters have died."""
    line = (f'iteration {row["iteration"]}: {row["stable"]:.1%} assigned as before, '
            f'criterion {row["criterion"]:.3f}, sizes {row["sizes"]}')
    if 'acc' in row:
        line += '; ' + ', '.join(f'{key} {row[key]:.3f}' for key in ('acc', 'nmi', 'ari', 'purity'))
    if row['live_clusters'] < len(row['sizes']):
        line += f'\nWARNING: only {row["live_clusters"]} of {len(row["sizes"])} clusters are alive'
    print(line, flush=True)


# -------------------------------------------------------------------------------------- both of them

def check(args, ds):
    """ValueError for clusters that can't be found."""
    if args.method == 'scan' and not args.encoder:
        raise ValueError('--method scan finds clusters in the features of a finished run: --encoder RUN')
    if args.clusters > len(ds.x_train) // 2:
        raise ValueError(f'--clusters {args.clusters} is too many for {len(ds.x_train):,} images')


def learn(run, args, ds, device):
    """Find clusters by --method scan or cluster; returns the network."""
    return scan(run, args, ds, device) if args.method == 'scan' else cluster(run, args, ds, device)


def measure(run, args, ds, model, device):
    """Score the clusters on the test set, once; write clusters.csv, report.html and metrics.json."""
    began, network = time.monotonic(), runs.Network(run.config, model, device)
    probs = model.probs if args.method == 'scan' else network.predict(ds.x_train)
    confidence, pred = (t.cpu() for t in probs.max(1))
    key, names = ds.row_names()
    rows = [(name, k, f'{p:.4f}') for name, k, p in zip(names, pred.tolist(), confidence.tolist())]
    runs.write_csv(run.folder / 'clusters.csv', [key, 'cluster', 'confidence'], rows)
    metrics, shown = evaluate.measure_clusters(ds, network.predict_batch, network.encode_batch, args.clusters,
                                               pred, device)
    report.finish(run, ds, metrics, shown, began)
    print(f'-> {run.folder / "clusters.csv"}: the clusters of all {len(pred):,} training images')
