"""Samples that emerge in the terminal, on stderr; as lines of text if it is not a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from sedd_jax.generation.trajectory import GIVEN, NOISE, Frame, Span, Trajectory, colour

FRAMES_PER_SECOND = 15
# The number of events that are printed without a terminal.
PLAIN_FRAMES = 10


@contextmanager
def screen(trajectory: Trajectory, console: Console | None = None) -> Iterator[Callable[[Frame], None]]:
    """Gives a function that shows a frame. The last frame of each batch stays."""
    console = console or Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        yield lambda frame: _plain(console, trajectory, frame)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        shown = float("-inf")

        def show(frame: Frame) -> None:
            nonlocal shown
            if frame.number == frame.length or time.monotonic() - shown > 1 / FRAMES_PER_SECOND:
                live.update(_picture(trajectory, frame), refresh=True)
                shown = time.monotonic()

        yield show


def style(span: Span, length: int) -> str:
    return {NOISE: "dim", GIVEN: "bold"}.get(span.step) or colour(span.step, length)


def _picture(trajectory: Trajectory, frame: Frame) -> Group:
    panels = []
    for index, spans in enumerate(trajectory.read(frame), frame.first):
        text = Text.assemble(*((span.text, style(span, frame.length)) for span in spans))
        panels.append(Panel(text, title=f"sample {index}", title_align="left", border_style="dim"))
    return Group(*panels, Text(f"step {frame.number} of {frame.length}"))


def _plain(console: Console, trajectory: Trajectory, frame: Frame) -> None:
    if frame.number != frame.length and frame.number % -(-frame.length // PLAIN_FRAMES):
        return
    for index, spans in enumerate(trajectory.read(frame), frame.first):
        text = "".join(span.text for span in spans).replace("\n", "\u2424")
        line = f"step {frame.number} of {frame.length}, sample {index}: {text}"
        console.print(line, markup=False, emoji=False, soft_wrap=True)
