"""Images as PNG, tables as text, report.html of one run and of many, TensorBoard."""
from helpers import close, finished, folder, home, images, modules, rand, randn, raises, run, tiny

import base64
import contextlib
import html
import io
import itertools
import json
import math
import re
import shutil
import statistics
import struct
import subprocess
import sys
import time
import types
import unittest
import zlib
from unittest import mock

import numpy as np
import torch

import labels
import report
import runs


def pixels(blob):
    """Pixels of a PNG, its chunks and their checksums read one by one."""
    assert blob[:8] == b'\x89PNG\r\n\x1a\n'
    chunks, at = {}, 8
    while at < len(blob):
        size, kind = struct.unpack('>I4s', blob[at:at + 8])
        body = blob[at + 8:at + 8 + size]
        assert struct.unpack('>I', blob[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    W, H, depth, color = struct.unpack('>IIBB', chunks[b'IHDR'][:10])
    raw, stride = zlib.decompress(chunks[b'IDAT']), W * (3 if color == 2 else 1)
    assert depth == 8 and list(chunks)[-1] == b'IEND' and len(raw) == H * (stride + 1)
    lines = [list(raw[r * (stride + 1) + 1:(r + 1) * (stride + 1)]) for r in range(H)]
    return np.array(lines, np.uint8).reshape((H, W, 3) if color == 2 else (H, W))


def embedded(address):
    """Pixels of an image that is inside a page."""
    return pixels(base64.b64decode(address.removeprefix('data:image/png;base64,'), validate=True))


def content(path):
    """What a page holds; nothing else in it is a script, and it points nowhere else."""
    page = path.read_text('utf-8')
    assert page.count('<script') == page.count('</script>') == 1 and not re.search(r'@import|url\(|src="http', page)
    return json.loads(re.search('const report = (.*);\n', page)[1])


def made(there, method, metrics, log=(), **args):
    """A run folder as read by compare."""
    there.mkdir(parents=True)
    args = {'method': method, 'seed': 0, **args}
    runs.write_json(there / 'config.json', {'data': {'digest': 'abc'}, 'args': args})
    if metrics is not None:
        runs.write_json(there / 'metrics.json', metrics)
    (there / 'log.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in log))
    return there


def config_of(classes, **args):
    return {'args': {'method': 'classify', 'seed': 0, 'tensorboard': False, **args}, 'command': 'python ssl.py',
            'data': {'name': 'tiny', 'digest': 'abc', 'shape': [1, 8, 8], 'train': 9, 'test': 6, 'classes': classes},
            'versions': {'torch': '2'}, 'machine': {'device': 'cpu', 'threads': 1, 'system': 'here'}}


METRICS = {'method': 'classify', 'accuracy': 0.5, 'labels': 9, 'n': 6, 'split': 'test', 'left_out': [],
           'f1': [0.5, 0.5], 'mean_f1': 0.5, 'confusion': [[2, 1], [2, 1]], 'epochs': 1, 'seconds': 1.0,
           'measuring_seconds': 1.0}


# ------------------------------------------------------------------------------------------- images

def test_png_holds_the_pixels_it_was_given():
    rng = np.random.default_rng(0)
    with folder() as f:
        for shape in (1, 1), (5, 7), (5, 7, 3), (1, 300, 3):
            image = rng.integers(0, 256, shape, np.uint8)
            for given in image, np.asfortranarray(image):
                report.write_png(f / 'x.png', given)
                assert np.array_equal(pixels((f / 'x.png').read_bytes()), image)


def test_sheet_lays_rows_of_images_out_with_gaps():
    for C in 1, 3:
        a, b = rand(3, C, 4, 5), rand(2, C, 4, 5, seed=1) * 3 - 1        # b leaves 0..1 and is clipped
        out = report.sheet(a, b, gap=2, zoom=3)
        assert out.shape[:2] == (3 * (2 * 6 + 2), 3 * (3 * 7 + 2)) and out.dtype == np.uint8
        small = out[::3, ::3]
        assert np.array_equal(small.repeat(3, 0).repeat(3, 1), out)
        wanted = np.full(small.shape, 128)
        for r, row in enumerate((a, b)):
            for i, c, h, w in itertools.product(range(len(row)), range(C), range(4), range(5)):
                at = (2 + 6 * r + h, 2 + 7 * i + w)
                wanted[at if C == 1 else (*at, c)] = round(min(max(row[i, c, h, w].item(), 0), 1) * 255)
        assert np.array_equal(small, wanted)


def test_captions_are_the_numbers_under_enlarged_images():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 9, 40), dtype=np.uint8))
    out = report.captioned(x, torch.tensor([17, 4]))
    assert out.shape == (2, 3, 3 * 9 + 14, 120) and torch.equal(out[:, :, 1:27:3, 2::3], x) and out.dtype == x.dtype
    dots = [''.join('.#'[int(v > 0)] for v in row) for row in out[0, 1, 27:, :20]][2:12:2]
    assert [row[2::2] for row in dots] == ['.#..###..', '##....#..', '.#....#..', '.#....#..', '###...#..']


