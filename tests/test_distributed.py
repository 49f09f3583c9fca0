"""Tests of distributed.py."""
from helpers import HERE, close, folder, python, randn
import os
import unittest
from unittest import mock

import torch

import distributed

TWO_STEPS = '''
import sys, torch
from unittest import mock
import augment, distributed, nets, pretrain
from device import generator
def two_steps():
    torch.manual_seed(0)
    model = distributed.sync_batchnorm(nets.build('simclr', 'resnet', (1, 8, 8), 0.1)).train()
    opt, seen = torch.optim.SGD(model.parameters(), 0.1), []
    x1, x2 = torch.rand(2, 12, 1, 8, 8, generator=generator('cpu', 0))
    for step in range(2):
        ids = distributed.share(torch.arange(6 * step, 6 * step + 6))
        with mock.patch.object(augment, 'augment', lambda x, views, g: torch.cat([x1[ids], x2[ids]])):
            loss, _ = pretrain.contrastive(model, x1[ids], None, 0.2)
        opt.zero_grad()
        loss.backward()
        seen.append(distributed.average_gradients(model, loss).item())
        opt.step()
    return seen, model.state_dict()
if __name__ == '__main__':
    torch.set_num_threads(1)
    distributed.start(torch.device('cpu'))
    result = two_steps()
    assert distributed.from_first([distributed.rank()]) == [0] and distributed.world() == 2
    if distributed.rank() == 0:
        torch.save(result, sys.argv[1])
    distributed.stop()
'''


def test_two_processes_with_half_a_batch_each_step_as_one_with_the_whole():
    if not torch.distributed.is_gloo_available():
        raise unittest.SkipTest('no gloo')
    with folder() as f:
        (f / 'two.py').write_text(TWO_STEPS)
        process = python('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, f / 'two.py',
                         f / 'out', PYTHONPATH=str(HERE))
        _, err = process.communicate(timeout=400)
        assert (f / 'out').exists(), err
        seen, state = torch.load(f / 'out', weights_only=True)
    here = {'__name__': 'here'}
    exec(TWO_STEPS, here)
    wanted, alone = here['two_steps']()
    assert close(seen, wanted, 1e-4) and state.keys() == alone.keys()
    for name in alone:                                        # BatchNorm buffers included
        assert close(state[name], alone[name], 1e-3), name


def test_batchnorm_across_processes_keeps_its_digits_far_from_zero():
    for at, spread in (30, 0.01), (30, 0.001):
        ours, theirs = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
        ours.__class__ = distributed.SyncBatchNorm
        x = at + spread * randn(6, 3, 4, 5)
        halves = [half.clone().requires_grad_() for half in x.split(3)]
        dims = {'dim': (0, 2, 3), 'keepdim': True}
        other = torch.stack([halves[1].mean(**dims), halves[1].var(**dims, correction=0)])
        with mock.patch.object(distributed, 'world', lambda: 2), \
                mock.patch.object(distributed, 'gather', lambda z, other=other: torch.stack([z[0], other])):
            found = ours(halves[0])
        x.requires_grad_()
        wanted, g = theirs(x), randn(3, 3, 4, 5, seed=1)
        assert close(found, wanted[:3], 2e-3)
        assert close(ours.running_mean, theirs.running_mean)
        assert close(ours.running_var, theirs.running_var, 2e-3)
        grads = torch.autograd.grad(found, halves, g)
        assert close(torch.cat(grads) * spread, torch.autograd.grad(wanted[:3], x, g)[0] * spread, 5e-3)


def test_each_process_has_a_card_of_its_own_and_a_share_of_a_batch():
    cpu, cuda = torch.device('cpu'), torch.device('cuda')
    assert distributed.own_device(cuda) == cuda
    with mock.patch.dict(os.environ, WORLD_SIZE='4', LOCAL_RANK='3'):
        assert distributed.own_device(cuda) == torch.device('cuda:3') and distributed.own_device(cpu) == cpu
    with mock.patch.multiple(distributed, world=lambda: 3, rank=lambda: 1):
        assert distributed.share(torch.arange(11)).tolist() == [3, 4, 5]       # of each as many
