"""What a person looks at: images as PNG, tables as text, report.html of one run and of many, TensorBoard.

A page is the file report.html with its content put in as JSON: here is what a page tells, there how it looks.
It stands alone: nothing is loaded from anywhere.
"""
import base64
import json
import os
import re
import shutil
import statistics
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import features
import runs

PNGS = 'reconstructions', 'views', 'samples', 'interpolation'           # of a run, where its method has them
PERPLEXITY = 30.0                                                       # of t-SNE


# ------------------------------------------------------------------------------------------- images

def png(image):
    """(H, W) or (H, W, 3) uint8 as the bytes of a PNG file: one chunk of zlib-compressed rows (RFC 2083)."""
    H, W = image.shape[:2]
    rows = np.zeros((H, 1 + image[0].size), np.uint8)                   # each row: filter type 0, its bytes
    rows[:, 1:] = image.reshape(H, -1)

    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

    header = chunk(b'IHDR', struct.pack('>IIBB3x', W, H, 8, 2 if image.ndim == 3 else 0))
    data = chunk(b'IDAT', zlib.compress(rows.tobytes(), 9))
    return b'\x89PNG\r\n\x1a\n' + header + data + chunk(b'IEND', b'')


def write_png(path, image):
    """Write (H, W) or (H, W, 3) uint8 as a PNG file."""
    runs.write_atomic(path, png(image))


def sheet(*rows, gap=2, zoom=2):
    """Rows of images, each (n, C, H, W) float 0..1, as one image (H', W') or (H', W', 3) uint8."""
    C, H, W = rows[0].shape[1:]
    n = max(len(row) for row in rows)
    cells = torch.full((len(rows), n, C, gap + H, gap + W), 128 / 255)
    for r, row in enumerate(rows):
        cells[r, :len(row), :, gap:, gap:] = row.detach().clamp(0, 1)
    out = cells.permute(2, 0, 3, 1, 4).reshape(C, len(rows) * (gap + H), n * (gap + W))
    out = F.pad(out, (0, gap, 0, gap), value=128 / 255)
    out = (255 * out).round().byte().numpy().repeat(zoom, 1).repeat(zoom, 2)
    return out[0] if C == 1 else out.transpose(1, 2, 0)


# ------------------------------------------------------------------------------------------ as text

# key in metrics.json, name, format in a report and in a table of runs ('': not there), convention
MEASURES = [
    ('accuracy', 'accuracy', '.2%', '.1%', 'from {labels:,} labels'),
    ('estimate', 'estimate', '.1%', '.1%', 'of the accuracy, 95 % interval, from {audits} random answers'),
    ('mse', 'MSE', '.4f', '.4f', 'of reconstructions, pixels 0..1'),
    ('ssim', 'SSIM', '.3f', '.3f', '11 taps, sigma 1.5, no padding'),
    ('psnr', 'PSNR', '.1f', '', 'dB, mean over images'),
    ('active_units', 'active units', 'd', '', 'latent units whose mean has a variance over 0.01'),
    ('knn', 'kNN', '.2%', '.1%', 'cosine, k 20, weighted; {knn_labels:,} labels'),
    ('probe', 'linear probe', '.2%', '.1%', '{probe_labels:,} labels, l2 {probe_l2:g}'),
    ('kmeans_acc', 'k-means ACC', '.3f', '.3f', 'mapping from {kmeans_mapping} labels, k {clusters}'),
    ('kmeans_nmi', 'k-means NMI', '.3f', '.3f', 'arithmetic mean of the entropies'),
    ('kmeans_ari', 'k-means ARI', '.3f', '', '0 by chance'),
    ('kmeans_purity', 'k-means purity', '.3f', '', 'rises with k'),
    ('features', 'features', 'd', '', 'effective rank {effective_rank:.1f}, deviation {feature_std:.3f}'),
    ('live_clusters', 'live clusters', 'd', '', 'of {clusters}, of sizes {sizes}'),
    ('acc', 'ACC', '.3f', '.3f', 'Hungarian, on the {mapping} labels'),
    ('nmi', 'NMI', '.3f', '.3f', 'arithmetic mean of the entropies'),
    ('ari', 'ARI', '.3f', '.3f', '0 by chance'),
    ('purity', 'purity', '.3f', '.3f', 'rises with the number of clusters'),
    ('mean_f1', 'F1', '.3f', '', 'mean over classes, of {predictor}')]
COLUMNS = [(key, name, form) for key, name, _, form, _ in MEASURES if form]
COLUMNS += [(key, key, '.0f') for key in ('labels', 'epochs', 'seconds')]


