"""Classifiers from few labels: what they learn from, who answers, what it costs, the estimated accuracy."""
from helpers import (HERE, UNLABELLED, arrays, assert_same_run, close, finished, flat, folder, images,
                     measured, ok, place, posix, python, rand, randn, refused, run, tiny, write_npz)
import contextlib
import csv
import http.client
import itertools
import json
import os
import signal
import threading
import time
import unittest
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

Y = arrays()['y_train']
UNLABELLED_DATA = {key: v for key, v in arrays().items() if key != 'y_train'}


def database(there):
    """The labels of a run, to be read."""
    digest = runs.read_config(there)['data']['digest']
    return labels.LabelDatabase(there / 'labels.sqlite', None, 0, digest)


def bought(there):
    """(ids, labels) that a run paid for."""
    return [t.tolist() for t in database(there).labels_of_round()]


def without(word, flags):
    """The flags without one and its value."""
    at = flags.index(word)
    return flags[:at] + flags[at + 2:]


def rows_of(path):
    return list(csv.DictReader(path.open(encoding='utf-8')))


# ----------------------------------------------------------------------------------------- learning

def test_mixup_is_the_loss_of_mixed_images_weighed_by_their_shares():
    torch.manual_seed(0)
    model = nets.Classifier(nets.Encoder('fc', (1, 8, 8), 0.1), 3).eval()
    x, y = rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    with mock.patch.object(augment, 'augment', lambda x, views, g: x):
        g = generator('cpu', 1)
        share = float(np.random.default_rng(g.initial_seed()).beta(0.4, 0.4))
        other = torch.randperm(6, generator=generator('cpu', 1))
        loss, _ = query.classification(model, x, y, g, None, 0.4)
    log_p = model(share * x + (1 - share) * x[other]).log_softmax(1)
    wanted = -sum(share * log_p[i, y[i]] + (1 - share) * log_p[i, y[other[i]]] for i in range(6)) / 6
    assert close(loss, wanted)


def test_consistency_learns_from_images_the_teacher_is_sure_of_and_from_no_other():
    torch.manual_seed(0)
    model = nets.MeanTeacher(nets.Classifier(nets.Encoder('fc', (1, 8, 8)), 3)).train()
    for p in model.teacher.head.parameters():
        p.data *= 50                                          # so that it is sure
    x, views, entropy = rand(8, 1, 8, 8, seed=1), augment.Views(), torch.nn.functional.cross_entropy
    labelled = (255 * randn(5, 1, 8, 8, seed=2).sigmoid()).byte(), torch.tensor([0, 1, 2, 0, 1])

    def value(threshold):
        with mock.patch.object(augment, 'augment', lambda x, views, g: x):
            loss, parts = query.consistency(model, x, generator('cpu', 0), labelled, views, threshold)
        return loss, parts['accepted'].item()
    ids = torch.randint(5, (2,), generator=generator('cpu', 0))
    supervised = entropy(model.student(labelled[0][ids] / 255), labelled[1][ids])
    assert close(value(1.0)[0], supervised) and value(1.0)[1] == 0
    guess = model.teacher(x).argmax(1)
    assert close(value(0.0)[0], supervised + entropy(model.student(x), guess)) and value(0.0)[1] == 1


def test_labels_that_were_not_paid_for_change_nothing_of_a_classifier():
    picks = ('classify', 'random'), ('classify', 'coverage'), ('query', 'random'), ('query', 'informative')
    with folder() as cwd:
        for method, pick in picks:
            write_npz(cwd / 'tiny.npz')
            flags = tiny(method, '--pick', pick, '--overwrite')
            ok(*flags, '--name', 'honest', cwd=cwd)
            ids, _ = bought(cwd / 'runs/honest')
            others, changed = np.setdiff1d(np.arange(120), ids), arrays()
            changed['y_train'][others] = changed['y_train'][others[::-1]]
            assert len(set(ids)) == 15 and (changed['y_train'] != Y).any()
            write_npz(cwd / 'tiny.npz', **changed)
            ok(*flags, '--name', 'other', cwd=cwd)
            assert_same_run(cwd / 'runs/honest', cwd / 'runs/other')


