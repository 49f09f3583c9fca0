from helpers import HERE, TRAINED, cli, flat, folder, images, python, refused, run, tiny, write_npz
import dataclasses
import importlib.util
import itertools
import os
import re
import time
from unittest import mock

import torch

import data
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
        torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 1, worker]
        processes = {
            'torchrun': python(*torchrun, PYTHONPATH=str(HERE)),
            'main': python('-c', 'import ssl; ssl.create_default_context(); print(ssl.__file__)'),
            'threads': python('-c', THREADS_AND_A_WORKER)}
        for module, words in ('pip', ['help', 'install']), ('pytest', ['--version']):
            if importlib.util.find_spec(module):
                processes[module] = python('-m', module, *words)
        for name, process in processes.items():
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0 and 'Traceback' not in err, (name, err)
            assert name != 'main' or out.strip() == STANDARD


def test_help_and_a_mistyped_flag_answer_before_torch_is_imported():
    for words, code, said in (['--help'], 0, '--method'), (['--metod', 'ae'], 2, 'did you mean --method?'):
        began = time.monotonic()
        process = python('-X', 'importtime', HERE / 'ssl.py', *words)
        out, err = process.communicate(timeout=60)
        lines = [line for line in err.splitlines() if line.startswith('import time:')]
        imported = {line.split('|')[-1].strip() for line in lines}
        assert 'argparse' in imported and not imported & {'torch', 'numpy', 'scipy', 'data', 'train'}
        assert process.returncode == code and said in out + err and time.monotonic() - began < 10


def test_a_python_without_the_scripts_folder_on_its_path_runs_too():
    for env in {'PYTHONSAFEPATH': '1'}, {'PYTHONPATH': ''}:
        with folder() as elsewhere:
            process = python(HERE / 'ssl.py', '--list', cwd=elsewhere, **env)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0 and out == 'runs/ holds no run yet\n' and not err, err


def flags():
    """{dest: argparse action} of every flag but --help."""
    return {a.dest: a for a in cli().make_parser()._actions if a.dest != 'help'}


def test_help_shows_every_flag_with_its_default():
    text = cli().make_parser().format_help()
    assert len(flags()) <= 60
    joined = ''.join(text.split())                            # lines break anywhere
    for dest, action in flags().items():
        assert all(option in text for option in action.option_strings)
        assert ''.join((action.help % {}).split()) in joined, dest
        for method, values in cli().DEFAULTS.items():
            value = values.get(dest)
            if value not in (None, False, True):
                assert str(value) in action.help, (dest, method)


def test_every_flag_is_read_somewhere():
    read = {field.name for field in dataclasses.fields(train.Settings)}
    for path in HERE.glob('*.py'):
        read |= set(re.findall(r'\bargs\.(\w+)', path.read_text()))
        read |= set(re.findall(r'''(?:args\[|args, |args\.get\(|args'\]\.get\()'(\w+)\'''', path.read_text()))
        read |= set(re.findall(r'''\'(\w+)\' (?:not )?in typed''', path.read_text()))
    assert not set(flags()) - read, set(flags()) - read


def takers(dest):
    """Methods that take the flag."""
    some = [method for method, own in cli().DEFAULTS.items() if dest in own]
    return some or list(cli().DEFAULTS)


def test_a_wrong_value_of_any_number_flag_is_one_line_and_starts_nothing():
    numbers = {dest: a for dest, a in flags().items() if 'number' in getattr(a.type, '__qualname__', '')}
    assert len(numbers) > 20
    wrong = ['-1', '-1e9', 'nan', 'inf', '1e999', '9' * 400, '', 'abc', '1,5', '0x10', '--lr']
    with folder() as cwd, mock.patch('commands.main', side_effect=AssertionError('work was started')):
        for (dest, action), text in itertools.product(numbers.items(), wrong):
            option = action.option_strings[0]
            refused('--method', takers(dest)[0], option, text, cwd=cwd, said=[option])
            refused('--method', takers(dest)[0], f'{option}={text}', cwd=cwd, said=[option])
        for option in '--clusters', '--lr', '--batch-size', '--budget', '--rounds', '--width', '--labels', '--limit':
            refused('--method', takers(option[2:].replace('-', '_'))[0], option, 0, cwd=cwd, said=[option])
        assert not list(cwd.iterdir())


