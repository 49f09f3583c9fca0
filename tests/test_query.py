"""Classifiers from few labels: what they learn from, who answers, what it costs, the estimated accuracy."""
from helpers import (HERE, UNLABELLED, arrays, assert_same_run, close, differences, finished, flat, folder,
                     images, inside, measured, ok, pillow, place, posix, python, rand, refused, results,
                     rows_of, run, tiny, without, write_npz)
import contextlib
import itertools
import json
import os
import shutil
import signal
import time
import urllib.request
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
    return [t.tolist() for t in database(there).labels()]


# ----------------------------------------------------------------------------------------- learning

def test_mixup_is_the_loss_of_mixed_images_weighed_by_their_shares():
    torch.manual_seed(0)
    model = nets.Classifier(nets.Encoder('fc', (1, 8, 8), 0.1), 3).eval()
    x, y = rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    share = float(np.random.default_rng(generator('cpu', 1).initial_seed()).beta(0.4, 0.4))
    other = torch.randperm(6, generator=generator('cpu', 1))
    with mock.patch.object(augment, 'augment', lambda x, views, g: x):
        loss, _ = query.classification(model, x, y, generator('cpu', 1), None, 0.4)
    log_p = model(share * x + (1 - share) * x[other]).log_softmax(1)
    wanted = -sum(share * log_p[i, y[i]] + (1 - share) * log_p[i, y[other[i]]] for i in range(6)) / 6
    assert close(loss, wanted)


def test_consistency_learns_from_images_the_teacher_is_sure_of_and_from_no_other():
    torch.manual_seed(0)
    model = nets.MeanTeacher(nets.Classifier(nets.Encoder('fc', (1, 8, 8)), 3)).train()
    x, entropy = rand(8, 1, 8, 8, seed=1), torch.nn.functional.cross_entropy
    images, y = (255 * rand(5, 1, 8, 8, seed=2)).byte(), torch.tensor([0, 1, 2, 0, 1])
    drawn = torch.randint(5, (2,), generator=generator('cpu', 0))        # a quarter as many
    supervised = entropy(model.student(images[drawn] / 255), y[drawn])
    confidence, guess = model.teacher(x).softmax(1).max(1)
    each = entropy(model.student(x), guess, reduction='none')
    for threshold in 0, confidence.median().item(), 1:
        with mock.patch.object(augment, 'augment', lambda x, views, g: x):
            g, views = generator('cpu', 0), augment.Views()
            loss, parts = query.consistency(model, x, g, (images, y), views, threshold)
        sure = (confidence > threshold).float()
        assert close(loss, supervised + (sure * each).mean()) and close(parts['accepted'], sure.mean())


def test_labels_that_were_not_paid_for_change_nothing_of_a_classifier():
    with place() as cwd:
        for flags in (tiny('classify'), tiny('classify', '--pick coverage'), tiny('query', '--pick random'),
                      tiny('query')):
            write_npz(cwd / 'tiny.npz')
            ok(*flags, '--overwrite --name honest')
            ids, _ = bought(cwd / 'runs/honest')
            others, changed = np.setdiff1d(np.arange(120), ids), arrays()
            changed['y_train'][others] = changed['y_train'][others[::-1]]
            assert len(set(ids)) == 15 and (changed['y_train'] != Y).any()
            write_npz(cwd / 'tiny.npz', **changed)
            ok(*flags, '--overwrite --name other')
            assert_same_run(cwd / 'runs/honest', cwd / 'runs/other')


def test_no_label_is_bought_where_there_is_none():
    labelled = np.sort(np.random.default_rng(1).permutation(120)[:40])
    some = np.where(np.isin(np.arange(120), labelled), Y, -1)
    with place(**{**arrays(), 'y_train': some}) as cwd:
        for method, pick in ('classify', 'random'), ('classify', 'coverage'), ('query', 'informative'):
            ok(*tiny(method), '--overwrite --pick', pick)
            ids, y = bought(cwd / 'runs' / method)
            assert len(ids) == 15 and set(ids) <= set(labelled.tolist()) and y == Y[ids].tolist()
        refused(*tiny('classify'), '--labels 41 --name x', said=['40'])
        refused(*tiny('query'), '--labels 41 --name x', said=['40'])