# ------------------------------------------------------------------------------------------ as text

def test_what_stdout_can_not_encode_becomes_a_question_mark():
    for encoding, shown in ('ascii', '0.5?0.1 ? ?'), ('cp1252', '0.5±0.1 ? ?'), ('utf-8', '0.5±0.1 猫 ?'):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with contextlib.redirect_stdout(out):
            report.say('0.5±0.1 猫 \ud800')
        assert out.buffer.getvalue().decode(encoding).rstrip() == shown


def test_an_estimate_is_told_with_its_interval_or_as_too_few_to_say():
    query = {**METRICS, 'method': 'query', 'estimate': 0.9, 'estimate_low': 0.81, 'estimate_high': 0.958, 'audits': 40}
    told = {name: (value, convention) for name, value, convention in report.measures(query)}
    assert told['estimate'][0] == '90.0% (81.0 to 95.8)' and 'from 40 random answers' in told['estimate'][1]
    assert told['accuracy'][0] == '50.00%' and 'F1' in told and 'estimate' not in report.describe(METRICS)
    few = {**METRICS, 'method': 'query'}
    assert ['too few to say' in line for line in report.describe(few).splitlines() if 'estimate' in line] == [True]
    for metrics, who in (METRICS, 'the classifier'), ({**METRICS, 'probe': 0.5, 'probe_labels': 9, 'probe_l2': 0.1},
                                                      'the linear probe'):
        line, = (line for line in report.describe(metrics).splitlines() if 'F1' in line)
        assert line.endswith(f'of {who}')


def test_compare_gives_mean_and_sample_deviation_over_seeds_and_the_same_seed_twice_is_no_spread():
    knn = [0.5, 0.7, 0.9]
    with folder() as f:
        there = [made(f / f'b-seed={s}', 'simclr', {'knn': k, 'epochs': 7, 'seconds': 10 * s, 'mse': None}, seed=s)
                 for s, k in enumerate(knn)]
        there += [made(f / 'again', 'simclr', {'knn': 0.1}, seed=1), made(f / 'a', 'simclr', None, temperature=0.2)]
        head, *lines = report.compare(there)
        rows = {line[0]: dict(zip(head, line)) for line in lines}
        assert rows.keys() == {'b', 'again', 'a'} and 'MSE' not in head
        std = math.sqrt(sum((k - 0.7) ** 2 for k in knn) / 2)
        assert close(std, statistics.stdev(knn))
        assert rows['b'] == {'run': 'b', 'seeds': '3', 'kNN': f'70.0%±{100 * std:.1f}', 'epochs': '7', 'seconds': '10'}
        assert rows['again']['kNN'] == '10.0%' and rows['a']['seeds'] == '0' and rows['a']['kNN'] == '-'
        shown = report.table([head, *lines]).splitlines()
        assert len({len(line) for line in shown}) == 1 and shown[1].startswith('b     ')
        bounds = {'method': 'query', 'estimate': 0.8, 'estimate_low': 0.5, 'estimate_high': 0.9, 'accuracy': 0.7}
        others = {**bounds, 'estimate': 0.9, 'estimate_low': 0.7, 'estimate_high': 1.0}
        there = [made(f / f'q-seed={s}', 'query', m, seed=s) for s, m in enumerate((bounds, others))]
        head, row = report.compare(there)
        assert row[head.index('estimate')] == '85.0% (60.0 to 95.0)' and row[head.index('accuracy')] == '70.0%±0.0'


