"""report.html: what a run learned, and what runs compare to, each as one HTML file that stands alone.

Nothing is loaded from anywhere: pictures are inside as PNG, curves as SVG. Every page is well-formed XML too.
"""
import base64
import bisect
import json
import math
import re
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
import labels
import runs
import tsne
from report import compare, kind, measures, png, sheet


# ------------------------------------------------------------------------------------- parts of a page

def text(value):
    """Anything as text that a page shows and never reads as markup; what can not be shown becomes a mark."""
    return escape(''.join(c if c.isprintable() or c == '\n' else '\ufffd' for c in str(value)))


def page(title, *parts):
    """A whole page as bytes: page.html, whose policy forbids it to load anything, with these parts."""
    frame = Path(__file__).with_name('page.html').read_text(encoding='utf-8')
    return frame.replace('<!--title-->', text(title)).replace('<!--body-->', '\n'.join(filter(None, parts))).encode()


def section(title, *parts):
    """A headed part of a page; nothing if its parts are."""
    return f'<section><h2>{text(title)}</h2>{"".join(parts)}</section>' if any(parts) else ''


def grid(rows, head=None):
    """Rows of cells as an HTML table that scrolls by itself if it must."""
    def row(cells, tag):
        return '<tr>' + ''.join(f'<{t}>{text(c)}</{t}>' for c, t in zip(cells, ['th', *[tag] * len(cells)])) + '</tr>'
    top = f'<thead>{row(head, "th")}</thead>' if head else ''
    return f'<div class="scroll"><table>{top}<tbody>{"".join(row(r, "td") for r in rows)}</tbody></table></div>'


def details(summary, body, opened=False):
    state = ' open="open"' if opened else ''
    return f'<details{state}><summary>{text(summary)}</summary>{body}</details>'


def terms(pairs):
    return '<dl>' + ''.join(f'<dt>{text(k)}</dt><dd>{text(v)}</dd>' for k, v in pairs) + '</dl>'


def bars(title, names, values, form='{:.2f}'):
    """A bar for each name, the longest as wide as there is room."""
    shares = [v / max([*values, 1e-9]) for v in values]
    return f'<div class="card bars"><h3>{text(title)}</h3>' + ''.join(
        f'<div class="bar"><span>{text(n)}</span><i style="width:{s:.1%}"></i><b>{form.format(v)}</b></div>'
        for n, s, v in zip(names, shares, values)) + '</div>'


def image(blob, alt):
    """Bytes of a PNG, inside the page."""
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{base64.b64encode(blob).decode()}"/>'


def shrink(x):
    """uint8 (n, C, H, W) as float 0..1, no side over 32 px (24 in colour)."""
    x, most = x.cpu().float() / 255, 32 if x.shape[1] == 1 else 24
    share = most / max(x.shape[2:])
    return x if share >= 1 else F.interpolate(x, [max(1, round(n * share)) for n in x.shape[2:]], mode='area')


def pictures(x, captions):
    """Pictures (n, C, H, W) uint8, a caption under each."""
    return '<div class="pics">' + ''.join(
        f'<figure>{image(png(sheet(one[None], gap=0, zoom=1)), caption)}<figcaption>{text(caption)}</figcaption>'
        '</figure>' for one, caption in zip(shrink(x), captions)) + '</div>'


def mark(k):
    """Colour and shape of class k, as attributes of what <use>s a shape."""
    return f'href="#m{k % 10}" style="fill:var(--c{(k + k // 10) % 10})"'


