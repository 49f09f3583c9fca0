"""Learning without labels: objectives, what runs leave behind, and that no label is looked at."""
from helpers import (METHODS, TRAINED, UNLABELLED, arrays, close, drawn, finished, folder, home, images,
                     logged, measured, ok, place, rand, refused, run, tiny, weights, write_npz)
import math
from unittest import mock

import numpy as np
import torch

import augment
import data
import features
import nets
import pretrain
import runs
from device import generator


def nt_xent_by_loops(z1, z2, tau):
    z = torch.nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1).detach().numpy()
    B, total = len(z1), 0.0
    for i in range(2 * B):
        similarity = [math.exp(z[i] @ z[j] / tau) for j in range(2 * B)]
        total -= math.log(similarity[(i + B) % (2 * B)] / (sum(similarity) - similarity[i]))
    return total / (2 * B)


def test_contrastive_is_nt_xent_of_two_views_plus_the_weighed_error_of_the_decoded_image():
    torch.manual_seed(0)
    for recon in 0.0, 3.0:
        model = nets.build('simclr', 'fc', (1, 8, 8), 0.1, None, bool(recon)).eval()
        x, other = rand(6, 1, 8, 8), rand(6, 1, 8, 8, seed=1)
        with mock.patch.object(augment, 'augment', lambda x, views, g: x / 2):
            loss, parts = pretrain.contrastive(model, x, None, 0.5, None, recon, other)
        h = model.encode(torch.cat([x if recon else x / 2, other / 2]))        # a decoder sees it as it is
        wanted = nt_xent_by_loops(*model.head(h).chunk(2), 0.5)
        if recon:
            wanted += recon * ((model.decode(h[:6]) - x) ** 2).mean().item()
        assert close(loss, wanted, 1e-4) and close(parts['chance'], math.log(11))


def test_with_neighbours_each_image_is_paired_with_a_neighbour_of_its_own():
    all_x = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1)
    near = torch.randint(30, (6, 4), generator=torch.Generator().manual_seed(0))
    seen = []

    def objective(model, x, g, other):
        seen.append((255 * other).round().long().flatten())
    for step in range(40):
        g = generator('cpu', step)
        pretrain.with_neighbours(None, all_x[:6] / 255, near, g, all_x.__getitem__, objective)
    for i, ids in enumerate(torch.stack(seen, 1)):            # each of its neighbours, and nobody else
        assert set(ids.tolist()) == set(near[i].tolist())


def test_the_last_epochs_of_simclr_pair_neighbours_in_its_own_features():
    found, neighbours = [], features.neighbours

    def spy(h, k):
        found.append((h, k))
        return neighbours(h, k)
    with folder() as cwd, mock.patch.object(features, 'neighbours', spy), \
            mock.patch.object(pretrain, 'SEARCH_EVERY', 1):
        write_npz(cwd / 'tiny.npz')
        for share, epochs in (1, 0), (0.5, 2), (0, 4):
            found.clear()
            more = ['--epochs', 4, '--neighbours-from', share, '--neighbours', 3, '--overwrite']
            ok(*tiny('simclr'), *more, cwd=cwd)
            assert len(found) == epochs and all(k == 3 and len(h) == 108 for h, k in found)
            assert [row['epoch'] for row in logged(cwd / 'runs/simclr')] == [1, 2, 3, 4]


def test_every_method_learns_on_tiny_images_and_leaves_all_its_files():
    shows = {**dict.fromkeys(['ae', 'conv', 'pca'], 'reconstructions'), 'simclr': 'reconstructions views',
             'vae': 'reconstructions samples interpolation', 'random': '', 'pixels': ''}
    for method, pngs in shows.items():
        there = finished(method)
        assert drawn(there).keys() == {f'{png}.png' for png in pngs.split()}, method
        assert (there / 'report.html').exists() and (there / 'checkpoint.pt').exists()
        if method in UNLABELLED:
            first, second = logged(there)
            assert second['loss'] < first['loss'], method
        m = measured(there)
        assert m['split'] == 'test' and m['n'] == 40 and m['method'] == method
        assert ('mse' in m) == ('reconstructions' in pngs) and ('active_units' in m) == (method == 'vae')
    assert measured(finished('pixels'))['knn'] == 1 and measured(finished('pixels'))['features'] == 120
    x = data.to_float(data.load(home() / 'tiny.npz').x_test)
    model = runs.open_run(finished('pca')).model
    assert close(measured(finished('pca'))['mse'], (model.decode(model.encode(x)) - x).square().mean())