def test_a_run_that_can_not_be_read_is_named_and_the_others_are_shown():
    with folder() as f:
        good, out = made(f / 'good', 'ae', {'mse': 0.1}), io.StringIO()
        torn, bad = made(f / 'torn', 'ae', {}), made(f / 'bad', 'ae', {'mse': 0.2})
        (torn / 'metrics.json').write_text('{"ms')
        (bad / 'config.json').write_text('[]')
        with contextlib.redirect_stdout(out):
            lines = report.compare([torn, good, bad, f / 'none'])
        assert [line[0] for line in lines] == ['run', 'good']
        assert [[name in line for name in ('torn', 'bad', 'none')] for line in out.getvalue().splitlines()] == [
            [True, False, False], [False, True, False], [False, False, True]]
        report.write_comparison(f / 'report.html', [torn, good])
        assert len(content(f / 'report.html')['errors']) == 1
        with raises(ValueError, 'torn'):
            report.compare([torn])
        with raises(ValueError, f'did you mean {f / "good"}?'):
            report.compare([f / 'goood'])


# -------------------------------------------------------------------------------------------- pages

def test_the_page_of_each_method_holds_what_it_has_to_show():
    pngs = {'ae': ['reconstructions'], 'vae': ['reconstructions', 'samples', 'interpolation'], 'simclr': ['views']}
    extra = {'classify': {'labels', 'wrong'}, 'query': {'labels', 'wrong'}, 'scan': {'clusters'}}
    for method in 'pixels', 'ae', 'vae', 'simclr', 'classify', 'query', 'scan':
        there = finished(method)
        page = content(there / 'report.html')
        assert page['metrics'] == runs.read_json(there / 'metrics.json') and page['log'] == runs.read_log(there)
        assert page['config']['args'] == runs.read_config(there)['args'] and list(page['pngs']) == pngs.get(method, [])
        assert page.keys() & {'labels', 'wrong', 'clusters'} == extra.get(method, {'clusters', 'wrong'})
        for stem, address in page['pngs'].items():
            assert np.array_equal(embedded(address), pixels((there / f'{stem}.png').read_bytes()))
        assert len(page['maps']['pca']) == len(page['maps']['tsne']) == len(page['maps']['kinds']) == 40
    paid = content(finished('query') / 'report.html')['labels']
    assert sum(paid['counts']) == 15


def test_a_page_without_labels_has_a_map_in_one_colour_and_no_scores():
    with folder() as f:
        shown = {'x': torch.zeros(30, 3, 8, 8, dtype=torch.uint8), 'h': randn(30, 4)}
        metrics = {'method': 'pixels', 'left_out': ['knn'], 'epochs': None, 'seconds': 0.0, 'measuring_seconds': 0.1}
        report.write_report(f, config_of(['a'], method='pixels'), metrics, shown)
        page = content(f / 'report.html')
        assert 'kinds' not in page['maps'] and not page['measures'] and 'clusters' not in page
        few = {**shown, 'h': shown['h'][:3]}
        report.write_report(f, config_of(['a'], method='pixels'), metrics, few)
        assert content(f / 'report.html')['maps'] is None