def test_a_classifier_starts_from_any_encoder_and_a_frozen_one_keeps_every_bit():
    with place() as cwd, mock.patch.object(query, 'LEAST_EPOCH', 60):
        flags = without('--width', tiny('classify', '--overwrite'))
        for method, frozen in itertools.product([*UNLABELLED, 'random', 'cluster'], (False, True)):
            ok(*flags, '--freeze' if frozen else '--no-freeze', '--encoder', finished(method))
            models = [runs.open_run(there).model for there in (finished(method), cwd / 'runs/classify')]
            before, after = (dict(flat(nets.encoder_of(model).state_dict())) for model in models)
            assert (before == after) == frozen, method
        assert runs.read_config(cwd / 'runs/classify')['args']['width'] == 0.1
        assert 'already finished' in ok('--method classify --name classify --resume')


REFUSED = {                                                   # method and flags: what the answer says
    'classify --labels 121': '121', 'classify --labels 20.5': 'whole number',
    'classify --encoder runs/none': 'runs/none', 'classify --encoder PCA': 'no encoder',
    'classify --encoder SIMCLR --data other.npz': '(1, 8, 12)', 'classify --encoder SIMCLR --net fc': '--net',
    'query --data bare.npz': 'y_train', 'query --labels 121': '120', 'query --labels 2': 'classes',
    'query --rounds 16': '15', 'query --oracle file': 'a.csv',
    'query --classes a,b': '3', 'query --classes a,b,a': 'twice',
    'query --oracle web --data bare.npz': 'classes',
    'query --oracle web --data bare.npz --classes one': 'two classes',
    'query --oracle web --search 2 lr=1e-4:1e-2': '--oracle'}


def test_what_can_not_start_is_one_line_and_leaves_no_run():
    encoders = {'PCA': finished('pca'), 'SIMCLR': finished('simclr')}
    with place() as cwd:
        write_npz(cwd / 'other.npz', **arrays(H=8))
        write_npz(cwd / 'bare.npz', x_train=arrays()['x_train'])
        for words, said in REFUSED.items():
            method, *more = [encoders.get(word, word) for word in words.split()]
            flags = without('--width', tiny(method)) if '--encoder' in more else tiny(method)
            refused(*flags, *more, said=[said])
        assert not list((cwd / 'runs').glob('*'))


def test_lost_labels_are_one_sentence():
    with place() as cwd:
        ok(*tiny('query'))
        (cwd / 'runs/query/labels.sqlite').unlink()
        refused('--evaluate runs/query', said=['runs/query/labels.sqlite'])
        (cwd / 'runs/query/metrics.json').unlink()
        refused(*tiny('query'), '--resume', said=['lost its labels', '--overwrite'])


# ----------------------------------------------------------------------------------------- a person

def ask(address, path, body=None):
    """JSON of a request to the labelling page; with a body, a POST."""
    blob = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(address + path, blob, timeout=20) as reply:
        return json.load(reply)


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

    def collecting(web, round):
        def answer_one(seconds):
            if len(seen) == patience:
                os.kill(os.getpid(), how)
            i = question(web.address)
            seen.append(i)
            ask(web.address, 'answer', {'id': i, 'label': None if i in skips else int(y[i])})
        with mock.patch.object(oracle, 'time', mock.Mock(sleep=answer_one)):       # while the program waits
            return collect(web, round)
    with mock.patch.object(oracle.Web, 'collect', collecting):
        yield seen


def test_a_person_who_answers_as_y_train_does_gets_the_same_run_however_often_it_is_stopped():
    posix()
    for how, patience in (None, 99), (signal.SIGTERM, 3), (signal.SIGINT, 4):
        with place(**{**arrays(), 'y_train': (Y + 1) % 3}) as cwd:           # which it never looks at
            everything, code = [], None
            while code != 0:
                with person(Y, patience=patience, how=how) as seen:
                    code, out, err = run(*tiny('query'), '--oracle web --resume')
                assert code == 0 or code == 130 and '--resume to continue' in out + err, err
                everything += seen
                assert len(everything) == len(set(everything)) <= 15           # nothing is asked twice
            assert_same_run(cwd / 'runs/query', finished('query'))