def ticks(low, high):
    """About four round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(m for m in (5, 2, 1) if (high - low) / (m * step) >= 3)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def axes(xs, ys, x_label, y_label, H=230, numbers=True, whole=False, log=False):
    """(SVG of named axes with round numbers, function from values to places); whole: steps of 1 at least in x; log:
    x, above 0, in logarithms."""
    def ends(values):
        low, high = min(values), max(values)
        margin = (high - low) * 0.04 or abs(high) * 0.1 or 1
        return low - margin, high + margin
    scale = math.log10 if log else float
    (x0, x1), (y0, y1) = ends([scale(x) for x in xs]), ends(ys)
    def place(x, y):
        return 54 + (scale(x) - x0) / (x1 - x0) * 298, H - 38 - (y - y0) / (y1 - y0) * (H - 62)
    marks = ticks(x0, x1) if not log else [n * 10 ** e for e in range(math.floor(x0), math.ceil(x1)) for n in (
        (1, 2, 5) if x1 - x0 < 2 else (1, 3)) if x0 <= math.log10(n * 10 ** e) <= x1]
    lines = [f'<path class="axis" d="M54 24V{H - 38}H352"/><text x="4" y="13">{text(y_label)}</text>'
             f'<text class="end" x="352" y="{H - 6}">{text(x_label)}</text>']
    for v in marks if numbers else ():
        if not whole or v == round(v):
            lines.append(f'<text class="mid" x="{place(v, y0)[0]:.1f}" y="{H - 22}">{v:.6g}</text>')
    for v in ticks(y0, y1) if numbers else ():
        y = place(xs[0], v)[1]
        lines.append(f'<path class="axis" d="M54 {y:.1f}H352"/>'
                     f'<text class="end" x="49" y="{y + 4:.1f}">{v:.6g}</text>')
    return ''.join(lines), place


def legend(names, tag='span'):
    return f'<div class="legend{" keys" if tag == "button" else ""}">' + ''.join(
        f'<{tag}><svg viewBox="-5 -5 10 10"><use {mark(k)}/></svg>{text(name)}</{tag}>'
        for k, name in enumerate(names)) + '</div>'


def chart(title, series, x_label, y_label, whole=True, log=False):
    """Curves {name: [(x, y), ...]} as a card with the numbers under it; '' if there is not one finite number. log: x in
    logarithms, where it is above 0 and spans a factor of 30 or more."""
    series = {n: [(x, y) for x, y in points if y is not None and math.isfinite(y)] for n, points in series.items()}
    series = {n: sorted(points) for n, points in series.items() if points}
    if not series:
        return ''
    xs, ys = zip(*(p for points in series.values() for p in points))
    lines, place = axes(xs, ys, x_label, y_label, whole=whole, log=log and max(xs) >= 30 * min(xs) > 0)
    for k, points in enumerate(series.values()):
        at = [f'{x:.1f} {y:.1f}' for x, y in (place(*p) for p in points)]
        lines += f'<path class="curve" style="stroke:var(--c{(k + k // 10) % 10})" d="M{"L".join(at)}"/>'
        if len(points) <= 60:
            lines += ''.join(f'<use {mark(k)} x="{a.split()[0]}" y="{a.split()[1]}"><title>{x:g}: {y:.5g}</title></use>'
                             for a, (x, y) in zip(at, points))
    rows = [[f'{x:g}', *(f'{dict(p)[x]:.5g}' if x in dict(p) else '' for p in series.values())]
            for x in sorted(set(xs))]
    return (f'<div class="card"><h3>{text(title)}</h3><svg viewBox="0 0 360 230" role="img">{lines}</svg>'
            + legend(series) + details('numbers', grid(rows, [x_label, *series])) + '</div>')


def alone(drawn):
    """The first <svg> of a part of a page as the bytes of a file of its own, with the page's style and shapes."""
    frame = Path(__file__).with_name('page.html').read_text(encoding='utf-8')
    style, shapes = (re.search(f'<{tag}>.*?</{tag}>', frame, re.S)[0] for tag in ('style', 'defs'))
    box, inside = re.search('<svg( viewBox="[^"]*")[^>]*>(.*?)</svg>', drawn, re.S).groups()
    return (f'<svg xmlns="http://www.w3.org/2000/svg"{box} font-family="system-ui, sans-serif">{style}{shapes}{inside}'
            '</svg>\n').encode()


# ------------------------------------------------------------------------------------- the page of a run