def test_maps_show_the_components_and_the_class_of_each_image():
    h, y = randn(60, 6) * torch.arange(1, 7), torch.arange(60) % 3
    maps = report.feature_maps({'h': h, 'y': y, 'probs': torch.eye(3)[0].expand(60, 3)}, ['a', 'b', 'c'], seed=0)
    U, S, _ = np.linalg.svd((h - h.mean(0)).double().numpy(), full_matrices=False)
    assert close(np.abs(maps['pca']), np.abs(U * S)[:, :2], 1e-3) and maps['kinds'] == y.tolist()
    assert close(maps['variance'], (S ** 2 / (S ** 2).sum())[:2], 1e-4) and maps['by'] == 'class'
    maps = report.feature_maps({'h': h, 'probs': torch.eye(3)[y]}, ['a', 'b', 'c'], seed=0, most=20)
    assert maps['by'] == 'predicted class' and len(maps['kinds']) == len(maps['tsne']) == 20


def test_the_most_wrong_are_the_most_confident_of_the_wrong_and_members_belong_to_their_cluster():
    x = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 8, 8) * 40
    y = torch.tensor([0, 0, 1, 1, 0, 1])
    confidence = torch.tensor([0.9, 0.6, 0.8, 0.7, 0.95, 0.55])
    pred = torch.tensor([1, 1, 0, 1, 0, 0])                              # wrong: 0, 1, 2 and 5
    probs = torch.where(torch.eye(2)[pred] > 0, confidence[:, None], 1 - confidence[:, None])
    found = report.most_wrong({'x': x, 'y': y, 'probs': probs}, ['a', 'b'], n=3)
    assert [caption for _, caption in found] == ['a, predicted b, 90.0%', 'b, predicted a, 80.0%',
                                                 'a, predicted b, 60.0%']
    assert [embedded(address)[4, 4] for address, _ in found] == [0, 80, 40]
    shown = {'x': x, 'y': y, 'h': randn(6, 2), 'clusters': torch.tensor([0, 0, 0, 1, 1, 1]), 'mapping': {0: 1},
             'centres': randn(3, 2)}
    first, second, empty = report.clusters(shown, ['a', 'b'], seed=0, n=2)
    assert (first['name'], first['size'], second['name'], empty['size']) == ('b', 3, 'no class', 0)
    for cluster, members in (first, {0, 1, 2}), (second, {3, 4, 5}):
        ids = [int(embedded(address)[0, 0]) // 40 for address, _ in cluster['images']]
        assert len(set(ids)) == 2 and set(ids) <= members
        assert [caption for _, caption in cluster['images']] == ['ab'[y[i]] for i in ids]


def test_estimates_stand_at_the_labels_they_came_from_and_skipped_questions_are_none():
    with folder() as f:
        paid = labels.LabelDatabase(f / 'labels.sqlite', None, 100, 'digest')
        some = labels.Estimate(0.5, 0.25, 0.75, 20)
        for r in range(3):
            paid.query(range(4 * r, 4 * r + 4), r, [(0, 0.9, 1, 1)] * 4, some if r else None)
            for i in range(4):
                paid.answer(4 * r + i, i % 2 if i < 3 - r else None, r)  # 3, 2 and 1 of four
        x = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 8, 8)
        rows = paid.history()
        found = report.paid_labels(x[[row[0] for row in rows]], rows, paid.rounds(), ['a', 'b'])
        assert found['estimates'] == [(3, *some[:3]), (5, *some[:3])] and found['counts'] == [4, 2]
        assert [(embedded(address)[0, 0], caption) for address, caption in found['other']] == [
            (1, 'b, predicted a'), (5, 'b, predicted a')]


EVIL = '<script>alert(1)</script>&"\'</title>\x00\ud800]]> CONTENT <!--'


