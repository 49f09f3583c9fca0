from helpers import arrays, close, rand, raises, randn
import itertools
import math
from unittest import mock

import numpy as np
import scipy
import torch

import data
import evaluate
import features


def ssim_by_windows(x, y, scale, rows, cols):
    """Wang et al. 2004 for one channel x, y (H, W), window by window."""
    i, j = np.indices((rows, cols))
    w = np.exp(-((i - rows // 2) ** 2 + (j - cols // 2) ** 2) / (2 * 1.5 ** 2)).ravel()
    c1, c2, values = (0.01 * scale) ** 2, (0.03 * scale) ** 2, []
    for i, j in itertools.product(range(x.shape[0] - rows + 1), range(x.shape[1] - cols + 1)):
        pair = [v[i:i + rows, j:j + cols].ravel() for v in (x, y)]
        (a, b), ((va, both), (_, vb)) = np.average(pair, 1, w), np.cov(pair, ddof=0, aweights=w)
        values.append((2 * a * b + c1) * (2 * both + c2) / ((a ** 2 + b ** 2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_ssim_is_wang_2004_written_out():
    for C, H, W, *taps in (1, 14, 13, 11, 11), (3, 12, 15, 11, 11), (1, 8, 9, 7, 9), (1, 10, 14, 9, 11):
        for scale in 1.0, 255.0:
            x = rand(2, C, H, W) * scale
            y = (x + 0.3 * scale * randn(2, C, H, W, seed=1)).clamp(0, scale)
            wanted = [np.mean([ssim_by_windows(*pair, scale, *taps) for pair in zip(a, b)])
                      for a, b in zip(x.double().numpy(), y.double().numpy())]
            assert close(evaluate.ssim(x, y, scale), wanted, 1e-4)
    flat = [torch.full((1, 1, 12, 12), v) for v in (0.2, 0.6)]
    assert close(evaluate.ssim(*flat), [(2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)], 1e-4)


def test_psnr_is_20_db_for_a_tenth_of_the_range():
    x, y = torch.full((2, 1, 8, 8), 0.5), rand(2, 1, 8, 8)
    assert close(evaluate.psnr(x * 255, x * 255 + 25.5, 255), [20, 20], 1e-4)
    assert close(evaluate.psnr(x, y), -10 * ((x - y) ** 2).mean((1, 2, 3)).log10(), 1e-4)
    assert evaluate.psnr(x, x).tolist() == [math.inf] * 2


def test_nothing_is_left_behind_on_the_cpu():
    x, h = torch.empty(6, 1, 12, 12, device='meta'), torch.empty(80, 5, device='meta')
    similarities, rows = features.most_similar(h[:9], h, 3)
    scores = evaluate.ssim(x, x), evaluate.nearest(h, h[:3])[1], similarities, rows
    assert all(score.device.type == 'meta' for score in scores)


def test_images_of_different_shapes_are_not_compared():
    for score in evaluate.ssim, evaluate.psnr:                            # though they would broadcast
        with raises(ValueError, '(2, 1, 12, 12)', '(1, 1, 12, 12)'):
            score(torch.zeros(2, 1, 12, 12), torch.zeros(1, 1, 12, 12))


def test_reconstruction_is_the_mean_of_the_scores_over_images():
    x = (255 * rand(30, 1, 12, 12)).byte()
    found, a = evaluate.reconstruction(lambda v: v / 2, x, ids=torch.arange(20)), x[:20].float() / 255
    wanted = [(a / 2).square().mean(), evaluate.ssim(a / 2, a).mean(), evaluate.psnr(a / 2, a).mean()]
    assert list(found) == ['mse', 'ssim', 'psnr'] and close(list(found.values()), wanted)


def test_kmeans_is_lloyd_written_out():
    x = randn(400, 6)
    points, start = x.double().numpy(), x[:9] + 0.1
    c = start.double().numpy()
    for _ in range(5):
        index = scipy.spatial.distance.cdist(points, c).argmin(1)
        c = np.stack([points[index == i].mean(0) for i in range(9)])
    d = scipy.spatial.distance.cdist(points, c, 'sqeuclidean')
    for chunk in 1 << 20, 300:                                            # at once, in parts
        with mock.patch.object(evaluate, 'CHUNK', chunk):
            index, centres, inertia = evaluate.kmeans(x, 9, iterations=5, tol=-1, centres=start)
            nearest, dist = evaluate.nearest(x, centres)
        assert index.tolist() == nearest.tolist() == d.argmin(1).tolist()
        assert close(centres, c) and close(dist, d.min(1), 1e-4) and close(inertia, d.min(1).sum())
    one, two, ten, again = (evaluate.kmeans(x, 9, restarts=r, seed=1)[2] for r in (1, 2, 10, 10))
    assert one >= two >= ten == again and one > ten


def test_kmeans_stops_when_the_centres_shift_little_of_the_variance_of_a_feature():
    for x in randn(300, 4), randn(300, 4) + 100:
        shifts, c = [], x[:5]
        for _ in range(30):
            before, c = c, evaluate.kmeans(x, 5, iterations=1, centres=c)[1]
            shifts.append(((c - before) ** 2).sum() / x.var(0, correction=0).mean())
        for tol in 0.1, 0.003:
            steps = next(i for i, shift in enumerate(shifts) if shift <= tol) + 1
            found = evaluate.kmeans(x, 5, tol=tol, centres=x[:5])[1]
            wanted = evaluate.kmeans(x, 5, iterations=steps, tol=-1, centres=x[:5])[1]
            assert close(found, wanted) and 1 < steps < 30


def test_distances_do_not_depend_on_where_the_points_stand():
    x = (256 * randn(300, 4)).round() / 256                               # so that moving them loses no digit
    here, there = (evaluate.kmeans(v, 8, centres=v[:8]) for v in (x, x + 4096))
    assert torch.equal(here[0], there[0]) and close(here[2], there[2], 1e-4)
    assert close(here[1] + 4096, there[1], 1e-6)
    assert close(evaluate.nearest(x, x[:8])[1], evaluate.nearest(x + 4096, x[:8] + 4096)[1], 1e-4)


def test_kmeans_restarts_an_empty_cluster_at_the_farthest_point():
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [9, 9], [9, 8]])
    start = torch.tensor([[0.0, 0], [500, 500], [600, 600]])              # nobody is nearest to two of them
    _, centres, _ = evaluate.kmeans(x, 3, iterations=1, centres=start)
    assert close(centres[0], [3.8, 3.6])                                  # the mean of all
    assert close(sorted(centres[1:].tolist()), [[9, 8], [9, 9]])          # each a point of its own
    index, centres, _ = evaluate.kmeans(x, 2, centres=start[:2])
    assert index.tolist() == [0, 0, 0, 1, 1] and close(centres, [[1 / 3, 1 / 3], [9, 8.5]])


def test_kmeans_is_finite_for_equal_points_and_refuses_more_clusters_than_points():
    for x in torch.ones(6, 3), torch.cat([torch.zeros(5, 2), torch.ones(1, 2)]), torch.zeros(1, 4):
        for k in range(1, len(x) + 1):
            index, centres, inertia = evaluate.kmeans(x, k)
            assert centres.isfinite().all() and centres.shape == (k, x.shape[1]) and index.max() < k
            assert inertia < 1e-6 or k == 1
    with raises(ValueError, 7, 6):
        evaluate.kmeans(torch.ones(6, 3), 7)


def cases():
    """Pairs of cluster ids and labels: fewer, as many, more clusters than classes, any ids, one cluster."""
    rng = np.random.default_rng(0)
    for clusters, classes in (2, 4), (3, 3), (5, 3), (4, 4), (1, 3), (3, 1):
        yield rng.integers(0, clusters, 25), rng.integers(0, classes, 25)
    yield np.array([0, 3, 3, 0, 5]), np.array([1, 1, 4, 4, 4])
    yield rng.integers(0, 3, 25) * 10 ** 12, rng.integers(1, 4, 25) * 10 ** 15     # no table of that size


def test_hungarian_accuracy_is_the_best_of_all_matchings():
    for pred, true in cases():
        clusters, classes = sorted(set(pred.tolist())), sorted(set(true.tolist()))
        slots = classes + [-1] * len(clusters)                            # -1: matched to no class, all wrong
        best = max(np.mean([match[clusters.index(p)] == y for p, y in zip(pred, true)])
                   for match in set(itertools.permutations(slots, len(clusters))))
        accuracy, mapping = evaluate.hungarian_accuracy(pred, true)
        assert len(set(mapping.values())) == len(mapping) == min(len(clusters), len(classes))
        mapped = [mapping.get(p, -1) for p in pred.tolist()]
        assert close(accuracy, best) and close(np.mean(mapped == true), best)


def test_nmi_is_mutual_information_over_the_mean_entropy_and_stays_within_0_and_1():
    def entropy(v):
        return scipy.stats.entropy(np.unique(v, return_counts=True)[1])

    for pred, true in cases():
        mutual = 0.0
        for i, j in itertools.product(set(pred), set(true)):
            both = np.mean((pred == i) & (true == j))
            mutual += scipy.special.xlogy(both, both / (np.mean(pred == i) * np.mean(true == j)))
        assert close(evaluate.nmi(pred, true), 2 * mutual / (entropy(pred) + entropy(true)), 1e-6)
    assert evaluate.nmi([7] * 4, [0] * 4) == 1
    rng = np.random.default_rng(0)
    for _ in range(100):                                                  # rounding would pass 1 in some
        labels = rng.integers(0, 10, 400)
        assert 1 - 1e-9 < evaluate.nmi(rng.permutation(10)[labels], labels) <= 1


def test_ari_counts_pairs():
    for pred, true in cases():
        i, j = np.triu_indices(len(pred), 1)                              # pairs
        same, equal = pred[i] == pred[j], true[i] == true[j]
        a, b, c, d = (np.sum(v) for v in (same & equal, same & ~equal, ~same & equal, ~same & ~equal))
        wanted = 2 * (a * d - b * c) / ((a + b) * (b + d) + (a + c) * (c + d))
        assert close(evaluate.ari(pred, true), wanted, 1e-6)
    for pred, true, wanted in ([0] * 4, [0] * 4, 1), ([0, 1, 2], [2, 0, 1], 1), ([5], [3], 1):
        assert evaluate.ari(pred, true) == wanted


def test_purity_is_the_share_of_each_clusters_majority():
    for pred, true in cases():
        right = sum(np.unique(true[pred == i], return_counts=True)[1].max() for i in set(pred))
        assert close(evaluate.purity(pred, true), right / len(pred), 1e-6)


def test_scores_take_integer_arrays_of_any_kind():
    def scores(pred, true):
        scored = evaluate.hungarian_accuracy, evaluate.nmi, evaluate.ari, evaluate.purity
        assert evaluate.confusion_matrix(pred, true, 201)[100, 200] == 2           # 200 * 101 is no uint8
        return [score(pred, true) for score in scored]
    pred, true = torch.tensor([0, 1, 200, 200, 1]), torch.tensor([3, 3, 100, 100, 100])
    p, y = pred.byte(), true.byte()
    assert scores(p, y) == scores(p.numpy(), y.numpy()) == scores(pred, true)
    for p, y in ([0, 1], [0]), ([], []), ([-1, 0], [0, 0]):
        with raises(ValueError):
            evaluate.contingency(np.array(p, int), np.array(y, int))


def f1_by_loops(pred, true, k):
    hits = sum(p == y == k for p, y in zip(pred, true))
    return 2 * hits / max(1, sum(p == k for p in pred) + sum(y == k for y in true))


def test_f1_by_loops_and_its_mean_leaves_out_classes_that_are_nowhere():
    rng = np.random.default_rng(0)
    pred, true = rng.integers(0, 3, 50).tolist(), rng.integers(0, 4, 50).tolist()
    table = evaluate.confusion_matrix(pred, torch.tensor(true), 6)
    assert table.tolist() == [[list(zip(true, pred)).count((i, j)) for j in range(6)] for i in range(6)]
    for missed in [0] * 6, [0, 2, 0, 0, 5, 0]:                            # images that got no class
        lost = [k for k in range(6) for _ in range(missed[k])]
        each = [f1_by_loops(pred + [-1] * len(lost), true + lost, k) for k in range(6)]
        assert close(evaluate.f1(table, np.array(missed)), each)
        exist = len({*pred, *true, *lost})                                # of the six classes
        assert close(evaluate.mean_f1(table, np.array(missed)), sum(each) / exist)


def logistic_by_scipy(x, y, K, l2):
    """log p (N, K) function of the minimiser of cross-entropy + l2 / 2 |W|^2 on standardised x, float64."""
    mean, std = x.mean(0), x.std(0)

    def logp(v, theta):
        W = theta.reshape(-1, K)
        return scipy.special.log_softmax((v - mean) / std @ W[:-1] + W[-1], 1)

    def objective(theta):
        return -logp(x, theta)[np.arange(len(y)), y].mean() + l2 / 2 * (theta[:-K] ** 2).sum()

    found = scipy.optimize.minimize(objective, np.zeros((x.shape[1] + 1) * K), method='L-BFGS-B')
    return lambda v: logp(v, found.x)


def test_linear_probe_is_the_optimum_that_scipy_finds():
    scale, l2s = torch.tensor([1, 10, 0.1, 3]), (1e-3, 1e-1, 10.0)
    x, test = randn(96, 4) * scale + 5, randn(40, 4, seed=7) * scale + 5
    y = (x[:, 0] > 5).long() + (x[:, 2] + 0.05 * randn(96, seed=3) > 5).long()
    X, Y, T = x.double().numpy(), y.numpy(), test.double().numpy()
    hits = {l2: np.sum(logistic_by_scipy(X[:80], Y[:80], 3, l2)(X[80:]).argmax(1) == Y[80:]) for l2 in l2s}
    logits, l2 = evaluate.linear_probe(x[:80], y[:80], x[80:], y[80:], test, l2s)     # all are fitted
    assert hits[l2] == max(hits.values()) > min(hits.values())
    assert close(logits.log_softmax(1), logistic_by_scipy(X, Y, 3, l2)(T), 5e-3)
    alone, l2 = evaluate.linear_probe(x[:2], y[:2], x[:0], y[:0], test)   # two labels, none to choose with
    assert l2 == 0.01 and alone.isfinite().all()


def test_active_units_are_those_whose_variance_passes_the_threshold():
    assert evaluate.active_units(torch.tensor([[0.0, 1, 5], [0.1, 2, 5]])) == 1     # variances .0025, .25, 0


def measure(contents, encode=lambda x: x.flatten(1)):
    ds = data.make_dataset('tiny', contents)
    with mock.patch.object(evaluate, 'PROBE_SHARE', 0.5):
        return evaluate.measure(ds, *data.split(len(ds.x_train), 20, 0), encode)[0]


def test_measure_scores_separable_classes_1_and_shuffled_labels_by_chance():
    good = arrays(200, 90)
    with mock.patch.object(evaluate, 'linear_probe', wraps=evaluate.linear_probe) as probe, \
            mock.patch.object(evaluate, 'kmeans', wraps=evaluate.kmeans) as kmeans:
        sure = measure(good)
    assert [len(y) for y in probe.call_args.args[1:4:2]] == [84, 16]      # of training, of validation images
    assert len(kmeans.call_args.args[0]) == 180
    ones = 'knn', 'probe', 'mean_f1', 'kmeans_acc', 'kmeans_purity', 'kmeans_nmi', 'kmeans_ari'
    assert close([sure[key] for key in ones], np.ones(7)) and sure['f1'] == [1, 1, 1]
    assert (sure['split'], sure['n'], sure['knn_labels'], sure['probe_labels']) == ('test', 90, 200, 100)
    chance = measure({**good, 'y_test': np.random.default_rng(0).permutation(good['y_test'])})
    assert all(0.2 < chance[key] < 0.5 for key in ('knn', 'probe', 'kmeans_acc', 'kmeans_purity'))
    assert abs(chance['kmeans_ari']) < 0.1 and chance['probe_l2'] == sure['probe_l2']
    stretched = measure(good, lambda x: x.flatten(1) * (1 + 50 * x[:, 0, :1, 0]))
    assert stretched['kmeans_acc'] == stretched['knn'] == 1               # by direction, not by length
    renamed = measure({**good, 'y_test': (good['y_test'] + 1) % 3})       # training labels name the clusters
    assert (renamed['kmeans_acc'], renamed['kmeans_mapping']) == (0, 'train') and renamed['kmeans_nmi'] > 0.99


def test_measure_says_what_it_leaves_out():
    a = arrays(200, 90)
    bare = measure({'x_train': a['x_train']})
    assert bare['left_out'] == ['knn', 'probe', 'kmeans'] and (bare['split'], bare['n']) == ('validation', 20)
    assert not {'knn', 'probe', 'kmeans_acc', 'f1'} & set(bare) and bare['features'] == 120
    assert measure({'x_train': a['x_train'], 'x_test': a['x_test']})['split'] == 'test'
    del a['y_test']
    m = measure(a)
    assert (m['split'], m['n'], m['left_out']) == ('validation', 20, []) and m['knn'] == m['probe'] == 1
    assert m['knn_labels'] == 180 and m['probe_labels'] == 90             # those it is scored on don't vote
    a = arrays(200, 90)
    del a['y_train']
    m = measure(a)
    assert m['left_out'] == ['knn', 'probe'] and m['kmeans_acc'] == 1 and m['kmeans_mapping'] == 'test'


def test_images_without_a_label_are_left_out_of_what_needs_labels():
    a = arrays(200, 90)
    a['y_train'][np.random.default_rng(0).permutation(200)[:130]] = -1
    known, m = a['y_train'] >= 0, measure(a)
    few = measure({**a, 'x_train': a['x_train'][known], 'y_train': a['y_train'][known]})
    assert (m['n'], m['knn_labels'], m['probe_labels'], m['knn']) == (90, 70, 35, few['knn'])
    assert m['probe'] > 0.9 and m['kmeans_acc'] > 0.9
    m = measure({key: a[key] for key in ('x_train', 'y_train')})
    among = known[data.split(200, 20, 0)[1]].sum()                        # of the validation images
    assert (m['n'], m['knn_labels'], m['probe']) == (among, 70 - among, 1)
    for labelled in data.split(200, 20, 0):                               # the other part has no label
        m = measure({'x_train': a['x_train'], 'y_train': np.where(np.isin(range(200), labelled), 1, -1)})
        assert (m['n'], m['left_out']) == (20, ['knn', 'probe', 'kmeans'][:2 if len(labelled) == 20 else 3])


def test_features_that_overflow_are_told_as_a_training_that_diverged():
    with raises(ValueError, 'diverged', '--lr'):
        measure(arrays(), lambda x: x.flatten(1) * 1e30)


def test_measure_classifier_counts_hits_on_the_test_set():
    a = arrays(40, 30)
    predict, encode = (lambda x: x[:, 0, 5, :3]), (lambda x: x[:, 0, 5])  # nonsense, but repeatable
    m, shown = evaluate.measure_classifier(data.make_dataset('tiny', a), predict, encode)
    pred, true = a['x_test'][:, 5, :3].argmax(1).tolist(), a['y_test'].tolist()
    table = evaluate.confusion_matrix(pred, true, 3)
    assert close(m['accuracy'], np.mean(pred == a['y_test'])) and (m['split'], m['n']) == ('test', 30)
    assert m['confusion'] == table.tolist() and close(m['f1'], evaluate.f1(table))
    assert close(m['mean_f1'], evaluate.mean_f1(table)) and shown['h'].shape == (30, 12)
    bare = data.make_dataset('tiny', {'x_train': a['x_train']})
    m, shown = evaluate.measure_classifier(bare, predict, encode)
    assert 'accuracy' not in m and m['left_out'] and len(shown['x']) == 40


K = 5


def clusters(x):
    """(B,) of K clusters: the class of an image (B, 1, 10, 12), of some another one."""
    return x[:, 0, [1, 4, 8]].mean(2).argmax(1) + 2 * ((255 * x[:, 0, 0, 0]).round() % 4 == 0)


def measure_clusters(a):
    """evaluate.measure_clusters of arrays by `clusters`."""
    ds = data.make_dataset('some', a)
    predict, encode = (lambda x: torch.eye(K)[clusters(x)]), (lambda x: x[:, 0, 0, :4])
    return evaluate.measure_clusters(ds, predict, encode, K, clusters(data.to_float(ds.x_train)))


def test_clusters_get_the_names_that_training_labels_give_them_and_unmatched_ones_are_wrong():
    a = arrays(60, 30)
    a['y_test'] = (a['y_test'] + 1) % 3                                   # these would name them so
    train, pred = (clusters(torch.tensor(a[x])[:, None] / 255).tolist() for x in ('x_train', 'x_test'))
    m, shown = measure_clusters(a)
    best = max(itertools.permutations([0, 1, 2, -1, -1], K),
               key=lambda names: sum(names[c] == y for c, y in zip(train, a['y_train'])))
    named = [best[c] for c in pred]
    each = [f1_by_loops(named, a['y_test'], k) for k in range(3)]
    assert close(m['acc'], np.mean(named == a['y_test'])) and m['acc'] < 0.5
    assert close(m['f1'], each) and close(m['mean_f1'], sum(each) / 3)
    assert (m['split'], m['mapping'], m['live_clusters']) == ('test', 'training', len(set(pred)))
    assert shown['clusters'].tolist() == pred and sum(m['sizes']) == 30
    h = torch.nn.functional.normalize(shown['h'], dim=1)
    assert close(shown['centres'][0], h[shown['clusters'] == 0].mean(0))


def test_clusters_are_scored_on_the_training_images_where_the_test_set_has_no_labels():
    a = arrays(60, 30)
    a['y_train'][:20] = -1
    del a['y_test']
    m, shown = measure_clusters(a)
    assert (m['split'], m['n']) == ('training', 40) and len(shown['x']) == 40
    assert shown['y'].tolist() == a['y_train'][20:].tolist() and m['acc'] > 0.5
    del a['y_train']
    m, _ = measure_clusters(a)
    assert 'acc' not in m and m['left_out'] and m['split'] == 'test'
