from helpers import close, rand, randn
import contextlib
import io
import itertools
import math
import re
from unittest import mock

import numpy as np
import scipy
import torch

import device
import evaluate
import features


def cosines(a, b):
    """(len(a), len(b)) in float64."""
    a, b = a.double().numpy(), b.double().numpy()
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def test_in_chunks_is_the_function_of_all_images_as_floats():
    x, sizes = torch.arange(250, dtype=torch.uint8).view(-1, 1, 1, 1), []

    def twice(part):
        sizes.append(len(part))
        return 2 * part.flatten(1)
    ids = torch.tensor([7, 3, 9])
    assert close(features.in_chunks(twice, x, ids=ids, size=2).flatten(), ids * 2 / 255) and sizes == [2, 1]


def test_a_sample_is_drawn_by_its_key_without_repetition():
    a, again, b = (features.sample(100, 10, key).tolist() for key in 'aab')
    assert a == again != b and a == sorted(set(a)) and len(a) == 10 and a[-1] < 100
    assert features.sample(5, 10).tolist() == [0, 1, 2, 3, 4]


def test_the_most_similar_rows_are_those_of_the_sorted_cosines():
    for M, k in itertools.product((1, 9, 64, 65, 500), (1, 5, 20, 200)):
        x, bank = 3 * randn(40, 5), randn(M, 5, seed=1)
        wanted = cosines(x, bank)
        with mock.patch.object(features, 'CHUNK', 3000):                  # parts, the last one shorter
            similarities, rows = features.most_similar(x, bank, k)
        assert rows.tolist() == np.argsort(-wanted, axis=1)[:, :k].tolist()
        assert close(similarities, -np.sort(-wanted, axis=1)[:, :k])


def test_neighbours_are_the_nearest_by_cosine_without_the_row_itself():
    for n, k in (500, 20), (64, 63):
        h = randn(n, 5, seed=1)
        wanted = cosines(h, h)
        np.fill_diagonal(wanted, -2)
        with mock.patch.object(features, 'CHUNK', 3000):
            assert features.neighbours(h, k).tolist() == np.argsort(-wanted, axis=1)[:, :k].tolist()
    equal = features.neighbours(torch.ones(100, 3), 7)                    # itself may be the ninth
    assert equal.shape == (100, 7) and all(i not in row for i, row in enumerate(equal.tolist()))


def test_the_knn_vote_agrees_with_one_written_out():
    x, y, t = randn(80, 5), torch.arange(80) % 4, 3 * randn(30, 5, seed=1)    # cosine: the length is nothing
    s = cosines(t, x)
    for k, tau in itertools.product((1, 5, 20, 200), (0.07, 1.0)):
        wanted = []
        for row in s:
            votes = [0.0] * 4
            for i in sorted(range(80), key=lambda i: -row[i])[:k]:
                votes[int(y[i])] += math.exp(row[i] / tau)
            wanted.append(votes.index(max(votes)))
        assert features.knn(x, y, t, k, tau).tolist() == wanted
    assert features.knn(x, y, t, classes=9).tolist() == features.knn(x, y, t).tolist()


def test_principal_components_are_those_of_the_singular_value_decomposition():
    for N, D in (20, 6), (6, 20), (7, 7), (5, 1):
        h = randn(N, D) * torch.arange(1, D + 1) + 7
        U, S, _ = np.linalg.svd((h - h.mean(0)).double().numpy(), full_matrices=False)
        wanted, found = (U * S)[:, :2], features.principal(h)
        assert found.shape == (N, 2) and (D > 1 or close(found[:, 1], np.zeros(N)))
        assert close(found[:, :wanted.shape[1]].abs(), np.abs(wanted), 1e-3)
    assert features.principal(1e30 * randn(9, 4)).isfinite().all()        # their squares are not, in float32


