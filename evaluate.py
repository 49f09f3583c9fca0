"""What a representation is worth: image quality, k-means, clusters against classes, linear probe.

Images are float in 0..1, features float32 (N, D), labels int64 (N,), all on one device. Cluster ids and
labels to be scored may be numpy or torch arrays of any integer type.
"""
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from device import generator, progress
from features import effective_rank, in_chunks, knn, sample

CHUNK = 1 << 20                     # distances at once: 4 MiB stay in a cache
PROBE_SHARE = 0.1                   # of the labels, for the linear probe


# ------------------------------------------------------------------------------------ image quality

def ssim(x, y, data_range=1.0):
    """Structural similarity of each pair of images: x, y (N, C, H, W) -> (N,). Wang et al. 2004.

    Gaussian window of 11 taps, sigma 1.5, population covariance, K1 0.01, K2 0.03, no padding (only windows
    that lie inside), mean over windows, then channels. Images under 11 px get the largest odd window that
    fits. 1 for equal images. ValueError if the shapes differ.
    """
    _same_shape(x, y)
    x, y = x.float(), y.float()
    rows, cols = (_window_matrix(n, x) for n in x.shape[2:])

    def mean(v):                    # both 1-d filters as products with banded matrices
        return rows @ v @ cols.T

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = mean(x), mean(y)
    vx = mean(x * x) - mx * mx
    vy = mean(y * y) - my * my
    vxy = mean(x * y) - mx * my
    s = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return s.mean((1, 2, 3))


def _same_shape(x, y):
    if x.shape != y.shape:
        raise ValueError(f'images of shapes {tuple(x.shape)} and {tuple(y.shape)}; wanted the same shape')