def test_no_label_is_bought_where_there_is_none():
    labelled = np.sort(np.random.default_rng(1).permutation(120)[:40])
    with folder() as cwd:
        some = np.where(np.isin(np.arange(120), labelled), Y, -1)
        write_npz(cwd / 'tiny.npz', **{**arrays(), 'y_train': some})
        for method, pick in ('classify', 'random'), ('classify', 'coverage'), ('query', 'informative'):
            ok(*tiny(method), '--pick', pick, '--overwrite', cwd=cwd)
            ids, y = bought(cwd / 'runs' / method)
            assert len(ids) == 15 and set(ids) <= set(labelled.tolist()) and y == Y[ids].tolist()
        refused(*tiny('classify'), '--labels', 41, '--name', 'x', cwd=cwd, said=['40'])
        refused(*tiny('query'), '--budget', 41, '--name', 'x', cwd=cwd, said=['40'])


def test_a_classifier_starts_from_any_encoder_and_a_frozen_one_keeps_every_bit():
    with place() as cwd, mock.patch.object(query, 'LEAST_EPOCH', 60):
        flags = without('--width', tiny('classify', '--overwrite'))
        for method, more in itertools.product([*UNLABELLED, 'random', 'cluster'], ([], ['--freeze'])):
            ok(*flags, '--encoder', finished(method), *more, cwd=cwd)
            models = [runs.open_run(there).model for there in (finished(method), cwd / 'runs/classify')]
            before, after = (dict(flat(nets.encoder_of(model).state_dict())) for model in models)
            assert (before == after) == bool(more), method
        assert 'already finished' in ok('--method', 'classify', '--name', 'classify', '--resume', cwd=cwd)


REFUSED = {                                                   # method and flags: what the answer says
    'classify --labels 121': '121', 'classify --labels 2': 'classes',
    'classify --labels 20.5': 'whole number',
    'classify --encoder runs/none': 'runs/none', 'classify --encoder PCA': 'no encoder',
    'classify --encoder SIMCLR --data other.npz': '(1, 8, 12)', 'classify --encoder SIMCLR --net fc': '--net',
    'query --encoder SIMCLR --data other.npz': '(1, 8, 12)', 'classify --data bare.npz': 'y_train',
    'query --data bare.npz': 'y_train', 'query --budget 121': '120', 'query --budget 2': 'classes',
    'query --rounds 16': '15', 'query --oracle file': '--answers', 'query --answers a.csv': '--oracle file',
    'query --classes a,b': '3', 'query --classes a,b,a': 'twice',
    'query --oracle web --data bare.npz': 'classes',
    'query --oracle web --data bare.npz --classes one': 'two classes',
    'query --oracle web --search 2 --over lr=1e-4:1e-2': '--oracle'}


def test_what_can_not_start_is_one_line_and_leaves_no_run():
    encoders = {'PCA': finished('pca'), 'SIMCLR': finished('simclr')}
    with place() as cwd:
        write_npz(cwd / 'other.npz', **arrays(H=8))
        write_npz(cwd / 'bare.npz', x_train=arrays()['x_train'])
        for words, said in REFUSED.items():
            method, *more = [encoders.get(word, word) for word in words.split()]
            flags = without('--width', tiny(method)) if '--encoder' in more else tiny(method)
            refused(*flags, *more, cwd=cwd, said=[said])
        assert not list((cwd / 'runs').glob('*'))


def test_lost_labels_are_one_sentence():
    with place() as cwd:
        ok(*tiny('query'), cwd=cwd)
        (cwd / 'runs/query/labels.sqlite').unlink()
        refused('--evaluate', 'runs/query', cwd=cwd, said=['runs/query/labels.sqlite'])
        (cwd / 'runs/query/metrics.json').unlink()
        refused(*tiny('query'), '--resume', cwd=cwd, said=['lost its labels', '--overwrite'])


# ----------------------------------------------------------------------------------------- a person

def ask(address, path, body=None):
    """JSON of a request to the labelling page; with a body, a POST."""
    url = urllib.parse.urlparse(address)
    connection = http.client.HTTPConnection(url.netloc, timeout=20)
    with contextlib.closing(connection):
        connection.request('POST' if body else 'GET', url.path + path, body and json.dumps(body))
        reply = connection.getresponse()
        assert reply.status == 200
        return json.loads(reply.read())


