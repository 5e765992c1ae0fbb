"""A page to play with a trained model: python -m sedd_jax.playground --workdir=DIR [--port=8000]

Type a text with holes as for `sample --template`, watch it come about, move steps, temperature, sampler and seed, click
a token for its alternatives, and copy the command that gives the same text. Only this machine reaches the page, at
127.0.0.1; it loads nothing from elsewhere. Visitors wait for one another. Ctrl-C ends it."""

import contextlib
import functools
import http.server
import json
import shlex
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict

from sedd_jax import cli, sampling
from sedd_jax.config import build
from sedd_jax.devices.processes import say
from sedd_jax.errors import InputError, TrainingError, explained
from sedd_jax.generation.generate import Generator
from sedd_jax.generation.templates import parse_template
from sedd_jax.generation.trajectory import Frame, Trajectory
from sedd_jax.rates import Absorbing
from sedd_jax.sampling.sampler import END_TIME
from sedd_jax.training.options import SamplingOptions
from sedd_jax.training.trained import Trained, load_trained

cli.define_model("Directory of a trained diffusion model.")
flags.DEFINE_integer("port", 8000, "Of the page; 0 for any that is free.", lower_bound=0, upper_bound=65535)

# What the page sets, besides the text and the seed. `sample` has flags of the same names.
CONTROLS = ("method", "steps", "temperature", "top_p")
LONGEST_REQUEST = 1 << 18  # bytes
NUM_ALTERNATIVES = 8

Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Playground:
    """Answers requests, one at a time. workdir: as the user named it."""

    trained: Trained
    workdir: str
    _queue: list[object] = field(default_factory=list)
    _generators: dict[SamplingOptions, Generator] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """What the page shows of the model and begins with."""
        trained, defaults = self.trained, self.trained.experiment.sampling
        about = {"workdir": self.workdir, "length": trained.length, "step": trained.step}
        absorbing = isinstance(trained.experiment.graph, Absorbing)
        about["methods"] = sampling.METHODS if absorbing else sampling.GRID_METHODS
        about["parameters"] = optax.tree.size(trained.params)
        return about | {"defaults": {name: getattr(defaults, name) for name in CONTROLS}}

    def fill(self, request: dict[str, Any], send: Send) -> None:
        """Sends {spans: [[text, step], ..], number, of} after events, then {tokens, command, seconds, calls}. request:
        template, seed and the CONTROLS. Raises InputError for what `sample` refuses."""
        trained, template, seed = self.trained, request.get("template"), request.get("seed")
        if not (isinstance(template, str) and type(seed) is int and 0 <= seed < 1 << 32):
            raise InputError("give a text with holes, and a seed from 0 to 2^32 - 1")
        given = {name: request[name] for name in CONTROLS if name in request}
        section = ConfigDict({"sampling": asdict(trained.experiment.sampling) | given | {"num": 1}})
        options = build(SamplingOptions, "sampling", section)
        options.check(trained.experiment.graph, options.steps)
        window = parse_template(template, trained.tokenizer, length=trained.length, flag="the text")
        if any(window.rules) or any(least < most for least, most in window.ranges):
            raise InputError("the page fills holes of a given length without a rule; `sample --template` fills others")
        trajectory = Trajectory(trained.tokenizer, [window])

        def show(frame: Frame) -> None:
            trajectory.add(frame)
            number, spans = trajectory.samples[0][-1]
            if number == frame.number:
                send({"spans": spans, "number": number, "of": frame.length})

        with self._turn(send):
            generator = self._generators.setdefault(options, Generator(trained, options, batch_size=1))
            generated = generator.watch(window.tokens[None], steps=options.steps, seed=seed, show=show)
        settings = {"workdir": self.workdir, "template": template, "num": 1, "seed": seed} | given
        command = ["python", "-m", "sedd_jax.sample", *(f"--{name}={value}" for name, value in settings.items())]
        answer = {"tokens": generated.tokens[0].tolist(), "command": shlex.join(command)}
        send(answer | {"seconds": generated.seconds, "calls": generated.calls})

    def alternatives(self, request: dict[str, Any], send: Send) -> None:
        """Sends {alternatives: [[text, probability], ..]}: the likeliest tokens at a position, given all others.
        request: tokens, those of a window, and position. Raises InputError for others."""
        tokens, position, length = request.get("tokens"), request.get("position"), self.trained.length
        states = range(self.trained.experiment.graph.num_states)
        sound = isinstance(tokens, list) and len(tokens) == length and all(type(token) is int for token in tokens)
        if not (sound and all(token in states for token in tokens) and position in range(length)):
            raise InputError(f"give the {length} tokens of a window, and one of its positions")
        with self._turn(send):
            function = lambda batch, first: self._conditional(self.trained.params, *batch)  # noqa: E731
            row = np.array([tokens], np.int32), np.array([position], np.int32)
            probs = self.trained.experiment.map_batches(function, row, 1)[0]
        likeliest, decode = np.argsort(-probs)[:NUM_ALTERNATIVES].tolist(), self.trained.tokenizer.decode
        send({"alternatives": [[decode([token]), float(probs[token])] for token in likeliest]})

    @functools.cached_property
    def _conditional(self) -> Callable[..., jax.Array]:
        """(params, tokens [B, L], position [B]) -> p(token | all others) [B, V], if uniform at least noise."""
        experiment, vocab_size = self.trained.experiment, self.trained.tokenizer.vocab_size

        def conditional(params, tokens, position):
            rows, network = jnp.arange(len(tokens)), experiment.network(params)
            x, level = tokens, experiment.noise.total(jnp.asarray(END_TIME))
            if isinstance(experiment.graph, Absorbing):
                # The level at which one position of the window is masked, on average.
                x, level = tokens.at[rows, position].set(experiment.graph.mask), -jnp.log1p(-1 / tokens.shape[1])
            sigma = jnp.full(len(tokens), level)
            features = network.features(x, sigma)[rows, position][:, None]
            score = network.log_score(network.head, features, x[rows, position][:, None], sigma)[:, 0]
            return jax.nn.softmax(score[:, :vocab_size])

        return jax.jit(conditional)

    @contextlib.contextmanager
    def _turn(self, send: Send) -> Iterator[None]:
        """Waits until all who came before are done, and says how many they are."""
        self._queue.append(me := object())
        try:
            while ahead := self._queue.index(me):
                send({"ahead": ahead})
                time.sleep(0.3)
            send({"ahead": 0})
            yield
        finally:
            self._queue.remove(me)


