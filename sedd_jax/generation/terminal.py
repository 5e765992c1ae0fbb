"""Samples that crystallise in the terminal, on stderr; plain lines where that is none."""

import colorsys
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from sedd_jax.generation.film import Frame, Script
from sedd_jax.generation.pieces import GIVEN, NOISE, Piece, hue

FRAMES_PER_SECOND = 15
# Without a terminal, about so many events are told of.
PLAIN_FRAMES = 10


@contextmanager
def screen(script: Script, console: Console | None = None) -> Iterator[Callable[[Frame], None]]:
    """A function that shows a frame. The last frame of each batch stays."""
    console = console or Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        yield lambda frame: _plain(console, script, frame)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        shown = float("-inf")

        def show(frame: Frame) -> None:
            nonlocal shown
            if frame.number == frame.length or time.monotonic() - shown > 1 / FRAMES_PER_SECOND:
                live.update(_picture(script, frame), refresh=True)
                shown = time.monotonic()

        yield show


def style(piece: Piece, length: int) -> str:
    if piece.step == NOISE:
        return "dim"
    if piece.step == GIVEN:
        return "bold"
    red, green, blue = colorsys.hls_to_rgb(hue(piece.step, length) / 360, 0.65, 0.8)
    return f"rgb({round(255 * red)},{round(255 * green)},{round(255 * blue)})"


def _picture(script: Script, frame: Frame) -> Group:
    panels = []
    for index, parts in enumerate(script.read(frame), frame.first):
        text = Text.assemble(*((piece.text, style(piece, frame.length)) for piece in parts))
        panels.append(Panel(text, title=f"sample {index}", title_align="left", border_style="dim"))
    return Group(*panels, Text(f"step {frame.number} of {frame.length}"))


def _plain(console: Console, script: Script, frame: Frame) -> None:
    if frame.number != frame.length and frame.number % -(-frame.length // PLAIN_FRAMES):
        return
    for index, parts in enumerate(script.read(frame), frame.first):
        text = "".join(piece.text for piece in parts).replace("\n", "\u2424")
        line = f"step {frame.number} of {frame.length}, sample {index}: {text}"
        console.print(line, markup=False, emoji=False, soft_wrap=True)
