"""What can be done with runs: searches, tables, exports, predictions; and what is printed where."""
from helpers import (HERE, cli, close, finished, folder, home, images, inside, logged, ok, place, posix,
                     python, refused, rows_of, run, tiny, weights, without, write_idx, write_npz)
import math
import os
import shlex
import shutil
from unittest import mock

import numpy as np
import torch

import commands
import data
import evaluate
import labels
import runs


# ------------------------------------------------------------------------------------------- search

def test_settings_cover_their_ranges_evenly_in_logarithms_where_they_span_more():
    ranges = [('lr', 1e-4, 1e-2), ('crop', 0.2, 1.0), ('epochs', 3, 6)]
    found = commands.settings(ranges, 64, 0)
    for values in [math.log(s['lr'] / 1e-4, 100) for s in found], [s['crop'] / 0.8 - 0.25 for s in found]:
        assert all(abs(u - (i + 0.5) / 64) <= 0.501 / 64 for i, u in enumerate(sorted(values)))
    assert {s['epochs'] for s in found} == {3, 4, 5, 6}
    assert commands.settings(ranges, 5, 0) == found[:5] != commands.settings(ranges, 5, 1)


def table_of(out, name):
    """Cells of the lines of the table at the end of a search."""
    return [line.split() for line in out.splitlines() if line.startswith(f'{name}-') and ':' not in line]


def test_a_run_is_named_by_what_differs_from_the_defaults_or_could_on_some_data():
    for words, name in (('--seed 0 --lr 0.004 --temperature 0.3', 'simclr-temperature=0.3'),
                        ('--crop 0.4 --epochs 12', 'simclr-crop=0.4-epochs=12')):
        _, typed, defaults = cli().parse(['--method', 'simclr', *words.split()])
        assert commands.run_name('simclr', typed, defaults) == name


def test_a_search_scores_without_the_test_set_and_its_best_command_gives_the_best_run_again():
    over = '--search 3 lr=1e-5:1e-2'
    with place() as cwd:
        with mock.patch.object(evaluate, 'measure', side_effect=AssertionError('the test set was read')):
            out = ok(*tiny('ae'), over)
        last = {f'ae-{i:02}': logged(cwd / f'runs/ae-{i:02}')[-1]['val_loss'] for i in range(3)}
        order = sorted(last, key=last.get)
        scores = [(row[0], float(row[-1])) for row in table_of(out, 'ae')]
        assert scores == [(name, -round(last[name], 4)) for name in order]
        best = shlex.split(next(line for line in out.splitlines() if line.startswith('best: python ssl.py')))
        ok(*best[3:], '--name again')
        assert logged(cwd / 'runs/again')[-1]['val_loss'] == last[order[0]]
        again = ok(*tiny('ae'), over, '--resume')             # nothing is trained twice
        assert table_of(again, 'ae') == table_of(out, 'ae') and 'epoch 1/' not in again
        assert table_of(ok('--compare'), 'ae')[0][1] == '0'   # a trial is no measured run
        ok('--evaluate runs/ae-00')
        assert table_of(ok(*tiny('ae'), over, '--resume'), 'ae') == table_of(out, 'ae')
        for method in 'simclr', 'classify':
            ok(*tiny(method), over)
        for wrong, said in ('lr=3:1', 'lower'), ('lr=0:1', 'lr'), ('lr', 'lr'), ('net=1:2', 'net'):
            refused(*tiny('ae'), '--search 2', wrong, said=[said, '--search'])
        refused(*tiny('ae'), '--search 2', said=['FLAG=LOW:HIGH'])
        write_npz(cwd / 'tiny.npz', x_train=images(60)[0])
        refused(*tiny('simclr'), over, '--overwrite', said=['no labels'])


def test_training_that_diverges_is_told_and_ranks_last_in_a_search():
    out = ok(*tiny('classify'), '--search 2 lr=1e-3:1e9')
    first, second = table_of(out, 'classify')
    assert 'not finite' in out and math.isfinite(float(first[-1])) and second[-1] == '-inf', out
    refused(*tiny('classify'), '--search 2 lr=9e8:1e9 --name all', said=['every'])


# ------------------------------------------------------------------------------------- finished runs

def test_compare_says_how_far_unfinished_runs_are():
    posix()
    import fcntl
    with folder() as cwd, inside(cwd):
        for name in 'done', 'half':
            shutil.copytree(finished('simclr'), cwd / 'runs' / name)
        (cwd / 'runs/half/metrics.json').unlink()
        log = cwd / 'runs/half/log.jsonl'
        log.write_text(log.read_text().splitlines()[0] + '\n')
        shutil.copytree(finished('query'), cwd / 'runs/asks')
        (cwd / 'runs/asks/metrics.json').unlink()
        asks, half, head, done, _ = run('--compare')[1].splitlines()
        assert asks == 'runs/asks: stopped at epoch 2'        # nobody knows yet how often it will ask
        assert half == 'runs/half: stopped at epoch 1 of 2'
        assert head.startswith('run ') and done.startswith('done ')
        with open(cwd / 'runs/half/.lock') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert 'runs/half: running at epoch 1 of 2' in run('--compare')[1]


