"""Tests: `python test_all.py` runs all, `python test_all.py WORD ...` those that hold a word in file.name.
`python test_all.py --fuzz N` reads N damaged files, `--soak MINUTES` kills and resumes runs for so long.

On a CPU, with no data set and no network, in minutes, a file of tests on each core; pytest runs them too.
"""
import importlib
import os
import sys
import time
import traceback
import unittest
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parent / 'tests'
SLOW = 5                                                      # seconds
sys.path.insert(0, str(TESTS))


def error_of(test):
    """None, or what went wrong, as text; skipping is no error."""
    try:
        test()
    except unittest.SkipTest as e:
        print(f'skipped: {e}')
    except (Exception, SystemExit):
        return traceback.format_exc()


def run_file(path, words):
    """(passed, failed) of the tests of a file whose file.name holds a word; prints what is slow or fails."""
    try:
        module = importlib.import_module(path.stem)
    except Exception:
        print(f'FAILED to import {path.stem}\n{traceback.format_exc()}', flush=True)
        return 0, 1
    passed = failed = 0
    for name, test in list(vars(module).items()):
        full = f'{path.stem}.{name}'
        if not name.startswith('test_') or words and not any(word in full for word in words):
            continue
        began = time.monotonic()
        error = error_of(test)
        took = time.monotonic() - began
        failed, passed = failed + bool(error), passed + (not error)
        if error or took > SLOW:
            print(f'{"FAILED" if error else "slow"} {took:.1f} s {full}\n{error or ""}', end='', flush=True)
    return passed, failed


def main(words):
    if words[:1] in (['--fuzz'], ['--soak']):
        import faults
        work = faults.fuzz if words[0] == '--fuzz' else faults.soak
        return work(float(words[1]))
    files = sorted(TESTS.glob('test_*.py'), key=lambda path: -path.stat().st_size)       # the longest first
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        passed, failed = map(sum, zip(*pool.map(partial(run_file, words=words), files)))
    print(f'{passed} passed, {failed} failed')
    return 0 if passed and not failed else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
