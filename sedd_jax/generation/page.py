"""A trajectory as one page of HTML that needs no network and no other file."""

import html
import json

from sedd_jax.generation.trajectory import MASK, Trajectory

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1a1a22; --soft: #70707e; --line: #d9d9e2; --light: 36% }
@media (prefers-color-scheme: dark) {
  :root { --page: #16161d; --text: #ececf2; --soft: #8d8d9c; --line: #34343f; --light: 72% } }
body { background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 0 auto; padding: 1rem }
h1 { font-size: 1.2rem; margin: 0 } p { color: var(--soft); margin: .3rem 0 1rem }
nav { position: sticky; top: 0; display: flex; gap: .8rem; align-items: center; background: var(--page);
  padding: .6rem 0; border-bottom: 1px solid var(--line) }
nav input[type=range] { flex: 1; min-width: 4rem } button { font: inherit; min-width: 5rem; padding: .2rem .6rem }
output { font-variant-numeric: tabular-nums; color: var(--soft); min-width: 8rem; text-align: right }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: .4rem;
  padding: .8rem; font: 15px/1.6 ui-monospace, monospace }
.noise { color: var(--soft); opacity: .6 } .given { font-weight: 700 }
.key { height: .5rem; border-radius: .25rem; margin-bottom: .2rem }
"""

SCRIPT = """
const film = JSON.parse(document.getElementById("film").textContent);
const scrub = document.getElementById("scrub"), play = document.getElementById("play");
const told = document.getElementById("told"), last = film.numbers.length - 1;
const hue = step => 265 - 235 * (step - 1) / Math.max(film.length - 1, 1);
const samples = film.samples.map((sample, i) => {
  const box = document.createElement("pre");
  box.setAttribute("aria-label", "sample " + i);
  const spans = sample.start.map(() => box.appendChild(document.createElement("span")));
  document.getElementById("samples").append(box);
  return {...sample, spans};
});
function put(span, [text, step]) {
  span.textContent = text;
  span.className = step < 0 ? "noise" : step ? "" : "given";
  span.style.color = step > 0 ? `hsl(${hue(step)} 75% var(--light))` : "";
  span.title = step > 0 ? "step " + step : step ? "not there yet" : "given";
}
let shown = -1;
function show(frame) {
  for (const sample of samples) {
    if (shown < 0 || frame < shown) sample.start.forEach((piece, i) => put(sample.spans[i], piece));
    for (let n = frame < shown ? 0 : shown + 1; n <= frame; n++)
      for (const [i, text, step] of sample.changes[n]) put(sample.spans[i], [text, step]);
  }
  shown = frame;
  scrub.value = frame;
  told.textContent = `step ${film.numbers[frame]} of ${film.length}`;
}
let timer = null;
function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
function start() {
  if (shown === last) show(0);
  play.textContent = "Pause";
  timer = setInterval(() => { if (shown < last) show(shown + 1); if (shown === last) stop(); },
    Math.min(400, Math.max(40, 8000 / (last + 1))));
}
play.addEventListener("click", () => timer === null ? start() : stop());
scrub.addEventListener("input", () => { stop(); show(+scrub.value); });
scrub.max = last;
document.getElementById("key").style.background = "linear-gradient(to right," +
  [0, .25, .5, .75, 1].map(share => `hsl(${265 - 235 * share} 75% var(--light))`).join() + ")";
show(0);
if (matchMedia("(prefers-reduced-motion: reduce)").matches) show(last); else start();
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{text}</p>
<nav><button id="play" type="button">Play</button>
<input id="scrub" type="range" min="0" value="0" aria-label="step"><output id="told"></output></nav>
<div class="key" id="key"></div>
<p>First step to last: the colour of a token is the step at which it appeared. Bold: given. {mask}: not there yet.</p>
<main id="samples"></main>
<script type="application/json" id="film">{film}</script>
<script>{script}</script>
</body>
</html>
"""


def render(trajectory: Trajectory, *, title: str, text: str) -> str:
    """The page. title and text stand above the samples; they and the samples are escaped."""
    data = {"length": trajectory.length, "numbers": trajectory.numbers}
    data["samples"] = [_sample(trajectory, sample) for sample in sorted(trajectory.samples)]
    # Within a script element, "<" alone could end it or begin a comment.
    content = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.format(
        title=html.escape(title), text=html.escape(text), style=STYLE, script=SCRIPT, film=content, mask=MASK
    )


def _sample(trajectory: Trajectory, sample: int) -> dict[str, list]:
    """start: the spans at first. changes: for each frame the (position, text, step) that are new in it."""
    before = trajectory.at(sample, 0)
    start, changes = before, []
    for number in trajectory.numbers:
        after = trajectory.at(sample, number)
        changes.append([[i, *new] for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new])
        before = after
    return {"start": start, "changes": changes}
