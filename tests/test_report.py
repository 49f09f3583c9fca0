"""Images as PNG, tables as text, report.html of one run and of many, TensorBoard."""
from helpers import close, finished, folder, pillow, pixels, rand, randn, raises

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import unittest
from unittest import mock

import numpy as np
import torch

import features
import labels
import report
import runs


def embedded(address):
    """Pixels of an image that is inside a page."""
    return pixels(base64.b64decode(address.removeprefix('data:image/png;base64,'), validate=True))


def content(path):
    """What a page holds; nothing else in it is a script, and it points nowhere else."""
    page = path.read_text('utf-8')
    assert page.count('<script') == page.count('</script>') == 1
    assert not re.search(r'@import|url\(|src="http', page)
    return json.loads(re.search('const report = (.*);\n', page)[1])


def made(there, method, metrics, log=(), digest='abc', **args):
    """A run folder as read by compare."""
    there.mkdir(parents=True)
    args = {'method': method, 'seed': 0, **args}
    runs.write_json(there / 'config.json', {'data': {'digest': digest}, 'args': args})
    if metrics is not None:
        runs.write_json(there / 'metrics.json', metrics)
    (there / 'log.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in log))
    return there


METRICS = {'method': 'classify', 'accuracy': 0.5, 'labels': 9, 'n': 6, 'split': 'test', 'left_out': [],
           'f1': [0.5, 0.5], 'mean_f1': 0.5, 'confusion': [[2, 1], [2, 1]], 'epochs': 1, 'seconds': 1.0,
           'measuring_seconds': 1.0}


# ------------------------------------------------------------------------------------------- images

def test_png_holds_the_pixels_it_was_given():
    for shape in (1, 1), (5, 7), (5, 7, 3), (1, 300, 3):
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        assert np.array_equal(pixels(report.png(image)), image)
        png = report.png(np.asfortranarray(image))
        assert np.array_equal(pillow().open(io.BytesIO(png)), image)


def test_sheet_lays_rows_of_images_out_with_gaps():
    for C in 1, 3:
        rows = rand(3, C, 4, 5), rand(2, C, 4, 5, seed=1) * 3 - 1        # leaves 0..1 and is clipped
        wanted = np.full((14, 23, C), 128)
        for r, row in enumerate(rows):
            for i, image in enumerate(np.clip(row.numpy(), 0, 1).transpose(0, 2, 3, 1)):
                wanted[2 + 6 * r:6 + 6 * r, 2 + 7 * i:7 + 7 * i] = np.round(255 * image)
        wanted = wanted.repeat(3, 0).repeat(3, 1)
        assert np.array_equal(report.sheet(*rows, gap=2, zoom=3), wanted[:, :, 0] if C == 1 else wanted)


def test_compare_gives_mean_and_sample_deviation_over_seeds_and_the_same_seed_twice_is_no_spread():
    with folder() as f:
        there = []
        for seed, score in enumerate((0.5, 0.7, 0.9)):
            metrics = {'knn': score, 'epochs': 7, 'seconds': 10 * seed, 'mse': None}
            there.append(made(f / f'b-seed={seed}', 'simclr', metrics, seed=seed))
        there.append(made(f / 'again', 'simclr', {'knn': 0.1}, seed=1))
        there.append(made(f / 'elsewhere', 'simclr', {'knn': 0.2}, seed=3, digest='of other data'))
        there.append(made(f / 'a', 'simclr', None, temperature=0.2))
        lines = report.compare(there, f / 'report.html')
        assert lines == [
            ['run', 'seeds', 'kNN', 'epochs', 'seconds'], ['b', '3', '70.0%±20.0', '7', '10'],
            ['again', '1', '10.0%', '-', '-'], ['elsewhere', '1', '20.0%', '-', '-'],
            ['a', '0', '-', '-', '-']]
        assert len({len(line) for line in report.table(lines).splitlines()}) == 1


def test_an_estimate_stands_in_a_table_with_its_interval():
    with folder() as f:
        there = []
        for seed, low in enumerate((0.5, 0.6)):
            metrics = {'estimate': low + 0.2, 'estimate_low': low, 'estimate_high': low + 0.3}
            there.append(made(f / f'q-seed={seed}', 'query', metrics, seed=seed))
        assert report.compare(there, f / 'report.html')[1] == ['q', '2', '75.0% (55.0 to 85.0)']


def test_a_comparison_names_what_it_leaves_out_and_wants_one_run():
    with folder() as f:
        good = made(f / 'good', 'ae', {'mse': 0.1})
        report.compare([f / 'goood', good], f / 'report.html')
        assert len(content(f / 'report.html')['errors']) == 1
        with raises(ValueError, 'is not a run folder', good):
            report.compare([f / 'goood'], f / 'report.html')


# -------------------------------------------------------------------------------------------- pages

def test_the_page_of_each_method_holds_what_it_has_to_show():
    pngs = {'vae': ['reconstructions', 'samples', 'interpolation'], 'simclr': ['reconstructions', 'views']}
    parts = {'query': {'labels', 'wrong'}, 'scan': {'clusters'}}
    for method in 'pixels', 'vae', 'simclr', 'query', 'scan':
        there = finished(method)
        page, metrics = content(there / 'report.html'), runs.read_json(there / 'metrics.json')
        assert page['metrics'] == metrics and page['config']['args'] == runs.read_config(there)['args']
        assert page.keys() & {'labels', 'wrong', 'clusters'} == parts.get(method, {'clusters', 'wrong'})
        assert list(page['pngs']) == pngs.get(method, []) and len(page['maps']['kinds']) == 40
        for stem, png in page['pngs'].items():
            assert np.array_equal(embedded(png), pixels((there / f'{stem}.png').read_bytes()))


def test_a_map_is_coloured_by_what_was_predicted_where_no_class_is_known():
    h, y = randn(60, 6), torch.arange(60) % 3
    maps = report.feature_maps({'h': h, 'probs': torch.eye(3)[y]}, ['a', 'b', 'c'], seed=0)
    assert maps['by'] == 'predicted class' and maps['kinds'] == y.tolist() and len(maps['tsne']) == 60
    assert close(maps['pca'], features.principal(h), 1e-4)


def shades(n):
    """Images (n, 1, 8, 8) whose pixels are their number; and the numbers of those in a gallery."""
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8)
    return x, lambda gallery: [int(embedded(address)[4, 4]) for address, _ in gallery]


