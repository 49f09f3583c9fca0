from helpers import posix
import contextlib
import io

import faults


def test_runs_broken_at_random_and_resumed_equal_their_unbroken_twins():
    posix()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = faults.soak(0.1)
    assert code == 0 and ' 0 differ or failed' in out.getvalue(), out.getvalue()


def test_damaged_files_of_every_format_are_read_or_refused_in_one_sentence():
    counts = faults.read_damaged(2400)
    assert all(read for read, _ in counts.values())
    assert sum(refused > 0 for _, refused in counts.values()) >= 8
