from helpers import (HERE, UNLABELLED, arrays, assert_same_run, close, finished, flat, folder, images, measured, posix, python, rand, randn, refused, run, tiny, write_npz)
import contextlib
import csv
import http.client
import itertools
import json
import os
import signal
import threading
import time
import urllib.parse
from unittest import mock

import numpy as np
import torch

import augment
import labels
import nets
import oracle
import query
import runs
from device import generator

y_train = arrays()['y_train']


def bought(there):
    """(ids, labels) that a run paid for."""
    digest = runs.read_config(there)['data']['digest']
    found = labels.LabelDatabase(there / 'labels.sqlite', None, 0, digest).labels_of_round()
    return [t.tolist() for t in found]


def without_width(method, *more):
    """Flags of a run that starts from an --encoder, whose width it has."""
    return [word for word in tiny(method, *more) if word not in ('--width', 0.1)]


# ----------------------------------------------------------------------------------------- learning

def test_mixup_is_the_loss_of_mixed_images_weighed_by_their_shares():
    torch.manual_seed(0)
    model = nets.Classifier(nets.Encoder('fc', (1, 8, 8), 0.1), 3).eval()
    x, y, off = rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]), augment.Views(1, False, 0, 0)
    with mock.patch.object(augment, 'augment', lambda x, views, g: x):
        g = generator('cpu', 1)
        share = float(np.random.default_rng(g.initial_seed()).beta(0.4, 0.4))
        other = torch.randperm(6, generator=generator('cpu', 1))
        loss, _ = query.classification(model, x, y, g, off, 0.4)
        log_p = model(share * x + (1 - share) * x[other]).log_softmax(1)
        wanted = -sum(share * log_p[i, y[i]] + (1 - share) * log_p[i, y[other[i]]] for i in range(6)) / 6
        assert close(loss, wanted)


def test_consistency_learns_from_images_the_teacher_is_sure_of_and_from_no_other():
    torch.manual_seed(0)
    model = nets.MeanTeacher(nets.Classifier(nets.Encoder('fc', (1, 8, 8)), 3)).train()
    for p in model.teacher.head.parameters():
        p.data *= 50
    x, views = rand(8, 1, 8, 8, seed=1), augment.Views(1, False, 0, 0)
    x_labelled, y = (randn(5, 1, 8, 8, seed=2).sigmoid() * 255).byte(), torch.tensor([0, 1, 2, 0, 1])

    def value(threshold):
        loss, parts = query.consistency(model, x, generator('cpu', 0), (x_labelled, y), views, threshold)
        return loss.item(), parts['accepted'].item()
    ids = torch.randint(5, (2,), generator=generator('cpu', 0))
    supervised = torch.nn.functional.cross_entropy(model.student(x_labelled[ids].float() / 255), y[ids]).item()
    assert close(value(1.0)[0], supervised) and value(1.0)[1] == 0
    with mock.patch.object(augment, 'augment', lambda x, views, g: x):
        loss, accepted = value(0.0)
    guess = model.teacher(x).argmax(1)
    assert close(loss, supervised + torch.nn.functional.cross_entropy(model.student(x), guess).item())
    assert accepted == 1


def test_labels_that_were_not_paid_for_change_nothing_of_a_classifier():
    picks = ('classify', 'random'), ('classify', 'coverage'), ('query', 'random'), ('query', 'informative')
    with folder() as cwd:
        for method, pick in picks:
            write_npz(cwd / 'tiny.npz')
            flags = tiny(method, '--pick', pick, '--overwrite')
            assert run(*flags, '--name', 'honest', cwd=cwd)[0] == 0
            ids, _ = bought(cwd / 'runs/honest')
            others = np.setdiff1d(np.arange(120), ids)
            changed = arrays()
            changed['y_train'][others] = changed['y_train'][others[::-1]]
            assert len(set(ids)) == 15 and (changed['y_train'] != y_train).any()
            write_npz(cwd / 'tiny.npz', **changed)
            assert run(*flags, '--name', 'other', cwd=cwd)[0] == 0
            assert_same_run(cwd / 'runs/honest', cwd / 'runs/other')


