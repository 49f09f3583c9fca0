"""Tests of bench.py."""
from helpers import python
from unittest import mock

import torch

import bench

SETUP = bench.Setup(torch.device('cpu'), False, 0.1)


def test_the_benchmark_counts_what_ran_and_names_what_is_missing():
    process = python('bench.py', '--scale', 0.1, '--repeats', 1, '--peers', 'NT-Xent, B = 512')
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lines = [line for line in out.splitlines() if line.startswith('NT-Xent, B = 512')]
    assert ' ours ' in lines[0] and '%' in lines[0] and ' textbook ' in lines[-1] and lines[-1].endswith(' x')
    assert out.count('limit, float32') == 4 and out.count('limit, bfloat16') in (0, 4) and '100%' in out
    assert any(' lightly ' in line for line in lines) or 'left out: lightly' in err
    rows = bench.measure(bench.nt_xent(SETUP, 512), SETUP, False, 3)
    assert rows[0].flops == 3 * 2 * 1024 ** 2 * 128           # similarities, and twice their gradient
    assert len(rows[0].seconds) == 3 and min(rows[0].seconds) > 0


def test_an_epoch_is_timed_by_the_functions_of_training():
    x, model = (torch.rand(512, 1, 28, 28) * 255).byte(), bench.network(SETUP, bench.arguments(SETUP, 'ae'))
    with mock.patch.object(bench, 'images', lambda n: x[:n]), \
            mock.patch.object(bench, 'network', return_value=model):
        part = bench.epoch(SETUP, 'ae', 5120)
    for _ in range(2):                                        # each call is another epoch
        before = [p.clone() for p in model.parameters()]
        part.calls['ours']()
        assert part.amount == 512 and not all(map(torch.equal, before, model.parameters()))


def test_shares_of_the_limit_and_ratios_are_those_of_the_medians():
    def row(name, flops, *seconds):
        return bench.Row(name, None, flops, list(seconds))

    limit = bench.Part(None, 'GFLOP', {})
    measured = {'limit, float32': (limit, [row('a', 8e9, 2, 2, 3), row('b', 8e9, 1, 9, 1)]),
                'limit, bfloat16': (limit, [row('a', 8e9, 1)]),
                'part': (bench.Part(60, 'rows', {}), [row('ours', 2e9, 1, 2, 4), row('other', 0, 3, 4, 4)])}
    lines = [line.split() for line in bench.table(measured).splitlines()]
    assert [line[-1] for line in lines[1:4]] == ['50%', '100%', '100%'] and lines[2][5] == '8'
    assert lines[4] == ['part', 'ours', '2', '1-4', '30', 'rows', f'{2e9 / 2 / 8e9:.0%}']
    assert lines[5] == ['part', 'other', '4', '3-4', '15', 'rows', '2.0', 'x']


def test_seconds_are_those_of_one_call():
    clock = iter(range(1000))
    with mock.patch.object(bench.time, 'perf_counter', lambda: next(clock)):
        assert bench.timed(lambda: None, 4) == 1 / 4
