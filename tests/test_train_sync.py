"""Nothing in a training step makes the CPU wait for a GPU: tried on the meta device, which has no numbers."""
from helpers import cli, raises
import contextlib
from functools import partial
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import augment
import pretrain
import query
import runs

META = torch.device('meta')
WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select', 'unique', '_unique2', 'equal', 'is_nonzero'}
VIEWS = ['--blur', '1', '--cutout', '0.3', '--grey', '0.1']


class Dispatch(TorchDispatchMode):
    """If strict, RuntimeError for what waits: values that Python reads, boolean masks, copies of a device."""

    def __init__(self, strict=True):
        super().__init__()
        self.strict = strict

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, kwargs = op.overloadpacket.__name__, dict(kwargs or {})
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        masks = name.startswith('index') and any(v.dtype == torch.bool for v in tensors[1:])
        devices = {v.device for v in tensors}
        if name == '_to_copy' and kwargs.get('device'):
            devices.add(torch.device(kwargs['device']))
        copied = name in ('_to_copy', 'copy_') and len(devices) > 1
        if self.strict and (name in WAITS or masks or copied):
            raise RuntimeError(f'{name} waits for the device')
        if 'generator' in kwargs:
            kwargs['generator'] = None                        # the meta device has none
        return op(*args, **kwargs)


@contextlib.contextmanager
def no_waiting():
    """Refuses tensors of Python's numbers too: their copy to a GPU waits for all that was asked of it."""
    def refuse(*given, **options):
        raise RuntimeError('a tensor of numbers waits for the device')
    with Dispatch(), mock.patch.object(torch, 'tensor', refuse), \
            mock.patch.object(torch.Tensor, 'new_tensor', refuse):
        yield


def step(method, *flags):
    """Objective and gradients of a step of a method on the meta device; the first step may make constants."""
    args = cli().parse(['--method', method, *flags])[0]
    args.amp = False
    shape, g = (3, 16, 16), torch.Generator()
    x, x_u8 = torch.empty(8, *shape, device=META), torch.empty(8, *shape, device=META, dtype=torch.uint8)
    y, near = torch.zeros(8, device=META).long(), torch.zeros(8, 3, device=META).long()
    config = {'args': vars(args), 'data': {'shape': shape, 'classes': range(10)}}
    model = runs.build(config).to(META).train()
    given, follow = (x, g), lambda: None
    if method in ('classify', 'cluster'):
        objective = partial(query.classification, views=pretrain.views_of(args), mixup=args.mixup)
        given = x, y, g
    elif method == 'query':
        objective = partial(query.consistency, labelled=(x_u8, y), views=pretrain.views_of(args))
        follow = partial(model.follow, args.ema)
    else:
        objective = pretrain.objective_of(args)
    if method == 'simclr':
        objective = partial(pretrain.with_neighbours, images=x_u8.__getitem__, objective=objective)
        given = x, near, g
    for mode in Dispatch(strict=False), no_waiting():
        with mode:
            loss, parts = objective(model, *given)
            loss.backward()
            follow()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(v.device == META for v in (loss, *parts.values(), *(p.grad for p in learned))), method


def test_no_step_waits_for_the_device_or_leaves_a_tensor_behind_on_the_cpu():
    for method, *flags in (
            ['ae'], ['conv', '--noise', '0.1'], ['vae'], ['classify', *VIEWS], ['query', *VIEWS],
            ['cluster', *VIEWS], ['simclr', '--recon', '1', '--noise', '0.1', *VIEWS]):
        step(method, *flags)


def test_what_waits_is_found():
    x = torch.empty(8, 4, device=META)
    for waits in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu(), lambda: x.new_tensor([1.0]),
                  lambda: torch.tensor(1.0, device=META), lambda: torch.ones(8).to(META)):
        with no_waiting(), raises(RuntimeError, 'waits for the device'):
            waits()
    with raises(RuntimeError), mock.patch.object(augment, 'cutout', lambda x, *_: x * torch.rand(16, 16)):
        step('simclr', '--cutout', '0.3')                  # a tensor forgotten on the CPU