UNIT = {'ae': 'squared error per pixel', 'conv': 'squared error per pixel', 'vae': 'nats per picture'}      # else nats
CURVES = [('Loss', '', {'loss': 'training', 'val_loss': 'validation', 'chance': 'by chance'}),
          ('Parts of the loss', 'nats per picture', {'recon': 'reconstruction', 'kl': 'KL term'}),
          ('Learning rate', 'a step', {'lr': 'learning rate'}),
          ('Spread of the features', 'mean standard deviation', {'std': 'on validation pictures'}),
          ('Rank of the features', 'effective dimensions', {'rank': 'on validation pictures'}),
          ('Score', 'of --search, more is better', {'score': 'score'}),
          ('Clusters against classes', '1 is best', {'acc': 'ACC', 'nmi': 'NMI', 'ari': 'ARI', 'purity': 'purity'}),
          ('Assigned as before', 'share of the pictures', {'stable': 'share'}),
          ('Criterion', 'of the clusters, sees no label', {'criterion': 'criterion'}),
          ('Speed', 'pictures a second', {'images_per_s': 'in training'})]
PNGS = [('reconstructions', 'Reconstructions', 'Validation pictures above, what the code alone gives back below.'),
        ('views', 'Views', 'Validation pictures above, two random views of each below: what the encoder has to match.'),
        ('samples', 'Samples', 'Pictures decoded from random codes.'),
        ('interpolation', 'Interpolation', 'Each row decodes the way from the code of one picture to that of another.')]


def write(folder, config, metrics, shown, classes, perplexity=30.0):
    """report.html of a run folder. shown: what was measured, from evaluate.measure or measure_classifier; for runs
    that paid for labels also asked: (pictures, rows of LabelDatabase.history, its rounds)."""
    folder, rows, args = Path(folder), runs.read_log(folder), config['args']
    names = dict(enumerate(classes))
    table = measures(metrics)
    on = f'Measured on {metrics["n"]:,} {metrics["split"]} pictures. ' if 'n' in metrics else ''
    left = f'Left out for want of labels: {", ".join(metrics["left_out"])}.' if metrics['left_out'] else ''
    parts = [f'<p>{text(args["method"])} on {text(config["data"]["name"])}. {text(on + left)}</p>',
             '<div class="tiles">', *(f'<div class="card"><span>{text(k)}</span><b>{text(v)}</b><span>{text(c)}</span>'
                                      '</div>' for k, v, c in table), '</div>', what_was_run(config, metrics)]
    charts = [chart(title, {name: [(row['epoch'], row.get(key)) for row in rows] for key, name in keys.items()},
                    'epochs', unit or UNIT.get(args['method'], 'nats')) for title, unit, keys in CURVES]
    parts.append(section('Training', '<div class="grid">' + ''.join(charts) + '</div>' if any(charts) else ''))
    for stem, title, words in PNGS:
        if (folder / f'{stem}.png').exists():
            parts.append(section(title, f'<p>{words}</p>', image((folder / f'{stem}.png').read_bytes(), title)))
    parts += [feature_maps(shown, names, perplexity, args['seed']), confusion(metrics, classes),
              most_wrong(shown, names), clusters(shown, names, args['seed']), queries(shown, classes, metrics)]
    runs.write_atomic(folder / 'report.html', page(folder.name, *parts))
    for name, drawn in (('confusion', matrix(metrics, classes)), ('iterations', next(
            (c for c, (title, _, _) in zip(charts, CURVES) if c and title == 'Clusters against classes'), ''))):
        if drawn:
            runs.write_atomic(folder / f'{name}.svg', alone(drawn))


