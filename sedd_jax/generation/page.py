"""A trajectory as one page of HTML that needs no network and no other file."""

import html
import json

from sedd_jax.generation.trajectory import MASK, Trajectory

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.2rem; margin: 0 } p { color: GrayText; margin: .3rem 0 1rem }
nav { position: sticky; top: 0; display: flex; gap: .8rem; align-items: center; background: Canvas; padding: .6rem 0 }
nav input[type=range] { flex: 1; min-width: 4rem } button { font: inherit; min-width: 5rem; padding: .2rem .6rem }
output { font-variant-numeric: tabular-nums; color: GrayText; min-width: 8rem; text-align: right }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid GrayText; border-radius: .4rem;
  padding: .8rem; font: 15px/1.6 ui-monospace, monospace }
.noise { color: GrayText; opacity: .6 } .given { font-weight: 700 }
.key { height: .5rem; border-radius: .25rem; margin-bottom: .2rem }
"""

SCRIPT = """
const element = id => document.getElementById(id), data = JSON.parse(element("data").textContent);
const scrub = element("scrub"), play = element("play"), last = data.numbers.length - 1;
const lightness = matchMedia("(prefers-color-scheme: dark)").matches ? 72 : 36;
const colour = share => `hsl(${265 - 235 * share} 75% ${lightness}%)`;
const tokens = data.samples.flatMap((sample, i) => {
  const box = element("samples").appendChild(document.createElement("pre"));
  box.setAttribute("aria-label", "sample " + i);
  return sample.map(states => ({states, span: box.appendChild(document.createElement("span"))}));
});
let shown = 0, timer = null;
function show(frame) {
  for (const token of tokens) {
    const state = token.states.findLast(state => state[0] <= frame), [, text, step] = state;
    if (state === token.state) continue;
    token.state = state;
    token.span.textContent = text;
    token.span.className = step < 0 ? "noise" : step ? "" : "given";
    token.span.style.color = step > 0 ? colour((step - 1) / Math.max(data.length - 1, 1)) : "";
    token.span.title = step > 0 ? "step " + step : step ? "not there yet" : "given";
  }
  shown = scrub.value = frame;
  element("label").textContent = `step ${data.numbers[frame]} of ${data.length}`;
}
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
element("key").style.background = `linear-gradient(to right, ${[0, .25, .5, .75, 1].map(colour).join()})`;
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
<input id="scrub" type="range" min="0" value="0" aria-label="step"><output id="label"></output></nav>
<div class="key" id="key"></div>
<p>First step to last: the colour of a token is the step at which it appeared. Bold: given. {mask}: not there yet.</p>
<main id="samples"></main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def render(trajectory: Trajectory, *, title: str, text: str) -> str:
    """The page. title and text stand above the samples; they and the samples are escaped."""
    samples = [_histories(trajectory, sample) for sample in sorted(trajectory.samples)]
    data = {"length": trajectory.length, "numbers": trajectory.numbers, "samples": samples}
    # Within a script element, "<" alone could end it or begin a comment.
    content = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.format(
        title=html.escape(title), text=html.escape(text), style=STYLE, script=SCRIPT, data=content, mask=MASK
    )


def _histories(trajectory: Trajectory, sample: int) -> list[list[list]]:
    """For each token, the [index of the frame, text, step] of its first state and of each later change."""
    frames = [trajectory.at(sample, number) for number in trajectory.numbers]
    return [
        [[i, *span] for i, span in enumerate(spans) if i == 0 or span != spans[i - 1]]
        for spans in zip(*frames, strict=True)
    ]