def test_no_label_is_bought_where_there_is_none():
    labelled = np.sort(np.random.default_rng(1).permutation(120)[:40])
    some = arrays()
    some['y_train'] = np.where(np.isin(np.arange(120), labelled), some['y_train'], -1)
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', **some)
        for method, pick in ('classify', 'random'), ('classify', 'coverage'), ('query', 'informative'):
            code, _, err = run(*tiny(method), '--pick', pick, '--overwrite', cwd=cwd)
            assert code == 0, err
            ids, y = bought(cwd / 'runs' / method)
            assert len(ids) == 15 and set(ids) <= set(labelled.tolist()) and y == y_train[ids].tolist()
        refused(*tiny('classify'), '--labels', 41, '--name', 'x', cwd=cwd, said=['40'])
        refused(*tiny('query'), '--budget', 41, '--name', 'x', cwd=cwd, said=['40'])


def test_a_classifier_starts_from_any_encoder_and_a_frozen_one_keeps_every_bit():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        flags = without_width('classify', '--epochs', 1, '--overwrite')
        for method, more in itertools.product([*UNLABELLED, 'random', 'cluster'], ([], ['--freeze'])):
            code, _, err = run(*flags, '--encoder', finished(method), *more, cwd=cwd)
            assert code == 0 and not err, (method, err)
            before, after = (nets.encoder_of(runs.open_run(there).model).state_dict()
                             for there in (finished(method), cwd / 'runs/classify'))
            assert (dict(flat(before)) == dict(flat(after))) == bool(more), method
        code, out, err = run('--method', 'classify', '--name', 'classify', '--resume', cwd=cwd)
        assert code == 0 and 'already finished' in out, err


def test_what_can_not_start_is_one_line_and_leaves_no_run():
    encoder = ['--encoder', finished('simclr')]
    web, names = ['--oracle', 'web'], ['--classes', ','.join(map(str, range(16)))]
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        write_npz(cwd / 'other.npz', **arrays(H=8))
        write_npz(cwd / 'bare.npz', x_train=arrays()['x_train'])
        other, bare = ['--data', 'other.npz'], ['--data', 'bare.npz']
        for flags, more, said in (
                (without_width('classify'), ['--labels', 121], '121'),
                (without_width('classify'), ['--labels', 2], 'classes'),
                (without_width('classify'), ['--labels', 30.7], '30.7'),
                (without_width('classify'), ['--encoder', 'runs/none'], 'runs/none'),
                (without_width('classify'), ['--encoder', finished('pca')], 'no encoder'),
                (without_width('classify'), [*encoder, *other], '(1, 8, 12)'),
                (without_width('classify'), [*encoder, '--net', 'fc'], '--net'),
                (without_width('query'), [*encoder, *other], '(1, 8, 12)'),
                (tiny('classify'), bare, 'y_train'),
                (tiny('query'), bare, 'y_train'),
                (tiny('query'), ['--budget', 121], '120'),
                (tiny('query'), ['--budget', 2], 'classes'),
                (tiny('query'), ['--rounds', 16], '15'),
                (tiny('query'), ['--oracle', 'file'], '--answers'),
                (tiny('query'), ['--answers', 'a.csv'], '--oracle file'),
                (tiny('query'), ['--classes', 'a,b'], '3'),
                (tiny('query'), ['--classes', 'a,b,a'], 'different'),
                (tiny('query'), [*web, *bare], '--classes'),
                (tiny('query'), [*web, *bare, '--classes', 'one'], 'two classes'),
                (tiny('query'), [*web, *bare, *names], 'budget'),
                (tiny('query'), [*web, '--search', 2, '--over', 'lr=1e-4:1e-2'], '--oracle web')):
            refused(*flags, *more, cwd=cwd, said=[said])
        assert not list((cwd / 'runs').glob('*'))


