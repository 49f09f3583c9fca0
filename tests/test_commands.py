from helpers import (HERE, close, finished, folder, home, images, logged, measured, posix, python,
                     refused, run, tiny, weights, write_npz)
import csv
import io
import itertools
import math
import os
import shlex
import shutil
import subprocess
from unittest import mock

import numpy as np
import scipy.ndimage
import torch

import commands
import data
import evaluate
import labels
import runs


# ------------------------------------------------------------------------------------------- search

def test_settings_cover_their_ranges_evenly_in_logarithms_where_they_span_more():
    ranges = [('lr', 1e-4, 1e-2), ('crop', 0.2, 1.0), ('epochs', 3, 6), ('temperature', 0.1, 0.7)]
    found = commands.settings(ranges, 64, 0)
    for key, low, high, to in ('lr', 1e-4, 1e-2, math.log), ('crop', 0.2, 1, float), ('temperature', .1, .7, float):
        values = sorted((to(s[key]) - to(low)) / (to(high) - to(low)) for s in found)
        assert all(i / 64 - 1e-3 <= u <= (i + 1) / 64 + 1e-3 for i, u in enumerate(values)), key   # one in each part
    assert {s['epochs'] for s in found} == {3, 4, 5, 6} and all(float(f'{s["lr"]:.4g}') == s['lr'] for s in found)
    assert commands.settings(ranges, 5, 0) == found[:5] != commands.settings(ranges, 5, 1)


def test_a_search_scores_on_validation_and_its_best_command_gives_the_best_run_again():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        flags = tiny('ae', '--search', 3, '--over', 'lr=1e-5:1e-2', 'latent=2:8')
        flags = [w for i, w in enumerate(flags) if '--latent' not in (w, flags[i - 1])]
        with mock.patch.object(evaluate, 'measure', side_effect=AssertionError('the test set was read')):
            code, out, err = run(*flags, cwd=cwd)
        assert code == 0 and not err, err
        last = {i: logged(cwd / f'runs/ae-{i:02}')[-1]['val_loss'] for i in range(3)}
        best = min(last, key=last.get)
        assert measured(cwd / f'runs/ae-{best:02}')['score'] == -last[best]
        lines = out.splitlines()
        table = [line.split() for line in lines if line.startswith('ae-') and ':' not in line]
        assert [float(row[-1]) for row in table] == sorted((-round(v, 4) for v in last.values()), reverse=True)
        command = shlex.split(next(line for line in lines if line.startswith('best: ')))
        assert command[:3] == ['best:', 'python', 'ssl.py'] and table[0][0] == f'ae-{best:02}'
        assert run(*command[3:], '--name', 'again', cwd=cwd)[0] == 0
        assert logged(cwd / 'runs/again')[-1]['val_loss'] == last[best]
        code, again, err = run(*flags, '--resume', cwd=cwd)   # nothing is trained twice
        assert code == 0 and again.splitlines()[-4:] == lines[-4:] and 'epoch 1/' not in again
        for method in 'simclr', 'classify':
            code, _, err = run(*tiny(method, '--search', 2, '--over', 'lr=1e-5:1e-2'), cwd=cwd)
            assert code == 0 and not err and len(list((cwd / 'runs').glob(f'{method}-0?/metrics.json'))) == 2
        for over, said in ('lr=3:1', 'lower'), ('lr=0:1', 'lr'), ('lr', 'lr'), ('net=1:2', 'net'), ('latant=1:2', 'latent?'):
            refused(*tiny('ae', '--search', 2, '--over', over), cwd=cwd, said=[said, '--over'])
        refused(*tiny('ae', '--search', 2), cwd=cwd, said=['--over'])
        refused(*tiny('pca', '--search', 2, '--over', 'latent=2:4'), cwd=cwd, said=['--search'])
        write_npz(cwd / 'tiny.npz', x_train=images(60)[0])
        refused(*tiny('simclr', '--search', 2, '--over', 'lr=1e-5:1e-2', '--overwrite'), cwd=cwd, said=['no labels'])


def test_training_that_diverges_is_told_and_ranks_last_in_a_search():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        code, out, err = run(*tiny('classify'), '--search', 2, '--over', 'lr=1e-3:1e9', cwd=cwd)
        assert code == 0 and not err and 'not finite' in out, (out, err)
        table = [line.split() for line in out.splitlines() if line.startswith('classify-') and ':' not in line]
        assert math.isfinite(float(table[0][-1])) and table[1][-1] == '-inf', table
        refused(*tiny('classify'), '--search', 2, '--over', 'lr=9e8:1e9', '--name', 'all', cwd=cwd, said=['every'])