def test_a_real_process_killed_while_a_person_answers_keeps_every_answer():
    posix()
    with place(x_train=arrays()['x_train']) as cwd, contextlib.ExitStack() as ended:
        def started():
            """A process, how many images it asks about, and where."""
            flags = tiny('query', '--oracle', 'web', '--classes', 'a,b,c', '--resume')
            process = python(HERE / 'ssl.py', *flags, cwd=cwd)
            ended.callback(process.kill)                      # whatever fails below
            words = next(line for line in process.stdout if 'http' in line).split()
            return process, int(words[2]), words[-1]

        def answered(address):
            i = question(address)
            ask(address, 'answer', {'id': i, 'label': i % 3})
            return i
        process, n, address = started()
        assert n == 7 and address.startswith('http://127.0.0.1:')
        ids = [answered(address) for _ in range(3)]
        process.kill()
        process.communicate(timeout=60)
        assert bought(cwd / 'runs/query') == [ids, [i % 3 for i in ids]]
        process, n, again = started()
        assert n == 4 and again != address and answered(again) not in ids
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and '--resume to continue' in out + err, (process.returncode, err)
        assert len(bought(cwd / 'runs/query')[0]) == 4


def test_what_is_skipped_is_never_asked_again_and_costs_nothing():
    skips = set(range(0, 120, 2))
    with place(x_train=arrays()['x_train']) as cwd:
        flags = tiny('query', '--oracle web --classes a,b,c --overwrite --rounds 5')
        for pick in 'informative', 'random':
            with person(Y, skips) as seen:
                ok(*flags, '--pick', pick)
            assert len(seen) == len(set(seen)) and set(seen) & skips
            ids, y = bought(cwd / 'runs/query')
            assert set(ids) == set(seen) - skips and len(ids) <= 15 and y == Y[ids].tolist()
            table = rows_of(cwd / 'runs/query/predictions.csv')
            assert {int(row['id']) for row in table if row['given'] == '1'} == set(ids) and len(table) == 120
            assert all(table[i]['class'] == 'abc'[Y[i]] and table[i]['confidence'] == '1.0000' for i in ids)
        with person(Y, skips=range(120)) as seen:             # who can't tell any
            refused(*flags, said=['every image was skipped'])
        assert sorted(seen) == list(range(120))


def test_answers_from_a_file_make_the_same_run_and_what_is_missing_is_written_down():
    names = 'cat', 'dog', 'other'
    with place(**UNLABELLED_DATA) as cwd:
        there, answers = cwd / 'runs/query', cwd / 'a.csv'
        flags = tiny('query', '--oracle a.csv --resume --classes cat,dog,other')
        answers.touch()

        def missing():
            """Ids of wanted.csv after the program has looked for answers."""
            code, out, err = run(*flags)
            assert code == 130 and not err and '--resume' in out and (there / 'wanted.png').exists(), err
            return [int(row['id']) for row in rows_of(there / 'wanted.csv')]
        for n in 7, 8:
            first, *others = missing()
            assert len(others) == n - 1
            lines = [f'{i},{names[Y[i]]}\n' for i in others]
            answers.write_text(answers.read_text() + ''.join(lines) + f'{first},\n')
            assert missing() == [first]                       # an empty cell is no answer yet
            answers.write_text(answers.read_text() + f'{first},{Y[first]}\n')
        ok(*flags)
        assert differences(results(there), results(finished('query'))) == ['labels.csv', 'predictions.csv']
        classes = [names[int(row['class'])] for row in rows_of(finished('query') / 'predictions.csv')]
        assert classes == [row['class'] for row in rows_of(there / 'predictions.csv')]


