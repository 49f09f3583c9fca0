"""Learning without labels: objectives, what runs leave behind, and that no label is looked at."""
from helpers import (TINY, TRAINED, UNLABELLED, arrays, cli, close, differences, drawn, finished, images,
                     logged, measured, ok, place, rand, refused, results, run, tiny, without, write_npz)
import math
from unittest import mock

import numpy as np
import torch

import augment
import features
import losses
import nets
import pretrain
import runs
from device import generator


def test_contrastive_is_nt_xent_of_two_views_plus_the_weighed_error_of_the_decoded_image():
    torch.manual_seed(0)
    for recon in 0.0, 3.0:
        model = nets.build('simclr', 'fc', (1, 8, 8), 0.1, None, bool(recon)).eval()
        x, other = rand(6, 1, 8, 8), rand(6, 1, 8, 8, seed=1)
        with mock.patch.object(augment, 'augment', lambda x, views, g: x / 2):
            loss, parts = pretrain.contrastive(model, x, None, 0.5, None, recon, other)
        h = model.encode(torch.cat([x if recon else x / 2, other / 2]))        # a decoder sees it as it is
        wanted = losses.nt_xent(*model.head(h).chunk(2), 0.5)
        if recon:
            wanted += recon * ((model.decode(h[:6]) - x) ** 2).mean()
        assert close(loss, wanted, 1e-4) and close(parts['chance'], math.log(11))


def test_with_neighbours_each_image_is_paired_with_a_neighbour_of_its_own():
    all_x = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1)
    near = torch.randint(30, (6, 4), generator=generator('cpu', 0))
    seen = []

    def objective(model, x, g, other):
        seen.append((255 * other).round().flatten().tolist())
    for step in range(40):
        g = generator('cpu', step)
        pretrain.with_neighbours(None, all_x[:6] / 255, near, g, all_x.__getitem__, objective)
    for found, wanted in zip(zip(*seen), near.tolist()):      # each of its neighbours, and nobody else
        assert set(found) == set(wanted)


def test_the_last_epochs_of_simclr_pair_neighbours_in_its_own_features():
    with place() as cwd, mock.patch.object(pretrain, 'SEARCH_EVERY', 1):
        for share, epochs in (1, 0), (0.5, 2), (0, 4):
            with mock.patch.object(features, 'neighbours', wraps=features.neighbours) as found:
                ok(*tiny('simclr'), '--epochs 4 --neighbours 3 --overwrite --neighbours-from', share)
            assert found.call_count == epochs
            assert all(len(h) == 108 and k == 3 for (h, k), _ in found.call_args_list)
            assert [row['epoch'] for row in logged(cwd / 'runs/simclr')] == [1, 2, 3, 4]


def test_every_method_learns_on_tiny_images_and_leaves_all_its_files():
    shows = {'simclr': 'reconstructions views', 'vae': 'reconstructions samples interpolation',
             **dict.fromkeys(['ae', 'conv', 'pca'], 'reconstructions'), 'random': '', 'pixels': ''}
    for method, pngs in shows.items():
        there, m = finished(method), measured(finished(method))
        assert drawn(there).keys() == {f'{png}.png' for png in pngs.split()}, method
        assert (there / 'report.html').exists() and (there / 'checkpoint.pt').exists()
        if method in UNLABELLED:
            first, second = logged(there)
            assert second['loss'] < first['loss'], method
        assert (m['split'], m['n'], m['method']) == ('test', 40, method)
        assert ('mse' in m) == bool(pngs) and ('active_units' in m) == (method == 'vae')
    assert m['knn'] == 1 and m['features'] == 120             # of pixels


def test_evaluate_gives_the_measures_and_images_of_the_finished_run_again_and_moves_no_weight():
    for method in TINY:
        there = finished(method)
        before = results(there)
        for png in there.glob('*.png'):
            png.unlink()
        (there / 'metrics.json').write_text('{}')
        ok('--evaluate', there)
        assert not differences(results(there), before), method


def test_permuting_labels_changes_no_weight_no_loss_no_cluster_and_no_image():
    rng = np.random.default_rng(0)
    permuted = {key: rng.permutation(v) if key[0] == 'y' else v for key, v in arrays().items()}
    with place(**permuted) as cwd:
        for method in *UNLABELLED, 'cluster', 'scan':
            ok(*tiny(method))
            found, wanted = results(cwd / 'runs' / method), results(finished(method))
            assert found['metrics'].get('sizes') == wanted['metrics'].get('sizes')
            for row in found['log'] + wanted['log']:
                for score in 'acc', 'nmi', 'ari', 'purity':   # of clusters, logged to be looked at
                    row.pop(score, None)
            assert set(differences(found, wanted)) <= {'metrics'}, method
            assert found['metrics'] != wanted['metrics'] or method == 'cluster'     # which has one cluster