def test_effective_rank_of_known_spectra():
    basis = torch.linalg.svd(randn(40, 5) - randn(40, 5).mean(0), full_matrices=False)[0]   # orthonormal
    for s in ([1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [4, 2, 1, 1, 0]):
        wanted = math.exp(scipy.stats.entropy(s))
        assert close(features.effective_rank(basis * torch.tensor(s) + 3), wanted, 1e-3)
    assert close(features.effective_rank(torch.ones(9, 4)), 1)
    assert math.isnan(features.effective_rank(torch.tensor([[1.0], [math.inf]])))


def test_tsne_joint_probabilities_are_gaussians_and_have_the_perplexity_asked_for():
    x = (256 * randn(12, 3)).round() / 256                                # so that moving them loses no digit
    d = scipy.spatial.distance.cdist(x, x, 'sqeuclidean')
    for perplexity in 2, 3.5:
        p = features.conditional(x, perplexity).double().numpy()
        for i in range(12):
            row, far = np.delete(p[i], i), np.delete(d[i], i)
            assert close(math.exp(scipy.stats.entropy(row)), perplexity, 1e-3) and p[i, i] == 0
            a, b = far.argsort()[:2]
            beta = math.log(row[a] / row[b]) / (far[b] - far[a])          # the width it found
            assert close(row, scipy.special.softmax(-beta * far), 1e-4)
        P = features.joint(x, perplexity)
        assert close(P, (p + p.T) / 24) and close(P.sum(), 1)
        assert close(features.joint(x + 4096, perplexity), P, 1e-4)       # wherever the points stand


def test_tsne_gradient_is_that_of_the_divergence_written_out():
    P, y = features.joint(randn(9, 3), 2.0), randn(9, 2, seed=1).requires_grad_()
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    q = {(i, j): 1 / (1 + (y[i] - y[j]).square().sum()) for i, j in pairs}
    total = sum(q.values())
    loss = sum(P[pair] * (P[pair] / (q[pair] / total)).log() for pair in pairs)
    loss.backward()
    assert close(features.kl(P, y.detach()), loss.item(), 1e-4)
    assert close(features.gradient(P, y.detach()), y.grad, 1e-4)


def test_tsne_lowers_the_divergence_separates_blobs_and_bears_equal_points():
    truth = torch.arange(90) % 3
    x = torch.eye(3, 10)[truth] * 10 + 0.5 * randn(90, 10)
    y, after = features.tsne(x, 10, steps=200)
    P, first = features.joint(x, 10), features.principal(x)
    assert close(after, features.kl(P, y)) and after < 0.7 * features.kl(P, 1e-4 * first / first.std())
    d = torch.cdist(y, y).fill_diagonal_(torch.inf)
    assert (truth[d.argmin(1)] == truth).float().mean() > 0.95            # a stray point may stay behind
    assert torch.equal(y, features.tsne(x, 10, steps=200)[0])             # nothing is drawn at random
    for N in 4, 30:
        y, after = features.tsne(torch.ones(N, 5), 30, steps=50)
        assert y.isfinite().all() and math.isfinite(after)
    assert torch.equal(features.tsne(x[:7], 30, 9)[0], features.tsne(x[:7], 2, 9)[0])   # (N - 1) / 3


def test_long_work_tells_a_terminal_how_far_it_is_and_leaves_nothing_behind():
    x, y = rand(60, 4), torch.arange(60) % 3
    pixels = torch.zeros(60, 1, 8, 8, dtype=torch.uint8)
    work = {'images': lambda: features.in_chunks(lambda v: v, pixels, size=5),
            'k-means': lambda: evaluate.kmeans(x, 3), 't-SNE': lambda: features.tsne(x, 5, 20),
            'linear probe': lambda: evaluate.linear_probe(x, y, x, y, x, (1, 2, 3)),
            'nearest neighbours': lambda: features.knn(x, y, x)}

    def shown(name, terminal, speed):
        out, clock = io.StringIO(), itertools.count(0, speed)
        out.isatty = lambda: terminal
        with contextlib.redirect_stdout(out), mock.patch.object(features, 'CHUNK', 600), \
                mock.patch.object(device.time, 'monotonic', lambda: next(clock)):
            work[name]()
        return out.getvalue()

    for name in work:
        lines = shown(name, True, 0.7).split('\r')
        assert len(lines) > 4 and not lines[-1] and not lines[-2].strip(), (name, lines)      # wiped
        assert all(re.fullmatch(rf'{name}[^:]*: \d+%, [\d:]+ left *', line) for line in lines[1:-2])
        assert not shown(name, False, 0.7) and not shown(name, True, 1e-4)     # in a file, and of quick work