def test_lost_labels_are_one_sentence():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        for method in 'classify', 'query':
            assert run(*tiny(method), cwd=cwd)[0] == 0
            (cwd / f'runs/{method}/labels.sqlite').unlink()
            refused('--evaluate', f'runs/{method}', cwd=cwd, said=[f'runs/{method}/labels.sqlite'])
            assert not (cwd / f'runs/{method}/labels.sqlite').exists()
        (cwd / 'runs/query/metrics.json').unlink()
        refused(*tiny('query'), '--resume', cwd=cwd, said=['lost its labels', '--overwrite'])


# ----------------------------------------------------------------------------------------- a person

def ask(address, path, body=None):
    """(status, JSON) of a request to the labelling page; with a body, a POST."""
    url = urllib.parse.urlparse(address)
    connection = http.client.HTTPConnection(url.netloc, timeout=20)
    with contextlib.closing(connection):
        blob = body and json.dumps(body)
        connection.request('POST' if body else 'GET', url.path + path, blob)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())


@contextlib.contextmanager
def person(y, skips=(), patience=10 ** 9, how=None):
    """Someone on the page who answers with y, and `skips` with can't tell; after `patience` answers the program gets
    the signal `how`. Yields the list of what was asked."""
    collect, seen = oracle.Web.collect, []

    def someone(address):
        while True:
            status, news = ask(address, 'state')
            i = news.get('question')
            if i is None:
                if news.get('waiting') is False or over.is_set():
                    return
                time.sleep(0.001)
                continue
            if len(seen) == patience:
                os.kill(os.getpid(), how)
                return
            seen.append(i)
            assert ask(address, 'answer', {'id': i, 'label': None if i in skips else int(y[i])})[0] == 200
    over = threading.Event()

    def answering(web, *given):
        over.clear()
        thread = threading.Thread(target=someone, args=(web.address,))
        thread.start()
        try:
            return collect(web, *given)
        finally:
            over.set()
            thread.join()
    with mock.patch.object(oracle.Web, 'collect', answering):
        yield seen


def test_a_person_who_answers_as_y_train_does_gets_the_same_run_however_often_it_is_stopped():
    posix()
    for how, patience in (None, 99), (signal.SIGTERM, 3), (signal.SIGINT, 4):
        with folder() as cwd:
            write_npz(cwd / 'tiny.npz', **{**arrays(), 'y_train': (y_train + 1) % 3})     # which it never looks at
            everything, codes = [], []
            while 0 not in codes and len(codes) < 20:
                with person(y_train, patience=patience, how=how) as seen:
                    code, out, err = run(*tiny('query'), '--oracle', 'web', '--resume', cwd=cwd)
                codes.append(code)
                assert code in (0, 130) and (code == 0 or '--resume to continue' in out + err), err
                everything += seen
            assert len(everything) == len(set(everything)) == 15, codes        # nothing was asked twice
            there = cwd / 'runs/query'
            assert_same_run(there, finished('query'))
            for name in 'predictions.csv', 'labels.csv':
                assert (there / name).read_text() == (finished('query') / name).read_text()


def test_a_real_process_killed_while_a_person_answers_keeps_every_answer():
    posix()
    with folder() as cwd, contextlib.ExitStack() as ended:
        write_npz(cwd / 'tiny.npz', x_train=arrays()['x_train'])
        words = [HERE / 'ssl.py', *tiny('query'), '--oracle', 'web', '--classes', 'a,b,c', '--resume']

        def started():
            process = python(*words, cwd=cwd)
            ended.callback(process.kill)                      # whatever fails below
            line = next(line for line in process.stdout if 'http' in line)
            return process, line, line.split()[-1]

        def answered(address):
            while (i := ask(address, 'state')[1]['question']) is None:
                time.sleep(0.01)
            assert ask(address, 'answer', {'id': i, 'label': i % 3})[0] == 200
            return i
        process, line, address = started()
        assert '7' in line.split() and address.startswith('http://127.0.0.1:')
        ids = [answered(address) for _ in range(3)]
        process.kill()
        process.communicate(timeout=60)
        assert bought(cwd / 'runs/query') == [ids, [i % 3 for i in ids]]
        process, line, again = started()
        assert '4' in line.split() and again != address and answered(again) not in ids
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and '--resume to continue' in out + err, (process.returncode, out, err)
        assert len(bought(cwd / 'runs/query')[0]) == 4


