"""A trajectory as an animated GIF."""

import functools
import pathlib

from sedd_jax.generation.trajectory import GIVEN, NOISE, UNKNOWN, Span, Trajectory, hue

COLUMNS, MOST_LINES = 96, 64
SAMPLES = 4
SECONDS, STAYS = 8, 2
BACKGROUND, NOISE_COLOUR, GIVEN_COLOUR = "#16161d", "#55556a", "#f5f5f5"
# In points; DejaVu Sans Mono, which comes with matplotlib, is 0.602 of its size wide.
SIZE, WIDTH, HEIGHT = 9, 0.602, 1.3

# One character and its colour.
Cell = tuple[str, str]


def write(trajectory: Trajectory, path: pathlib.Path) -> None:
    """Writes the first SAMPLES samples, cut to MOST_LINES lines; the last frame stays for STAYS seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.animation import PillowWriter

    frames = [_lines(trajectory, number) for number in trajectory.numbers]
    lines = min(MOST_LINES, max(map(len, frames)))
    inches = (WIDTH * SIZE * (COLUMNS + 2) / 72, HEIGHT * SIZE * (lines + 1) / 72)
    figure = pyplot.figure(figsize=inches, facecolor=BACKGROUND)
    writer = PillowWriter(fps=min(20, max(2, round(len(frames) / SECONDS))))
    with writer.saving(figure, str(path), dpi=100):
        for cells in frames:
            _paint(figure, cells[:lines])
            writer.grab_frame(facecolor=BACKGROUND)
        for _ in range(STAYS * writer.fps):
            writer.grab_frame(facecolor=BACKGROUND)
    pyplot.close(figure)


def _colour(span: Span, length: int) -> str:
    from matplotlib.colors import hsv_to_rgb, to_hex

    fixed = {NOISE: NOISE_COLOUR, GIVEN: GIVEN_COLOUR}
    return fixed.get(span.step) or to_hex(hsv_to_rgb((hue(span.step, length) / 360, 0.5, 1)))


def _lines(trajectory: Trajectory, number: int) -> list[list[Cell]]:
    """All samples after event `number`, wrapped, with a blank line between two."""
    lines: list[list[Cell]] = []
    for sample in sorted(trajectory.samples)[:SAMPLES]:
        lines.append([])
        for span in trajectory.at(sample, number):
            colour = _colour(span, trajectory.length)
            for character in span.text:
                if character == "\n" or len(lines[-1]) == COLUMNS:
                    lines.append([])
                if character != "\n":
                    lines[-1].append((character if ord(character) in _glyphs() else UNKNOWN, colour))
        lines.append([])
    return lines + [[(character, NOISE_COLOUR) for character in f"step {number} of {trajectory.length}"]]


def _paint(figure, lines: list[list[Cell]]) -> None:
    """One text artist per colour, with spaces for the letters of other colours: all letters have one width."""
    figure.texts.clear()
    for colour in {colour for line in lines for _, colour in line}:
        text = "\n".join("".join(letter if own == colour else " " for letter, own in line) for line in lines)
        figure.text(
            WIDTH * SIZE / (72 * figure.get_figwidth()),
            1 - 0.5 * HEIGHT * SIZE / (72 * figure.get_figheight()),
            text,
            color=colour,
            family="DejaVu Sans Mono",
            size=SIZE,
            linespacing=1.0,
            va="top",
            parse_math=False,
        )


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters of the font; matplotlib warns of others."""
    from matplotlib import font_manager, ft2font

    return frozenset(ft2font.FT2Font(font_manager.findfont("DejaVu Sans Mono")).get_charmap())
