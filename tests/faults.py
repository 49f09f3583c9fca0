"""Damage on purpose: `fuzz` reads damaged files of every format, `soak` breaks and resumes runs of every method."""
import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import sqlite3
import sys
import time
import traceback

from helpers import (TRAINED, arrays, cli, drawn, finished, flat, folder, home, images, logged, measured,
                     run, tiny, write_npz)

import numpy as np
import torch

import data
import labels
import oracle
import runs
import train

# --------------------------------------------------------------------------------------------- fuzz


def damage(blob, rng):
    """The bytes with one fault: cut, lengthened, moved, overwritten, doubled, bits flipped."""
    blob, (i, j) = bytearray(blob), sorted(rng.integers(0, len(blob) + 1, 2))
    fault = rng.integers(7)
    if fault < 4:
        return bytes([blob[:i], blob + rng.bytes(j - i), blob[:i] + blob[j:], blob[j:] + blob[:j]][fault])
    if fault == 4:
        blob[i:j] = rng.bytes(j - i)
    elif fault == 5:
        blob[i:j] = blob[i:j] * 2
    else:
        for k in rng.integers(0, len(blob), 3):
            blob[k] ^= 1 << rng.integers(8)
    return bytes(blob)


STRANGE = [None, True, -1, 0.5, 1e299, 10 ** 40, '', 'x', '\0', '../x', [], {}, [[]], [None], {'x': 1}]


def strange_json(value, rng):
    """JSON of a dict in which one value, at any depth, is another or lacks."""
    value = at = json.loads(json.dumps(value))
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[rng.integers(len(keys))]
        if not (isinstance(at[key], (dict, list)) and at[key]) or rng.integers(3) == 0:
            break
        at = at[key]
    if rng.integers(4) == 0:
        del at[key]
    else:
        at[key] = STRANGE[rng.integers(len(STRANGE))]
    return json.dumps(value).encode()


def strange_databases(path):
    """Label databases that are whole files but hold what they must not."""
    blob = path.read_bytes()
    columns = {'queries': ('id', 'label', 'round', 'answered', 'guess', 'confidence', 'agreed', 'audit'),
               'rounds': ('asked', 'estimate', 'low', 'audits', 'round'), 'dataset': ('digest',)}
    statements = ['DROP TABLE rounds', 'ALTER TABLE queries RENAME COLUMN label TO other', 'DELETE FROM dataset',
                  'CREATE TRIGGER t AFTER INSERT ON queries BEGIN DELETE FROM queries; END']
    for table in columns:
        for column, value in itertools.product(columns[table], ("'x'", "x'ff'", '-1', '1e300', '70000', '0.5')):
            statements.append(f'UPDATE {table} SET {column} = {value} WHERE rowid = 1')
    for statement in statements:
        path.write_bytes(blob)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            with contextlib.suppress(sqlite3.IntegrityError):
                db.executescript(statement)
        yield path.read_bytes()


def use_database(path):
    database = labels.LabelDatabase(path, lambda ids: [0] * len(ids), 99, 'abc')
    with contextlib.closing(database.db):
        database.labels_of_round(), database.asked(), database.history(), database.round_counts(0), database.last(1)
        database.rounds(), database.audits(0)
        database.query([5, 7], 3)


def use_run(path):
    """Everything that reads the file of a finished run: as ssl.py does, where an error is told in one line."""
    there = path.parent
    again = ['--evaluate', there, '--data', home() / 'tiny.npz']
    for command in ['--list'], ['--compare', there], again if path.name == 'config.json' else ['--compare']:
        code, _, err = run(*command, cwd=there.parent.parent)
        assert code in (0, 2) and 'Traceback' not in err and err.count('\n') <= 2, (command, err)