def test_what_is_skipped_is_never_asked_again_and_costs_nothing():
    skips = set(range(0, 120, 2))
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', x_train=arrays()['x_train'])
        for pick in 'informative', 'random':
            flags = tiny('query', '--oracle', 'web', '--classes', 'a,b,c', '--pick', pick, '--overwrite')
            with person(y_train, skips) as seen:
                code, out, err = run(*flags, '--rounds', 5, cwd=cwd)
            assert code == 0 and not err, err
            assert len(seen) == len(set(seen)) and set(seen) & skips and 'skipped' in out
            there = cwd / 'runs/query'
            ids, y = bought(there)
            assert set(ids) == set(seen) - skips and len(ids) <= 15 and y == y_train[ids].tolist()
            table = list(csv.DictReader((there / 'predictions.csv').open()))
            assert [row['id'] for row in table] == [str(i) for i in range(120)]
            assert {int(row['id']) for row in table if row['given'] == '1'} == set(ids)
            assert all(row['class'] == 'abc'[int(row['label'])] for row in table)
            assert all(int(table[i]['label']) == y_train[i] and table[i]['confidence'] == '1.0000' for i in ids)
            given = list(csv.DictReader((there / 'labels.csv').open()))
            assert [(int(row['id']), row['class']) for row in given] == [(i, 'abc'[k]) for i, k in zip(ids, y)]
        with person(y_train, skips=range(120)) as seen:       # who can't tell any
            code, _, err = run(*flags, '--rounds', 5, cwd=cwd)
        assert code == 2 and 'every image was skipped' in err and sorted(seen) == list(range(120))


def test_answers_from_a_file_make_the_same_run_and_what_is_missing_is_written_down():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', **{key: v for key, v in arrays().items() if key != 'y_train'})
        there, answers = cwd / 'runs/query', cwd / 'a.csv'
        names = 'cat', 'dog', 'other'
        flags = tiny('query', '--oracle', 'file', '--answers', 'a.csv', '--classes', ','.join(names), '--resume')
        answers.write_text('id,label\n')
        for n in 7, 8:
            code, out, err = run(*flags, cwd=cwd)
            assert code == 130 and not err and str(n) in out and '--resume' in out, err
            rows = list(csv.DictReader((there / 'wanted.csv').open()))
            ids = [int(row['id']) for row in rows]
            assert len(ids) == n and (there / 'wanted.png').exists()
            with answers.open('a') as f:
                f.write(''.join(f'{i},{names[y_train[i]]}\n' for i in ids[1:]) + f'{ids[0]},\n')
            code, out, _ = run(*flags, cwd=cwd)               # an empty cell is no answer yet
            assert code == 130
            assert [int(row['id']) for row in csv.DictReader((there / 'wanted.csv').open())] == ids[:1]
            with answers.open('a') as f:
                f.write(f'{ids[0]},{y_train[ids[0]]}\n')
        code, _, err = run(*flags, cwd=cwd)
        assert code == 0 and not err, err
        assert_same_run(there, finished('query'))
        assert not list(there.glob('wanted.*'))


def test_classify_learns_from_a_file_of_labels_and_from_the_labels_csv_of_another_run():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', **{key: v for key, v in arrays().items() if key != 'y_train'})
        there = finished('query')
        for file in there / 'labels.csv', there / 'predictions.csv':
            code, _, err = run(*[w for w in tiny('classify') if w not in ('--labels', 15)], '--oracle', 'file',
                               '--answers', file, '--classes', '0,1,2', '--overwrite', cwd=cwd)
            assert code == 0 and not err, err
            ids, y = bought(cwd / 'runs/classify')
            rows = list(csv.DictReader(file.open()))
            assert sorted(ids) == sorted(int(row['id']) for row in rows)
            assert {i: str(k) for i, k in zip(ids, y)} == {int(row['id']): row['class'] for row in rows}


