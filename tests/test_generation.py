"""How samples come about: watching does not change them; spans, pages and GIFs show them."""

import dataclasses
import json
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image

from sedd_jax.data.tokenizers import Bytes
from sedd_jax.generation import views
from sedd_jax.generation.generate import Generator
from sedd_jax.generation.templates import FREE, Window, parse_template
from sedd_jax.generation.trajectory import GIVEN, MASK, MOST_FRAMES, NOISE, Frame, Span, Trajectory, spans
from sedd_jax.training.trained import load_trained

MASK_ID = Bytes().vocab_size


def read(text, changed, given=None):
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    return spans(Bytes(), tokens, np.array(changed), np.zeros(len(tokens), bool) if given is None else given)


def test_a_character_of_several_tokens_is_one_span_and_empty_ones():
    found = read("a\u00e9!".encode(), [1, 2, 3, 0], np.array([False, False, False, True]))
    assert found == [Span("a", 1), Span("\u00e9", 2), Span("", 3), Span("!", GIVEN)]


def test_noise_and_control_characters_are_shown_by_signs():
    tokens = np.array([MASK_ID, 27, 98])
    found = spans(Bytes(), tokens, np.array([0, 1, 2]), np.zeros(3, bool))
    assert found == [Span(MASK, NOISE), Span("\u241b", 1), Span("b", 2)]


def make_trajectory(texts, length):
    """One sample whose tokens are written from left to right, one per event."""
    tokens = np.frombuffer(texts, np.uint8).astype(np.int32)
    trajectory = Trajectory(Bytes(), [Window(np.full(len(tokens), FREE), len(tokens))])
    for number in range(length + 1):
        done = np.arange(len(tokens)) < number
        changed = np.where(done, 1 + np.arange(len(tokens)), 0)
        trajectory.add(Frame(0, number, length, np.where(done, tokens, MASK_ID)[None], changed[None]))
    return trajectory


def test_page_escapes_what_was_drawn_and_replays_to_the_end():
    text = b"</script><b>&amp;"
    trajectory = make_trajectory(text, len(text))
    shown = views.page(trajectory, title="<i>", text="a & b")
    assert "&lt;i&gt;" in shown and "a &amp; b" in shown and shown.count("</script>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', shown, re.S)[1])
    (sample,) = data["samples"]
    at = lambda frame: [next(span for first, *span in reversed(states) if first <= frame) for states in sample]  # noqa: E731
    assert {span[0] for span in at(0)} == {MASK}
    state = at(len(data["numbers"]) - 1)
    assert "".join(span[0] for span in state).encode() == text
    assert [span[1] for span in state] == list(range(1, len(text) + 1))


def test_long_trajectories_keep_a_spread_of_frames_and_the_last_one():
    trajectory = make_trajectory(b"abcd", 5 * MOST_FRAMES + 3)
    numbers = trajectory.numbers
    assert len(numbers) <= MOST_FRAMES + 1 and numbers[0] == 0 and numbers[-1] == trajectory.length


def test_gif_has_a_frame_per_event_and_then_stays(tmp_path):
    views.gif(make_trajectory(b"ab\ncd", 5), tmp_path / "samples.gif")
    with Image.open(tmp_path / "samples.gif") as image:
        # Equal frames in a row are stored as one that lasts.
        assert image.format == "GIF" and image.n_frames >= 6
        durations = []
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
    assert sum(durations[5:]) > 3 * durations[0]


@pytest.mark.parametrize("method", ["analytic", "entropy"])
def test_watching_changes_no_sample(method, models):
    trained = load_trained(epath.Path(models / "diffusion"), log=print)
    generator = Generator(trained, dataclasses.replace(trained.experiment.sampling, method=method), batch_size=8)
    windows = np.stack([parse_template("ab[[5]]c", Bytes(), length=32).tokens] * 9)
    frames: list[Frame] = []
    seen = generator.watch(windows, steps=3, seed=1, show=frames.append)
    drawn = generator.generate(windows, steps=3, seed=1)
    np.testing.assert_array_equal(seen.tokens, drawn.tokens)
    np.testing.assert_array_equal(seen.changed, drawn.changed)
    assert seen.calls == drawn.calls
    # Two batches, the second of one window; each from its start to its last event.
    assert [frame.number for frame in frames] == 2 * list(range(frames[0].length + 1))
    assert [len(frame.tokens) for frame in frames if frame.number == 0] == [8, 1]
    assert all((frame.tokens[:, :2] == [97, 98]).all() for frame in frames)
    np.testing.assert_array_equal(frames[-1].tokens, drawn.tokens[8:])
