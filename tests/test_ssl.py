"""The command line: import ssl stays the standard library's, flags, their defaults, wrong words."""
from helpers import (HERE, TRAINED, cli, finished, folder, images, inside, ok, python, refused, tiny, weights,
                     write_npz)
import contextlib
import dataclasses
import importlib.util
import itertools
import os
import re
from pathlib import Path
from unittest import mock

import data
import runs
import train

STANDARD = os.path.join(os.path.dirname(os.__file__), 'ssl.py')
THREADS_AND_A_WORKER = f'''
import multiprocessing, threading
seen, together = [], threading.Barrier(16)
def load():
    together.wait()
    import ssl
    ssl.create_default_context()
    seen.append((id(ssl), ssl.__file__))
threads = [threading.Thread(target=load) for _ in range(16)]
for t in threads: t.start()
for t in threads: t.join()
assert len(seen) == 16 and len(set(seen)) == 1 and seen[0][1] == {STANDARD!r}, seen
ask = "__import__('ssl').create_default_context() and __import__('ssl').__file__"
if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        assert pool.apply(eval, (ask,)) == {STANDARD!r}
'''


def test_import_ssl_in_this_folder_is_the_standard_library():
    with folder() as there:
        worker = there / 'worker.py'
        worker.write_text(f'import ssl\nssl.create_default_context()\nassert ssl.__file__ == {STANDARD!r}')
        torchrun = '-m torch.distributed.run --standalone --nproc-per-node 1'.split()
        processes = {
            'torchrun': python(*torchrun, worker, PYTHONPATH=str(HERE)),
            'main': python('-c', worker.read_text()),
            'threads': python('-c', THREADS_AND_A_WORKER)}
        for module, words in ('pip', ['help', 'install']), ('pytest', ['--version']):
            if importlib.util.find_spec(module):
                processes[module] = python('-m', module, *words)
        for name, process in processes.items():
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0 and 'Traceback' not in err, (name, err)


def test_help_and_a_mistyped_flag_answer_before_torch_is_imported():
    for words, code, said in (['--help'], 0, '--method'), (['--metod', 'ae'], 2, '--metod'):
        process = python('-X', 'importtime', HERE / 'ssl.py', *words)
        out, err = process.communicate(timeout=60)
        imported = set(re.findall(r'\| +(\S+)$', err, re.M))
        assert 'argparse' in imported and not imported & {'torch', 'numpy', 'scipy', 'data', 'train'}
        assert process.returncode == code and said in out + err


def test_a_python_that_leaves_the_scripts_folder_out_of_its_path_runs_too():
    with folder() as elsewhere:
        process = python(HERE / 'ssl.py', '--compare', cwd=elsewhere, PYTHONSAFEPATH='1')
        out, err = process.communicate(timeout=60)
        assert out == 'runs/ holds no finished run yet\n' and not err, err


def flags():
    """{dest: argparse action} of every flag but --help."""
    return {a.dest: a for a in cli().make_parser()._actions if a.dest != 'help'}


def takers(dest):
    """Methods that take the flag."""
    some = [method for method, own in cli().DEFAULTS.items() if dest in own]
    return some or list(cli().DEFAULTS)


def test_every_flag_is_read_and_help_of_a_method_shows_those_that_it_takes_with_their_defaults():
    read = {field.name for field in dataclasses.fields(train.Settings)}
    for path in HERE.glob('*.py'):
        source = path.read_text()
        read |= set(re.findall(r'\bargs\.(\w+)', source))
        read |= set(re.findall(r"args(?:'\])?(?:\[|, |\.get\()'(\w+)'", source))
    assert set(flags()) <= read
    for method in None, *cli().DEFAULTS:
        text = ok('--help', *(['--method', method] if method else []))
        entries = re.findall(r'^  --([\w-]+)(.*?)(?=^  -|^\S|\Z)', text, re.M | re.S)
        shown = {key.replace('-', '_'): entry for key, entry in entries}
        assert set(shown) == {dest for dest in flags() if method is None or method in takers(dest)}, method
        for dest, value in cli().DEFAULTS.get(method, {}).items():
            if dest in shown and (value is not None or dest in cli().DEFAULT_WORDS):
                wanted = cli().DEFAULT_WORDS[dest] if value is None else value
                on_colour = cli().DEFAULTS[method].get('on_colour', {})
                if dest in on_colour:
                    wanted = f'{value}, on colour images {on_colour[dest]}'
                assert ' '.join(shown[dest].split()).endswith(f'(default: {wanted})'), (method, dest)


def test_a_wrong_value_of_any_number_flag_is_one_line_and_starts_nothing():
    numbers = {dest: a for dest, a in flags().items() if getattr(a.type, 'is_number', False)}
    assert len(numbers) > 20
    wrong = '-1', 'nan', 'inf', '9' * 400, '', 'abc', '1,5', '0x10', '--lr'
    with folder() as cwd, inside(cwd), mock.patch('commands.main', side_effect=AssertionError('started')):
        for (dest, action), text in itertools.product(numbers.items(), wrong):
            option = action.option_strings[0]
            for words in f'{option} {text}', f'{option}={text}':
                refused('--method', takers(dest)[0], words, said=[option])
        assert not list(cwd.iterdir())