def question(address):
    """The id of the image that the page asks about."""
    while (found := ask(address, 'state')['question']) is None:
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def person(y, skips=(), patience=10 ** 9, how=None):
    """Someone on the page who answers with y, and `skips` with can't tell; after `patience` answers the
    program gets the signal `how`. Yields the list of what was asked."""
    collect, seen = oracle.Web.collect, []

    def answer_all(web, n):
        for _ in range(n):
            if len(seen) == patience:
                return os.kill(os.getpid(), how)
            i = question(web.address)
            seen.append(i)
            ask(web.address, 'answer', {'id': i, 'label': None if i in skips else int(y[i])})

    def collecting(web, round):
        n = len(web.database.unanswered(round))
        thread = threading.Thread(target=answer_all, args=(web, n))
        thread.start()
        try:
            return collect(web, round)
        finally:
            thread.join()
    with mock.patch.object(oracle.Web, 'collect', collecting):
        yield seen


def test_a_person_who_answers_as_y_train_does_gets_the_same_run_however_often_it_is_stopped():
    posix()
    for how, patience in (None, 99), (signal.SIGTERM, 3), (signal.SIGINT, 4):
        with folder() as cwd:
            write_npz(cwd / 'tiny.npz', **{**arrays(), 'y_train': (Y + 1) % 3})      # which it never looks at
            everything, code = [], None
            while code != 0:
                with person(Y, patience=patience, how=how) as seen:
                    code, out, err = run(*tiny('query'), '--oracle', 'web', '--resume', cwd=cwd)
                assert code == 0 or code == 130 and '--resume to continue' in out + err, err
                everything += seen
                assert len(everything) == len(set(everything)) <= 15           # nothing is asked twice
            there = cwd / 'runs/query'
            assert_same_run(there, finished('query'))
            for name in 'predictions.csv', 'labels.csv':
                assert (there / name).read_text() == (finished('query') / name).read_text()


def test_a_real_process_killed_while_a_person_answers_keeps_every_answer():
    posix()
    with place(x_train=arrays()['x_train']) as cwd, contextlib.ExitStack() as ended:
        words = [HERE / 'ssl.py', *tiny('query'), '--oracle', 'web', '--classes', 'a,b,c', '--resume']

        def started():
            process = python(*words, cwd=cwd)
            ended.callback(process.kill)                      # whatever fails below
            line = next(line for line in process.stdout if 'http' in line)
            return process, line.split()

        def answered(address):
            i = question(address)
            ask(address, 'answer', {'id': i, 'label': i % 3})
            return i
        process, line = started()
        assert '7' in line and line[-1].startswith('http://127.0.0.1:')
        ids = [answered(line[-1]) for _ in range(3)]
        process.kill()
        process.communicate(timeout=60)
        assert bought(cwd / 'runs/query') == [ids, [i % 3 for i in ids]]
        process, again = started()
        assert '4' in again and again[-1] != line[-1] and answered(again[-1]) not in ids
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and '--resume to continue' in out + err, (process.returncode, err)
        assert len(bought(cwd / 'runs/query')[0]) == 4


def test_what_is_skipped_is_never_asked_again_and_costs_nothing():
    skips = set(range(0, 120, 2))
    with place(x_train=arrays()['x_train']) as cwd:
        flags = tiny('query', '--oracle', 'web', '--classes', 'a,b,c', '--overwrite', '--rounds', 5)
        for pick in 'informative', 'random':
            with person(Y, skips) as seen:
                assert 'skipped' in ok(*flags, '--pick', pick, cwd=cwd)
            assert len(seen) == len(set(seen)) and set(seen) & skips
            ids, y = bought(cwd / 'runs/query')
            assert set(ids) == set(seen) - skips and len(ids) <= 15 and y == Y[ids].tolist()
            table = rows_of(cwd / 'runs/query/predictions.csv')
            assert {int(row['id']) for row in table if row['given'] == '1'} == set(ids) and len(table) == 120
            assert all(table[i]['class'] == 'abc'[Y[i]] and table[i]['confidence'] == '1.0000' for i in ids)
        with person(Y, skips=range(120)) as seen:             # who can't tell any
            refused(*flags, cwd=cwd, said=['every image was skipped'])
        assert sorted(seen) == list(range(120))