def test_classify_learns_from_a_file_of_labels_as_another_run_leaves_it():
    with place(**UNLABELLED_DATA) as cwd:
        flags = without('--labels', tiny('classify', '--classes 0,1,2'))
        for file in finished('query') / 'predictions.csv', finished('query') / 'labels.csv':
            ok(*flags, '--overwrite --oracle', file)
            wanted = {int(row['id']): int(row['class']) for row in rows_of(file)}
            assert dict(zip(*bought(cwd / 'runs/classify'))) == wanted
        (cwd / 'runs/classify/metrics.json').unlink()
        moved = shutil.copy(file, cwd / 'moved.csv')
        with open(moved, 'a') as f:                           # what is added later is not learned
            f.write(f'{min(set(range(120)) - set(wanted))},0\n')
        ok(*flags, '--resume --oracle', moved)
        assert dict(zip(*bought(cwd / 'runs/classify'))) == wanted
        with open(moved, 'a') as f:
            f.write('119,3\n')
        before = list((cwd / 'runs/classify').iterdir())
        refused(*flags, '--overwrite --oracle', moved, said=["'3'"])
        assert before == list((cwd / 'runs/classify').iterdir())
        refused(*flags, '--name new --oracle none.csv', said=['none.csv', 'no such file'])
        assert not (cwd / 'runs/new').exists()


# ------------------------------------------------------------------------------ the estimated accuracy

def test_queries_stop_by_enough_random_answers_and_the_interval_is_told_everywhere():
    x, y = images(400)
    with place(x_train=x, y_train=y) as cwd:
        out = ok(*tiny('query'), '--rounds 8 --labels 320 --until 0.2')
        there = cwd / 'runs/query'
        m, (*asked, (last, estimate)) = measured(there), database(there).rounds().values()
        assert last == 0 and m['labels'] == 40 * len(asked) < 320
        assert estimate.low >= 0.2 and all(e is None or e.low < 0.2 for _, e in asked)
        assert [m[key] for key in ('estimate', 'estimate_low', 'estimate_high')] == [*estimate[:3]]
        assert m['estimate_low'] < m['estimate'] < m['estimate_high'] and m['audits'] >= 12
        assert all(f'{100 * share:.1f}' in out for share in estimate[:3])
        out = ok(*tiny('query'), '--rounds 8 --labels 24 --audit 0.25 --name few')
        assert 'too few to say' in out and 'estimate' not in measured(cwd / 'runs/few')
        assert 'add x_test' in out                            # there is no test set to score on


def test_the_ids_of_the_classes_are_the_users_own_in_every_output():
    a, ids = arrays(), np.array([3, 7, 900])
    with place(**{key: ids[v] if key[0] == 'y' else v for key, v in a.items()}) as cwd:
        ok(*tiny('query'))
        written = [int(row['label']) for row in rows_of(cwd / 'runs/query/predictions.csv')]
        out = ok('--predict runs/query tiny.npz').splitlines()[1:]
        assert {int(line.split(',')[1]) for line in out} | set(written) <= set(ids.tolist())
        ok('--export runs/query e.npz')
        found = np.load(cwd / 'e.npz')
        given = found['labels'][:120] >= 0
        assert given.any() and found['labels'][120:].tolist() == ids[a['y_test']].tolist()
        assert found['labels'][:120][given].tolist() == ids[a['y_train']][given].tolist()
        right = np.array(written)[given] == ids[a['y_train']][given]
        assert right.all()                                    # labels that were given are in the table


def test_file_names_are_carried_to_the_end():
    x, y = images(60, 16, 16, C=3)
    wanted = {f'{"abc"[k]}/photo {i}.png' for i, k in enumerate(y)}

    def names_in(path):
        return {row['file'] for row in rows_of(path)}
    with folder() as cwd, inside(cwd):
        for i, k in enumerate(y):
            path = cwd / 'photos' / f'{"abc"[k]}/photo {i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            pillow().fromarray(x[i]).save(path)
        for method, table in ('query', 'predictions'), ('cluster', 'clusters'):
            code, _, err = run(*tiny(method), '--data photos --size 16')
            assert code == 0 and names_in(cwd / f'runs/{method}/{table}.csv') == wanted, err
        given = rows_of(cwd / 'runs/query/labels.csv')
        assert len(given) == 15 and all(row['file'].startswith(row['class'] + '/') for row in given)
        code, out, err = run('--predict runs/query photos')
        (cwd / 'predicted.csv').write_text(out)
        assert code == 0 and names_in(cwd / 'predicted.csv') == wanted, err
        code, _, err = run('--export runs/query e.npz photos')
        assert code == 0 and set(np.load(cwd / 'e.npz')['names'].tolist()) == wanted, err
