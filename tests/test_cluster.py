"""Clusters: the heads of scan and their criterion, pseudo-labelling in turns, names and files."""
from helpers import (arrays, close, finished, home, logged, measured, ok, place, randn, refused, rows_of,
                     tiny, without)
import itertools
import math
from unittest import mock

import numpy as np
import torch

import cluster
import data
import evaluate
import features
import runs
from device import generator


def blobs(n=60, K=3):
    """(points (n, 2) around K corners on a circle, the corner of each)."""
    blob = torch.arange(n) % K
    angle = 2 * math.pi * blob / K
    return 3 * torch.stack([angle.cos(), angle.sin()], 1) + 0.3 * randn(n, 2), blob


def criterion_by_loops(pred, near, entropy=5.0):
    same = sum(int(pred[j] == pred[i]) for i in range(len(pred)) for j in near[i]) / near.numel()
    sizes = [count / len(pred) for count in pred.bincount().tolist() if count]
    return -math.log(same) + entropy * sum(size * math.log(size) for size in sizes)


def test_scan_heads_find_blobs_agree_on_the_names_and_need_no_more_memory_than_there_is():
    h, blob = blobs()
    near = features.neighbours(h, 5)
    probs = cluster.scan_heads(h, near, 3, heads=8, steps=600, batch=64)
    assert evaluate.hungarian_accuracy(probs.argmax(1), blob)[0] == 1 and close(probs.sum(1), torch.ones(60))
    assert probs.max(1).values.min() > 0.75                   # heads that name differently would blur it
    with mock.patch.object(cluster, 'HEADS_BYTES', 4 * 64 * 3 * 2 + 1):        # memory for two heads
        few = cluster.scan_heads(h, near, 3, heads=8, steps=60, batch=64)
    assert close(few, cluster.scan_heads(h, near, 3, heads=2, steps=60, batch=64), 1e-6)


def test_propagation_is_a_walk_along_the_graph_of_the_nearest_neighbours():
    near, probs = features.neighbours(randn(60, 4), 12), randn(60, 3, seed=1).softmax(1)
    step = np.zeros((60, 60))
    step[np.arange(60)[:, None], near[:, :10]] = 1 / 10
    wanted = np.linalg.matrix_power(step, 5) @ probs.double().numpy()
    assert close(cluster.propagate(probs, near), wanted, 1e-6)


def test_of_the_heads_that_half_decides_whose_clusters_neighbours_share_most():
    h, said = randn(200, 4), []
    near = features.neighbours(h, 12)
    with mock.patch.object(cluster, 'propagate', lambda probs, near: said.append(probs) or probs):
        probs = cluster.scan_heads(h, near, 3, heads=5, steps=3, batch=64)
    judged = [criterion_by_loops(one.argmax(1), near) for one in said[:5]]     # hardly trained: they differ
    kept = sorted(range(5), key=judged.__getitem__)[:3]
    first, total = said[kept[0]].argmax(1), 0
    for head in kept:                                         # of all ways to name its clusters the best
        named = [said[head][:, list(order)] for order in itertools.permutations(range(3))]
        total += max(named, key=lambda probs: (probs.argmax(1) == first).sum())
    assert len(set(judged)) == 5 and close(probs, total / 3, 1e-6)


def test_the_criterion_sees_neighbours_and_sizes_and_one_cluster_for_all_is_worst():
    h, blob = blobs()
    near = features.neighbours(h, 5)
    other = torch.randint(3, (60,), generator=generator('cpu', 0))
    assert close(cluster.criterion(other, near, 3, 2.0), criterion_by_loops(other, near, 2.0))
    assert close(cluster.criterion(blob, near, 3), -5 * math.log(3))
    assert close(cluster.criterion(torch.zeros_like(blob), near, 3), 0)


def test_cluster_starts_from_kmeans_or_a_scan_assigns_anew_and_keeps_each_iteration():
    h = data.to_float(data.load(home() / 'tiny.npz').x_train).flatten(1)
    h = torch.nn.functional.normalize(h - h.mean(0), dim=1)
    voted = runs.open_run(finished('scan')).model.probs.argmax(1)
    from_scan = without('--width', tiny('cluster', '--encoder', finished('scan')))
    for flags, wanted in (tiny('cluster'), evaluate.kmeans(h, 3, seed=0)[0]), (from_scan, voted):
        ok(*flags, '--overwrite --name started')
        there = home() / 'runs/started'
        found = {p.stem: torch.load(p, weights_only=True)['pred'].tolist() for p in there.glob('[ibf]*.pt')}
        assert set(found) == {'iteration-00', 'iteration-01', 'iteration-02', 'best', 'final'}
        assert found['iteration-00'] == wanted.tolist()
        rows = [row for row in logged(there) if 'iteration' in row]
        assert [row['iteration'] for row in rows] == [0, 1, 2]
        best = min(rows[1:], key=lambda row: row['criterion'])['iteration']    # of those that have a network
        assert found['best'] == found[f'iteration-{best:02}'] and found['final'] == found['iteration-02']
    backwards = arrays()
    backwards['x_train'] = backwards['x_train'][::-1]         # each image keeps its cluster
    with place(**backwards) as cwd:
        ok(*from_scan)
        start = torch.load(cwd / 'runs/cluster/iteration-00.pt', weights_only=True)['pred']
        assert (start == voted.flip(0)).float().mean() > 0.9


def test_any_number_of_clusters_is_found_and_each_image_is_told_its_own():
    x = data.load(home() / 'tiny.npz').x_train
    for K, method in itertools.product((2, 20), ('cluster', 'scan')):
        out = ok(*tiny(method), '--overwrite --name many --clusters', K)
        there = home() / 'runs/many'
        assert measured(there)['clusters'] == K and 'clusters.csv' in out
        rows, opened = rows_of(there / 'clusters.csv'), runs.open_run(there)
        p = opened.model.probs if method == 'scan' else opened.predict(x)
        assert [row['id'] for row in rows] == [str(i) for i in range(120)]
        assert [int(row['cluster']) for row in rows] == p.argmax(1).tolist()
        assert close([float(row['confidence']) for row in rows], p.max(1).values, 1e-4)
    refused(*tiny('scan'), '--clusters 121 --name x', said=['121', '120'])


def test_an_assignment_that_collapses_is_said_loudly():
    with mock.patch.object(runs.Network, 'predict', lambda network, x: torch.eye(3)[[0] * len(x)]):
        assert 'WARNING: only 1 of 3 clusters are alive' in ok(*tiny('cluster'), '--name collapsed')