class Handler(http.server.BaseHTTPRequestHandler):
    """GET / is the page; POST /fill and /alternatives take JSON, answered in lines of JSON, by `server.playground`."""

    def do_GET(self) -> None:
        if self.path != "/" or not self._local():
            return self.send_error(404)
        page = resources.files("sedd_jax.generation").joinpath("playground.html").read_text("utf-8")
        about = json.dumps(self.server.playground.about()).replace("<", "\\u003c")
        self._begin("text/html; charset=utf-8")
        self.wfile.write(page.replace("{{about}}", about).encode())

    def do_POST(self) -> None:
        answers = {"/fill": self.server.playground.fill, "/alternatives": self.server.playground.alternatives}
        # Another site's page can post here, but not as JSON.
        if self.path not in answers or not self._local() or self.headers["Content-Type"] != "application/json":
            return self.send_error(404)
        self._begin("application/x-ndjson")
        try:
            answers[self.path](self._request(), self._send)
        except (InputError, TrainingError) as error:
            self._send({"error": cli.one_line(error)})
        except OSError:
            pass  # the visitor has left
        except Exception:
            traceback.print_exc()
            self._send({"error": "a defect; the terminal shows where"})

    def _local(self) -> bool:
        """Not asked for under another name, which would be another site's that leads here."""
        return self.headers.get("Host", "").partition(":")[0] in ("127.0.0.1", "localhost")

    def _request(self) -> dict[str, Any]:
        size = self.headers.get("Content-Length", "")
        if not (size.isdecimal() and int(size[:10]) <= LONGEST_REQUEST):
            raise InputError(f"the text is too long; {LONGEST_REQUEST >> 10} KiB are the most")
        with explained("the request is no JSON object", "send one", ValueError, TypeError, RecursionError):
            return {**json.loads(self.rfile.read(int(size)))}

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def _send(self, answer: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(cli.to_json(answer)).encode() + b"\n")

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    values = flags.FLAGS
    trained = load_trained(cli.path(), log=say, mesh=values.mesh)
    if trained.experiment.model.causal:
        raise InputError("the model of this --workdir writes from left to right, and fills no holes; try `sample`")
    with http.server.ThreadingHTTPServer(("127.0.0.1", values.port), Handler) as server:
        server.playground = Playground(trained, cli.required("workdir"))
        print(json.dumps({"url": f"http://127.0.0.1:{server.server_port}/"}), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    cli.run(main)