# ------------------------------------------------------------------------------- the estimated accuracy

def test_queries_stop_when_the_estimate_says_so_with_enough_random_answers_and_its_interval_is_told():
    with folder() as cwd:
        x, y = images(400)
        write_npz(cwd / 'tiny.npz', x_train=x, y_train=y)
        flags = tiny('query', '--rounds', 8, '--decay-epochs', 1)
        code, out, err = run(*flags, '--budget', 320, '--until', 0.2, cwd=cwd)
        assert code == 0 and not err
        there = cwd / 'runs/query'
        m, ids = measured(there), bought(there)[0]
        digest = runs.read_config(there)['data']['digest']
        *asked, (last, estimate) = labels.LabelDatabase(there / 'labels.sqlite', None, 0, digest).rounds().values()
        assert last == 0 and len(ids) == m['labels'] == 40 * len(asked) < 320
        assert estimate.low >= 0.2 and all(e is None or e.low < 0.2 for _, e in asked)
        assert (m['estimate'], m['estimate_low'], m['estimate_high']) == estimate[:3] and m['audits'] >= 12
        assert m['estimate_low'] <= m['estimate'] <= m['estimate_high'] and 'accuracy' not in m
        low, high = 100 * m['estimate_low'], 100 * m['estimate_high']
        shown = [text for text in (out, (there / 'report.html').read_text()) if f'{low:.1f}' in text]
        assert len(shown) == 2 and all(f'{high:.1f}' in text for text in shown)
        few = ['--budget', 24, '--audit', 0.25, '--name', 'few']
        code, out, err = run(*flags, *few, cwd=cwd)
        assert code == 0 and 'too few' in out and 'accuracy 1' not in out, out


def test_without_a_test_set_a_classifier_says_what_it_wants_and_the_page_of_one_class_is_refused():
    with folder() as cwd:
        x, y = images(60)
        write_npz(cwd / 'tiny.npz', x_train=x, y_train=y)
        for method in 'classify', 'query':
            code, out, err = run(*tiny(method), cwd=cwd)
            assert code == 0 and ('x_test' in out or 'hold-out' in out), out
        write_npz(cwd / 'tiny.npz', x_train=x, y_train=y * 0)
        for method in 'classify', 'query':
            refused(*tiny(method), '--name', 'x', cwd=cwd, said=['two classes'])


def test_file_names_are_carried_to_the_end():
    try:
        from PIL import Image
    except ImportError:
        import unittest
        raise unittest.SkipTest('Pillow reads image files') from None
    x, y = images(60, 16, 16, C=3)
    with folder() as cwd:
        for i, (image, k) in enumerate(zip(x, y)):
            path = cwd / 'photos' / 'abc'[k] / f'photo {i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        flags = ['--data', 'photos', '--size', 16]
        assert run(*tiny('random'), *flags, cwd=cwd)[0] == 0
        for method, table in ('query', 'predictions.csv'), ('scan', 'clusters.csv'), ('cluster', 'clusters.csv'):
            more = ['--encoder', 'runs/random'] * (method == 'scan')
            code, _, err = run(*tiny(method), *flags, *more, cwd=cwd)
            assert code == 0, err
            rows = list(csv.DictReader((cwd / 'runs' / method / table).open()))
            wanted = {f'{"abc"[k]}/photo {i}.png' for i, k in enumerate(y)}
            assert {row['file'] for row in rows} == wanted and len(rows) == 60
        right = [row for row in csv.DictReader((cwd / 'runs/query/labels.csv').open())]
        assert len(right) == 15 and all(row['file'].startswith(row['class'] + '/') for row in right)
        code, out, err = run('--predict', 'runs/query', 'photos', cwd=cwd)
        assert code == 0 and {row['file'] for row in csv.DictReader(out.splitlines())} == wanted, err
        code, _, err = run('--export', 'runs/query', 'e.npz', 'photos', cwd=cwd)
        assert code == 0 and set(np.load(cwd / 'e.npz')['names'].tolist()) == wanted, err