def evil_pages(f):
    """report.html of a run and of many whose names are all hostile."""
    probs, x = torch.eye(2)[[1, 0] * 20], torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    shown = {'x': x, 'y': torch.arange(40) % 2, 'h': randn(40, 4), 'probs': probs, 'clusters': torch.arange(40) % 2,
             'centres': randn(2, 4), 'mapping': {0: 1}, 'asked': (x[:2], [(0, 1, 0, None), (1, 0, 1, 1)], {
                 1: (2, labels.Estimate(0.5, 0.25, 0.75, 20))})}
    there = made(f / 'a <b> "c" #1', 'classify', METRICS, [{'epoch': e, 'loss': 2 / e, 'val_loss': 1 / e} for e in (1, 2)])
    config = config_of([EVIL, 'b'])
    config['command'] = config['data']['name'] = config['args'][EVIL] = config['versions'][EVIL] = EVIL
    report.write_report(there, config, METRICS, shown)
    report.write_comparison(f / 'report.html', [there])
    return there / 'report.html', f / 'report.html'


def test_hostile_names_are_text_and_nothing_else():
    with folder() as f:
        page, many = map(content, evil_pages(f))
        assert page['config']['command'] == EVIL and page['labels']['other'][0][1] == f'{EVIL}, predicted b'
        assert many['links'] == [[[0, 'a <b> "c" #1']]]


def test_comparison_has_one_curve_over_labels_for_runs_that_differ_in_nothing_else():
    with folder() as f:
        for seed, n, encoder in itertools.product((0, 1), (100, 1000), (None, 'simclr')):
            name = f'classify{f"-encoder={encoder}" if encoder else ""}-labels={n}-seed={seed}'
            accuracy = n / 10_000 + seed / 100 + (0.1 if encoder else 0)
            made(f / 'runs' / name, 'classify', {'labels': n, 'accuracy': accuracy}, labels=n, seed=seed,
                 encoder=encoder and f'runs/{encoder}-seed={seed}')
        log = [{'epoch': 1, 'loss': 3.0, 'val_loss': 2.0}, {'epoch': 2, 'loss': 2.0}]
        made(f / 'runs' / 'vae', 'vae', {'mse': 0.1}, log)
        there = sorted((f / 'runs').iterdir())
        report.write_comparison(f / 'runs' / 'report.html', there)
        page = content(f / 'runs' / 'report.html')
        assert page['table'] == report.compare(there) and len(page['table']) == 1 + 4 + 1
        assert close([page['accuracy'][name] for name in ('classify', 'classify-encoder=simclr')], [
            [[100, 0.015], [1000, 0.105]], [[100, 0.115], [1000, 0.205]]])
        assert page['losses']['vae'] == {'vae': [[1, 2.0], [2, None]]}
        assert [[seed for seed, _ in row] for row in page['links']] == [[0, 1]] * 4 + [[0]]
        assert all((f / 'runs' / there / 'config.json').exists() for row in page['links'] for _, there in row)


def browsed(path):
    """The page as a browser shows it."""
    browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not browser:
        raise unittest.SkipTest('no chromium here')
    words = ['--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=5000', '--dump-dom', path.as_uri()]
    return subprocess.run([browser, *words], capture_output=True, text=True, timeout=100).stdout


