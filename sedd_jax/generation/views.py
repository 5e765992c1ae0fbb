"""Views of a trajectory: in the terminal, as an HTML page that needs no network and no other file, as a GIF."""

import collections
import contextlib
import html
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import resources

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from sedd_jax.generation.trajectory import GIVEN, MASK, NOISE, Frame, Span, Trajectory, colour

FRAMES_PER_SECOND, PLAIN_FRAMES = 15, 10  # of the terminal; without one, the number of events that are printed

# Of GIFs; sizes in pixels: of the letters, and the distance of lines.
COLUMNS, MOST_LINES, SAMPLES, SECONDS, STAYS = 80, 40, 4, 8, 2
BACKGROUND, NOISE_COLOUR, GIVEN_COLOUR = "#16161d", "#55556a", "#f5f5f5"
SIZE, HEIGHT = 16, 22


@contextlib.contextmanager
def screen(trajectory: Trajectory) -> Iterator[Callable[[Frame], None]]:
    """Gives a function that shows a frame on stderr, as lines of text if that is no terminal. Last frames stay."""
    console = Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        yield lambda frame: _print(console, trajectory, frame)
        return
    last = collections.deque[Frame](maxlen=1)
    draw = lambda: Group(*(panel for frame in last for panel in _panels(trajectory, frame)))  # noqa: E731
    with Live(console=console, get_renderable=draw, refresh_per_second=FRAMES_PER_SECOND, vertical_overflow="crop"):
        yield last.append


def _panels(trajectory: Trajectory, frame: Frame) -> Iterator[Panel | Text]:
    for index, spans in enumerate(trajectory.read(frame), frame.first):
        text = Text.assemble(*((span.text, _style(span, frame.length, "dim", "bold")) for span in spans))
        yield Panel(text, title=f"sample {index}", title_align="left", border_style="dim")
    yield Text(f"step {frame.number} of {frame.length}")


def _print(console: Console, trajectory: Trajectory, frame: Frame) -> None:
    due = frame.number == frame.length or frame.number % -(-frame.length // PLAIN_FRAMES) == 0
    for index, spans in enumerate(trajectory.read(frame) if due else (), frame.first):
        text = "".join(span.text for span in spans).replace("\n", "\u2424")
        line = f"step {frame.number} of {frame.length}, sample {index}: {text}"
        console.print(line, markup=False, emoji=False, soft_wrap=True)


def _style(span: Span, length: int, noise: str, given: str) -> str:
    return {NOISE: noise, GIVEN: given}.get(span.step) or colour(span.step, length)


def page(trajectory: Trajectory, *, title: str, text: str) -> str:
    """page.html with the samples. title and text stand above them; all are escaped."""
    samples = [_histories(trajectory, sample) for sample in sorted(trajectory.samples)]
    data = {"length": trajectory.length, "numbers": trajectory.numbers, "samples": samples}
    # Within a script element, "<" alone could end it or begin a comment.
    content = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    values = {"title": html.escape(title), "text": html.escape(text), "mask": MASK, "data": content}
    template = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda field: values[field[1]], template)


def _histories(trajectory: Trajectory, sample: int) -> list[list[list]]:
    """For each token, the [index of the frame, text, step] of its first state and of each later change."""
    tokens = zip(*(trajectory.at(sample, number) for number in trajectory.numbers), strict=True)
    return [[[i, *span] for i, span in enumerate(spans) if i == 0 or span != spans[i - 1]] for spans in tokens]


def gif(trajectory: Trajectory, path: str | pathlib.Path) -> None:
    """Writes the first SAMPLES samples, cut to MOST_LINES lines; the last frame stays for STAYS seconds."""
    from matplotlib import font_manager  # here, since it is slow to import
    from PIL import Image, ImageDraw, ImageFont

    frames = [_lines(trajectory, number) for number in trajectory.numbers]
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), SIZE)
    width = round(font.getlength(" "))
    size = (COLUMNS + 2) * width, (min(MOST_LINES, max(map(len, frames))) + 1) * HEIGHT
    images = []
    for lines in frames:
        images.append(Image.new("RGB", size, BACKGROUND))
        draw = ImageDraw.Draw(images[-1])
        for row, line in enumerate(lines[:MOST_LINES]):
            for column, (letter, fill) in enumerate(line, 1):
                draw.text((column * width, (row + 0.5) * HEIGHT), letter, fill, font)
    # The last frame has all colours. With one palette, frames differ only where text has changed.
    palette = images[-1].quantize()
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    milliseconds = 1000 // min(20, max(2, round(len(images) / SECONDS)))
    durations = [milliseconds] * (len(images) - 1) + [milliseconds + 1000 * STAYS]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def _lines(trajectory: Trajectory, number: int) -> list[list[tuple[str, str]]]:
    """The samples after event `number`, each and a blank line, as lines of (letter, colour). MASK takes its space."""
    lines: list[list[tuple[str, str]]] = []
    for sample in sorted(trajectory.samples)[:SAMPLES]:
        lines.append([])
        last = trajectory.at(sample, trajectory.length)
        for span, final, shown in zip(trajectory.at(sample, number), last, _wrapped(last), strict=True):
            text = {final.text: shown, MASK: re.sub(".", MASK, shown)}.get(span.text, span.text)
            fill = _style(span, trajectory.length, NOISE_COLOUR, GIVEN_COLOUR)
            for character in text:
                if character == "\n" or len(lines[-1]) == COLUMNS:
                    lines.append([])
                if character != "\n":
                    lines[-1].append((character, fill))
        lines.append([])
    return lines + [[(character, NOISE_COLOUR) for character in f"step {number} of {trajectory.length}"]]


def _wrapped(spans: Sequence[Span]) -> Iterator[str]:
    """The texts of the spans, with newlines in place of the spaces where a line is full."""
    text = "".join(span.text for span in spans)
    wrapped = iter(re.sub(rf"(.{{1,{COLUMNS}}})( |$)", lambda line: line[1] + "\n" * len(line[2]), text, flags=re.M))
    return ("".join(itertools.islice(wrapped, len(span.text))) for span in spans)