# ------------------------------------------------------------------------------------- finished runs

def test_list_says_what_state_each_run_is_in_and_touches_nothing():
    posix()
    with folder() as cwd:
        assert run('--list', cwd=cwd)[1] == 'runs/ holds no run yet\n' and not list(cwd.iterdir())
        for name in 'done', 'half':
            shutil.copytree(finished('simclr'), cwd / 'runs' / name)
        (cwd / 'runs/half/metrics.json').unlink()
        half = (cwd / 'runs/half/log.jsonl')
        half.write_text(half.read_text().splitlines()[0] + '\n')
        before = {p: p.stat().st_mtime_ns for p in cwd.rglob('*')}
        lines = dict(line.split(': ', 1) for line in run('--list', cwd=cwd)[1].splitlines())
        assert lines['runs/half'] == 'stopped at epoch 1 of 2'
        assert lines['runs/done'].startswith('finished after epoch 2 of 2, 0:0')
        lock = (f'import fcntl, sys; f = open({str(cwd / "runs/half/.lock")!r}); fcntl.flock(f, fcntl.LOCK_EX); '
                'print(1, flush=True); sys.stdin.read()')
        held = python('-c', lock, stdin=subprocess.PIPE)
        try:
            held.stdout.readline()
            assert 'runs/half: running at epoch 1 of 2' in run('--list', cwd=cwd)[1]
        finally:
            held.communicate('')
        assert before == {p: p.stat().st_mtime_ns for p in cwd.rglob('*')}


def test_export_holds_the_features_of_all_images_with_what_labels_are_known():
    ds = data.load(home() / 'tiny.npz')
    for method in 'simclr', 'vae', 'pixels', 'pca', 'query', 'scan', 'cluster':
        code, out, err = run('--export', finished(method), 'e.npz')
        assert code == 0 and not err and 'e.npz' in out, err
        e = dict(np.load(home() / 'e.npz', allow_pickle=False))
        wanted = runs.open_run(finished(method)).encode(torch.cat([ds.x_train, ds.x_test]))
        assert close(e['features'], wanted) and e['features'].dtype == np.float32
        assert e['ids'].tolist() == [*range(120), *range(40)]
        y = ds.y_train
        if method == 'query':
            ids, known = labels.LabelDatabase(finished(method) / 'labels.sqlite', None, 0, ds.digest).labels_of_round()
            y = torch.full((120,), -1).index_put((ids,), known)
        assert e['labels'].tolist() == [*y.tolist(), *ds.y_test.tolist()]
        val = [] if method in ('query', 'scan', 'cluster') else sorted(data.split(120, 5000, 0)[1].tolist())
        assert np.flatnonzero(e['split'] == 'validation').tolist() == val and set(e['split'][120:]) == {'test'}
    np.savez(home() / 'new.npz', x=images(7, seed=9)[0])
    assert run('--export', finished('simclr'), 'e.npz', 'new.npz')[0] == 0
    assert close(np.load(home() / 'e.npz')['features'], runs.open_run(finished('simclr')).encode(images(7, seed=9)[0]))
    for words in ['--export', finished('ae')], ['--show-views']:
        for path, said in ('tiny.npz', 'it is kept'), ('none/x', 'no folder none'), ('.', 'a folder'), (os.devnull, 'kept'):
            refused(*words, path, *['--data', 'tiny.npz'] * (words == ['--show-views']), said=[said])


def seen_by(x):
    """The views that a prediction is the mean over, by scipy: the image, its mirror, and four shifted zooms."""
    yield from (x, x.flip(3))
    for dx, dy in itertools.product((-1, 1), repeat=2):
        rows, cols = (0.96 * (np.arange(n) - (n - 1) / 2) + (n - 1) / 2 + d * 0.04 * n / 2
                      for n, d in zip(x.shape[2:], (dy, dx)))
        where = np.meshgrid(rows, cols[::-1] if dx != dy else cols, indexing='ij')
        shifted = [scipy.ndimage.map_coordinates(one[0].numpy(), where, order=1, mode='grid-constant') for one in x]
        yield torch.from_numpy(np.stack(shifted)[:, None])