def predictor(metrics):
    """Whose predictions the F1 and the confusion matrix of a metrics.json are about."""
    if 'probe' in metrics:
        return 'the linear probe'
    return 'the matched clusters' if 'acc' in metrics else 'the classifier'


def estimate_of(metrics):
    """The estimated accuracy as text, never without its interval; of several metrics the means."""
    known = [m for m in metrics if m.get('estimate') is not None]
    if not known:
        return 'too few to say'
    mean, low, high = (100 * statistics.mean(m[key] for m in known)
                       for key in ('estimate', 'estimate_low', 'estimate_high'))
    return f'{mean:.1f}% ({low:.1f} to {high:.1f})'


def measures(metrics):
    """metrics.json as rows (name, value, convention)."""
    rows = []
    known = {'predictor': predictor(metrics), **metrics}
    for key, name, form, _, convention in MEASURES:
        if metrics.get(key) is not None:
            value = estimate_of([metrics]) if key == 'estimate' else f'{metrics[key]:{form}}'
            rows.append((name, value, convention.format(**known)))
        elif key == 'estimate' and metrics['method'] == 'query':
            rows.append((name, 'too few to say', 'under a dozen random answers'))
    return rows


def as_text(metrics):
    """metrics.json as lines of text."""
    lines = []
    if 'n' in metrics:
        lines.append(f'measured on {metrics["n"]:,} {metrics["split"]} images')
    for name, value, convention in measures(metrics):
        lines.append(f'  {name:<15} {value:<9} {convention}')
    if metrics['left_out']:
        lines.append(f'  left out for want of labels: {", ".join(metrics["left_out"])}')
    return '\n'.join(lines)