def test_the_most_wrong_are_the_most_confident_of_the_wrong():
    x, numbers = shades(6)
    b = torch.tensor([0.9, 0.6, 0.2, 0.7, 0.05, 0.55])                    # predicted: b, b, a, b, a, b
    shown = {'x': x, 'y': torch.tensor([0, 0, 1, 1, 0, 0]), 'probs': torch.stack([1 - b, b], 1)}
    found = report.most_wrong(shown, ['a', 'b'], n=3)
    assert numbers(found) == [0, 2, 1] and [caption for _, caption in found] == [
        'a, predicted b, 90.0%', 'b, predicted a, 80.0%', 'a, predicted b, 60.0%']


def test_members_belong_to_their_cluster():
    x, numbers = shades(6)
    shown = {'x': x, 'y': torch.arange(6) % 2, 'clusters': torch.tensor([0, 0, 0, 2, 2, 2]),
             'mapping': {0: 1}, 'centres': randn(3, 2)}
    first, empty, other = report.clusters(shown, ['a', 'b'], seed=0, n=2)
    assert (first['name'], first['size'], other['name'], empty['size']) == ('b', 3, '', 0)
    i, j = numbers(first['images'])
    assert i != j and {i, j} <= {0, 1, 2} and first['images'][0][1] == 'ab'[i % 2]


def test_estimates_stand_at_the_labels_they_came_from():
    x, numbers = shades(6)
    rows = [(i, i % 2, r, 0 if r else None) for i, r in enumerate([0, 0, 0, 1, 1, 2])]
    some = labels.Estimate(0.5, 0.25, 0.75, 20)
    found = report.paid_labels(x, rows, {0: (4, None), 1: (4, some), 2: (4, some)}, ['a', 'b'])
    assert found['estimates'] == [(3, *some[:3]), (5, *some[:3])] and found['counts'] == [3, 3]
    assert numbers(found['other']) == [3, 5] and found['other'][0][1] == 'b, predicted a'


EVIL = '<script>alert(1)</script>&"\'</title> CONTENT <!--'


def evil_pages(f):
    """report.html of a run and of many whose names are all hostile."""
    x, y = torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.arange(40) % 2
    asked = x[:2], [(0, 1, 0, None), (1, 0, 1, 1)], {1: (2, labels.Estimate(0.5, 0.25, 0.75, 20))}
    shown = {'x': x, 'y': y, 'h': randn(40, 4), 'probs': torch.eye(2)[1 - y], 'clusters': y,
             'centres': randn(2, 4), 'mapping': {0: 1}, 'asked': asked}
    log = [{'epoch': e, 'loss': 2 / e, 'val_loss': 1 / e} for e in (1, 2)]
    there = made(f / 'a <b> "c" #1', 'classify', METRICS, log)
    data = {'name': EVIL, 'digest': 'abc', 'shape': [1, 8, 8], 'train': 9, 'test': 6, 'classes': [EVIL, 'b']}
    config = {'args': {'method': 'classify', 'seed': 0, EVIL: EVIL}, 'data': data, 'command': EVIL,
              'versions': {}, 'machine': {}}
    report.write_report(there, config, METRICS, shown)
    report.compare([there], f / 'report.html')
    return there / 'report.html', f / 'report.html'


