"""Clusters without labels: neighbours, SCAN heads on frozen features, which pictures to rely on, matching."""
import math

import torch
import torch.nn.functional as F

import data
import evaluate
import losses
from runs import progress

BYTES = 1 << 30          # of what all heads say of a batch
CLOSE = 10               # neighbours that pass their cluster on; more of them share the class than of all


def neighbours(h, k):
    """Ids (N, k) of the k nearest rows of h (N, D) by cosine, without the row itself."""
    ids = evaluate.most_similar(h, h, k + 1)[1]
    itself = (ids == torch.arange(len(h), device=h.device).unsqueeze(1)).byte()   # missing where k more are equal to it
    return ids.gather(1, itself.argsort(dim=1, stable=True))[:, :-1]


def scan_heads(h, near, K, heads=144, entropy=5.0, steps=800, batch=4096, lr=3e-3, seed=0):
    """Probabilities (N, K) by the consensus of linear cluster heads on frozen features h (N, D).

    All heads are trained at once by SCAN's loss (arXiv 2005.12320, eq. 2) on pairs of a row and one of its neighbours
    near (N, k), nearest first. What each says is passed on to neighbours, and the half whose clusters then have the
    lowest criterion is kept, so no label chooses. The clusters of each take the names of those of the best head that
    they overlap most; the consensus is the mean over the heads, passed on.
    """
    g = data.generator(h.device, seed, 'scan')
    x, batch = 16 * F.normalize(h.float(), dim=1), min(batch, len(h))
    heads = max(1, min(heads, BYTES // (4 * batch * K)))
    weight = (0.05 * torch.randn(h.shape[1], K * heads, generator=g, device=h.device)).requires_grad_()
    bias = torch.zeros(K * heads, device=h.device, requires_grad=True)
    opt = torch.optim.Adam([weight, bias], lr=lr)
    def answers(x):                                     # (n, K, heads): softmax over a short last dimension is slow
        return (x @ weight + bias).unflatten(1, (K, -1)).softmax(1)
    at = progress('cluster heads', steps)
    for step in range(steps):
        at(step)
        opt.param_groups[0]['lr'] = lr * (1 - step / steps)
        i = torch.randint(len(x), (batch,), generator=g, device=h.device)
        j = near[i, torch.randint(near.shape[1], i.shape, generator=g, device=h.device)]
        opt.zero_grad()
        losses.scan(*(answers(x[v]).permute(2, 0, 1) for v in (i, j)), entropy).sum().backward()
        opt.step()
    at(steps)
    with torch.no_grad():
        def says(head):                                 # one at a time: memory need not hold what all say
            return (x @ weight[:, head::heads] + bias[head::heads]).softmax(1)
        judged, at = [], progress('choosing heads', heads)
        for head in range(heads):
            judged.append(criterion(passed_on(says(head), near).argmax(1), near, K, entropy))
            at(head + 1)
        best = torch.tensor(judged).argsort(stable=True)[:-(-heads // 2)].tolist()
        first, total = says(best[0]).argmax(1), 0
        for probs in map(says, best):
            total = total + probs[:, names(probs.argmax(1), first, K).argsort()]
    return passed_on(total / len(best), near)


def passed_on(probs, near, times=5):
    """probs (N, K) after each row took the mean over those of its CLOSE nearest neighbours, again and again: label
    propagation (Zhu & Ghahramani 2002) with no label held fixed, which mends what linear heads cut wrongly."""
    for _ in range(times):
        probs = around(probs, near[:, :CLOSE])
    return probs


def around(probs, near):
    """The mean over the neighbours near (N, k) of what probs (N, K) say of them: (N, K)."""
    return torch.cat([probs[part].mean(1) for part in near.split(4096)])


def reliable(probs, near, share=0.5):
    """Ids of pictures to learn from: of each cluster the `share` of its members, one at least, whose neighbours are, on
    average, most surely in it too (local consistency as in SPICE, arXiv 2103.09382, section 3.3). The same share of
    each, or the clusters that are easy to tell would swallow the others."""
    pred = probs.argmax(1)
    sure = around(probs, near).gather(1, pred.unsqueeze(1)).squeeze(1)
    chosen = []
    for c in range(probs.shape[1]):
        members = (pred == c).nonzero().flatten()
        chosen.append(members[sure[members].argsort(descending=True)[:math.ceil(share * len(members))]])
    return torch.cat(chosen).sort().values


def criterion(pred, near, K, entropy=5.0):
    """SCAN's loss of hard assignments pred (N,): minus the log share of neighbours in the same cluster, minus
    `entropy` times that of the cluster sizes. Sees no label; lower is better, and one cluster for all is worst."""
    same = (pred[near] == pred.unsqueeze(1)).float().mean().clamp(min=1e-8)
    sizes = torch.bincount(pred, minlength=K).float() / len(pred)
    return (-same.log() + entropy * torch.special.xlogy(sizes, sizes).sum()).item()


def names(pred, before, K):
    """For each of K clusters of pred (N,) the cluster of the assignment `before` that it overlaps most, one to one
    (Hungarian): (K,) int64."""
    found = {int(a): int(b) for a, b in evaluate.hungarian_accuracy(pred, before)[1].items()}
    free = [c for c in range(K) if c not in found.values()]
    return torch.tensor([found[c] if c in found else free.pop() for c in range(K)], device=pred.device)


def match(pred, before, K):
    """pred (N,) with its clusters renamed to those of `before`, as names says."""
    return names(pred, before, K)[pred]