def table(lines):
    """Rows of cells as aligned text: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for first, *cells in lines:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        text.append('  '.join([first.ljust(widths[0]), *cells]))
    return '\n'.join(text)


# --------------------------------------------------------------------------------------- many runs

def read_runs(folders):
    """([(folder, config, numbers in metrics.json)], a sentence for each folder that can't be read).

    ValueError if none can be read.
    """
    found, errors = [], []
    for folder in map(Path, folders):
        path = folder / 'metrics.json'
        try:
            config = runs.read_config(folder)
            metrics = runs.read_json(path) if path.exists() else {}
            numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
            found.append((folder, config, numbers))
        except (ValueError, OSError) as e:
            errors.append(str(e))
    if errors and not found:
        raise ValueError(errors[0])
    return found, errors


def without_seed(text):
    return re.sub('-seed=[0-9]+', '', text)


def setting(config, *but):
    """What runs that differ only by seed, or in the flags `but`, have in common, as text."""
    ignored = runs.NOT_IN_IDENTITY | {'seed', 'oracle', *but}
    kept = [(key, value) for key, value in sorted(config['args'].items()) if key not in ignored]
    return without_seed(repr([config['data']['digest'], kept]))         # an encoder's name holds one too


def by_setting(found):
    """The runs in groups of those that differ only by seed; the same seed twice is no spread."""
    groups = {}
    seen = Counter()
    for run in found:
        key, seed = setting(run[1]), run[1]['args']['seed']
        groups.setdefault((key, seen[key, seed]), []).append(run)
        seen[key, seed] += 1
    return list(groups.values())


def table_rows(found):
    there = {key for *_, metrics in found for key in metrics if metrics[key] is not None}
    columns = [(key, name, form) for key, name, form in COLUMNS if key in there]
    lines = [['run', 'seeds'] + [name for _, name, _ in columns]]
    for group in by_setting(found):
        name = group[0][0].name
        if len(group) > 1:
            name = without_seed(name)
        done = [metrics for *_, metrics in group if metrics and 'score' not in metrics]     # no trials
        lines.append([name, str(len(done))] + [cell(done, key, form) for key, _, form in columns])
    return lines


def cell(done, key, form):
    """'-' without a value, the value itself, or mean±standard deviation of several seeds."""
    values = [metrics[key] for metrics in done if metrics.get(key) is not None]
    if not values:
        return '-'
    if key == 'estimate':
        return estimate_of(done)
    mean = f'{statistics.mean(values):{form}}'
    if len(values) == 1 or form == '.0f':
        return mean
    return mean + '±' + f'{statistics.stdev(values):{form}}'.rstrip('%')


def compare(folders, path):
    """Table of runs as rows of cells; writes a page at `path` with it, accuracies by labels, and losses.

    Runs that differ only by seed are one row, mean±deviation over seeds. A run that can't be read is named in
    a printed line and on the page; ValueError if none can.
    """
    found, errors = read_runs(folders)
    for error in errors:
        print(f'left out: {error}')
    losses = {}
    for folder, config, _ in found:
        curve = [(row['epoch'], row.get('val_loss')) for row in runs.read_log(folder)]
        losses.setdefault(config['args']['method'], {})[folder.name] = curve
    links = []
    for group in by_setting(found):
        links.append([])
        for folder, config, _ in group:
            links[-1].append((config['args']['seed'], os.path.relpath(folder, Path(path).parent)))
    rows = table_rows(found)
    Path(path).parent.mkdir(exist_ok=True)
    write_page(path, {
        'title': 'Runs compared',
        'table': rows,
        'links': links,
        'errors': errors,
        'accuracy': accuracy_curves(found),
        'losses': losses})
    return rows


def accuracy_curves(found):
    """{name: [(labels, accuracy)]}: runs that differ only in the labels or the seed are one curve."""
    curves = {}
    for folder, config, metrics in found:
        if metrics.get('labels') and metrics.get('accuracy'):
            name = re.sub('-(seed|labels)=[0-9.]+', '', folder.name)
            key = setting(config, 'labels')
            points = curves.setdefault(key, (name, {}))[1]
            points.setdefault(metrics['labels'], []).append(metrics['accuracy'])
    series = {}
    for name, points in curves.values():
        series[name] = [(n, statistics.mean(points[n])) for n in sorted(points)]
    return series


# ------------------------------------------------------------------------------------ the page of a run

def write_page(path, content):
    """Write report.html with this content."""
    page = Path(__file__).with_name('report.html').read_text('utf-8')
    content = json.dumps(content).replace('<', '\\u003c')               # so that no text ends the script
    runs.write_atomic(path, page.replace('CONTENT', content).encode())


def write_report(folder, config, metrics, shown):
    """report.html of a run folder.

    shown: what was measured, from evaluate.measure, measure_classifier or measure_clusters; of runs that paid
    for labels also 'asked': (images, rows of LabelDatabase.history(), LabelDatabase.rounds()).
    """
    classes = config['data']['classes']
    seed = config['args']['seed']
    content = {
        'title': folder.name,
        'config': config,
        'metrics': metrics,
        'measures': measures(metrics),
        'predictor': predictor(metrics),
        'log': runs.read_log(folder),
        'pngs': {path.stem: embedded(path.read_bytes()) for path in pngs(folder)},
        'maps': feature_maps(shown, classes, seed)}
    if 'probs' in shown and 'y' in shown:
        content['wrong'] = most_wrong(shown, classes)
    if 'clusters' in shown:
        content['clusters'] = clusters(shown, classes, seed)
    if 'asked' in shown:
        content['labels'] = paid_labels(*shown['asked'], classes)
    write_page(folder / 'report.html', content)


def pngs(folder):
    """Paths of the images that a run's method has drawn."""
    paths = [folder / f'{stem}.png' for stem in PNGS]
    return [path for path in paths if path.exists()]


def embedded(blob):
    """The bytes of a PNG as an address."""
    return 'data:image/png;base64,' + base64.b64encode(blob).decode()


def thumbnails(x, side=64):
    """Images (n, C, H, W) uint8 as float 0..1, no side longer than this."""
    scale = min(1, side / max(x.shape[2:]))
    return F.interpolate(x.cpu().float() / 255, scale_factor=scale, mode='area')


def gallery(x, captions):
    """Images (n, C, H, W) uint8 as [(address, caption)]."""
    images = []
    for image, caption in zip(thumbnails(x), captions):
        blob = png(sheet(image[None], gap=0, zoom=1))
        images.append((embedded(blob), caption))
    return images


def feature_maps(shown, classes, seed, most=1000):
    """The features of at most `most` images in two dimensions, by PCA and t-SNE, with their classes, or else
    those that were predicted."""
    ids = features.sample(len(shown['h']), most, seed)
    h = shown['h'].cpu()[ids].float()
    if len(h) < 4 or not h.isfinite().all():
        return None
    maps = {}
    if 'y' in shown:
        maps = {'by': 'class', 'kinds': shown['y'].cpu()[ids].tolist()}
    elif 'probs' in shown:
        maps = {'by': 'predicted class', 'kinds': shown['probs'].argmax(1).cpu()[ids].tolist()}
    y, kl = features.tsne(h, PERPLEXITY)
    pca = features.principal(h)
    variance = pca.var(0) / h.var(0).sum().clamp(min=1e-30)
    return {
        **maps,
        'names': classes,
        'pca': pca.tolist(),
        'variance': variance.tolist(),
        'tsne': y.tolist(),
        'kl': kl,
        'perplexity': PERPLEXITY}


def most_wrong(shown, classes, n=24):
    """Gallery of the wrong predictions that were made with the most confidence."""
    y = shown['y'].cpu()
    confidence, pred = shown['probs'].cpu().max(1)
    wrong = (pred != y).nonzero().flatten()
    ids = wrong[confidence[wrong].argsort(descending=True)[:n]]
    captions = []
    for i in ids:
        captions.append(f'{classes[y[i]]}, predicted {classes[pred[i]]}, {confidence[i]:.1%}')
    return gallery(shown['x'][ids], captions)


def clusters(shown, classes, seed, n=8):
    """Of each cluster its size, the class it is matched to, and members drawn at random."""
    found = []
    mapping = shown.get('mapping', {})
    for k in range(min(30, len(shown['centres']))):
        members = (shown['clusters'].cpu() == k).nonzero().flatten()
        ids = members[features.sample(len(members), n, seed, 'members', k)]
        captions = [classes[y] for y in shown['y'].cpu()[ids]] if mapping else [''] * n
        found.append({
            'size': len(members),
            'name': classes[mapping[k]] if k in mapping else '',
            'images': gallery(shown['x'][ids], captions)})
    return found


def paid_labels(x, rows, rounds, classes, n=24):
    """Estimated accuracy against the number of labels, labels by class, the newest predicted otherwise."""
    estimates = []
    for number, (_, estimate) in rounds.items():
        if estimate:
            before = sum(row[2] < number for row in rows)
            estimates.append((before, estimate.mean, estimate.low, estimate.high))
    other = [i for i, (_, y, _, pred) in enumerate(rows) if pred not in (None, y)][-n:]
    captions = [f'{classes[rows[i][1]]}, predicted {classes[rows[i][3]]}' for i in other]
    return {
        'estimates': estimates,
        'counts': [sum(row[1] == k for row in rows) for k in range(len(classes))],
        'other': gallery(x[other], captions)}


# --------------------------------------------------------------------------------- the end of a run

def finish(run, ds, metrics, shown, began):
    """Write report.html, TensorBoard's files if they are asked for, then metrics.json, which makes the run a
    finished one; say what it holds and where to look. began: time.monotonic() when measuring began."""
    args = run.config['args']
    rows = runs.trained(runs.read_log(run.folder))
    last = rows[-1] if rows else {'epoch': None, 'seconds': 0.0}        # nothing was trained
    metrics.update(
        method=args['method'],
        epochs=last['epoch'],
        seconds=last['seconds'],
        measuring_seconds=round(time.monotonic() - began, 1))
    write_report(run.folder, run.config, metrics, shown)
    if args['tensorboard']:
        write_tensorboard(run.folder, metrics, shown, ds.classes, args['seed'])
    run.write_metrics(metrics)
    print(f'{as_text(metrics)}\n-> {run.folder}/report.html')
    if args['tensorboard']:
        print(f'-> {run.folder}/tensorboard, which tensorboard --logdir {run.folder} shows')


def tensorboard_writer():
    """torch's SummaryWriter. ValueError, one sentence, if it or what its images need can't be imported."""
    try:
        import PIL.Image                                                # noqa: F401
        from torch.utils.tensorboard import SummaryWriter
    except Exception as e:                                              # its packages may fail in any way
        reason = ' '.join(str(e).split())
        raise ValueError('--tensorboard needs the packages tensorboard and pillow, which can not be imported '
                         f'here ({reason}); python -m pip install tensorboard pillow gets them') from None
    return SummaryWriter


def write_tensorboard(folder, metrics, shown, classes, seed, most=2000):
    """Folder `tensorboard` of a run: numbers by epoch and measures as scalars, its PNGs, and for the
    projector the features of at most `most` measured images with their classes."""
    from PIL import Image
    shutil.rmtree(folder / 'tensorboard', ignore_errors=True)
    rows = [('training', row['epoch'], row) for row in runs.read_log(folder)]
    rows.append(('measured', metrics['epochs'] or 0, metrics))
    ids = features.sample(len(shown['h']), most, seed)
    names = [classes[k] for k in shown['y'].cpu()[ids]] if 'y' in shown else None
    x = thumbnails(shown['x'][ids])
    with tensorboard_writer()(folder / 'tensorboard') as writer:
        for group, epoch, values in rows:
            for key, value in values.items():
                if isinstance(value, (int, float)) and key != 'epoch':
                    writer.add_scalar(f'{group}/{key}', value, epoch)
        for path in pngs(folder):
            image = np.array(Image.open(path))
            writer.add_image(path.stem, image, dataformats='HWC'[:image.ndim])
        square = x.shape[2] == x.shape[3]                               # its sprites are
        writer.add_embedding(shown['h'].cpu()[ids], names, x if square else None)