def test_permuting_test_labels_changes_nothing_but_the_final_scores():
    scores = {'knn', 'probe', 'f1', 'mean_f1', 'confusion', 'kmeans_acc', 'kmeans_nmi', 'kmeans_ari',
              'kmeans_purity', 'accuracy', 'acc', 'nmi', 'ari', 'purity'}
    a, changed = arrays(), 0
    a['y_test'] = np.random.default_rng(0).permutation(a['y_test'])
    with place(**a) as cwd:
        for method in TINY:
            ok(*tiny(method))
            found, wanted = results(cwd / 'runs' / method), results(finished(method))
            assert set(differences(found, wanted)) <= {'metrics'}, method
            assert set(differences(found['metrics'], wanted['metrics'])) <= scores, method
            changed += found != wanted
    assert changed >= 7                                       # a network that names one class can't tell


def test_images_without_labels_or_test_set_in_colour_and_odd_sizes_can_be_learned():
    with place(x_train=images(60, 9, 13, C=3)[0]) as cwd:
        for method in TINY.keys() - {'classify', 'query', 'scan'}:
            assert 'labels' in ok(*tiny(method))
            assert not {'knn', 'probe', 'acc'} & set(measured(cwd / 'runs' / method))
        assert 'labels' in ok(*tiny('scan'), '--encoder runs/simclr')


def test_simclr_has_other_defaults_in_colour_where_they_are_not_typed():
    default = cli().DEFAULTS['simclr']
    flags = '--method simclr --data tiny.npz --width 0.1 --epochs 1'
    with place(**arrays(40, 10, C=3)) as cwd:
        ok(flags, '--name colour')
        ok(flags, '--name typed --recon', default['recon'], '--crop', default['crop'])
        ok(flags, '--name resumed')
        (cwd / 'runs/resumed/metrics.json').unlink()
        ok('--method simclr --name resumed --resume')
        colour, typed, resumed = (runs.read_config(cwd / 'runs' / name)['args']
                                  for name in ('colour', 'typed', 'resumed'))
    assert default['on_colour'].items() <= colour.items() and 'on_colour' not in resumed
    assert resumed == {**colour, 'name': 'resumed', 'resume': True}
    assert typed == {**colour, 'name': 'typed', 'recon': default['recon'], 'crop': default['crop']}
    grey = runs.read_config(finished('simclr'))['args']
    assert all(grey[key] == default[key] != value for key, value in default['on_colour'].items())


def test_few_images_one_class_and_missing_classes_are_learned_and_one_image_is_refused():
    with place() as cwd:
        for n, batch in (20, 512), (27, 8), (27, 2):
            x, y = images(n, 8, 8)
            write_npz(cwd / 'tiny.npz', x_train=x, y_train=2 * y, x_test=x, y_test=2 * y)       # no 1, no 3
            for method in TRAINED if batch > 8 else UNLABELLED:
                few = {'query': '--labels 9', 'classify': '--labels 9'}.get(method, '--overwrite')
                out = ok(*tiny(method), '--overwrite --batch-size', batch, few)
                assert 'nan' not in out
        write_npz(cwd / 'tiny.npz', x_train=x, y_train=0 * y, x_test=x, y_test=0 * y)
        for method in *UNLABELLED, 'cluster':
            ok(*tiny(method), '--overwrite')
        for method in 'classify', 'query':
            refused(*tiny(method), '--overwrite', said=['two classes'])
        write_npz(cwd / 'tiny.npz', x_train=x[:1])
        for method in TRAINED:
            refused(*tiny(method), '--name x', said=['1', '20'])


def test_a_small_set_gets_enough_steps_and_a_run_that_will_make_few_says_so():
    assert 'only 6 steps' in run(*tiny('simclr'), '--name few')[1]
    with mock.patch('train.Trainer.fit') as fit, mock.patch('pretrain.measure'):
        assert 'only' not in ok(*without('--epochs', tiny('ae')), '--name more --batch-size 10')
    assert fit.call_args_list[0].kwargs['epochs'] * 11 >= 500