def test_hostile_names_are_text_and_nothing_else():
    with folder() as f:
        page, many = map(content, evil_pages(f))
        assert page['maps']['by'] == 'class' and page['maps']['kinds'] == [0, 1] * 20
        assert page['config']['command'] == EVIL and page['labels']['other'][0][1] == f'{EVIL}, predicted b'
        assert many['links'] == [[[0, 'a <b> "c" #1']]]


def test_comparison_has_one_curve_over_labels_for_runs_that_differ_in_nothing_else():
    with folder() as f:
        for seed, n in itertools.product((0, 1), (100, 1000)):
            metrics = {'labels': n, 'accuracy': n / 10_000 + seed / 100}
            made(f / f'few-labels={n}-seed={seed}', 'classify', metrics, labels=n, seed=seed,
                 encoder=f'runs/simclr-seed={seed}')
        made(f / 'other', 'classify', {'labels': 100, 'accuracy': 0.5}, labels=100)
        made(f / 'vae', 'vae', {'mse': 0.1}, [{'epoch': 1, 'val_loss': 2.0}, {'epoch': 2}])
        there = sorted(f.iterdir())
        rows = report.compare(there, f / 'report.html')
        page = content(f / 'report.html')
        assert page['table'] == rows and len(page['table']) == 1 + 2 + 2
        assert page['accuracy'].keys() == {'few', 'other'}
        assert close(page['accuracy']['few'], [[100, 0.015], [1000, 0.105]])
        assert page['losses']['vae'] == {'vae': [[1, 2.0], [2, None]]}
        assert page['links'][0] == [[s, f'few-labels=100-seed={s}'] for s in (0, 1)]


def browsed(path):
    """The page as a browser shows it."""
    browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not browser:
        raise unittest.SkipTest('no chromium here')
    words = ['--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=5000', '--dump-dom']
    done = subprocess.run([browser, *words, path.as_uri()], capture_output=True, text=True, timeout=100)
    return done.stdout


def test_a_browser_draws_the_pages():
    with folder() as f:
        page, many = (browsed(path).split('<main>')[1].split('</main>')[0] for path in evil_pages(f))
    assert re.findall('<h2>(.*?)</h2>', page) == [
        'What was run', 'Training', 'Features in two dimensions', 'Confusion and F1 of the classifier',
        'Most confidently wrong', 'Clusters', 'Labels paid for']
    assert '<script' not in page and '&lt;script&gt;alert(1)' in page
    assert re.findall('<td style="background[^>]*>(.*?)</td>', page) == ['2', '1', '2', '1']
    assert page.count('class="dots"') == 4 and '50 (25 to 75)' in page
    loss = page.split('<h3>Loss')[1]
    assert re.findall('<td>(.*?)</td>', loss)[:6] == ['1', '2', '1', '2', '1', '0.5']
    ticks = re.findall('<text class="end" x="49"[^>]*>(.*?)</text>', loss.split('</svg>')[0])
    assert ticks == ['0.5', '1', '1.5', '2']
    assert 'href="a%20%3Cb%3E%20%22c%22%20%231/report.html"' in many
    assert 'data-head="accuracy">50.0%</td>' in many
    assert re.findall('<h3>(.*?)</h3>', many) == ['Accuracy on the test set', 'Validation loss, classify']


def test_tensorboard_gets_what_the_page_has_or_says_how_to_get_it():
    for missing in 'PIL', 'torch.utils.tensorboard':
        with mock.patch.dict(sys.modules, {missing: None}), raises(ValueError, 'pip install tensorboard'):
            report.tensorboard_writer()
    try:
        report.tensorboard_writer()
    except ValueError as e:
        raise unittest.SkipTest(str(e)) from None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    shown = {'x': shades(4)[0], 'y': torch.tensor([0, 1, 1, 0]), 'h': randn(4, 3)}
    with folder() as f:
        there = made(f / 'a', 'vae', None, [{'epoch': 1, 'loss': 3.0}])
        report.write_png(there / 'samples.png', np.zeros((8, 9), np.uint8))
        for mse in 0.5, 0.25:                                            # the second replaces the first
            metrics = {'epochs': 2, 'mse': mse, 'left_out': []}
            report.write_tensorboard(there, metrics, shown, ['cat', 'dog'], 0)
        events = EventAccumulator(str(there / 'tensorboard')).Reload()
        assert [(e.step, e.value) for e in events.Scalars('training/loss')] == [(1, 3.0)]
        assert [(e.step, e.value) for e in events.Scalars('measured/mse')] == [(2, 0.25)]
        assert [(e.width, e.height) for e in events.Images('samples')] == [(9, 8)]
        names = (there / 'tensorboard/00000/default/metadata.tsv').read_text().split()
        assert names == ['cat', 'dog', 'dog', 'cat']
