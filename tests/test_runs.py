"""Run folders: checkpoints, logs, what may change on resume, what is kept, how a finished run is opened."""
from helpers import (Hostile, arrays, close, finished, flat, folder, images, inside, measured, ok,
                     place, raises, randn, refused, results, run, tiny, weights, without,
                     write_npz)
import contextlib
import io
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch

import runs

CONFIG = {'args': {'method': 'ae', 'seed': 0}, 'data': {'digest': 'abc'}}


def state(seed=0):
    optimizer = {'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': [{'lr': 0.1, 'betas': (0.9, 1)}]}
    model = {'w': randn(40, 50, seed=seed), 'n': torch.tensor(3), 'half': randn(2).bfloat16()}
    return {'model': model, 'optimizer': optimizer, 'epoch': seed, 'best': math.inf}


def same(a, b):
    return dict(flat(a)) == dict(flat(b))


def test_a_checkpoint_comes_back_as_it_was_and_the_one_before_it_stays():
    with folder() as f:
        saved = runs.Run(f, CONFIG)
        assert saved.load() is None
        for seed in range(3):
            saved.save(state(seed))
            assert same(saved.load(), state(seed)) and not same(saved.load(), state(9))
        assert same(runs.load_checkpoint(f / 'checkpoint.previous.pt'), state(1))
        (f / 'checkpoint.pt').rename(f / 'checkpoint.previous.pt')             # killed between two renames
        runs.write_state(f / 'checkpoint.new.pt', state(4))
        assert same(saved.load(), state(4))
        saved.save(state(5))
        assert same(saved.load(), state(5)) and not (f / 'checkpoint.new.pt').exists()


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it():
    with folder() as f:
        saved = runs.Run(f, CONFIG)
        for seed in 1, 2:
            saved.save(state(seed))
        blob = (f / 'checkpoint.pt').read_bytes()
        number = state(2)['model']['w'].numpy().tobytes()
        for damage in blob[:len(blob) // 2], b'', blob.replace(number, bytes(len(number))):
            (f / 'checkpoint.pt').write_bytes(damage)
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                assert same(saved.load(), state(1))
            assert err.getvalue().count('\n') == 1 and 'checkpoint.pt' in err.getvalue()
        (f / 'checkpoint.previous.pt').write_bytes(b'junk')
        with raises(ValueError, 'checkpoint', '--overwrite'), contextlib.redirect_stderr(err):
            saved.load()


def test_a_checkpoint_that_holds_a_hostile_pickle_runs_nothing():
    with folder() as f:
        hostile = Hostile(f / 'ran')
        torch.save({'model': hostile}, f / 'zip.pt')
        torch.save({'model': hostile}, f / 'old.pt', _use_new_zipfile_serialization=False)
        (f / 'plain.pt').write_bytes(pickle.dumps(hostile))
        for name in 'zip.pt', 'old.pt', 'plain.pt':
            with raises(ValueError, name):
                runs.load_checkpoint(f / name)
            assert not (f / 'ran').exists()
        pickle.loads((f / 'plain.pt').read_bytes())
        assert (f / 'ran').exists()                           # it would have run


def test_logs_are_read_as_far_as_they_are_whole():
    rows = [{'epoch': 1, 'loss': 0.5}, {'epoch': 2, 'loss': None}]
    whole = ''.join(json.dumps(row) + '\n' for row in rows)
    with folder() as f:
        saved = runs.Run(f, CONFIG)
        for tail in '', '{"epoch": 3, "lo', '\0\0', '5\n', '{"loss": 1}\n', '[' * 10 ** 5:
            (f / 'log.jsonl').write_text(whole + tail)
            assert runs.read_log(f) == rows, tail[:20]
        saved.trim_log(1)
        saved.log({'epoch': 2, 'loss': math.nan})
        assert runs.read_log(f) == rows


def test_a_default_name_holds_what_sets_runs_apart_and_fits_a_file_system():
    name = runs.default_name('simclr', {'temperature': 0.5, 'batch_size': 8})
    assert name == 'simclr-temperature=0.5-batch-size=8'
    for hostile in '../../x', 'a b/c', 'x' * 999, '\n', '猫' * 200:
        name = runs.default_name('ae', {'data': hostile})
        assert Path(name).name == name and len(name.encode()) <= 200 and not set(name) & set('/ \n')


def test_an_existing_run_is_not_overwritten_silently():
    before = results(finished('ae'))
    refused(*tiny('ae'), said=['--resume', '--overwrite'])
    assert 'already finished' in ok(*tiny('ae'), '--resume') and results(finished('ae')) == before


def test_what_may_not_change_on_resume_is_named():
    with place() as cwd:
        shutil.copytree(finished('vae'), cwd / 'runs/vae')
        (cwd / 'runs/vae/metrics.json').unlink()
        before = weights(cwd / 'runs/vae')
        resume = '--method vae --name vae --data tiny.npz --resume'
        changes = ('lr', 0.002, 0.5), ('method', 'vae', 'conv'), ('seed', 0, 1), ('net', 'resnet', 'fc')
        for name, old, new in changes:
            said = [f'with --{name} {old}, not --{name} {new}']
            refused(resume, f'--{name}', new, said=said)
        write_npz(cwd / 'tiny.npz', **arrays(seed=5))
        refused(resume, said=['other data'])
        assert weights(cwd / 'runs/vae') == before


def test_the_same_data_may_lie_elsewhere_for_every_command():
    with folder() as cwd, inside(cwd):
        write_npz(cwd / 'moved.npz')
        shutil.copytree(finished('vae'), cwd / 'runs/vae')
        (cwd / 'runs/vae/metrics.json').unlink()
        for command in ('--method vae --name vae --resume', '--evaluate runs/vae',
                        '--export runs/vae e.npz'):
            config = runs.read_json(cwd / 'runs/vae/config.json')
            config['args']['data'] = 'tiny.npz'               # where each command has to look again
            runs.write_json(cwd / 'runs/vae/config.json', config)
            refused(command, said=['tiny.npz'])
            ok(command, '--data moved.npz')
        assert measured(cwd / 'runs/vae') == measured(finished('vae'))


def test_a_run_folder_with_foreign_content_is_one_sentence_and_hides_no_other():
    with place() as cwd:
        there = cwd / 'runs/ae'
        for name in 'ae', 'good':
            shutil.copytree(finished('ae'), cwd / 'runs' / name)
        torn = ('metrics.json', '{"se'), ('config.json', '{"args": 5}'), ('config.json', '{"arg')
        for file, content in torn:
            kept = (there / file).read_text()
            (there / file).write_text(content)
            code, out, err = run('--compare')
            told = [line for line in (out + err).splitlines() if 'runs/ae' in line]
            assert code == 0 and 'good' in out and any(file in line for line in told), (out, err)
            (there / file).write_text(kept)
        (there / 'config.json').write_text(content)
        for words in ['--evaluate runs/ae'], [*tiny('ae'), '--resume']:
            refused(*words, said=['config.json'])
        (there / 'config.json').write_text(kept)
        other = finished('conv') / 'checkpoint.pt'            # whole, but of something else
        shutil.copy(other, there / 'checkpoint.pt')
        refused('--evaluate runs/ae', said=['runs/ae'])
        (there / 'metrics.json').unlink()
        refused(*tiny('ae'), '--resume', said=['runs/ae'])


def test_a_finished_run_opens_from_any_folder_and_gives_features_and_classes():
    x = images(30, seed=9)[0]
    v = torch.from_numpy(x)[:, None]
    with folder() as elsewhere, inside(elsewhere):
        for method in 'simclr', 'vae', 'random', 'classify', 'query', 'scan', 'cluster':
            opened = runs.open_run(finished(method))
            with torch.no_grad():
                wanted = opened.model.encode(v / 255)
            h = opened.encode(x)
            assert close(h, wanted) and torch.equal(h, opened.encode(v)), method
            assert torch.equal(h, opened.encode(v / 255)) and torch.equal(h, opened.encode(v[:, 0])), method
            if method in ('classify', 'query', 'scan', 'cluster'):
                p = opened.predict(x)
                assert p.shape == (30, 3) and close(p.sum(1), np.ones(30)) and (p >= 0).all()
        with raises(ValueError, '(1, 12, 10)', '(1, 10, 12)'):
            opened.encode(x.transpose(0, 2, 1))
        with raises(ValueError, 'not a run folder'):
            runs.open_run('runs/none')


def test_labels_that_a_person_gave_are_kept_whatever_overwrites_the_run():
    with place() as cwd:
        there, kept = cwd / 'runs/query', []
        there.mkdir(parents=True)
        answers = there / 'mine.csv'                          # a user's own file, whatever its place
        answers.write_text(''.join(f'{i},{k}\n' for i, k in enumerate(arrays()['y_train'])))

        def content():
            return {path.name: path.read_bytes() for path in there.iterdir()}
        flags = tiny('query', '--oracle runs/query/mine.csv --overwrite')
        for seed in range(3):
            ok(*flags, '--seed', seed)
            kept.append((there / 'labels.sqlite').read_bytes())
        ok(*tiny('ae'), '--name query --overwrite')
        shutil.copy(answers, there / 'labels.csv')
        refused(*without('--labels', tiny('classify')), '--overwrite --name query --oracle',
                there / 'labels.csv', said=['copy it'])
        assert sorted(path.read_bytes() for path in there.glob('labels.*sqlite')) == sorted(kept)
        assert answers.exists() and not (there / 'labels.sqlite').exists()
        before = content()
        for method, flag in ('query', '--labels'), ('classify', '--labels'), ('scan', '--clusters'):
            refused(*tiny(method), flag, 999, '--name query --overwrite', said=[flag])
        assert content() == before