def test_predictions_are_those_of_the_model_for_npz_and_idx_files():
    x = images(30, seed=9)[0]
    with folder() as f:
        data.write_idx(f / 'x.idx', x)
        np.savez(f / 'x.npz', x=x, x_train=x[:0])
        np.savez(f / 'test.npz', x_test=x)
        for method in 'classify', 'query', 'scan', 'cluster':
            model, outputs = runs.open_run(finished(method), 'cpu').model, set()
            with torch.no_grad():
                probs = sum(model(view).softmax(1) for view in seen_by(torch.from_numpy(x)[:, None] / 255)) / 6
            for name in 'x.idx', 'x.npz', 'test.npz':
                code, out, err = run('--predict', finished(method), f / name)
                assert code == 0, err
                outputs.add(out)
            rows = list(csv.DictReader(io.StringIO(out)))
            assert len(outputs) == 1 and [row['index'] for row in rows] == [str(i) for i in range(30)]
            if method != 'scan':                              # which votes in the features of the image itself
                assert [int(row['class']) for row in rows] == probs.argmax(1).tolist(), method
                assert close([float(row['confidence']) for row in rows], probs.max(1).values, 1e-4)
        np.savez(f / 'wide.npz', x=images(5, 12, 12)[0])
        (f / 'text').write_text('hello')
        for path, said in ('wide.npz', '12, 12'), ('text', 'text'), ('none', 'none'):
            refused('--predict', finished('classify'), f / path, said=[said])
        refused('--predict', finished('simclr'), f / 'x.npz', said=['no classes'])
        refused('--predict', 'runs/none', f / 'x.npz', said=['runs/none', 'classify'])


def test_what_needs_a_finished_run_takes_no_other_and_none_overwrites_its_own_encoder():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        shutil.copytree(finished('classify'), cwd / 'runs/classify')
        before = weights(cwd / 'runs/classify')
        flags = [w for w in tiny('classify') if w not in ('--width', 0.1)]
        refused(*flags, '--encoder', 'runs/classify', '--overwrite', cwd=cwd, said=['--encoder of this run'])
        assert before == weights(cwd / 'runs/classify')
        (cwd / 'runs/classify/metrics.json').unlink()
        for words in (['--export', 'runs/classify', 'out.npz'], ['--predict', 'runs/classify', 'tiny.npz'],
                      ['--method', 'scan', '--encoder', 'runs/classify', '--data', 'tiny.npz']):
            refused(*words, cwd=cwd, said=['is not finished', '--resume'])
        assert [p.name for p in (cwd / 'runs').iterdir()] == ['classify'] and not (cwd / 'out.npz').exists()


# ------------------------------------------------------------------------------------------- output

def test_output_is_whole_where_the_terminal_lacks_a_character_and_quiet_where_the_reader_left():
    names = '猫', 'собака', 'é'
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        assert run(*tiny('query'), '--classes', ','.join(names), cwd=cwd)[0] == 0
        for seed in 1, 2:
            assert run(*tiny('ae'), '--seed', seed, '--name', f's{seed}', cwd=cwd)[0] == 0
        for encoding in 'cp1252', 'ascii':
            predict = python(HERE / 'ssl.py', '--predict', 'runs/query', 'tiny.npz', cwd=cwd, PYTHONIOENCODING=encoding,
                             PYTHONUTF8='0')
            compare = python(HERE / 'ssl.py', '--compare', cwd=cwd, PYTHONIOENCODING=encoding, PYTHONUTF8='0')
            out, err = predict.communicate(timeout=100)
            assert predict.returncode == 0 and not err and {row['name'] for row in csv.DictReader(out.splitlines())} <= {
                *names}, err
            out, err = compare.communicate(timeout=100)
            assert compare.returncode == 0 and not err and 'query' in out, err
        reader, writer = os.pipe()
        os.close(reader)
        for words in tiny('ae'), ['--compare'], ['--help'], ['--predict', 'runs/query', 'tiny.npz']:
            _, err = python(HERE / 'ssl.py', *words, cwd=cwd, stdout=writer).communicate(timeout=100)
            assert not err, err
        os.close(writer)


def test_a_run_that_is_not_there_is_answered_with_those_that_are():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        shutil.copytree(finished('ae'), cwd / 'runs/ae-limit=60')
        for words in ['--evaluate', 'runs/ae'], ['--export', 'runs/ae', 'e.npz'], ['--method', 'classify', '--data',
                                                                                 'tiny.npz', '--encoder', 'runs/ae']:
            refused(*words, cwd=cwd, said=['runs/ae-limit=60'])
        code, out, _ = run(*tiny('ae'), '--resume', cwd=cwd)
        assert code == 0 and 'starts' in out
