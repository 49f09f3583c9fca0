"""What a representation is worth: image quality, kNN, linear probe, clusters, from scratch.

Pictures are float in 0..1, features float32 (N, D), labels int64 (N,), all on one device. Label
arguments may be numpy or torch arrays of any integer type. Everything large is done in chunks.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import data
from runs import progress

CHUNK = 1 << 23                                     # floats in the largest temporary matrix (32 MiB)


@torch.no_grad()
def in_chunks(f, x, size=None, ids=None, device=None):
    """torch.cat of f over the rows `ids` (None: all) of uint8 pictures x, given to f as float 0..1 on the device
    (None: where they are), `size` at once: by default 1000, fewer where pictures are large."""
    size = size or min(1000, 1 + (1 << 22) // math.prod(x.shape[1:]))
    ids = torch.arange(len(x)) if ids is None else ids
    out, at = [], progress('pictures', len(ids))
    for i, part in enumerate(ids.split(size)):
        rows = x[part]
        out.append(f(data.to_float(rows if device is None else rows.to(device))))
        at((i + 1) * size)
    return torch.cat(out)


# ---------------------------------------------------------------------------------- image quality

def ssim(x, y, data_range=1.0):
    """Structural similarity of each pair of pictures: x, y (N, C, H, W) -> (N,). Wang et al. 2004.

    Gaussian window of 11 taps, sigma 1.5, population covariance, K1 0.01, K2 0.03, no padding (only
    windows that lie inside), mean over windows, then channels. Pictures under 11 px get the largest odd
    window that fits. 1 for equal pictures.
    """
    x, y = x.float(), y.float()
    rows, cols = (_window_matrix(n, x) for n in x.shape[2:])
    def mean(v):                                    # both 1-d filters as products with banded matrices
        return rows @ v @ cols.T
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    s = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return s.mean((1, 2, 3))


def _window_matrix(n, like, taps=11, sigma=1.5):
    """(n - taps + 1, n): each row a normalised Gaussian, moved on by one."""
    taps = min(taps, n - 1 + n % 2)
    w = torch.exp(-(torch.arange(taps, device=like.device) - taps // 2).square() / (2 * sigma ** 2))
    band = torch.zeros(n - taps + 1, n, device=like.device)
    for i in range(len(band)):
        band[i, i:i + taps] = w / w.sum()
    return band


def psnr(x, y, data_range=1.0):
    """Peak signal-to-noise ratio of each pair, in dB: (N, C, H, W) -> (N,); inf for equal pictures."""
    return 10 * torch.log10(data_range ** 2 / (x.float() - y.float()).square().flatten(1).mean(1))


def reconstruction(reconstruct, x, ids=None, device=None):
    """{'mse', 'ssim', 'psnr'}: means over uint8 pictures x (or its rows ids) of reconstruct(x) against x."""
    def measure(v):
        r = reconstruct(v)
        return torch.stack([(r - v).square().flatten(1).mean(1), ssim(r, v), psnr(r, v)], 1)
    return dict(zip(('mse', 'ssim', 'psnr'), in_chunks(measure, x, ids=ids, device=device).mean(0).tolist()))


# ---------------------------------------------------------------------------------------- k-means

def nearest(x, centres, squares=None):
    """(index of the nearest centre, squared distance to it) for each row of x (N, D); squares (N,) are those of the
    rows' lengths, if they are known."""
    index, dist, bias = [], [], centres.square().sum(1)
    for part in x.split(max(1, CHUNK // len(centres))):
        d, i = torch.addmm(bias, part, centres.T, alpha=-2).min(1)          # |x|^2 is the same for all
        index.append(i)
        dist.append(d)
    squares = torch.linalg.vector_norm(x, dim=1).square() if squares is None else squares
    return torch.cat(index), torch.cat(dist).add_(squares).clamp_(min=0)


def kmeans(x, k, restarts=10, iterations=100, tol=1e-4, seed=0, centres=None):
    """Lloyd's k-means on x (N, D): (assignment (N,), centres (k, D), inertia), the best of `restarts`.

    Starts by k-means++ (Arthur & Vassilvitskii 2007), or from `centres`. A cluster left empty restarts
    at the point farthest from its centre. Stops when the centres' squared shift falls under tol times
    the mean variance of a feature. Best is by inertia, the sum of squared distances. Memory: N floats
    and one chunk.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f'k-means was asked for {k} clusters of {len(x)} points')
    x = x.float()
    squares = torch.linalg.vector_norm(x, dim=1).square()
    limit = tol * (squares.mean() - x.mean(0).square().sum()).clamp(min=0) / x.shape[1]    # mean variance
    best, restarts = None, 1 if centres is not None else restarts
    at = progress('k-means, sooner if it settles', restarts * iterations)
    for r in range(restarts):
        g = data.generator(x.device, seed, 'kmeans', r)
        c = centres.to(x) if centres is not None else _kmeans_plus_plus(x, k, g)
        for i in range(iterations):
            at(r * iterations + i)
            old, (index, dist) = c, nearest(x, c, squares)
            c = _centroids(x, index, dist, k)
            if (c - old).square().sum() <= limit:
                break
        index, dist = nearest(x, c, squares)
        inertia = dist.sum().item()
        if best is None or inertia < best[2]:
            best = index, c, inertia
    at(restarts * iterations)
    return best


def medoids(x, centres):
    """Row of x nearest to its centre in each cluster that has rows: ids (k or fewer,) int64."""
    index, dist = nearest(x, centres)
    order = dist.argsort()
    order = order[index[order].argsort(stable=True)]                         # by cluster, then by distance
    cluster = index[order]
    return order[torch.cat([cluster.new_ones(1, dtype=torch.bool), cluster[1:] != cluster[:-1]])]


def _kmeans_plus_plus(x, k, g):
    """k rows of x, each drawn with probability proportional to its squared distance from those before."""
    first = torch.randint(len(x), (1,), generator=g, device=x.device)
    picked, dist = [first], None
    for _ in range(k - 1):
        d = nearest(x, x[picked[-1]])[1]
        dist = d if dist is None else torch.minimum(dist, d)
        total = dist.cpu().double().cumsum(0)                              # CUDA adds these up in any order
        draw = torch.rand(1, generator=g, device=x.device).cpu() * total[-1]
        picked.append(torch.searchsorted(total, draw).clamp(max=len(x) - 1).to(x.device))
    return x[torch.cat(picked)].clone()


def _centroids(x, index, dist, k):
    """Mean of each cluster; an empty one takes the farthest point, each a different one."""
    count = torch.bincount(index, minlength=k)
    total = torch.zeros(k, x.shape[1], device=x.device)
    if x.device.type == 'cpu':
        total.index_add_(0, index, x)
    else:                                           # there index_add_ adds in any order; a one-hot product doesn't
        step = max(1, CHUNK // k)
        for part, i in zip(x.split(step), index.split(step)):
            total += F.one_hot(i, k).to(x.dtype).T @ part
    centres = total / count.clamp(min=1).unsqueeze(1)
    empty = (count == 0).nonzero().flatten()
    if len(empty):
        centres[empty] = x[dist.topk(len(empty)).indices]
    return centres


# ------------------------------------------------------------------------- clusters against classes

def contingency(pred, labels):
    """(clusters, classes) counts of each pair, as int64 numpy; rectangular when their numbers differ."""
    pred, labels = (np.asarray(torch.as_tensor(v).cpu()).astype(np.int64) for v in (pred, labels))
    if pred.shape != labels.shape or pred.ndim != 1 or not len(pred):
        raise ValueError(f'cluster ids of shape {pred.shape} and labels of shape {labels.shape}; wanted (N,) twice')
    if pred.min() < 0 or labels.min() < 0:
        raise ValueError('cluster ids and labels must not be negative')
    K = labels.max() + 1
    return np.bincount(pred * K + labels, minlength=(pred.max() + 1) * K).reshape(-1, K)


def hungarian_accuracy(pred, labels):
    """(accuracy, {cluster: class}) of the best one-to-one matching of clusters to classes.

    Matched on the rectangular contingency table (Kuhn 1955); pictures in clusters left unmatched count
    as wrong.
    """
    table = contingency(pred, labels)
    rows, cols = linear_sum_assignment(table, maximize=True)
    return table[rows, cols].sum() / table.sum(), dict(zip(rows.tolist(), cols.tolist()))


def _entropy(p):
    p = p[p > 0]
    return -(p * np.log(p)).sum()


def nmi(pred, labels):
    """Normalised mutual information, arithmetic mean of the entropies; 0 if there is one cluster and one class."""
    p = contingency(pred, labels) / len(pred)
    h1, h2 = _entropy(p.sum(1)), _entropy(p.sum(0))
    mutual = h1 + h2 - _entropy(p)
    return float(max(0.0, mutual / ((h1 + h2) / 2))) if h1 + h2 > 0 else 0.0


def ari(pred, labels):
    """Adjusted Rand index (Hubert & Arabie 1985): 1 for equal partitions, 0 expected by chance."""
    table = contingency(pred, labels).astype(float)
    def pairs(n):
        return (n * (n - 1) / 2).sum()
    a, b, both, total = pairs(table.sum(1)), pairs(table.sum(0)), pairs(table), pairs(table.sum())
    expected = a * b / total if total else 0.0
    top = (a + b) / 2 - expected
    return float((both - expected) / top) if top else 1.0


def purity(pred, labels):
    """Share of pictures in the majority class of their cluster. Rises with k: say k beside it."""
    table = contingency(pred, labels)
    return float(table.max(1).sum() / table.sum())


def confusion_matrix(pred, labels, K):
    """(K, K) counts: row = true class, column = predicted class."""
    table = np.zeros((K, K), np.int64)
    np.add.at(table, (np.asarray(torch.as_tensor(labels).cpu()), np.asarray(torch.as_tensor(pred).cpu())), 1)
    return table


def f1(confusion):
    """Per-class F1 from a confusion matrix: (K,); 0 where a class is neither present nor predicted."""
    return 2 * confusion.diagonal() / np.maximum(confusion.sum(0) + confusion.sum(1), 1)


# -------------------------------------------------------------------------------- labelled probes

def most_similar(x, bank, k):
    """(cosine similarities (N, k), descending, and rows) of the k rows of bank (M, D) most similar to each of x (N, D).

    Each similarity row is cut into blocks of 64: the k largest lie in the k blocks of largest maximum, so that only
    those are sorted.
    """
    bank, M, k = F.normalize(bank.float(), dim=1).T, len(bank), min(k, len(bank))
    whole, found = M - M % 64, []
    room = torch.empty(min(len(x), max(1, CHUNK // M)), M, device=x.device)           # one, used again and again
    at = progress('nearest neighbours', len(x))
    for part in F.normalize(x.float(), dim=1).split(len(room)):
        s, rest = torch.mm(part, bank, out=room[:len(part)]).split((whole, M - whole), dim=1)
        blocks = s.unflatten(1, (whole // 64, 64))
        best = blocks.amax(2).topk(min(k, whole // 64), dim=1, sorted=False).indices.unsqueeze(2)
        rows = (64 * best + torch.arange(64, device=x.device)).flatten(1)
        rows = torch.cat([rows, torch.arange(whole, M, device=x.device).expand(len(part), -1)], 1)
        s, i = torch.cat([blocks.gather(1, best.expand(-1, -1, 64)).flatten(1), rest], 1).topk(k, dim=1)
        found.append((s, rows.gather(1, i)))
        at(sum(len(s) for s, _ in found))
    return tuple(map(torch.cat, zip(*found)))


def pool(p, q):
    """What two experts say together, p and q (..., K) probabilities: the normalised geometric mean (a logarithmic
    opinion pool, Genest & Zidek 1986); a class that q never heard of is not ruled out."""
    both = (p * (q + 1e-3)).sqrt()
    return both / both.sum(-1, keepdim=True)


def knn(x_train, y_train, x_test, k=20, tau=0.07, classes=None):
    """Class of each test row by a vote of its k nearest training rows: (N,) int64.

    Cosine similarity s, votes weighted exp(s / tau) (arXiv 1805.01978, section 3.4).
    """
    s, i = most_similar(x_test, x_train, k)
    vote = torch.zeros(len(s), classes or int(y_train.max()) + 1, device=s.device)
    return vote.scatter_add_(1, y_train[i], (s / tau).exp()).argmax(1)


def linear_probe(x_train, y_train, x_val, y_val, x_test, l2s=(1e-3, 1e-2, 1e-1, 1.0)):
    """(logits (N, K), chosen l2): multinomial logistic regression on frozen features.

    Features are standardised by the training rows. The L2 strength is chosen by accuracy on the
    validation rows; then the probe is fitted anew on both. All of these labels count as used.
    """
    K = int(torch.cat([y_train, y_val]).max()) + 1
    scores, at = [], progress('linear probe', len(l2s) + 1)
    for l2 in l2s if len(x_val) else l2s[1:2]:
        pred = logistic_regression(x_train, y_train, K, l2)(x_val).argmax(1) if len(x_val) else y_val
        scores.append(((pred == y_val).float().mean().item(), l2))
        at(len(scores))
    l2 = max(scores)[1]
    predict = logistic_regression(torch.cat([x_train, x_val]), torch.cat([y_train, y_val]), K, l2)
    at(len(l2s) + 1)
    return predict(x_test), l2


def logistic_regression(x, y, K, l2, iterations=200):
    """Function from features to logits (N, K): minimises cross-entropy + l2 / 2 |W|^2 by L-BFGS."""
    mean, std = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
    def standardise(v):
        return (v - mean) / std
    xs = standardise(x)
    W = x.new_zeros(x.shape[1], K, requires_grad=True)
    b = x.new_zeros(K, requires_grad=True)
    opt = torch.optim.LBFGS([W, b], max_iter=iterations, tolerance_change=1e-7, line_search_fn='strong_wolfe')
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(xs @ W + b, y) + l2 / 2 * W.square().sum()
        loss.backward()
        return loss
    with torch.enable_grad():
        opt.step(closure)
    return lambda v: standardise(v) @ W.detach() + b.detach()


# ----------------------------------------------------------------------------- PCA and health

class PCA:
    """Principal components of x (N, D): encode to (N, k), decode back. Exact."""

    def __init__(self, x, k):
        if k > x.shape[1]:
            raise ValueError(f'PCA was asked for {k} components of {x.shape[1]} pixels; wanted as many or fewer')
        self.mean = x.mean(0)
        if k < len(x) < x.shape[1] // 4:                                     # large pictures: no (D, D) matrix
            vectors = torch.linalg.svd((x - self.mean).cpu(), full_matrices=False).Vh.T.flip(1)
        else:
            cov = (x - self.mean).T @ (x - self.mean) / len(x)
            vectors = torch.linalg.eigh(cov.cpu()).eigenvectors              # few devices have it
        self.components = vectors[:, -k:].flip(1).to(x.device)               # (D, k), largest first

    def encode(self, x):
        return (x - self.mean) @ self.components

    def decode(self, z):
        return z @ self.components.T + self.mean


def principal(h, k=2):
    """First k principal components of h (N, D): (N, k); 0 beyond its dimensions. Through the smaller of the N x N
    products of pictures and the D x D covariance."""
    scale = h.abs().max().clamp(min=1e-30)                                 # squares of any features stay finite
    h = h / scale
    if h.shape[1] <= len(h):
        y = PCA(h, min(k, h.shape[1])).encode(h)
    else:
        h = h - h.mean(0)
        values, vectors = torch.linalg.eigh((h @ h.T).cpu())
        y = (vectors[:, -k:] * values[-k:].clamp(min=0).sqrt()).flip(1).to(h.device)
    return scale * F.pad(y, (0, k - y.shape[1]))


def effective_rank(h):
    """exp of the entropy of the normalised singular values of centred h (N, D) (Roy & Vetterli 2007).

    D when all directions carry the same, 1 when the features have collapsed to a line, nan if one is not finite.
    """
    if not h.isfinite().all():
        return math.nan
    s = torch.linalg.svdvals((h - h.mean(0)).float().cpu())              # few devices have it
    p = s / s.sum().clamp(min=1e-12)
    return math.exp(-(p * p.clamp(min=1e-12).log()).sum().item())


def active_units(mu, threshold=0.01):
    """Number of latent units whose mean varies over pictures by more than threshold (arXiv 1509.00519)."""
    return int((mu.var(0, unbiased=False) > threshold).sum())


# ------------------------------------------------------------------------------------ all measures

@torch.no_grad()
def measure(ds, train_ids, val_ids, encode, reconstruct=None, seed=0, probe_share=0.1, device='cpu'):
    """(every measure of one representation, as a dict for metrics.json; what they were measured on, to look at).
    Reads the test set once.

    Scored on the test set; on the validation pictures if there is no test set, or if it has no labels
    while the training set has some. Measures that need labels the data set lacks are named in 'left_out'.

    mse, ssim, psnr: of the reconstructions. knn: k = 20, cosine, all training and validation labels.
    probe: linear, from probe_share of the training and validation labels together; a sixth of those come
    from validation and choose the L2 strength. kmeans_*: on L2-normalised features, fitted on the training
    pictures, k = the number of classes; ACC maps clusters to classes by Hungarian matching on the training
    labels, NMI, ARI and purity need no mapping.

    To look at, each as far as there is one: x pictures, y labels, h features, probs (N, K) of the probe, and the
    k-means: clusters (N,), centres, mapping {cluster: class}.
    """
    use_test = ds.x_test is not None and (ds.y_test is not None or ds.y_train is None)
    x, y = (ds.x_test, ds.y_test) if use_test else (ds.x_train, ds.y_train)
    ids = torch.arange(len(x)) if use_test else val_ids if y is None else ds.labelled(val_ids)
    out = {'split': 'test' if use_test else 'validation', 'n': len(ids), 'left_out': []}
    if reconstruct:
        out.update(reconstruction(reconstruct, x, ids, device))
    h, h_train = (in_chunks(encode, v, ids=of, device=device).float() for v, of in ((x, ids), (ds.x_train, train_ids)))
    if not all(part.square().sum(1).isfinite().all() for part in (h, h_train)):
        raise ValueError('the features are too large to be measured: the training has diverged; start again with '
                         '--overwrite and a lower --lr')
    out.update(features=h.shape[1], effective_rank=effective_rank(h),
               feature_std=h.std(0, unbiased=False).mean().item())
    shown = {'x': x if use_test else x[ids], 'h': h}
    if y is None:
        return {**out, 'left_out': ['knn', 'probe', 'kmeans']}, shown
    y, K = y[ids].to(device), len(ds.classes)
    index, centres, _ = kmeans(F.normalize(h_train, dim=1), min(K, len(h_train)), restarts=5, seed=seed)
    pred = nearest(F.normalize(h, dim=1), centres)[0]
    out.update(clusters=len(centres), kmeans_nmi=nmi(pred, y), kmeans_ari=ari(pred, y), kmeans_purity=purity(pred, y))
    shown.update(y=y, clusters=pred, centres=centres)
    if ds.y_train is None:
        out['kmeans_acc'], shown['mapping'] = hungarian_accuracy(pred, y)
        return {**out, 'kmeans_mapping': out['split'], 'left_out': ['knn', 'probe']}, shown
    known, val_ids = (ds.y_train[train_ids] >= 0).to(device), ds.labelled(val_ids)
    h_train, h_val = h_train[known], in_chunks(encode, ds.x_train, ids=val_ids, device=device).float()
    y_train, y_val = ds.y_train[train_ids].to(device)[known], ds.y_train[val_ids].to(device)
    mapping = shown['mapping'] = hungarian_accuracy(index[known], y_train)[1]
    mapped = torch.tensor([mapping.get(i, -1) for i in range(len(centres))], device=device)[pred]
    out.update(kmeans_acc=(mapped == y).float().mean().item(), kmeans_mapping='train')
    bank = (h_train, y_train) if not use_test else (torch.cat([h_train, h_val]), torch.cat([y_train, y_val]))
    out.update(knn=(knn(*bank, h) == y).float().mean().item(), knn_labels=len(bank[1]))
    n = max(2, round(probe_share * (len(y_train) + len(y_val))))
    a = torch.randperm(len(y_train), generator=data.generator('cpu', seed, 'probe'))[:n - n // 6].to(device)
    b = torch.randperm(len(y_val), generator=data.generator('cpu', seed, 'probe', 'validation'))
    b = b[:n // 6 if use_test else 0].to(device)
    logits, l2 = linear_probe(h_train[a], y_train[a], h_val[b], y_val[b], h)
    pred, shown['probs'] = logits.argmax(1), logits.softmax(1)
    return {**out, 'probe': (pred == y).float().mean().item(), 'probe_labels': len(a) + len(b), 'probe_l2': l2,
            **by_class(pred, y, K)}, shown


def by_class(pred, y, K):
    """{'f1', 'confusion'} of predictions, as lists for metrics.json."""
    table = confusion_matrix(pred, y, K)
    return {'f1': f1(table).tolist(), 'confusion': table.tolist()}


@torch.no_grad()
def measure_classifier(ds, answer, device='cpu', seed=0):
    """(accuracy, F1 and confusion on the test set, as a dict for metrics.json; what to look at, as from measure).

    answer(x): (B, K + D), class probabilities beside features. The test set is read once; without labels for it
    nothing is measured, and what is to be looked at is 2,000 training pictures drawn by the seed, without labels.
    """
    K, labelled = len(ds.classes), ds.x_test is not None and ds.y_test is not None
    x = ds.x_test if labelled else ds.x_train[sample(len(ds.x_train), 2000, seed)]
    out = in_chunks(answer, x, device=device)
    shown = {'x': x, 'h': out[:, K:], 'probs': out[:, :K]}
    if not labelled:
        return {'left_out': ['accuracy: there is no labelled test set']}, shown
    pred, y = shown['probs'].argmax(1), ds.y_test.to(device)
    return {'split': 'test', 'n': len(y), 'left_out': [], 'accuracy': (pred == y).float().mean().item(),
            **by_class(pred, y, K)}, {**shown, 'y': y}


def sample(n, most, *key):
    """Ids of n things, at most `most` of them, drawn by the key; sorted int64 on the CPU."""
    return torch.randperm(n, generator=data.generator('cpu', 'sample', *key))[:most].sort().values


@torch.no_grad()
def measure_clusters(ds, answer, K, pred_train, device='cpu'):
    """(ACC, NMI, ARI, purity, F1 and confusion of K clusters on the test set, as a dict for metrics.json; what to
    look at, as from measure). Reads the test set once; without a labelled one it scores the training pictures.

    answer(x): (B, K + D), cluster probabilities beside features; pred_train (N,): the clusters of the training
    pictures. ACC and F1 name each cluster by Hungarian matching on the training labels (on the scored ones if there
    are no others); pictures in clusters left unmatched count as wrong.
    """
    pred, y, by, ids = pred_train.cpu(), None, 'test', torch.arange(len(pred_train))
    if ds.y_train is not None:
        ids, by = ds.labelled(), 'training'
        pred, y = pred[ids], ds.y_train[ids]
        name = hungarian_accuracy(pred, y)[1]
    use_test = ds.x_test is not None and (ds.y_test is not None or y is None)
    some = torch.arange(len(ds.x_test)) if use_test else ids[sample(len(ids), 2000, 'clusters')]
    x = (ds.x_test if use_test else ds.x_train)[some]
    out = in_chunks(answer, x, device=device).cpu()
    if use_test:
        pred, y = out[:, :K].argmax(1), ds.y_test
    h, seen = F.normalize(out[:, K:], dim=1), pred if use_test else pred_train.cpu()[some]
    centres = torch.stack([h[seen == c].mean(0) if (seen == c).any() else h.mean(0) for c in range(K)])
    shown = {'x': x, 'h': out[:, K:], 'clusters': seen, 'centres': centres}
    sizes = torch.bincount(pred, minlength=K)
    out = {'split': 'test' if use_test else 'training', 'n': len(pred), 'clusters': K, 'left_out': [],
           'live_clusters': int((sizes > 0).sum()), 'sizes': sizes.tolist()}
    if y is None:
        return {**out, 'left_out': ['ACC, NMI, ARI, purity: there are no labels']}, shown
    if by == 'test':
        name = hungarian_accuracy(pred, y)[1]
    shown.update(y=y if use_test else ds.y_train[some], mapping=name)
    named = torch.tensor([name.get(c, -1) for c in range(K)])[pred]
    classes = len(ds.classes)
    table = confusion_matrix(named[named >= 0], y[named >= 0], classes)
    missed = np.bincount(y[named < 0].numpy(), minlength=classes)            # in clusters that stand for no class
    both = 2 * table.diagonal() / np.maximum(table.sum(0) + table.sum(1) + missed, 1)
    return {**out, 'acc': (named == y).float().mean().item(), 'mapping': by, 'nmi': nmi(pred, y), 'ari': ari(pred, y),
            'purity': purity(pred, y), 'f1': both.tolist(), 'confusion': table.tolist()}, shown
