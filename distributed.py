"""Several processes as one: torchrun starts them, torch.distributed joins them.

Alone, every function here returns what it was given. With W processes each takes its share of every batch,
gradients are averaged, BatchNorm and NT-Xent see the whole batch, and only rank 0 writes files:
W processes with B / W images each make the step that one makes with B. Batch sizes are always those of
all processes together, so a run can be resumed with another number of them.
"""
import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

PATIENCE = timedelta(hours=6)     # for rank 0, which asks and measures alone


def many():
    """Did torchrun start several processes?"""
    return int(os.environ.get('WORLD_SIZE') or 1) > 1


def own_device(device):
    """The device of this process: under torchrun, the CUDA card of its machine with its number."""
    if many() and device.type == 'cuda':
        return torch.device('cuda', int(os.environ['LOCAL_RANK']))
    return device


def start(device):
    """Join the processes that torchrun started, with this one's device; returns that."""
    if many():
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        if not dist.is_initialized():               # once: a search makes many runs
            dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=PATIENCE)
    return device


def stop():
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.barrier()                              # nobody leaves while one still works
        dist.destroy_process_group()


def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(ids):
    """This process's equal share of a batch's ids; up to W - 1 at the end of the batch are left out."""
    each = len(ids) // world()
    return ids[rank() * each:(rank() + 1) * each]


def from_first(value):
    """The value that rank 0 has, of plain types and CPU tensors, on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


class Sum(torch.autograd.Function):
    """Sum of a tensor over the processes; the gradient is summed over them too."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return Sum.forward(ctx, grad.contiguous())


def gather(z):
    """Rows of all processes, (B, D) -> (W B, D), each with its gradient; as it is where gradients are off."""
    if world() == 1 or not torch.is_grad_enabled():
        return z
    rows = [z if r == rank() else torch.zeros_like(z) for r in range(world())]
    return Sum.apply(torch.cat(rows))


def mean(value):
    """Mean of a detached tensor over the processes."""
    if world() > 1:
        dist.all_reduce(value)
        value /= world()
    return value


def average_gradients(model, loss):
    """Replace every gradient by its mean over the processes; returns that of the loss."""
    loss = loss.detach()
    if world() == 1:
        return loss
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    message = mean(torch.cat([loss.view(1), *(g.flatten() for g in grads)]))
    loss, *means = message.split([1, *(g.numel() for g in grads)])
    for g, new in zip(grads, means):
        g.copy_(new.view_as(g))
    return loss[0].clone()                          # not a view that holds all gradients


def sync_batchnorm(model):
    """Let every BatchNorm of the model use the statistics of the whole batch; returns the model."""
    if world() > 1:
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose mean and variance, where gradients are on, are those of all processes, in float32.

    torch's own runs on CUDA only. Each process has equally many rows, so the mean is that of the means. The
    variance is the mean of the variances plus that between the means, which keeps its digits far from 0.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        v = x.float()
        own = torch.stack([v.mean(dims, keepdim=True), v.var(dims, correction=0, keepdim=True)])
        means, variances = gather(own.unsqueeze(0)).unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        n = x.numel() // self.num_features * world()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * n / (n - 1), self.momentum)
        v = (v - mean) * (var + self.eps).rsqrt()
        if self.affine:
            v = v * self.weight.view(mean.shape) + self.bias.view(mean.shape)
        return v.to(x.dtype)