WRONG = {                                                     # words: what the answer says
    '': 'say what to do', '--method VAE': "'vae'", '--method conv --net resent': "'resnet'",
    '--method ae extra': 'extra', '--meth ae': '--meth', '--method ae --resume --overwrite': 'exclude',
    '--method ae --data no/such': 'no/such', '--method ae --data=': '--data',
    '--method ae --data .': 'no image', '--method ae --lr 0': '--lr',
    '--method scan --clusters 1': '--clusters',
    '--evaluate runs/none': 'runs/none', '--compare none': 'none', '--evaluate=': 'path',
    '--compare --lr 1': '--lr', '--method classify --oracle a.csv --labels 3': 'all its labels',
    '--compare --seed 1': '--seed', '--method ae --search 2 epochs=0:2': 'from 1 to',
    '--method ae --show-views v.png': 'simclr',
    '--method classify --pick informative': 'informative',
    '--method ae --device gpu': 'try cuda', '--method ae --device cuda:99': 'try cuda',
    '--method ae --device cpu:x': 'try cuda', '--method ae --device meta': 'try cuda',
    '--method ae --name=': '--name', '--method ae --name ..': '--name', '--method ae --name a/b': '--name'}


def test_a_wrong_word_is_one_line_and_starts_nothing():
    with folder() as cwd, inside(cwd), mock.patch.object(data, 'find', side_effect=ValueError('wanted')):
        for words, said in WRONG.items():
            refused(*words.split(), said=[said])
        assert not list(cwd.iterdir())
    with mock.patch.dict(os.environ, WORLD_SIZE=''):          # which some launchers leave behind
        ok(*tiny('pixels'), '--name', 'alone')


def test_a_flag_that_does_not_belong_to_the_method_is_refused():
    with folder() as cwd, inside(cwd):
        for dest, action in flags().items():
            values = [own[dest] for own in cli().DEFAULTS.values() if own.get(dest) is not None]
            value = [] if action.nargs == 0 else [*values, 1][:1]
            for method in set(cli().DEFAULTS) - set(takers(dest)):
                refused('--method', method, action.option_strings[0], *value, said=['it is for'])


OTHER = {                                                     # values that change what is trained
    'net': 'conv', 'width': 0.3, 'latent': 3, 'epochs': 2, 'lr': 0.01, 'weight_decay': 0.5, 'batch_size': 8,
    'decay_epochs': 1, 'sam': 0.5, 'rounds': 1, 'threshold': 0.1,
    'audit': 0.5, 'clusters': 2, 'iterations': 1, 'noise': 0.3, 'beta': 3, 'likelihood': 'gaussian',
    'temperature': 1, 'recon': 1, 'neighbours_from': 1, 'neighbours': 3, 'crop': 0.9, 'rotate': 90,
    'jitter': 0, 'blur': 1,
    'cutout': 0.5, 'flip': False, 'amp': True, 'freeze': True, 'labels': 12, 'pick': 'random', 'mixup': 1,
    'seed': 1, 'limit': 30}
BY_METHOD = {('classify', 'pick'): 'coverage', ('ae', 'net'): 'resnet', ('classify', 'epochs'): 1,
             ('cluster', 'neighbours'): None,                 # they judge, and train nothing
             ('scan', 'amp'): None}                           # of new images only
ELSEWHERE = {                                                 # have tests of their own
    'method', 'evaluate', 'compare', 'export', 'predict', 'show_views', 'search', 'data',
    'size', 'name', 'resume', 'overwrite', 'device', 'deterministic', 'tensorboard', 'encoder', 'oracle',
    'classes', 'port', 'until', 'grey'}


def trained(method, **changed):
    """{path: value} of the network that small flags train, with some changed."""
    small = {'epochs': 3 if method == 'classify' else 1, 'decay_epochs': 0, 'batch_size': 14}
    taken = {key: value for key, value in small.items() if method in takers(key)}
    words = [runs.flag(key, value) for key, value in {**taken, **changed}.items()]
    ok(*tiny(method), '--data small.npz --overwrite', *words)
    return {path: v for path, v in weights(Path('runs', method)).items() if path.startswith('/model')}


def test_every_training_flag_changes_what_is_trained():
    assert set(OTHER) | ELSEWHERE == set(flags()), 'a flag without a test'
    finished('simclr')                                        # where scan begins
    with folder() as cwd, inside(cwd), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch('query.LEAST_EPOCH', 60))
        for module in 'pretrain', 'query', 'cluster':         # what only trains is quick
            stack.enter_context(mock.patch(f'{module}.measure', lambda *_: None))
        x, y = images(45)
        write_npz(cwd / 'small.npz', x_train=x, y_train=y)
        for method in (*TRAINED, 'scan'):
            plain = trained(method)
            assert trained(method) == plain
            for key in set(OTHER) & {*cli().DEFAULTS[method], *cli().COMMON}:
                value = BY_METHOD.get((method, key), OTHER[key])
                assert value is None or trained(method, **{key: value}) != plain, (method, key)