def _window_matrix(n, like, taps=11, sigma=1.5):
    """(n - taps + 1, n): each row a normalised Gaussian, moved on by one."""
    taps = min(taps, n - 1 + n % 2)
    w = torch.exp(-(torch.arange(taps, device=like.device) - taps // 2).square() / (2 * sigma ** 2))
    band = torch.zeros(n - taps + 1, n, device=like.device)
    for i in range(len(band)):
        band[i, i:i + taps] = w / w.sum()
    return band


def psnr(x, y, data_range=1.0):
    """Peak signal-to-noise ratio of each pair, in dB: (N, C, H, W) -> (N,); inf for equal images.

    ValueError if the shapes differ.
    """
    _same_shape(x, y)
    mse = (x.float() - y.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range ** 2 / mse)


def reconstruction(reconstruct, x, ids=None, device=None):
    """{'mse', 'ssim', 'psnr'}: means over uint8 images x (or its rows ids) of reconstruct(x) against x."""
    def scores(v):
        r = reconstruct(v)
        return torch.stack([(r - v).square().flatten(1).mean(1), ssim(r, v), psnr(r, v)], 1)

    means = in_chunks(scores, x, ids=ids, device=device).mean(0)
    return dict(zip(('mse', 'ssim', 'psnr'), means.tolist()))


# ------------------------------------------------------------------------------------------ k-means

def nearest(x, centres):
    """(index of the nearest centre, squared distance to it) of each row of x (N, D): int64, float32 (N,)."""
    origin = centres.mean(0)        # far from 0 the squares would lose their digits
    x = x.float() - origin
    return _assign(x, _squares(x), centres - origin)


def _squares(x):
    return torch.linalg.vector_norm(x, dim=1).square()


def _assign(x, squares, centres):
    """As `nearest`, for x that lies around 0; squares (N,) are its rows' squared lengths."""
    size = min(len(x), max(1, CHUNK // len(centres)))
    buffer = x.new_empty(size, len(centres))        # new memory for each part would cost a page fault a page
    lengths = centres.square().sum(1)
    found = []
    for part in x.split(size):
        d = torch.addmm(lengths, part, centres.T, alpha=-2, out=buffer[:len(part)])
        found.append(d.min(1))
    dist, index = map(torch.cat, zip(*found))
    return index, (dist + squares).clamp(min=0)


def kmeans(x, k, restarts=10, iterations=100, tol=1e-4, seed=0, centres=None):
    """Lloyd's k-means on x (N, D): (assignment (N,), centres (k, D), inertia), the best of `restarts`.

    Starts by k-means++ (Arthur & Vassilvitskii 2007), or from `centres`. A cluster left empty restarts at the
    point farthest from its centre. Stops when the centres' squared shift falls under tol times the mean
    variance of a feature. Best is by inertia, the sum of squared distances. ValueError for more clusters than
    points.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f'k-means was asked for {k} clusters of {len(x)} points')
    x = x.float()
    origin, squares = x.mean(0), _squares(x)
    variance = squares.mean() - origin.square().sum()
    if variance < squares.mean() / 16:              # far from 0 the squares lose their digits
        x = x - origin
        squares = _squares(x)
        variance = squares.mean()
    else:                                           # a copy takes as long as two iterations
        origin = torch.zeros_like(origin)
    limit = tol * variance / x.shape[1]
    restarts = 1 if centres is not None else restarts
    best = None
    update = progress('k-means, sooner if it settles', restarts * iterations)
    for r in range(restarts):
        if centres is None:
            c = _kmeans_plus_plus(x, squares, k, generator(x.device, seed, 'kmeans', r))
        else:
            c = centres.to(x) - origin
        for i in range(iterations):
            update(r * iterations + i)
            index, dist = _assign(x, squares, c)
            old, c = c, _new_centres(x, index, dist, k)
            if (c - old).square().sum() <= limit:
                break
        index, dist = _assign(x, squares, c)
        inertia = dist.sum().item()
        if best is None or inertia < best[2]:
            best = index, c + origin, inertia
    update(restarts * iterations)
    return best


def _kmeans_plus_plus(x, squares, k, g):
    """k rows of x, each drawn with probability proportional to its squared distance from those before."""
    picked = [torch.randint(len(x), (1,), generator=g, device=x.device)]
    dist = torch.full_like(squares, torch.inf)
    for _ in range(k - 1):
        dist = torch.minimum(dist, _assign(x, squares, x[picked[-1]])[1])
        total = dist.cpu().double().cumsum(0)       # CUDA adds these up in any order
        draw = torch.rand(1, generator=g, device=x.device).cpu() * total[-1]
        row = torch.searchsorted(total, draw).clamp(max=len(x) - 1)
        picked.append(row.to(x.device))
    return x[torch.cat(picked)]


def _means(x, index, k):
    """(means (k, D) of the rows of each cluster, 0 where it has none, and how many it has (k,))."""
    count = torch.bincount(index, minlength=k)
    order = index.int().argsort()                   # sorting int64 takes twice as long
    starts = count.cumsum(0) - count
    return F.embedding_bag(order, x, starts, mode='mean'), count


def _new_centres(x, index, dist, k):
    """Mean of each cluster; an empty one takes the farthest point, each a different one."""
    centres, count = _means(x, index, k)
    empty = (count == 0).nonzero().flatten()
    centres[empty] = x[dist.topk(len(empty)).indices]
    return centres


def medoids(x, centres):
    """Row of x nearest to its centre in each cluster that has rows: ids (k or fewer,) int64."""
    index, dist = nearest(x, centres)
    order = dist.argsort()
    order = order[index[order].argsort(stable=True)]            # by cluster, then by distance
    cluster = index[order]
    is_first = torch.ones_like(cluster, dtype=torch.bool)
    is_first[1:] = cluster[1:] != cluster[:-1]
    return order[is_first]


# ------------------------------------------------------------------------- clusters against classes

def _ids(v):
    return np.asarray(torch.as_tensor(v).cpu()).astype(np.int64)


def contingency(pred, labels):
    """(counts (clusters, classes), ids of the clusters, ids of the classes) of those that occur.

    ValueError unless both are ids (N,), none of them negative.
    """
    pred, labels = _ids(pred), _ids(labels)
    if pred.shape != labels.shape or pred.ndim != 1 or not len(pred):
        raise ValueError(f'cluster ids of shape {pred.shape}, labels of {labels.shape}; wanted (N,) twice')
    if pred.min() < 0 or labels.min() < 0:
        raise ValueError('cluster ids and labels must not be negative')
    clusters, row = np.unique(pred, return_inverse=True)
    classes, column = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(clusters), len(classes)), np.int64)
    np.add.at(counts, (row, column), 1)
    return counts, clusters, classes


def hungarian_accuracy(pred, labels):
    """(accuracy, {cluster: class}) of the best one-to-one matching of clusters to classes (Kuhn 1955).

    Images in clusters left unmatched count as wrong.
    """
    counts, clusters, classes = contingency(pred, labels)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    mapping = dict(zip(clusters[rows].tolist(), classes[columns].tolist()))
    return float(counts[rows, columns].sum() / counts.sum()), mapping


def _entropy(p):
    p = p[p > 0]
    return -(p * np.log(p)).sum()


def nmi(pred, labels):
    """Normalised mutual information by the mean of the entropies; 1 for one cluster and one class."""
    counts = contingency(pred, labels)[0]
    p = counts / counts.sum()
    total = _entropy(p.sum(1)) + _entropy(p.sum(0))
    if total == 0:
        return 1.0
    mutual = total - _entropy(p)
    return float(np.clip(2 * mutual / total, 0, 1))             # rounding leaves 0..1


def ari(pred, labels):
    """Adjusted Rand index (Hubert & Arabie 1985): 1 for equal partitions, 0 expected by chance."""
    def pairs(n):
        return (n * (n - 1) / 2).sum()

    counts = contingency(pred, labels)[0].astype(float)
    a, b = pairs(counts.sum(1)), pairs(counts.sum(0))
    expected = a * b / max(1, pairs(counts.sum()))
    top = (a + b) / 2 - expected
    return float((pairs(counts) - expected) / top) if top else 1.0


def purity(pred, labels):
    """Share of images in the majority class of their cluster. Rises with k: say k beside it."""
    counts = contingency(pred, labels)[0]
    return float(counts.max(1).sum() / counts.sum())


def confusion_matrix(pred, labels, K):
    """(K, K) counts: row = true class, column = predicted class."""
    counts = np.zeros((K, K), np.int64)
    np.add.at(counts, (_ids(labels), _ids(pred)), 1)
    return counts


def f1(confusion, missed=0):
    """F1 of each class (K,); 0 where a class is neither present nor predicted.

    missed (K,): images of each class, beside those in the confusion matrix, that got no class at all.
    """
    images = confusion.sum(0) + confusion.sum(1) + missed
    return 2 * confusion.diagonal() / np.maximum(images, 1)


def mean_f1(confusion, missed=0):
    """Mean F1 over the classes that are present or predicted: scikit-learn's macro average."""
    exists = confusion.sum(0) + confusion.sum(1) + missed > 0
    return float(f1(confusion, missed)[exists].mean())


# ------------------------------------------------------------------------------------- linear probe

def linear_probe(x_train, y_train, x_val, y_val, x_test, l2s=(1e-3, 1e-2, 1e-1, 1.0)):
    """(logits (N, K), chosen l2): multinomial logistic regression on frozen features.

    The L2 strength is chosen by accuracy on the validation rows, 0.01 if there are none; then the probe is
    fitted anew on both. All of these labels count as used.
    """
    x, y = torch.cat([x_train, x_val]), torch.cat([y_train, y_val])
    K = int(y.max()) + 1
    l2s = l2s if len(x_val) else l2s[1:2]
    update = progress('linear probe', len(l2s) + 1)
    scores = []
    for l2 in l2s:
        logits = logistic_regression(x_train, y_train, K, l2)(x_val)
        scores.append((_accuracy(logits.argmax(1), y_val), l2))
        update(len(scores))
    best = max(scores)[1]
    logits = logistic_regression(x, y, K, best)(x_test)
    update(len(l2s) + 1)
    return logits, best


def logistic_regression(x, y, K, l2, iterations=200):
    """Function from features to logits (N, K): minimises cross-entropy + l2 / 2 |W|^2 by L-BFGS.

    Features are standardised by the rows of x (n, D).
    """
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)

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


def active_units(mu, threshold=0.01):
    """Number of latent units whose mean varies over images by more than threshold (arXiv 1509.00519)."""
    return int((mu.var(0, correction=0) > threshold).sum())


# ------------------------------------------------------------------------------------- all measures

@torch.no_grad()
def measure(ds, train_ids, val_ids, encode, reconstruct=None, seed=0, device='cpu'):
    """(every measure of a representation, a dict for metrics.json; what they were measured on, to look at).

    Scored on the test set, which is read once; on the validation images if there is no test set, or if it has
    no labels while the training set has some. What needs labels that are missing is in 'left_out'.

    mse, ssim, psnr: of the reconstructions. knn: k = 20, cosine, all training labels, and those of validation
    images where these are not scored. probe: linear, from PROBE_SHARE of the same labels; a sixth of those
    come from validation and choose the L2 strength. kmeans_*: on L2-normalised features, fitted on the
    training images, k = the number of classes; ACC maps clusters to classes by Hungarian matching on the
    training labels, NMI, ARI and purity need no mapping.

    To look at, each as far as there is one: x images, y labels, h features, probs (N, K) of the probe, and
    the k-means: clusters (N,), centres, mapping {cluster: class}. ValueError for features that overflow.
    """
    use_test = _scores_test(ds)
    if use_test:
        x, y, ids = ds.x_test, ds.y_test, torch.arange(len(ds.x_test))
        bank_ids = torch.cat([train_ids, ds.labelled(val_ids)])
    else:
        x, y, bank_ids = ds.x_train, ds.y_train, train_ids
        ids = ds.labelled(val_ids)
        if not len(ids):
            y, ids = None, val_ids
    metrics = {'split': 'test' if use_test else 'validation', 'n': len(ids), 'left_out': []}
    if reconstruct:
        metrics.update(reconstruction(reconstruct, x, ids, device))
    h = in_chunks(encode, x, ids=ids, device=device).float()
    bank = in_chunks(encode, ds.x_train, ids=bank_ids, device=device).float()
    if not all(part.square().sum(1).isfinite().all() for part in (h, bank)):
        raise ValueError('the features are too large to be measured: the training has diverged; start again '
                         'with --overwrite and a lower --lr')
    metrics['features'] = h.shape[1]
    metrics['effective_rank'] = effective_rank(h)
    metrics['feature_std'] = h.std(0, correction=0).mean().item()
    shown = {'x': x if use_test else x[ids], 'h': h}
    if y is None:
        return {**metrics, 'left_out': ['knn', 'probe', 'kmeans']}, shown
    y = shown['y'] = y[ids].to(device)
    n = len(train_ids)              # those of the bank; the others are validation images with a label
    labels = torch.full_like(bank_ids, -1) if ds.y_train is None else ds.y_train[bank_ids]
    labels = labels.to(device)
    known = labels >= 0
    in_training = bool(known[:n].any())
    scores, clustering = _measure_kmeans(bank[:n], labels[:n], h, y, len(ds.classes), seed)
    metrics.update(scores, kmeans_mapping='train' if in_training else metrics['split'])
    shown.update(clustering)
    if not in_training:
        return {**metrics, 'left_out': ['knn', 'probe']}, shown
    metrics['knn'] = _accuracy(knn(bank[known], labels[known], h), y)
    metrics['knn_labels'] = int(known.sum())
    a, b = _probe_rows(known, n, seed)
    logits, l2 = linear_probe(bank[a], labels[a], bank[b], labels[b], h)
    pred, shown['probs'] = logits.argmax(1), logits.softmax(1)
    metrics.update(probe=_accuracy(pred, y), probe_labels=len(a) + len(b), probe_l2=l2)
    return {**metrics, **_by_class(pred, y, len(ds.classes))}, shown


def _probe_rows(known, n, seed):
    """Rows drawn from the first n of the bank, and from the others, that PROBE_SHARE of all labels makes."""
    rows, others = known[:n].nonzero().flatten(), torch.arange(n, len(known), device=known.device)
    count = max(2, round(PROBE_SHARE * (len(rows) + len(others))))
    a = torch.randperm(len(rows), generator=generator('cpu', seed, 'probe'))
    b = torch.randperm(len(others), generator=generator('cpu', seed, 'probe', 'validation'))[:count // 6]
    a = a[:count - len(b)]
    return rows[a.to(rows.device)], others[b.to(rows.device)]


def _scores_test(ds):
    """Is the test set what is scored? Not if it has no labels while the training set has some."""
    return ds.x_test is not None and (ds.y_test is not None or ds.y_train is None)


def _measure_kmeans(bank, labels, h, y, K, seed):
    """({'clusters', 'kmeans_acc', ...}, {'clusters', 'centres', 'mapping'} to look at), scored on h, y."""
    index, centres, _ = kmeans(F.normalize(bank, dim=1), min(K, len(bank)), restarts=5, seed=seed)
    pred = nearest(F.normalize(h, dim=1), centres)[0]
    known = labels >= 0
    matched = (index[known], labels[known]) if known.any() else (pred, y)
    mapping = hungarian_accuracy(*matched)[1]
    scores = _cluster_scores(pred, y, mapping)
    metrics = {f'kmeans_{key}': score for key, score in scores.items()}
    return {'clusters': len(centres), **metrics}, {'clusters': pred, 'centres': centres, 'mapping': mapping}


def _accuracy(pred, y):
    return (pred == y).float().mean().item()


def _to_classes(pred, mapping):
    """Class that `mapping` gives each cluster of pred (N,), -1 where it gives none."""
    classes = [mapping.get(cluster, -1) for cluster in range(int(pred.max()) + 1)]
    return torch.tensor(classes, device=pred.device)[pred]


def _cluster_scores(pred, y, mapping):
    """{'acc', 'nmi', 'ari', 'purity'}; the accuracy is of the classes that mapping gives the clusters."""
    acc = _accuracy(_to_classes(pred, mapping), y)
    return {'acc': acc, 'nmi': nmi(pred, y), 'ari': ari(pred, y), 'purity': purity(pred, y)}


def _by_class(pred, y, K):
    """{'f1', 'mean_f1', 'confusion'} for metrics.json; predictions of -1 are missed and in no column."""
    got = pred >= 0
    table = confusion_matrix(pred[got], y[got], K)
    missed = torch.bincount(y[~got], minlength=K).cpu().numpy()
    each, mean = f1(table, missed).tolist(), mean_f1(table, missed)
    return {'f1': each, 'mean_f1': mean, 'confusion': table.tolist()}


@torch.no_grad()
def measure_classifier(ds, predict, encode, device='cpu', seed=0):
    """(accuracy, F1 and confusion on the test set, a dict for metrics.json; what to look at, as `measure`).

    predict(x): class probabilities (B, K); encode(x): features (B, D). The test set is read once; without
    labels for it nothing is measured, and what is to be looked at is 2,000 training images drawn by the seed.
    """
    labelled = ds.x_test is not None and ds.y_test is not None
    x = ds.x_test if labelled else ds.x_train[sample(len(ds.x_train), 2000, seed)]
    probs = in_chunks(predict, x, device=device)
    shown = {'x': x, 'h': in_chunks(encode, x, device=device), 'probs': probs}
    if not labelled:
        return {'left_out': ['accuracy: add x_test and y_test to the data']}, shown
    pred, y = probs.argmax(1), ds.y_test.to(device)
    metrics = {'split': 'test', 'n': len(y), 'left_out': [], 'accuracy': _accuracy(pred, y)}
    return {**metrics, **_by_class(pred, y, len(ds.classes))}, {**shown, 'y': y}


@torch.no_grad()
def measure_clusters(ds, predict, encode, K, pred_train, device='cpu'):
    """(ACC, NMI, ARI, purity, F1 and confusion of K clusters on the test set, as a dict for metrics.json;
    what to look at, as `measure`). Reads the test set once; without a labelled one it scores the training
    images.

    predict(x): cluster probabilities (B, K); encode(x): features (B, D); pred_train (N,): the clusters of the
    training images. ACC and F1 name each cluster by Hungarian matching on the training labels (on the scored
    ones if there are no others); images in clusters left unmatched count as wrong.
    """
    known = torch.arange(len(pred_train)) if ds.y_train is None else ds.labelled()
    y_train = None if ds.y_train is None else ds.y_train[known]
    pred_train = pred_train.cpu()[known]
    use_test = _scores_test(ds)
    if use_test:
        x, y = ds.x_test, ds.y_test
        pred = in_chunks(predict, x, device=device).argmax(1).cpu()
        few = torch.arange(len(pred))
    else:
        pred, y = pred_train, y_train
        few = sample(len(pred), 2000, 'clusters')
        x = ds.x_train[known[few]]
    h = in_chunks(encode, x, device=device).float().cpu()
    centres = _means(F.normalize(h, dim=1), pred[few], K)[0]
    shown = {'x': x, 'h': h, 'clusters': pred[few], 'centres': centres}
    sizes = torch.bincount(pred, minlength=K)
    metrics = {'split': 'test' if use_test else 'training', 'n': len(pred), 'clusters': K, 'left_out': [],
               'live_clusters': int((sizes > 0).sum()), 'sizes': sizes.tolist()}
    if y is None:
        return {**metrics, 'left_out': ['ACC, NMI, ARI, purity: there are no labels']}, shown
    matched = (pred, y) if y_train is None else (pred_train, y_train)
    mapping = hungarian_accuracy(*matched)[1]
    metrics['mapping'] = 'test' if y_train is None else 'training'
    shown.update(y=y[few], mapping=mapping)
    classes = _to_classes(pred, mapping)
    return {**metrics, **_cluster_scores(pred, y, mapping), **_by_class(classes, y, len(ds.classes))}, shown
