"""TensorBoard: what report.html holds, once more through torch's own writer, where the package is installed."""
import shutil

import evaluate
import page
import report
import runs


def writer():
    """torch's SummaryWriter; ValueError, one sentence, if it or what its pictures need can't be imported."""
    try:
        import PIL.Image                                                   # noqa: F401, its pictures need it
        from torch.utils.tensorboard import SummaryWriter
    except Exception as e:                                                 # its own packages may fail in any way
        raise ValueError('--tensorboard needs the packages tensorboard and pillow, which can not be imported here '
                         f'({" ".join(str(e).split())}); python -m pip install tensorboard pillow gets them') from None
    return SummaryWriter


def write(folder, metrics, shown, names, seed, most=2000):
    """Folder `tensorboard` of a run: numbers by epoch and measures as scalars, its PNGs, and for the projector the
    features of at most `most` scored pictures with their classes. shown: as from evaluate.measure."""
    shutil.rmtree(folder / 'tensorboard', ignore_errors=True)
    rows = [('training', row['epoch'], row) for row in runs.read_log(folder)]
    ids, kind = evaluate.sample(len(shown['h']), most, seed), None
    if 'y' in shown:
        kind = [names[k] for k in shown['y'].cpu()[ids].tolist()]
    with writer()(folder / 'tensorboard') as board:
        for group, epoch, values in [*rows, ('measured', metrics['epochs'] or 0, metrics)]:
            for key, value in values.items():
                if isinstance(value, (int, float)) and key != 'epoch':
                    board.add_scalar(f'{group}/{key}', value, epoch)
        for stem, title, _ in page.PNGS:
            if (folder / f'{stem}.png').exists():
                picture = report.read_png(folder / f'{stem}.png')
                board.add_image(title, picture, dataformats='HWC'[:picture.ndim])
        x = page.shrink(shown['x'][ids])
        board.add_embedding(shown['h'].cpu()[ids], kind, x if x.shape[2] == x.shape[3] else None)  # it wants squares
