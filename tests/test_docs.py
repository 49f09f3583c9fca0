"""README.md, docs/ and tour.ipynb: commands, flags, links and code in them are those of this repository."""
from helpers import HERE, arrays, cli, finished, folder, home, inside, place, python, write_idx
import base64
import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from unittest import mock

import numpy as np

import data
import report
import runs

PAGES = [HERE / 'README.md', *sorted((HERE / 'docs').glob('*.md'))]
TORCHRUN = {'--nproc-per-node', '--nnodes', '--rdzv-backend', '--rdzv-endpoint'}


def code_of(page, language):
    return re.findall(rf'```{language}\n(.*?)```', (HERE / page).read_text(), re.S)


def test_every_command_of_the_pages_parses_and_every_flag_they_name_exists():
    known = {option for action in cli().make_parser()._actions for option in action.option_strings} | TORCHRUN
    for other in 'test_all.py', 'bench.py':
        known |= set(re.findall(r"'(--[a-z-]+)'", (HERE / other).read_text()))
    for page in PAGES:
        text = page.read_text().replace('\\\n', ' ')
        if page.name != 'forking.md':                         # whose commands need its changes
            for line in re.findall(r'^ +(?:python|torchrun [^\n]*?) ?ssl\.py (.*)', text, re.M):
                words = shlex.split(line, comments=True)
                assert '...' in words or cli().parse(words)
        unknown = set(re.findall(r'(?<![\w-])--[a-z][a-z-]*', text)) - known
        assert not unknown, (page.name, unknown)
    assert len((HERE / 'README.md').read_bytes()) <= 12_000


def test_every_link_of_the_pages_leads_somewhere_and_every_module_is_in_the_readme():
    for page in PAGES:
        text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
        for target, anchor in re.findall(r'\]\((?!http)([^)#]*)#?([^)]*)\)', text):
            path = page.parent / target if target else page
            assert path.exists(), (page.name, target)
            heads = re.findall(r'^#+ (.*)', path.read_text(), re.M) if anchor else []
            anchors = [re.sub(r'[^\w -]', '', head.lower()).replace(' ', '-') for head in heads]
            assert not anchor or anchor in anchors, (page.name, anchor)
        assert 'TODO' not in text, page.name
    readme = (HERE / 'README.md').read_text()
    assert all(f'`{path.name}`' in readme for path in HERE.glob('*.py'))


def test_the_readmes_python_runs_from_any_folder_beside_a_users_own_data_module():
    code, = code_of('README.md', 'python')
    x = arrays()['x_test']
    with folder() as cwd:
        (cwd / 'data.py').write_text('mine = 1\n')
        (cwd / 'try.py').write_text(code.replace('path/to/this/folder', str(HERE)))
        shutil.copytree(finished('classify'), cwd / 'runs/classify')
        np.savez(cwd / 'new.npz', x=x)
        out, err = python('try.py', cwd=cwd).communicate(timeout=60)
        classes = runs.open_run(finished('classify')).predict(x).argmax(1)
        assert out == f'{[str(k) for k in classes.tolist()]}\n', err


def test_the_snippet_that_made_the_picture_of_the_readme_runs():
    code, = code_of('docs/results.md', 'python')
    ds = data.load(home() / 'tiny.npz')
    with folder() as cwd, inside(cwd), mock.patch.object(data, 'load', return_value=ds):
        (cwd / 'docs').mkdir()
        for method in 'conv', 'scan':
            shutil.copytree(finished(method), cwd / f'runs/full-{method}-seed=0')
        exec(compile(code, 'results.md', 'exec'), {})
        assert (cwd / 'docs/examples.png').exists() and (HERE / 'docs/examples.png').exists()


def apply(diff, there):
    """Apply a unified diff to the files of a folder; what it changes, with its context, is in one place of
    the file, whatever its line numbers."""
    for part in re.split(r'^--- a/', diff, flags=re.M)[1:]:
        path = there / part.split('\n')[0]
        for body in re.split(r'^@@ .*\n', part, flags=re.M)[1:]:
            lines = [line if line.strip() else ' \n' for line in body.splitlines(keepends=True)]
            old = ''.join(line[1:] for line in lines if line[0] in ' -')
            new = ''.join(line[1:] for line in lines if line[0] in ' +')
            assert path.read_text().count(old) == 1, f'{path.name} has not once:\n{old}'
            path.write_text(path.read_text().replace(old, new))


def test_each_change_that_forking_shows_is_small_applies_and_works():
    text = (HERE / 'docs/forking.md').read_text()
    shown = re.findall(r'```diff\n(.*?)```.*?^ +python ssl\.py (.*?)\n', text, re.S | re.M)
    small = ['--epochs', 1, '--batch-size', 60, '--no-amp']
    assert len(shown) >= 3
    with place() as cwd, contextlib.ExitStack() as stack:
        (cwd / 'data/kmnist').mkdir(parents=True)
        for key, name in data.IDX_NAMES.items():
            write_idx(cwd / 'data/kmnist' / name, arrays(K=10)[key])
        started = []
        for i, (diff, words) in enumerate(shown):
            assert 0 < len(re.findall(r'^(?:[+](?![+][+])|-(?!--))', diff, re.M)) < 25, diff
            there = cwd / f'copy{i}'
            there.mkdir()
            for path in [*HERE.glob('*.py'), *HERE.glob('*.html')]:
                shutil.copy(path, there)
            apply(diff, there)
            more = ['--data', 'tiny.npz'] * ('--data' not in words) + small * ('pixels' not in words)
            process = python(there / 'ssl.py', *words.split(), *more, '--name', f'run{i}', cwd=cwd)
            stack.callback(process.kill)
            started.append(process)
        for i, process in enumerate(started):
            _, err = process.communicate(timeout=120)
            assert not err and (cwd / f'runs/run{i}/metrics.json').exists(), err


def test_the_tour_runs_as_plain_python_and_its_images_are_inside():
    book = json.loads((HERE / 'tour.ipynb').read_text())
    code = [''.join(cell['source']) for cell in book['cells'] if cell['cell_type'] == 'code']
    outputs = [out for cell in book['cells'] for out in cell.get('outputs', ())]
    stored = [out['data']['image/png'] for out in outputs if 'image/png' in out.get('data', ())]
    space = {'__name__': '__main__'}
    with folder() as cwd, inside(cwd):
        for key, array in arrays(200, H=14, W=14, K=10).items():
            write_idx(cwd / data.IDX_NAMES[key], array)
        with mock.patch.object(data, 'find', return_value=cwd), \
                mock.patch.object(report, 'png', wraps=report.png) as png, \
                mock.patch.dict(sys.modules, {'IPython.display': None}), \
                contextlib.redirect_stdout(io.StringIO()):
            for cell in code:
                exec(compile(cell, 'tour.ipynb', 'exec'), space)
    assert len(code) > 5 and png.call_count == len(stored) >= 4
    assert all(base64.b64decode(image).startswith(b'\x89PNG') for image in stored)
