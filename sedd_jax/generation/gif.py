"""A trajectory as an animated GIF."""

import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

from sedd_jax.generation.trajectory import GIVEN, MASK, NOISE, Span, Trajectory, colour

COLUMNS, MOST_LINES, SAMPLES = 80, 40, 4
SECONDS, STAYS = 8, 2
BACKGROUND, NOISE_COLOUR, GIVEN_COLOUR = "#16161d", "#55556a", "#f5f5f5"
# In pixels: the letters, and the distance of lines.
SIZE, HEIGHT = 16, 22

# A character and its colour.
Cell = tuple[str, str]


def write(trajectory: Trajectory, path: pathlib.Path) -> None:
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
            for fill, run in itertools.groupby(enumerate(line, 1), lambda cell: cell[1][1]):
                columns, cells = zip(*run, strict=True)
                text = "".join(letter for letter, _ in cells)
                draw.text((columns[0] * width, (row + 0.5) * HEIGHT), text, fill, font)
    # The last frame has all colours. With one palette, frames differ only where text has changed.
    palette = images[-1].quantize()
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    milliseconds = 1000 // min(20, max(2, round(len(images) / SECONDS)))
    durations = [milliseconds] * (len(images) - 1) + [milliseconds + 1000 * STAYS]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def _lines(trajectory: Trajectory, number: int) -> list[list[Cell]]:
    """All samples after event `number`, a blank line between two. A masked token takes the space of the last one."""
    lines: list[list[Cell]] = []
    for sample in sorted(trajectory.samples)[:SAMPLES]:
        lines.append([])
        last = trajectory.at(sample, trajectory.length)
        for span, final, shown in zip(trajectory.at(sample, number), last, _wrapped(last), strict=True):
            text = {final.text: shown, MASK: re.sub(".", MASK, shown)}.get(span.text, span.text)
            fill = {NOISE: NOISE_COLOUR, GIVEN: GIVEN_COLOUR}.get(span.step) or colour(span.step, trajectory.length)
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