def test_export_holds_the_features_of_all_images_with_what_labels_are_known():
    ds = data.load(home() / 'tiny.npz')
    for method in 'simclr', 'pca', 'query', 'scan':
        there = finished(method)
        ok('--export', there, 'e.npz --overwrite')
        e = np.load(home() / 'e.npz', allow_pickle=False)
        assert close(e['features'], runs.open_run(there).encode(torch.cat([ds.x_train, ds.x_test])))
        assert e['ids'].tolist() == [*range(120), *range(40)] and set(e['split'][120:]) == {'test'}
        y = ds.y_train
        if method == 'query':
            ids, known = labels.LabelDatabase(there / 'labels.sqlite', None, 0, ds.digest).labels()
            y = torch.full((120,), -1).index_put((ids,), known)
        assert e['labels'].tolist() == [*y.tolist(), *ds.y_test.tolist()]
        val = [] if method in ('query', 'scan') else data.split(120, 5000, 0)[1].tolist()
        assert np.flatnonzero(e['split'] == 'validation').tolist() == val
    x = images(7, seed=9)[0]
    np.savez(home() / 'new.npz', x=x)
    ok('--export', finished('simclr'), 'e.npz new.npz --overwrite')
    assert close(np.load(home() / 'e.npz')['features'], runs.open_run(finished('simclr')).encode(x))


def test_predictions_are_those_of_the_model_for_npz_and_idx_files():
    x = images(30, seed=9)[0]
    with folder() as f:
        write_idx(f / 'x.idx', x)
        np.savez(f / 'x.npz', x=x, x_train=x[:0])
        for method in 'classify', 'query', 'scan', 'cluster':
            (_, out, _), other = (run('--predict', finished(method), f / name) for name in ('x.idx', 'x.npz'))
            assert other == (0, out, '')
            (f / 'predicted.csv').write_text(out)
            rows, p = rows_of(f / 'predicted.csv'), runs.open_run(finished(method)).predict(x)
            assert [row['index'] for row in rows] == [str(i) for i in range(30)]
            assert [int(row['class']) for row in rows] == p.argmax(1).tolist()
            assert close([float(row['confidence']) for row in rows], p.max(1).values, 1e-4)
        np.savez(f / 'wide.npz', x=images(5, 12, 12)[0])
        for path, said in ('wide.npz', '12, 12'), ('none', 'none'):
            refused('--predict', finished('classify'), f / path, said=[said])
        refused('--predict', finished('simclr'), f / 'x.npz', said=['no classes'])


def test_no_file_is_replaced_unasked():
    before, export = (home() / 'tiny.npz').read_bytes(), f'--export {finished("ae")}'
    refused(export, 'tiny.npz', said=['tiny.npz exists', '--overwrite'])
    refused(export, 'none/x', said=['none'])
    ok(export, 'once.npz')
    ok(export, 'once.npz --overwrite')
    refused('--data tiny.npz --show-views tiny.npz', said=['.png'])
    ok('--data tiny.npz --show-views v.png')
    assert (home() / 'tiny.npz').read_bytes() == before


def test_what_needs_a_finished_run_takes_no_other_and_says_which_there_are():
    with place() as cwd:
        shutil.copytree(finished('classify'), cwd / 'runs/classify')
        before = weights(cwd / 'runs/classify')
        flags = without('--width', tiny('classify', '--encoder runs/classify --overwrite'))
        refused(*flags, said=['--encoder of this run'])
        assert before == weights(cwd / 'runs/classify')
        refused('--evaluate runs/class', said=['runs/classify'])
        (cwd / 'runs/classify/metrics.json').unlink()
        for words in ('--export runs/classify o.npz', '--predict runs/classify tiny.npz',
                      '--method scan --encoder runs/classify --data tiny.npz'):
            refused(words, said=['is not finished', '--resume'])
        assert [p.name for p in (cwd / 'runs').iterdir()] == ['classify'] and not (cwd / 'o.npz').exists()
        assert 'starts' in run(*tiny('ae'), '--resume')[1]


# ------------------------------------------------------------------------------------------- output

def test_output_is_whole_where_the_terminal_lacks_a_character_and_quiet_where_the_reader_left():
    names = '猫,собака,é'
    reader, writer = os.pipe()
    os.close(reader)
    with place() as cwd:
        ok(*tiny('query'), '--classes', names)
        for seed in 1, 2:
            ok(*tiny('pca'), '--seed', seed, '--name', f's{seed}')
        predict, compare = ['--predict', 'runs/query', 'tiny.npz'], ['--compare']
        started = [python(HERE / 'ssl.py', *words, cwd=cwd, PYTHONIOENCODING=encoding)
                   for words, encoding in ((predict, 'cp1252'), (predict, 'ascii'), (compare, 'ascii'))]
        for process in started:
            out, err = process.communicate(timeout=100)
            assert process.returncode == 0 and not err, err
            (cwd / 'out.csv').write_text(out)
            assert 'query' in out or {row['name'] for row in rows_of(cwd / 'out.csv')} <= {*names.split(',')}
        gone = tiny('pca'), compare, ['--help'], predict
        for process in [python(HERE / 'ssl.py', *words, cwd=cwd, stdout=writer) for words in gone]:
            _, err = process.communicate(timeout=100)
            assert not err, err
    os.close(writer)
