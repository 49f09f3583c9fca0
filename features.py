"""Features of images: encoded in chunks, compared by cosine, drawn in two dimensions.

h (N, D) float features, ids and labels int64, all on one device.
"""
import math

import torch
import torch.nn.functional as F

import data
from device import generator, progress

CHUNK = 1 << 24                     # similarities at once (64 MiB)
GROUP = 64                          # similarities whose largest is looked at first


@torch.no_grad()
def in_chunks(f, x, size=None, ids=None, device=None):
    """f of the uint8 images x (N, C, H, W), or of their rows `ids`, `size` at once: torch.cat of the results.

    f gets floats in 0..1 on the device, by default where x is. size: 1000 by default, fewer where images are
    large.
    """
    size = size or min(1000, 1 + (1 << 22) // math.prod(x.shape[1:]))
    ids = torch.arange(len(x)) if ids is None else ids
    update = progress('images', len(ids))
    results = []
    for part in ids.split(size):
        rows = x[part] if device is None else x[part].to(device)
        results.append(f(data.to_float(rows)))
        update(len(results) * size)
    return torch.cat(results)


def sample(n, most, *key):
    """Ids of n things, at most `most` of them, drawn by the key: sorted int64 on the CPU."""
    order = torch.randperm(n, generator=generator('cpu', 'sample', *key))
    return order[:most].sort().values


# ------------------------------------------------------------------------------- nearest neighbours

def most_similar(x, bank, k):
    """(cosine similarities (N, k), descending, and rows) of the k rows of bank (M, D) nearest to each of x.

    Fewer than k if the bank has fewer. The k largest of a row lie in the k groups of 64 with the largest
    maxima, so only those are sorted.
    """
    M, k = len(bank), min(k, len(bank))
    x = F.normalize(x.float(), dim=1)
    bank = F.pad(F.normalize(bank.float(), dim=1), (0, 0, 0, -M % GROUP))
    size = min(len(x), max(1, CHUNK // len(bank)))
    buffer = x.new_empty(size, len(bank))           # new memory for each part would cost a page fault a page
    first_group = torch.arange(size, device=x.device).unsqueeze(1) * (len(bank) // GROUP)
    update = progress('nearest neighbours', len(x))
    found = []
    for part in x.split(size):
        n = len(part)
        similarities = torch.mm(part, bank.T, out=buffer[:n])
        similarities[:, M:] = -torch.inf
        groups = similarities.view(-1, GROUP)
        maxima = groups.amax(1).view(n, -1)
        best = maxima.topk(min(k, maxima.shape[1]), dim=1).indices
        candidates = groups[first_group[:n] + best].flatten(1)
        values, at = candidates.topk(k, dim=1)
        found.append((values, best.gather(1, at // GROUP) * GROUP + at % GROUP))
        update(len(found) * size)
    similarities, rows = map(torch.cat, zip(*found))
    return similarities, rows


def neighbours(h, k):
    """Ids (N, k) of the k nearest rows of h (N, D) by cosine, without the row itself; k is N - 1 at most."""
    ids = most_similar(h, h, k + 1)[1]
    itself = ids == torch.arange(len(h), device=h.device).unsqueeze(1)  # none if k more are equal to it
    order = itself.byte().argsort(dim=1, stable=True)
    return ids.gather(1, order)[:, :-1]


def knn(x_train, y_train, x_test, k=20, tau=0.07, classes=None):
    """Class of each test row by a kNN vote of the training rows: (N,) int64.

    Each of the k nearest votes with the weight exp(cosine similarity / tau) (arXiv 1805.01978, section 3.4).
    """
    similarities, rows = most_similar(x_test, x_train, k)
    classes = classes or int(y_train.max()) + 1
    votes = torch.zeros(len(rows), classes, device=rows.device)
    votes.scatter_add_(1, y_train[rows], (similarities / tau).exp())
    return votes.argmax(1)


# ------------------------------------------------------------------------------ principal components

def principal(h, k=2):
    """First k principal components of a few thousand rows h (N, D), N >= k: (N, k) float32, 0 beyond D."""
    x = h.cpu().double()            # squares of any float32 stay finite
    u, scale, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    found = u[:, :k] * scale[:k]
    return F.pad(found, (0, k - found.shape[1])).float().to(h.device)


def effective_rank(h):
    """exp of the entropy of the normalised singular values of centred h (N, D) (Roy & Vetterli 2007).

    D when all directions carry the same, 1 when the features have collapsed to a line, nan if one is not
    finite.
    """
    if not h.isfinite().all():
        return math.nan
    s = torch.linalg.svdvals((h - h.mean(0)).float().cpu())     # few devices have it
    p = s / s.sum().clamp(min=1e-12)
    return math.exp(-torch.xlogy(p, p).sum().item())


# ------------------------------------------------- exact t-SNE (van der Maaten & Hinton, JMLR 2008)

def conditional(x, perplexity):
    """(N, N), row i: equation 1's p(j given i) of the rows of x (N, D). The diagonal is 0.

    A Gaussian around x_i whose width, found by bisection, gives the row the perplexity: e to its entropy in
    nats.
    """
    x = x - x.mean(0)               # far from 0 the squares would lose their digits
    square = x.square().sum(1)
    d = (torch.addmm(square, x, x.T, alpha=-2) + square.unsqueeze(1)).clamp(min=0)
    d = d / d.mean().clamp(min=1e-30)
    d.fill_diagonal_(torch.inf)
    d = d - d.amin(1, keepdim=True)                 # the nearest has exp(0)
    d.fill_diagonal_(1e30)
    low = x.new_full((len(x), 1), -20.0)                                   # of log(1 / (2 sigma^2))
    high = x.new_full((len(x), 1), 50.0)
    for _ in range(30):
        middle = (low + high) / 2
        p = (-middle.exp() * d).exp()
        total = p.sum(1, keepdim=True)
        entropy = total.log() + middle.exp() * (p * d).sum(1, keepdim=True) / total
        too_wide = entropy > math.log(perplexity)
        low = torch.where(too_wide, middle, low)
        high = torch.where(too_wide, high, middle)
    return p / total


def joint(x, perplexity):
    """P (N, N), symmetric, with sum 1: the mean of both conditionals, over N (section 3.1)."""
    p = conditional(x, perplexity)
    return (p + p.T) / (2 * len(x))


def student_t(y):
    """(N, N): 1 / (1 + |y_i - y_j|^2), 0 on the diagonal; over its sum it is Q of equation 4."""
    square, one = y.square().sum(1, keepdim=True), torch.ones_like(y[:, :1])
    left = torch.cat([-2 * y, 1 + square, one], 1)  # one product of these is all of 1 + |y_i - y_j|^2
    right = torch.cat([y, one, square], 1)
    return (left @ right.T).clamp_(min=1).reciprocal_().fill_diagonal_(0)


def kl(P, y):
    """KL(P || Q) in nats, equation 2."""
    q = student_t(y)
    Q = (q / q.sum()).clamp(min=1e-30)
    return torch.xlogy(P, P / Q).sum().item()


def gradient(P, y):
    """Gradient of the KL by y, (N, 2): 4 sum_j (p_ij - q_ij)(y_i - y_j) / (1 + |y_i - y_j|^2), equation 5."""
    q = student_t(y)
    pull = torch.sub(P, q, alpha=1 / q.sum().item()).mul_(q)
    return 4 * (pull.sum(1, keepdim=True) * y - pull @ y)


def tsne(x, perplexity=30.0, steps=500):
    """(y (N, 2), KL): x (N, D) in two dimensions by gradient descent with gains (Jacobs 1988).

    Starts at the first two principal components, so nothing is drawn at random. In the first quarter P is
    exaggerated 12 times and the momentum is 0.5, then 0.8. The perplexity is (N - 1) / 3 at most.
    """
    P = joint(x.float(), min(perplexity, (len(x) - 1) / 3))
    y = principal(x)
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-30)
    speed, gains, exaggerated = torch.zeros_like(y), torch.ones_like(y), 12 * P
    lr = max(50.0, len(x) / 48)
    update = progress('t-SNE', steps)
    for step in range(steps):
        early = step < steps // 4
        slope = gradient(exaggerated if early else P, y)
        gains = torch.where(slope * speed < 0, gains + 0.2, gains * 0.8).clamp(min=0.01)
        speed = (0.5 if early else 0.8) * speed - lr * gains * slope
        y = y + speed
        y = y - y.mean(0)
        update(step + 1)
    return y, kl(P, y)