def formats(f, rng):
    """(name, file, its contents as they should be, function that reads the file) of all that comes from outside."""
    small = arrays(20, 4, H=8, W=8)
    for name, array in ('images', small['x_train']), ('none', small['x_train'][:0]):
        for suffix in '', '.gz':
            data.write_idx(f / f'{name}{suffix}', array)
            yield f'IDX{suffix}', f / f'{name}{suffix}', [(f / f'{name}{suffix}').read_bytes()], data.read_idx
    np.savez(f / 'plain.npz', **small)
    np.savez_compressed(f / 'packed.npz', **small)
    for name in 'plain', 'packed':
        yield 'npz', f / f'{name}.npz', [(f / f'{name}.npz').read_bytes()], data.load
    there = f / 'cifar'
    there.mkdir()
    for name in 'data_batch_1.bin', 'test_batch.bin':
        (there / name).write_bytes(b''.join(bytes([i % 10]) + rng.bytes(3072) for i in range(30)))
    (there / 'batches.meta.txt').write_text('\n'.join(map(str, range(10))))
    for name in 'data_batch_1.bin', 'batches.meta.txt':
        yield f'CIFAR-10 {name}', there / name, [(there / name).read_bytes()], lambda path: data.load(path.parent)
    state = {'model': {'w': torch.ones(40, 50)}, 'epoch': 3, 'kept': {'row': {'sizes': [1, 2]}}}
    runs.write_state(f / 'fuzz.pt', state)
    yield 'checkpoint', f / 'fuzz.pt', [(f / 'fuzz.pt').read_bytes()], runs.load_checkpoint
    database = labels.LabelDatabase(f / 'fuzz.sqlite', lambda ids: [i % 3 for i in ids], 99, 'abc')
    database.query(range(30, 60), 0, [(1, 0.5, 1, 0)] * 30, labels.Estimate(0.5, 0.2, 0.8, 30))
    database.db.close()
    good = (f / 'fuzz.sqlite').read_bytes()
    yield 'label database', f / 'fuzz.sqlite', [good] * 99 + [*strange_databases(f / 'fuzz.sqlite')], use_database
    database = labels.LabelDatabase(f / 'answers.sqlite', None, 9, 'abc')
    x = torch.from_numpy(images(20)[0])[:, None]
    tables = [b'id,label\n1,cat\n2,dog\n\n19,1\n3,\n', b'"1";"cat"\r\n2;0\r\n7;?\r\n', '1\tcat\n'.encode('utf-16')]
    (f / 'a.csv').write_bytes(tables[0])
    yield 'answers', f / 'a.csv', tables, lambda path: oracle.File(database, x, ('cat', 'dog'), path, f).read()
    for method in 'simclr', 'query':
        there = f / 'runs' / method
        shutil.copytree(finished(method), there)
        for name in 'config.json', 'metrics.json':
            good = json.loads((there / name).read_text())
            yield f'{name} of {method}', there / name, [strange_json(good, rng) for _ in range(40)], use_run
        rows = (there / 'log.jsonl').read_bytes()
        strange = b'\n'.join(strange_json(json.loads(row), rng) for row in rows.splitlines())
        yield f'log.jsonl of {method}', there / 'log.jsonl', [rows, strange], use_run


def read_damaged(cases, seed=0):
    """{format: [files read, files refused]} of damaged files of all formats. Asserts that nothing but a ValueError or
    an OSError of one line that names the file comes, soon."""
    rng, counts = np.random.default_rng(seed), {}
    with folder() as f:
        kinds = len(list(formats(f, rng)))
    with folder() as f, contextlib.redirect_stderr(io.StringIO()):
        for kind, path, blobs, read in formats(f, rng):
            share = cases // kinds if read is not use_run else max(1, cases // kinds // 20)     # slow
            counts.setdefault(kind, [0, 0])
            whole = path.read_bytes()
            for case in range(share):
                blob = blobs[rng.integers(len(blobs))]
                path.write_bytes(blob if rng.integers(4) == 0 else damage(blob, rng))
                began, what = time.monotonic(), f'{kind}, seed {seed}, case {case}'
                try:
                    read(path)
                    counts[kind][0] += 1
                except (ValueError, OSError) as e:
                    named = any(name in str(e) for name in (path.stem, path.parent.name))
                    assert '\n' not in str(e) and named, f'{what}: {e!r}'
                    counts[kind][1] += 1
                except Exception as e:
                    raise AssertionError(f'{what}: {e!r} instead of a ValueError') from e
                assert time.monotonic() - began < 20, f'{what} took too long'
            path.write_bytes(whole)
    return counts


def fuzz(cases):
    """Read so many damaged files, by a seed of the clock; prints what was tried, or the seed that finds a fault."""
    seed, total = time.time_ns() % 10 ** 9, {}
    while sum(map(sum, total.values())) < cases:
        for kind, counts in read_damaged(10_000, seed).items():
            total[kind] = [a + b for a, b in zip(counts, total.get(kind, (0, 0)))]
        seed += 1
    for kind, (read, refused) in total.items():
        print(f'{kind:<28} {read:>8,} read {refused:>8,} refused')
    return 0


# --------------------------------------------------------------------------------------------- soak

FAULTS = ('SIGKILL', 'SIGTERM', 'SIGINT', 'SIGINT twice', 'disk full', 'damaged checkpoint', 'torn log')
KINDS = {**{method: tiny(method) for method in (*TRAINED, 'scan')},
         'simclr, neighbours': tiny('simclr', '--neighbours-from', 0.5, '--neighbours', 3),
         'classify, sam': tiny('classify', '--sam', 0.1),
         'query, random': tiny('query', '--pick', 'random', '--decay-epochs', 1)}


def in_a_fork(words, cwd, fault, rng):
    """The child of `launch`: suffers what a process can do to itself; does not return."""
    code = 1
    try:
        os.chdir(cwd)
        os.dup2(os.open('said', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        data.MAX_RESIDENT_BYTES = rng.choice([None, 0])       # held in memory, or read batch by batch
        train.SAVE_EVERY = rng.choice([1e-9, 0.02, 60])
        if fault == 'disk full':
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(10 ** rng.uniform(2, 5.3)),) * 2)
        code = cli().main([str(word) for word in words])
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code or 0)