def test_a_wrong_word_is_one_line_and_starts_nothing():
    with folder() as cwd, mock.patch.object(data, 'find', side_effect=ValueError('Fashion-MNIST was wanted')):
        for words, said in (
                ([], 'say what to do'), (['--method'], '--method'), (['--method', ''], 'wanted one of'),
                (['--method', 'simclrr'], 'did you mean simclr?'), (['--method', 'VAE'], 'did you mean vae?'),
                (['--method', 'conv', '--net', 'resent'], 'resnet'),
                (['--method', 'ae', 'extra'], 'extra is not known'), (['--meth', 'ae'], '--method?'),
                (['--method', 'vae', '--likelihood', 'gauss'], 'gaussian'),
                (['--method', 'ae', '--resume', '--overwrite'], 'exclude'),
                (['--method', 'ae', '--data', 'no/such'], 'no/such'), (['--method', 'ae', '--data', ''], '--data'),
                (['--method', 'ae', '--data', cwd], str(cwd)), (['--method', 'ae', '--data', HERE / 'ssl.py'], 'ssl.py'),
                (['--evaluate', 'runs/none'], 'runs/none'), (['--compare', 'runs/none'], 'runs/none'),
                (['--evaluate', ''], 'path'), (['--compare', '--lr', 1], '--lr'), (['--list', '--seed', 1], '--seed'),
                (['--method', 'ae', '--show-views', 'v.png'], 'simclr'),
                (['--method', 'classify', '--pick', 'informative'], 'informative'),
                *((['--method', 'ae', '--device', name], '--device') for name in ('gpu', 'cuda:99', 'meta', 'xla')),
                *((['--method', 'ae', '--name', name], '--name') for name in ('', '.', '..', 'a/b', '/x/y', 'x/'))):
            refused(*words, cwd=cwd, said=[said])
        assert not list(cwd.iterdir())


def test_an_empty_world_size_is_no_wrong_device():
    with mock.patch.dict(os.environ, WORLD_SIZE=''):
        assert run(*tiny('pixels'), '--name', 'alone')[0] == 0


def test_a_flag_that_does_not_belong_to_the_method_is_refused():
    with folder() as cwd:
        for dest, action in flags().items():
            values = [own[dest] for own in cli().DEFAULTS.values() if dest in own]
            value = [] if action.nargs == 0 else ['1' if values[:1] in ([None], []) else str(values[0])]
            for method in set(cli().DEFAULTS) - set(takers(dest)):
                refused('--method', method, action.option_strings[0], *value, cwd=cwd, said=['it is for'])
        assert not list(cwd.iterdir())


OTHER = {                                                     # values of flags that change what is trained
    'net': 'conv', 'width': 0.3, 'latent': 3, 'epochs': 2, 'lr': 0.01, 'weight_decay': 0.5, 'batch_size': 8,
    'decay_epochs': 1, 'sam': 0.5, 'budget': 12, 'rounds': 1, 'round_epochs': 2, 'threshold': 0.1, 'audit': 0.5,
    'clusters': 2, 'iterations': 1, 'noise': 0.3, 'beta': 3, 'likelihood': 'gaussian', 'temperature': 1, 'recon': 1,
    'neighbours_from': 1, 'neighbours': 3, 'crop': 0.9, 'rotate': 90, 'jitter': 0, 'blur': 1, 'cutout': 0.5,
    'flip': '--no-flip', 'amp': '--amp', 'freeze': '--freeze', 'labels': 12, 'pick': 'random', 'mixup': 1, 'seed': 1,
    'limit': 30}
BY_METHOD = {('classify', 'pick'): 'coverage', ('ae', 'net'): 'resnet',
             ('cluster', 'neighbours'): None,                 # they judge, and train nothing
             ('scan', 'amp'): None,                           # of new images only
             }
ELSEWHERE = {'method', 'evaluate', 'compare', 'list', 'export', 'predict', 'show_views', 'search', 'over', 'data', 'size',
             'name', 'resume', 'overwrite', 'device', 'deterministic', 'tensorboard', 'encoder', 'oracle', 'answers',
             'classes', 'port', 'until', 'grey'}              # have tests of their own


def test_every_training_flag_changes_what_is_trained():
    assert set(OTHER) | ELSEWHERE == set(flags()), 'a flag without a test'
    with folder() as cwd, mock.patch('report.finish', lambda *_: None), mock.patch('query.LEAST_EPOCH', 60):
        x, y = images(45)
        write_npz(cwd / 'small.npz', x_train=x, y_train=y)

        def trained(method, *more):
            batch = [] if method == 'scan' else ['--batch-size', 14]
            once = ['--epochs', 3 if method == 'classify' else 1] if method in takers('epochs') else []
            decay = ['--decay-epochs', 0] if method in takers('decay_epochs') else []
            code, _, err = run(*tiny(method), '--data', 'small.npz', *once, *decay, *batch, '--overwrite', *more, cwd=cwd)
            assert code == 0, err
            state = torch.load(cwd / 'runs' / method / 'checkpoint.pt', weights_only=True)
            return dict(flat(state['model']))
        for method in (*TRAINED, 'scan'):
            plain = trained(method)
            assert trained(method) == plain
            for dest in set(OTHER) & {*cli().DEFAULTS[method], *cli().COMMON}:
                value = BY_METHOD.get((method, dest), OTHER[dest])
                words = [value] if str(value).startswith('--') else ['--' + dest.replace('_', '-'), value]
                words = value if isinstance(value, list) else words
                if value is not None:
                    assert trained(method, *words) != plain, (method, dest)
