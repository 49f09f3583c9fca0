"""Tests: `python test_all.py` runs all, `python test_all.py WORD ...` those that hold a word in file.name.
`python test_all.py --fuzz N` reads N damaged files, `--soak MINUTES` kills and resumes runs for so long.

On a CPU, with no data set and no network, in minutes; pytest runs them too.
"""
import importlib
import sys
import time
import traceback
import unittest
from pathlib import Path

TESTS = Path(__file__).resolve().parent / 'tests'
SLOW = 2                                                      # seconds


def tests_of(path):
    """{file.test: function} of a file; one that can't be imported has one test, which fails."""
    try:
        found = vars(importlib.import_module(path.stem))
    except Exception:
        return {f'{path.stem}.import': lambda: importlib.import_module(path.stem)}
    return {f'{path.stem}.{name}': test for name, test in found.items() if name.startswith('test_')}


def error_of(test):
    """None, or what went wrong, as text; skipping is no error."""
    try:
        test()
    except unittest.SkipTest as e:
        print(f'skipped: {e}')
    except (Exception, SystemExit):
        return traceback.format_exc()


def main(words):
    sys.path.insert(0, str(TESTS))
    if words[:1] in (['--fuzz'], ['--soak']):
        import faults
        work = faults.fuzz if words[0] == '--fuzz' else faults.soak
        return work(float(words[1]))
    tests, failed = {}, 0
    for path in sorted(TESTS.glob('test_*.py')):
        tests.update(tests_of(path))
    if words:
        tests = {name: test for name, test in tests.items() if any(word in name for word in words)}
    if not tests:
        print(f'test_all.py: no test has {" or ".join(words) or "anything"} in its name', file=sys.stderr)
        return 2
    for name, test in tests.items():
        began = time.monotonic()
        error = error_of(test)
        took = time.monotonic() - began
        failed += bool(error)
        if error or took > SLOW:
            print(f'{"FAILED" if error else "slow"} {took:.1f} s {name}\n{error or ""}', end='', flush=True)
    print(f'{len(tests) - failed} passed, {failed} failed')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