def launch(words, cwd, fault=None, after=0.0, rng=None):
    """(exit code or minus the signal, what it said, seconds) of ssl.py in a forked process that suffers the fault."""
    sys.stdout.flush()
    began, pid = time.monotonic(), os.fork()
    if not pid:
        in_a_fork(words, cwd, fault, rng or np.random.default_rng(0))
    if fault and fault.startswith('SIG'):
        time.sleep(after)
        for _ in fault.split():
            os.kill(pid, getattr(signal, fault.split()[0]))
            time.sleep(0.003)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), (cwd / 'said').read_text(), time.monotonic() - began


def spoil(there, fault, rng):
    """Do to a run folder at rest what the fault does."""
    checkpoints = [there / name for name in runs.CHECKPOINTS if (there / name).exists()]
    if fault == 'damaged checkpoint' and len(checkpoints) > 1:        # of one there is none to fall back to
        blob, at = checkpoints[0].read_bytes(), int(rng.integers(100, 2000))
        flipped = blob[:at] + bytes([blob[at] ^ 64]) + blob[at + 1:]
        checkpoints[0].write_bytes([blob[:-at], flipped][rng.integers(2)])
    if fault == 'torn log' and there.exists():
        with open(there / 'log.jsonl', 'ab') as f:
            f.write([b'{"epoch": 2, "lo', b'\0' * 400, b'{"epoch": 9, "loss": NaN}\n'][rng.integers(3)])


def results(there):
    """{name: content without times} of all that a finished run leaves and that has to be the same."""
    found = {'log': logged(there), 'metrics': measured(there), **drawn(there)}
    found.update({p.name: p.read_bytes() for p in there.glob('*.csv')})
    for path in there.glob('*.pt'):
        if path.name != 'checkpoint.previous.pt':
            state = dict(flat(torch.load(path, map_location='cpu', weights_only=True)))
            found[path.name] = {key: value for key, value in state.items() if key != '/seconds'}
    if (there / 'labels.sqlite').exists():
        with contextlib.closing(sqlite3.connect(there / 'labels.sqlite')) as db:
            found['labels'] = [db.execute(f'SELECT * FROM {table}').fetchall() for table in ('queries', 'rounds')]
    return found


def break_and_resume(kind, cwd, twin, took, rng):
    """(faults survived, what went wrong or None) of one run, broken at random up to 12 times and resumed to its end."""
    words, there, story = [*KINDS[kind], '--name', 'r', '--resume'], cwd / 'runs/r', []
    codes = {'SIGKILL': [-9], 'SIGTERM': [-15, 130], 'SIGINT': [130], 'SIGINT twice': [130], 'disk full': [2]}
    for _ in range(rng.integers(1, 12)):
        fault = FAULTS[rng.integers(len(FAULTS))]
        spoil(there, fault, rng)
        code, said, _ = launch(words, cwd, fault, rng.uniform(0, 1.1 * took), rng)
        story.append((fault, code))
        if code not in [0, *codes.get(fault, [])] or 'Traceback' in said:
            return story, f'{kind}: {story}: {said[-1500:]}'
        if code == 0:
            break
    code, said, _ = launch(words, cwd)
    if code:
        return story, f'{kind}: {story}: the last --resume ended with {code}: {said[-1500:]}'
    found = results(there)
    differ = sorted(name for name in {*twin, *found} if twin.get(name) != found.get(name))
    return story, f'{kind}: {story}: {differ} are not as in its unbroken twin' if differ else None


def soak(minutes):
    """Break runs of every method at random for so long, resume each to its end, and compare it with its unbroken twin.
    Prints the figures; 1 if anything was lost."""
    seed = time.time_ns() % 10 ** 9
    rng, until, twins, stories, failures = np.random.default_rng(seed), time.monotonic() + 60 * minutes, {}, [], []
    print(f'seed {seed}', flush=True)
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        run(*tiny('ae', '--name', 'warm'), cwd=cwd)           # what torch imports late is then there in each fork
        while time.monotonic() < until:
            kind = list(KINDS)[rng.integers(len(KINDS))]
            if kind not in twins:
                code, said, took = launch([*KINDS[kind], '--name', 'twin'], cwd)
                assert code == 0, said
                twins[kind] = results(cwd / 'runs/twin'), took
                shutil.rmtree(cwd / 'runs/twin')
            story, failure = break_and_resume(kind, cwd, *twins[kind], rng)
            stories.append(story)
            failures += [failure] if failure else []
            shutil.rmtree(cwd / 'runs/r', ignore_errors=True)
    print('\n\n'.join(failures[:20]))
    print(f'{sum(map(len, stories)):,} faults in {len(stories):,} runs of {len(twins)} kinds, each resumed to its end: '
          f'{len(failures)} differ or failed')
    return 1 if failures else 0