def what_was_run(config, metrics):
    d, versions, machine = config['data'], config['versions'], config['machine']
    took = runs.clock(metrics.get('seconds') or 0)
    return section('What was run', terms([
        ('command', config['command']),
        ('data', f'{d["name"]}: {d["train"]:,} training and {d["test"]:,} test pictures {tuple(d["shape"])}, '
                 f'{len(d["classes"])} classes, SHA-256 {d["digest"][:12]}...'),
        ('time', f'{took} training' + (f', {metrics["epochs"]} epochs' if metrics.get('epochs') else '')
         + f'; {runs.clock(metrics.get("measuring_seconds") or 0)} measuring'),
        ('machine', f'{machine["device"]}, {machine["threads"]} threads, {machine["system"]}'),
        ('versions', ', '.join(f'{k} {v}' for k, v in versions.items()))]),
        details('every argument', terms(sorted(config['args'].items()))))


def feature_maps(shown, names, perplexity, seed, most=2000):
    """The features in two dimensions, by PCA and t-SNE; pointing at one shows its picture."""
    if len(shown['h']) < 4 or not shown['h'].isfinite().all():
        return ''
    ids = evaluate.sample(len(shown['h']), most, seed)
    by = 'class' if 'y' in shown else 'predicted class' if 'probs' in shown else None
    guess = shown['probs'].argmax(1).cpu()[ids] if 'probs' in shown else None
    true = shown['y'].cpu()[ids] if 'y' in shown else guess
    kind = true if by else torch.zeros(len(ids), dtype=torch.int64)
    order = kind.argsort(stable=True)                                       # as the points stand in the SVG
    ids, kind = ids[order], kind[order].tolist()
    words = [str(names.get(k, k)) if by == 'class' else '' for k in kind]
    if guess is not None:
        words = [f'{w}\npredicted {names.get(g, g)}'.strip() for w, g in zip(words, guess[order].tolist())]
    h = shown['h'].cpu()[ids].float()
    y = evaluate.principal(h)
    share = 100 * y.var(0) / (h - h.mean(0)).var(0).sum().clamp(min=1e-30)
    drawn = scatter('Principal components', y.tolist(), kind, *(
        f'component {i + 1}, {share[i]:.0f} % of the variance' for i in range(2)))
    if perplexity:
        y, kl = tsne.tsne(h, perplexity)
        drawn += scatter(f't-SNE: perplexity {min(perplexity, (len(h) - 1) / 3):g}, KL {kl:.2f} nats', y.tolist(),
                         kind, 't-SNE 1: only nearness has a meaning', 't-SNE 2', numbers=False)
    x, columns = shrink(shown['x'][ids]), 50
    sprites = base64.b64encode(png(sheet(*x.split(columns), gap=0, zoom=1))).decode()
    known = json.dumps({'w': x.shape[3], 'h': x.shape[2], 'columns': columns, 'words': words,
                        'sheet': f'data:image/png;base64,{sprites}'})
    for c in '<>&':
        known = known.replace(c, f'\\u{ord(c):04x}')
    return section('Features in two dimensions', f'<p>{len(ids):,} pictures{f", coloured by {by}" if by else ""}. '
                   f'Point at one or tap it to see it{"; a name shows its class alone" if by else ""}.</p>',
                   legend([names.get(k, k) for k in sorted(set(kind))], 'button') if by else '',
                   f'<div class="grid wide map">{drawn}</div><div id="tip"><i></i><span></span></div>'
                   f'<script>window.D = {known};</script>')


def scatter(title, points, kind, x_label, y_label, numbers=True):
    """Points (N, 2) whose colour and shape is their kind, as a card; both axes on one scale if they have none."""
    lines, place = axes(*zip(*points), x_label, y_label, H=330, numbers=numbers)
    for number, k in enumerate(sorted(set(kind))):
        at = (place(*p) for p, own in zip(points, kind) if own == k)
        shape, style = mark(number).split(' ')
        lines += f'<g {style}>' + ''.join(f'<use {shape} x="{a:.1f}" y="{b:.1f}"/>' for a, b in at) + '</g>'
    return (f'<div class="card"><h3>{text(title)}</h3><svg viewBox="0 0 360 330" role="img">{lines}'
            '<circle class="ring" r="0"/></svg></div>')


