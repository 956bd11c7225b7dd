"""The template of report.html, and the style sheet that the study's report shares.

Both live in a module so that they are always installed with the code.
"""

from string import Template

STYLE = """\
  :root { color-scheme: light dark;
          --page: #ffffff; --ink: #222a33; --soft: #5b6672; --line: #dfe3e8; --tint: #f5f7f9; --accent: #2563a8; }
  @media (prefers-color-scheme: dark) {
    :root { --page: #14191f; --ink: #e2e7ed; --soft: #a3afbb; --line: #36404b; --tint: #1f262e; --accent: #82b4ee; }
  }
  body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
         font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
  h1 { font-size: 1.7rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
  h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
  p, dd { max-width: 46rem; overflow-wrap: break-word; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; }
  .tiles div { background: var(--tint); border-radius: 8px; padding: .8rem 1rem; }
  .tiles div:first-child b { color: var(--accent); }
  .tiles b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
  .tiles span, figcaption, .small { color: var(--soft); font-size: .88rem; }
  .remark { border-left: 4px solid var(--accent); padding-left: .8rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-size: .92rem; }
  th, td { padding: .3rem .9rem .3rem 0; text-align: left; font-weight: 400; border-bottom: 1px solid var(--line); }
  td { font-variant-numeric: tabular-nums; white-space: nowrap; }
  .pairs th { vertical-align: top; white-space: nowrap; }
  .pairs td { white-space: normal; overflow-wrap: anywhere; }
  .scores th, .scores td { padding-right: 2rem; }
  .scores tr:first-child th { font-weight: 600; }
  .scores td:nth-child(2) { font-weight: 600; }
  dt { font-weight: 600; margin-top: .6rem; }
  dd { margin: 0; }
  figure { margin: 1rem 0 0; }
  img { width: 100%; height: auto; box-sizing: border-box; padding: .4rem; background: #ffffff;
        border: 1px solid var(--line); border-radius: 8px; }
  figcaption { max-width: 46rem; margin-top: .4rem; }
  pre { background: var(--tint); border-radius: 8px; padding: .8rem 1rem; white-space: pre-wrap;
        overflow-wrap: anywhere; font-size: .88rem; }
  pre span { display: inline-block; max-width: 100%; }
  details { margin-top: .8rem; }
  summary { cursor: pointer; color: var(--accent); }
  @media (max-width: 40rem) {
    body { padding: 1.25rem 1rem 3rem; }
    .tiles { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
    .scores th, .scores td { padding-right: 1rem; }
  }
"""

PAGE = Template(
    """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
"""
    + STYLE
    + """\
  figure { max-width: 46rem; }
  .key { list-style: none; margin: .6rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem;
         font-size: .88rem; }
  .key li { overflow-wrap: anywhere; }
  .key i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
  @media (min-width: 40rem) { .key.phone { display: none; } }
</style>
</head>
<body>
<h1>$title</h1>
<div class="tiles">$summary</div>

<h2>Is the representation any good?</h2>
<p>An encoder has learnt something if its features do better than raw pixels and better than the same encoder before
training. All three are evaluated on the same test images with the same protocol. Training used no labels.</p>
$remarks
$scores
$notes
<p class="small">BatchNorm statistics, if the encoder has any, were recomputed before the evaluation, in one pass
over the evaluated training images without augmentation. Raw pixels have no embedding, so alignment and uniformity do
not apply to them. Images larger than 32 x 32 are averaged down to about 1,000 raw values. A dash marks a score that was
not measured.</p>
<details><summary>What the measures mean</summary><dl>$measures</dl></details>

<figure>
$embedding
$key
<figcaption>Each point is a test image, coloured by its class if it has a label. t-SNE keeps neighbours close together;
fewer than 50 images are placed by their two principal components instead. Left: raw pixels. Right: features of the
trained encoder. Clear islands of one colour mean that the encoder has grouped the images of a class without ever seeing
a label. Distances between islands mean nothing.</figcaption>
</figure>

<h2>How did training go?</h2>
<figure>
$curves
<figcaption>The loss falls as the views of an image become easier to tell apart from other images. In runs of two
epochs or more, the heavy line is the mean over each epoch. The loss trades off alignment (views of one image together)
and uniformity (different images apart). Both should settle, and uniformity must not rise back to 0, which would mean
collapse. The learning rate warms up, then follows half a cosine.</figcaption>
</figure>
<figure>
$views
<figcaption>Examples of the augmentation, on test images. The top row shows the images, and the two rows below show
random views of them. The loss pulls the two views of an image together, so the features learn to ignore the differences
between views.</figcaption>
</figure>

<h2>Is the loss computed correctly?</h2>
$verification

<h2>Repeat the run and use the encoder</h2>
<pre>$command</pre>
<p>Training took $training_seconds s and the evaluation $evaluation_seconds s. This code loads the encoder without its
head and finds the most similar images:</p>
<pre>import torch
from fastntxent import retrieve
from fastntxent.simclr import load_encoder

encoder = load_encoder($folder)
with torch.no_grad():
    # images: float in [0, 1],
    # (N, $channels, $height, $width)
    features = encoder(images)
found = retrieve(features, features, k=6)
# found.indices is (N, 6):
# each image itself, then the nearest</pre>
<details><summary>All settings</summary>$settings</details>
<details><summary>Data and environment</summary>$environment</details>
$data_notes
</body>
</html>
"""
)