def test_a_browser_draws_the_pages():
    with folder() as f:
        page, many = map(browsed, evil_pages(f))
    drawn = page[page.index('<main>'):page.index('</main>')]
    assert re.findall('<h2>(.*?)</h2>', drawn) == [
        'What was run', 'Training', 'Features in two dimensions', 'Confusion and F1 of the classifier',
        'Most confidently wrong', 'Clusters', 'Labels paid for']
    assert '<script' not in drawn and html.escape(EVIL[:25], quote=False) in drawn
    assert re.findall('<td style="background[^>]*>(.*?)</td>', drawn) == ['2', '1', '2', '1']
    assert drawn.count('class="dots"') == 4 and '50 (25 to 75)' in drawn
    loss = drawn[drawn.index('<h3>Loss'):]
    assert re.findall('<td>(.*?)</td>', loss)[:6] == ['1', '2', '1', '2', '1', '0.5']
    numbers = [float(v) for v in re.findall('<text class="end" x="49"[^>]*>(.*?)</text>', loss[:loss.index('</svg>')])]
    assert 3 <= len(numbers) <= 8 and 0.4 <= min(numbers) and max(numbers) <= 2.1       # round, within the ends
    assert len({round(b - a, 6) for a, b in itertools.pairwise(numbers)}) == 1
    many = many[many.index('<main>'):many.index('</main>')]
    assert 'href="a%20%3Cb%3E%20%22c%22%20%231/report.html"' in many and 'data-head="accuracy">50.0%</td>' in many
    assert re.findall('<h3>(.*?)</h3>', many) == ['Accuracy on the test set', 'Validation loss, classify']


# ---------------------------------------------------------------------------------- the end of a run

def test_the_end_of_a_run_writes_all_and_says_where():
    x = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    shown = {'x': x, 'y': torch.arange(40) % 2, 'h': randn(40, 4), 'probs': torch.eye(2)[[1, 0] * 20]}
    metrics = {key: METRICS[key] for key in ('accuracy', 'labels', 'left_out', 'f1', 'confusion', 'mean_f1')}
    with folder() as f:
        log = [{'epoch': 3, 'loss': 1.0, 'seconds': 7.5}, {'epoch': 3, 'iteration': 1}]
        there, out = made(f / 'a', 'classify', None, log), io.StringIO()
        ended = types.SimpleNamespace(folder=there, config=config_of(['a', 'b']), write_metrics=mock.Mock())
        with contextlib.redirect_stdout(out):
            report.finish(ended, types.SimpleNamespace(classes=['a', 'b']), metrics, shown, time.monotonic() - 2)
        given, = ended.write_metrics.call_args.args
        assert (given['epochs'], given['seconds'], given['method']) == (3, 7.5, 'classify')
        assert 2 <= given['measuring_seconds'] < 60 and content(there / 'report.html')['metrics'] == given
        assert out.getvalue().splitlines()[-1] == f'-> {there}/report.html'


def test_tensorboard_gets_the_numbers_images_and_features_of_a_run_or_says_how_to_get_it():
    for missing in 'PIL', 'torch_utils_tensorboard':
        with modules(**{missing: None}), raises(ValueError, 'pip install tensorboard pillow'):
            report.tensorboard_writer()
    try:
        report.tensorboard_writer()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except (ValueError, ImportError) as e:
        raise unittest.SkipTest(str(e)) from None
    x, y = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
    shown = {'x': x, 'y': y, 'h': randn(40, 4)}
    with folder() as f:
        there = made(f / 'a', 'vae', None, [{'epoch': 1, 'loss': 3.0}, {'epoch': 2, 'loss': 1.5}])
        image = x[0, 0].numpy()
        report.write_png(there / 'samples.png', image)
        for _ in 1, 2:                                                   # the second replaces the first
            report.write_tensorboard(there, {'epochs': 2, 'mse': 0.25, 'left_out': []}, shown, ['cat', 'dog'], 0)
        events = EventAccumulator(str(there / 'tensorboard'))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars('training/loss')] == [(1, 3.0), (2, 1.5)]
        assert [(e.step, e.value) for e in events.Scalars('measured/mse')] == [(2, 0.25)]
        sent, = events.Images('samples')
        from PIL import Image
        assert np.array_equal(np.array(Image.open(io.BytesIO(sent.encoded_image_string)))[..., 0], image)
        features, = (there / 'tensorboard').rglob('tensors.tsv')
        names, = (there / 'tensorboard').rglob('metadata.tsv')
        found = [list(map(float, line.split('\t'))) for line in features.read_text().splitlines()]
        assert close(found, shown['h'], 1e-4) and names.read_text().split() == ['cat', 'dog'] * 20