def confusion(metrics, classes):
    """Confusion matrix with its numbers and F1 of each class."""
    if 'confusion' not in metrics:
        return ''
    drawn = matrix(metrics, classes) or (f'<p>{len(classes)} classes are too many to print; the matrix is in '
                                         'metrics.json.</p>')
    return section('Confusion and F1 by class', '<p>Rows are the true class, columns the predicted one; numbers are '
                   'pictures, the shade their share of the row. F1 is the harmonic mean of precision and recall.</p>'
                   '<div class="grid wide">', f'<div class="card scroll">{drawn}</div>',
                   bars('F1', classes, metrics['f1']), '</div>')


def matrix(metrics, classes):
    """The confusion matrix as an SVG: rows are the true class, columns the predicted one, the shade is the share of the
    row; '' where there is none or the classes are too many to read."""
    if 'confusion' not in metrics or len(classes) > 30:
        return ''
    drawn, size = '', 110 + 30 * len(classes)
    for k, (name, counts) in enumerate(zip(classes, metrics['confusion'])):
        y, name = 24 + 30 * k, name if name == str(k) else f'{k} {str(name)[:14]}'
        drawn += (f'<text class="end" x="100" y="{y + 19}">{text(name)}</text>'
                  f'<text class="mid" x="{125 + 30 * k}" y="16">{k}</text>')
        for at, n in enumerate(counts):
            x, share = 110 + 30 * at, 0.6 * n / max(1, sum(counts))
            drawn += (f'<rect x="{x}" y="{y}" width="29" height="29" style="fill:rgba(var(--tint),{share:.3f})"/>'
                      f'<text class="mid count" x="{x + 15}" y="{y + 19}">{n}</text>')
    return f'<svg viewBox="0 0 {size} {size - 80}" style="min-width:{size // 2 + 80}px">{drawn}</svg>'


def most_wrong(shown, names, n=24):
    """The wrong predictions that were held with the most confidence."""
    if 'probs' not in shown or 'y' not in shown:
        return ''
    sure, guess = shown['probs'].max(1)
    ids = torch.where(guess == shown['y'], -1, sure).argsort(descending=True)[:n]
    ids = ids[guess[ids] != shown['y'][ids]]
    captions = [f'{names.get(y, y)}, taken for {names.get(g, g)}, {p:.1%}' for y, g, p in zip(
        *(v[ids].tolist() for v in (shown['y'], guess, sure)))]
    return section('Most confidently wrong', pictures(shown['x'][ids.cpu()], captions)) if len(ids) else ''


def clusters(shown, names, seed, n=8):
    """Of each cluster its medoid first, then members drawn at random."""
    if 'clusters' not in shown:
        return ''
    out, h, matched = '', F.normalize(shown['h'], dim=1), 'mapping' in shown
    for k in range(min(30, len(shown['centres']))):
        members = (shown['clusters'] == k).nonzero().flatten()
        if len(members):
            medoid = members[(h[members] - shown['centres'][k]).square().sum(1).argmin()].cpu()
            ids = torch.cat([medoid[None], members.cpu()[evaluate.sample(len(members), n - 1, seed, 'members', k)]])
            name = f': {text(names.get(shown["mapping"].get(k), "no class"))}' if matched else ''
            true = [names.get(v, v) for v in shown['y'].cpu()[ids].tolist()] if matched else [''] * len(ids)
            out += f'<h3>Cluster {k}{name}, {len(members):,} pictures</h3>' + pictures(shown['x'][ids], true)
    return section('Clusters', '<p>Each with its medoid first, then members drawn at random'
                   f'{"; with the class it is matched to, and their true class" if matched else ""}.</p>', out)


def estimates(rounds, rows):
    """[(labels paid for until then, accuracy estimated from them in percent or None)] of LabelDatabase.rounds and its
    history."""
    came = [r for _, _, r, _ in rows]
    return [(bisect.bisect_left(came, r), estimate and 100 * estimate) for r, (_, estimate) in rounds.items()]