def test_evaluate_gives_the_measures_and_images_of_the_finished_run_again_and_moves_no_weight():
    for method in METHODS:
        there = finished(method)
        before, pngs, state = measured(there), drawn(there), weights(there)
        for png in there.glob('*.png'):
            png.unlink()
        (there / 'metrics.json').write_text('{}')
        ok('--evaluate', there)
        assert measured(there) == before and drawn(there) == pngs and weights(there) == state, method


def test_permuting_labels_changes_no_weight_no_loss_no_cluster_and_no_image():
    rng = np.random.default_rng(0)
    permuted = {key: rng.permutation(v) if key[0] == 'y' else v for key, v in arrays().items()}
    scores = 'acc', 'nmi', 'ari', 'purity'                    # of clusters, logged to be looked at
    with place(**permuted) as cwd:
        for method in *UNLABELLED, 'cluster', 'scan':
            more = ['--encoder', finished('simclr')] * (method == 'scan')
            ok(*tiny(method), *more, cwd=cwd)
            a, b = cwd / 'runs' / method, finished(method)
            rows = [[{k: v for k, v in row.items() if k not in scores} for row in logged(f)] for f in (a, b)]
            assert weights(a) == weights(b) and rows[0] == rows[1] and drawn(a) == drawn(b), method
            assert measured(a).get('sizes') == measured(b).get('sizes')
            assert measured(a) != measured(b) or method == 'cluster'           # which has one cluster so far


def test_permuting_test_labels_changes_nothing_but_the_final_scores():
    scores = {'knn', 'probe', 'f1', 'mean_f1', 'confusion', 'kmeans_acc', 'kmeans_nmi', 'kmeans_ari',
              'kmeans_purity', 'accuracy', 'acc', 'nmi', 'ari', 'purity'}
    original, changed = arrays(), 0
    with folder() as cwd:
        y_test = np.random.default_rng(0).permutation(original['y_test'])
        write_npz(cwd / 'tiny.npz', **{**original, 'y_test': y_test})
        for method in METHODS:
            ok(*tiny(method), cwd=cwd)
            a, b = cwd / 'runs' / method, finished(method)
            assert weights(a) == weights(b) and logged(a) == logged(b) and drawn(a) == drawn(b), method
            for path in b.glob('*.csv'):
                assert path.read_bytes() == (a / path.name).read_bytes(), path
            m, other = measured(a), measured(b)
            assert {k for k in {*m, *other} if m.get(k) != other.get(k)} <= scores, method
            changed += m != other
    assert changed >= 7                                       # a network that names one class can't tell


def test_images_without_labels_or_test_set_in_colour_and_odd_sizes_can_be_learned():
    with place(x_train=images(60, 9, 13, C=3)[0]) as cwd:
        for method in *UNLABELLED, 'random', 'pixels', 'pca', 'cluster', 'scan':
            more = ['--encoder', 'runs/simclr'] * (method == 'scan')
            assert 'labels' in ok(*tiny(method), *more, cwd=cwd)
            assert not {'knn', 'probe', 'acc'} & set(measured(cwd / 'runs' / method))


def test_few_images_one_class_and_missing_classes_are_learned_and_one_image_is_refused():
    with folder() as cwd:
        for n, batch in (20, 512), (27, 8), (27, 2):
            x, y = images(n, 8, 8)
            write_npz(cwd / 'tiny.npz', x_train=x, y_train=2 * y, x_test=x, y_test=2 * y)       # no 1, no 3
            for method in TRAINED if batch > 8 else UNLABELLED:
                few = {'query': ['--budget', 9], 'classify': ['--labels', 9]}.get(method, [])
                assert 'nan' not in ok(*tiny(method), '--batch-size', batch, '--overwrite', *few, cwd=cwd)
        write_npz(cwd / 'tiny.npz', x_train=x, y_train=0 * y, x_test=x, y_test=0 * y)
        for method in TRAINED:
            if method in ('classify', 'query'):
                refused(*tiny(method), '--overwrite', cwd=cwd, said=['two classes'])
            else:
                ok(*tiny(method), '--overwrite', cwd=cwd)
        write_npz(cwd / 'tiny.npz', x_train=x[:1])
        for method in TRAINED:
            refused(*tiny(method), '--name', 'x', cwd=cwd, said=['1', '20'])


def test_a_small_set_gets_enough_steps_and_a_run_that_will_make_few_says_so():
    assert 'only 6 steps' in run(*tiny('simclr'), '--name', 'few')[1]
    flags = tiny('ae', '--name', 'more')
    at = flags.index('--epochs')
    with mock.patch('train.Trainer.fit') as fit, mock.patch('pretrain.measure'):
        assert 'only' not in ok(*flags[:at], *flags[at + 2:], '--batch-size', 10)
    assert fit.call_args_list[0].kwargs['of'] * 11 > 450
