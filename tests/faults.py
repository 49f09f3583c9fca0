"""Damage on purpose: `fuzz` reads damaged files of every format, `soak` breaks and resumes runs."""
from helpers import (TRAINED, arrays, cli, differences, finished, folder, home, images, inside, place,
                     results, run, tiny, write_idx)
import contextlib
import io
import json
import os
import shutil
import signal
import sqlite3
import sys
import time
import traceback

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


def strange_json(blob, rng):
    """A JSON object in which one value, at any depth, is another or lacks."""
    value = at = json.loads(blob)
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


def use_database(path):
    database = labels.LabelDatabase(path, lambda ids: [0] * len(ids), 99, 'abc')
    with contextlib.closing(database.db):
        for question in database.labels, database.asked, database.history, database.rounds:
            question()
        database.query([5, 7], 3)


def use_run(path):
    """What reads the files of a finished run, as ssl.py does: an error is told in one line."""
    there = path.parent
    again = ['--evaluate', there, '--data', home() / 'tiny.npz']
    with inside(there.parent.parent):
        for command in ['--compare'], *[again] * (path.name == 'config.json'):
            code, _, err = run(*command)
            assert code in (0, 2) and 'Traceback' not in err and err.count('\n') <= 2, (command, err)


def use_answers(path):
    database = labels.LabelDatabase(path.with_name('answers.sqlite'), None, 9, 'abc')
    with contextlib.closing(database.db):
        x = torch.from_numpy(images(20)[0])[:, None]
        oracle.File(database, x, ('cat', 'dog'), path, path.parent).read()


def formats(f, rng):
    """(file as it should be, function that reads it) of all that comes from outside."""
    small = arrays(20, 4, H=8, W=8)
    for name in 'idx', 'idx.gz':
        write_idx(f / name, small['x_train'])
        yield f / name, data.read_idx
    np.savez(f / 'plain.npz', **small)
    np.savez_compressed(f / 'packed.npz', **small)
    for name in 'plain.npz', 'packed.npz':
        yield f / name, data.load
    (f / 'cifar').mkdir()
    (f / 'cifar/batches.meta.txt').write_text('\n'.join(map(str, range(10))))
    for name in 'data_batch_1.bin', 'test_batch.bin':
        (f / 'cifar' / name).write_bytes(b''.join(bytes([i % 10]) + rng.bytes(3072) for i in range(30)))
    for path in (f / 'cifar').iterdir():
        yield path, lambda path: data.load(path.parent)
    runs.write_state(f / 'fuzz.pt', {'model': {'w': torch.ones(40, 50)}, 'epoch': 3, 'kept': {'x': [1, 2]}})
    yield f / 'fuzz.pt', runs.load_checkpoint
    database = labels.LabelDatabase(f / 'fuzz.sqlite', lambda ids: [i % 3 for i in ids], 99, 'abc')
    database.query(range(30, 60), 0, [(1, 0.5, 1, 0)] * 30, labels.Estimate(0.5, 0.2, 0.8, 30))
    database.db.close()
    yield f / 'fuzz.sqlite', use_database
    tables = b'id,label\n1,cat\n2,dog\n\n19,1\n3,\n', b'"1";"cat"\r\n2;0\r\n', '1\tcat\n'.encode('utf-16')
    for i, table in enumerate(tables):
        (f / f'{i}.csv').write_bytes(table)
        yield f / f'{i}.csv', use_answers
    for method in 'simclr', 'query':
        shutil.copytree(finished(method), f / 'runs' / method)
        for name in 'config.json', 'metrics.json', 'log.jsonl':
            yield f / 'runs' / method / name, use_run


def read_damaged(cases, seed=0):
    """{file: [times read, times refused]} of damaged files of all formats. Asserts that nothing but a
    ValueError or an OSError of one line that names the file comes, soon."""
    rng, counts = np.random.default_rng(seed), {}
    with folder() as f, contextlib.redirect_stderr(io.StringIO()):
        for path, read in formats(f, rng):
            whole, count = path.read_bytes(), counts.setdefault(path.name, [0, 0])
            for case in range(cases // 200 if read is use_run else cases // 12):       # a run takes long
                what, began = f'{path.name}, seed {seed}, case {case}', time.monotonic()
                path.write_bytes(damage(whole, rng) if rng.integers(4) else whole)
                if path.suffix == '.json' and rng.integers(4):
                    path.write_bytes(strange_json(whole, rng))
                try:
                    read(path)
                    count[0] += 1
                except (ValueError, OSError) as e:
                    named = path.stem in str(e) or path.parent.name in str(e)
                    assert '\n' not in str(e) and named, f'{what}: {e!r}'
                    count[1] += 1
                except Exception as e:
                    raise AssertionError(f'{what}: {e!r} instead of a ValueError') from e
                assert time.monotonic() - began < 20, f'{what} took too long'
            path.write_bytes(whole)
    return counts


def fuzz(cases):
    """Read so many damaged files, by seeds of the clock; prints what was tried, or what finds a fault."""
    seed, done = time.time_ns() % 10 ** 9, 0
    while done < cases:
        counts = read_damaged(10_000, seed)
        done, seed = done + sum(map(sum, counts.values())), seed + 1
        print(f'seed {seed - 1}, {done:,} files:', counts, flush=True)
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
            size = int(10 ** rng.uniform(2.5, 5.3))           # of any file; the error itself has room
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
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
    """(exit code or minus the signal, what it said, seconds) of ssl.py in a fork that suffers the fault."""
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


def all_results(there):
    """The results of a finished run, with its labels."""
    found = results(there)
    if (there / 'labels.sqlite').exists():
        with contextlib.closing(sqlite3.connect(there / 'labels.sqlite')) as db:
            for name in 'queries', 'rounds':
                found[name] = db.execute(f'SELECT * FROM {name}').fetchall()
    return found


def break_and_resume(kind, cwd, twin, took, rng):
    """(faults survived, what went wrong or None) of one run, broken up to 12 times and resumed to its end."""
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
    differ = differences(twin, all_results(there))
    return story, f'{kind}: {story}: {differ} are not as in its unbroken twin' if differ else None


def soak(minutes):
    """Break runs of every method at random for so long, resume each to its end, and compare it with its
    unbroken twin. Prints the figures; 1 if anything was lost."""
    seed, until = time.time_ns() % 10 ** 9, time.monotonic() + 60 * minutes
    rng, twins, stories, failures = np.random.default_rng(seed), {}, [], []
    print(f'seed {seed}', flush=True)
    with place() as cwd:
        run(*tiny('ae', '--name', 'warm'))                    # what torch imports late is then in each fork
        while time.monotonic() < until:
            kind = list(KINDS)[rng.integers(len(KINDS))]
            if kind not in twins:
                code, said, took = launch([*KINDS[kind], '--name', 'twin'], cwd)
                assert code == 0, said
                twins[kind] = all_results(cwd / 'runs/twin'), took
                shutil.rmtree(cwd / 'runs/twin')
            story, failure = break_and_resume(kind, cwd, *twins[kind], rng)
            stories.append(story)
            failures += [failure] if failure else []
            shutil.rmtree(cwd / 'runs/r', ignore_errors=True)
    print('\n\n'.join(failures[:20]))
    print(f'{sum(map(len, stories)):,} faults in {len(stories):,} runs of {len(twins)} kinds, each resumed '
          f'to its end: {len(failures)} differ or failed')
    return 1 if failures else 0
