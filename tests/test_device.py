"""Tests of device.py."""
from helpers import folder, python
import platform
import sys
import unittest
from unittest import mock

import torch

import device

CPU = torch.device('cpu')


def test_a_macs_gpu_is_asked_for_by_name():
    with mock.patch.object(torch.backends.mps, 'is_available', lambda: True), \
            mock.patch.object(torch.cuda, 'is_available', lambda: False):
        assert device.pick_device() == CPU


def test_threads_heed_a_containers_quota_of_processor_time():
    threads = torch.get_num_threads()
    try:
        with folder() as f:
            for before, quota, after in (
                    (3, 'max 100000', 3), (3, '250000 100000', 2), (3, '50000 100000', 1),
                    (1, '800000 100000', 1)):
                torch.set_num_threads(before)
                (f / 'cpu.max').write_text(quota)
                device.limit_threads(f / 'cpu.max')
                assert torch.get_num_threads() == after, quota
            device.limit_threads(f / 'none')
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_is_the_default_only_where_it_is_faster():
    for speedup, wanted in (1.1, False), (2.0, True):
        with mock.patch.object(device, 'bfloat16_speedup', return_value=speedup):
            assert device.amp_by_default(CPU) is wanted
    for capability, wanted in ((7, 5), False), ((8, 0), True):
        with mock.patch.object(torch.cuda, 'get_device_capability', return_value=capability):
            assert device.amp_by_default(torch.device('cuda')) is wanted
    threads = torch.get_num_threads()
    assert 0.05 < device.bfloat16_speedup(CPU) < 50 and torch.get_num_threads() == threads


def test_generator_is_a_function_of_its_whole_key():
    keys = [(0, 1, 2), (0, 12), (0, 1, 3), (1, 1, 2), (0, 1, 2, 'val'), (0, '1', 2)]
    draws = [device.generator('cpu', *key).initial_seed() for key in keys * 2]
    assert draws[:6] == draws[6:] and len(set(draws)) == 6


def test_free_memory_heeds_a_containers_limit():
    if sys.platform != 'linux':
        raise unittest.SkipTest('Linux tells its memory')
    with folder() as f:
        def found(text):
            (f / 'memory.max').write_text(text)
            return device.free_memory(CPU, f / 'memory.max')

        assert found('4096') == 4096 and 1 << 20 < found('max') < 1 << 50 and found(str(1 << 60)) < 1 << 50


def test_numbers_too_small_to_matter_are_zero_on_every_thread():
    code = ('import argparse, commands, torch; torch.set_num_threads(2); '
            'commands.start_device(argparse.Namespace(deterministic=False, device="cpu")); '
            'print((torch.full((1 << 22,), 1e-30) * 1e-10).any().item())')
    out, err = python('-c', code).communicate(timeout=120)
    assert out == 'False\n', out + err


STEPS = '''
import ctypes, resource, sys, device
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == 'keep':
    device.keep_memory()
def step():
    blocks = [ctypes.c_void_p(libc.malloc(20 << 20)) for _ in range(4)]
    for block in blocks: libc.memset(block, 1, 20 << 20)
    for block in blocks: libc.free(block)
step(), step()
before = resource.getrusage(0).ru_minflt
for _ in range(10): step()
print(resource.getrusage(0).ru_minflt - before)
'''


def test_memory_of_a_step_is_kept_for_the_next():
    if platform.libc_ver()[0] != 'glibc':
        raise unittest.SkipTest('mallopt is of glibc')
    faults = {word: int(python('-c', STEPS, word).communicate()[0]) for word in ('keep', 'leave')}
    assert faults['keep'] < faults['leave'] / 100, faults