def queries(shown, classes, metrics):
    """The labels paid for, in their order: how many of each class, the estimate of each round, the pictures."""
    if 'asked' not in shown:
        return ''
    x, rows, rounds = shown['asked']
    curve, spent = estimates(rounds, rows), len(rows)
    final = [(spent, 100 * metrics['accuracy'])] if 'accuracy' in metrics else []
    out, most = '', 1000 // x.shape[1]
    for r in dict.fromkeys(row[2] for row in rows[:most]):
        mine = [i for i, row in enumerate(rows[:most]) if row[2] == r]
        captions = [classes[y] + (f', not {classes[guess]}' if guess not in (None, y) else '')
                    for _, y, _, guess in (rows[i] for i in mine)]
        out += details(f'round {r}: {len(mine)} pictures', pictures(x[mine], captions), opened=not out)
    counts = [sum(row[1] == k for row in rows) for k in range(len(classes))]
    return section('Labels paid for', f'<p>{len(rows):,} in all'
                   + (f', the first {most:,} are shown' if len(rows) > most else '') + '. Under each its label; if the '
                   'classifier had believed otherwise, what.</p><div class="grid">', chart('Accuracy', {
                       'estimated from the answers': curve, 'on the test set': final}, 'labels paid for', '%'),
                   bars('Labels by class', classes, counts, '{:.0f}'), '</div>', out)


# ------------------------------------------------------------------------------------- the page of many

def curve_title(config):
    """What a curve over numbers of labels is called."""
    args = config['args']
    begun = ' and '.join(Path(f).name for f in np.atleast_1d(args.get('encoder') or 'scratch'))
    asked = ', random queries' if args['method'] == 'query' and args['pick'] == 'random' else ''
    return (args['method'] + f' from {begun}{asked}').replace(f'-seed={args["seed"]}', '')


def write_comparison(path, folders):
    """One page about many runs: the table of --compare, accuracy against labels, validation losses by method. Runs that
    differ only in the number of labels or the seed are one curve, the mean over seeds; accuracy.svg is that chart."""
    path, tested, estimated, losses = Path(path), {}, {}, {}
    for folder in map(Path, folders):
        config, name = runs.read_config(folder), folder.name
        metrics = runs.read_json(folder / 'metrics.json') if (folder / 'metrics.json').exists() else {}
        if (folder / 'labels.sqlite').exists():
            paid = labels.LabelDatabase(folder / 'labels.sqlite', None, 0, config['data']['digest'])
            estimated[name] = estimates(paid.rounds(), paid.history())
        if metrics.get('labels') and metrics.get('accuracy'):
            points = tested.setdefault(kind(config, 'labels', 'budget'), (name, config, {}))[2]
            points.setdefault(metrics['labels'], []).append(100 * metrics['accuracy'])
        losses.setdefault(config['args']['method'], {})[name] = [
            (row['epoch'], row.get('val_loss')) for row in runs.read_log(folder)]
    titles = [curve_title(config) for _, config, _ in tested.values()]
    curves = {title if titles.count(title) == 1 else f'{title}: {name}': [
        (n, sum(found) / len(found)) for n, found in points.items()]
        for title, (name, _, points) in zip(titles, tested.values())}
    lines, by_labels = compare(folders), chart('Accuracy on the test set', curves, 'labels paid for', '%', log=True)
    charts = [by_labels, chart('Accuracy estimated from the answers', estimated, 'labels paid for', '%')] + [
        chart(f'Validation loss, {method}', series, 'epochs', UNIT.get(method, 'nats'))
        for method, series in losses.items()]
    if by_labels:
        runs.write_atomic(path.with_name('accuracy.svg'), alone(by_labels))
    runs.write_atomic(path, page('Runs compared', '<p>Runs that differ only by seed share a row: mean ± standard '
                                 'deviation over seeds. Seconds are those of training.</p>', grid(lines[1:], lines[0]),
                                 section('Curves', f'<div class="grid wide">{"".join(charts)}</div>')))