def test_answers_from_a_file_make_the_same_run_and_what_is_missing_is_written_down():
    names = 'cat', 'dog', 'other'
    with place(**UNLABELLED_DATA) as cwd:
        there = cwd / 'runs/query'
        flags = tiny('query', '--oracle', 'file', '--answers', 'a.csv', '--resume')
        flags += ['--classes', ','.join(names)]

        def missing():
            """Ids of wanted.csv after the program has looked for answers."""
            code, out, err = run(*flags, cwd=cwd)
            assert code == 130 and not err and '--resume' in out and (there / 'wanted.png').exists(), err
            return [int(row['id']) for row in rows_of(there / 'wanted.csv')]
        for n in 7, 8:
            first, *others = missing()
            assert len(others) == n - 1
            with (cwd / 'a.csv').open('a') as answers:
                answers.write(''.join(f'{i},{names[Y[i]]}\n' for i in others) + f'{first},\n')
            assert missing() == [first]                       # an empty cell is no answer yet
            with (cwd / 'a.csv').open('a') as answers:
                answers.write(f'{first},{Y[first]}\n')
        ok(*flags, cwd=cwd)
        assert not list(there.glob('wanted.*'))
        assert_same_run(there, finished('query'))


def test_classify_learns_from_a_file_of_labels_as_another_run_leaves_it():
    with place(**UNLABELLED_DATA) as cwd:
        for name in 'labels.csv', 'predictions.csv':
            file = finished('query') / name
            flags = without('--labels', tiny('classify', '--overwrite'))
            ok(*flags, '--oracle', 'file', '--answers', file, '--classes', '0,1,2', cwd=cwd)
            wanted = {int(row['id']): int(row['class']) for row in rows_of(file)}
            assert dict(zip(*bought(cwd / 'runs/classify'))) == wanted


# ------------------------------------------------------------------------------ the estimated accuracy

def test_queries_stop_by_enough_random_answers_and_the_interval_is_told_everywhere():
    x, y = images(400)
    with place(x_train=x, y_train=y) as cwd:
        flags = tiny('query', '--rounds', 8)
        out = ok(*flags, '--budget', 320, '--until', 0.2, cwd=cwd)
        there = cwd / 'runs/query'
        m, (*asked, (last, estimate)) = measured(there), database(there).rounds().values()
        assert last == 0 and m['labels'] == 40 * len(asked) < 320
        assert estimate.low >= 0.2 and all(e is None or e.low < 0.2 for _, e in asked)
        assert [m[key] for key in ('estimate', 'estimate_low', 'estimate_high')] == [*estimate[:3]]
        assert m['estimate_low'] < m['estimate'] < m['estimate_high'] and m['audits'] >= 12
        for end in m['estimate_low'], m['estimate_high']:
            assert f'{100 * end:.1f}' in out
        few = ['--budget', 24, '--audit', 0.25, '--name', 'few']
        out = ok(*flags, *few, cwd=cwd)
        assert 'too few' in out and 'estimate' not in measured(cwd / 'runs/few')
        assert 'x_test' in out or 'hold-out' in out           # there is no test set to score on


def test_file_names_are_carried_to_the_end():
    try:
        from PIL import Image
    except ImportError:
        raise unittest.SkipTest('Pillow reads image files') from None
    x, y = images(60, 16, 16, C=3)
    wanted = {f'{"abc"[k]}/photo {i}.png' for i, k in enumerate(y)}
    with folder() as cwd:
        for image, name in zip(x, sorted(wanted, key=lambda name: int(name[8:-4]))):
            path = cwd / 'photos' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        for method, table in ('query', 'predictions'), ('cluster', 'clusters'):
            code, _, err = run(*tiny(method), '--data', 'photos', '--size', 16, cwd=cwd)
            assert code == 0, err
            names = [row['file'] for row in rows_of(cwd / f'runs/{method}/{table}.csv')]
            assert len(names) == 60 and set(names) == wanted
        given = rows_of(cwd / 'runs/query/labels.csv')
        assert len(given) == 15 and all(row['file'].startswith(row['class'] + '/') for row in given)
        code, out, err = run('--predict', 'runs/query', 'photos', cwd=cwd)
        assert code == 0 and {row['file'] for row in csv.DictReader(out.splitlines())} == wanted, err
        code, _, err = run('--export', 'runs/query', 'e.npz', 'photos', cwd=cwd)
        assert code == 0 and set(np.load(cwd / 'e.npz')['names'].tolist()) == wanted, err
