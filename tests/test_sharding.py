"""Eight devices in any arrangement compute what one device does, and hold only their share."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, PartitionSpec
from running import ENVIRONMENT, ROOT, close, make_config

from sedd_jax import config as configuration
from sedd_jax.aot.costs import collectives
from sedd_jax.aot.hlo import Program
from sedd_jax.data.tokenizers import Bytes
from sedd_jax.devices import sharding
from sedd_jax.errors import InputError
from sedd_jax.evaluation import judging, perplexity
from sedd_jax.generation.generate import Generator
from sedd_jax.generation.templates import FREE
from sedd_jax.noise import Geometric, LogLinear
from sedd_jax.rates import Absorbing, Uniform
from sedd_jax.score_entropy import ScoreEntropy
from sedd_jax.training.checkpoint import Checkpoints
from sedd_jax.training.experiment import make_experiment
from sedd_jax.training.options import EvalOptions
from sedd_jax.training.state import abstract_state, clip_by_global_norm, init_state, learning_rate, make_optimizer
from sedd_jax.training.step import make_train_step
from sedd_jax.training.trained import load_trained
from sedd_jax.transformer import Transformer

MESHES = [(8, 1, 1), (2, 2, 2), (1, 8, 1)]
CASES = {"absorbing": (Absorbing(31), LogLinear()), "uniform": (Uniform(32), Geometric())}
TOKENS = np.random.default_rng(0).integers(0, 31, (8, 16)).astype(np.int32)


def mesh_of(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def model_of(graph, **options):
    return Transformer(num_states=graph.num_states, num_layers=2, dim=32, num_heads=4, cond_dim=16, **options)


def three_steps(case, shape, *, microbatches=1, dropout=0.1, **optim):
    """The state after three steps on a mesh, and their metrics, on the host."""
    graph, noise = CASES[case]
    mesh, optimizer = mesh_of(shape), make_optimizer(warmup_steps=2, **optim)
    model = model_of(graph, dropout=dropout, scale_by_sigma=case == "absorbing")
    with jax.set_mesh(mesh):
        state = init_state(jax.random.key(0), model, optimizer, mesh)
        objective = ScoreEntropy(graph, noise)
        step = make_train_step(model, objective, optimizer, mesh, decay=0.99, microbatches=microbatches)
        metrics = []
        for _ in range(3):
            state, values = step(state, jax.random.key(1), sharding.place_batch(TOKENS, mesh))
            metrics.append(jax.device_get(values))
    assert step._cache_size() == 1
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def one_device():
    return {case: three_steps(case, (1, 1, 1)) for case in CASES}


def assert_same_training(found, expected):
    for values, reference in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(values["loss"], reference["loss"], rtol=1e-5)
        np.testing.assert_allclose(values["grad_norm"], reference["grad_norm"], rtol=1e-4)
    # Adam's first steps are of size lr whatever the gradient's, so where a gradient is mere rounding its sign may
    # differ: three steps of at most 3e-4 each way. All but those few entries agree to rounding.
    for name in ("params", "ema"):
        pairs = zip(jax.tree.leaves(getattr(found[0], name)), jax.tree.leaves(getattr(expected[0], name)), strict=True)
        difference = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
        assert difference.max() <= 6 * 3e-4
        assert np.mean(difference > 1e-5) < 1e-3


LOWERED = """
import hashlib, sys
sys.path.insert(0, "tests")
import jax
from running import make_config
from sedd_jax.aot import report

experiment = report.make_experiment(make_config(mesh__data=2, mesh__fsdp=4), 256)
with jax.set_mesh(experiment.mesh):
    text = experiment.train_step_fn().lower(*report._train(experiment, 32).arguments).as_text()
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_every_process_makes_the_same_program():
    """Whatever order its sets of names have: with these two seeds those of the mesh's axes differ."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOWERED],
            cwd=ROOT,
            env=ENVIRONMENT | flags | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in "23"
    ]
    first, second = (process.communicate(timeout=300)[0] for process in started)
    assert len(first) == 65 and first == second


def test_muon_trains_on_a_mesh_as_on_one_device():
    """And its state differs from AdamW in the products of the blocks alone."""
    optim = {"kind": "muon", "decay": "cosine", "decay_steps": 4}
    expected = three_steps("absorbing", (1, 1, 1), **optim)
    assert_same_training(three_steps("absorbing", (2, 2, 2), **optim), expected)
    graph, _ = CASES["absorbing"]
    model, mesh = model_of(graph), mesh_of((1, 1, 1))
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(abstract_state(model, make_optimizer(kind=kind), mesh).opt_state))
        for kind in ("adamw", "muon")
    ]
    params = abstract_state(model, make_optimizer(), mesh).params["blocks"]
    products = sum(params[name]["kernel"].size for name in ("qkv", "attention_out", "mlp_in", "mlp_out"))
    # One moment of the products where AdamW has two, and a few numbers.
    assert 0 <= sizes[1] - (sizes[0] - products) < 10


@pytest.mark.parametrize(("decay", "middle"), [("none", 1.0), ("linear", 0.55), ("cosine", 0.55)])
def test_the_learning_rate_rises_and_falls_as_asked(decay, middle):
    rate = learning_rate(2.0, 10, decay=decay, decay_steps=30, floor=0.1)
    found = [float(rate(jnp.asarray(update))) / 2 for update in (0, 4, 9, 19, 29, 1000)]
    end = 1.0 if decay == "none" else 0.1
    np.testing.assert_allclose(found, [0.1, 0.5, 1.0, middle, end, end], rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"kind": "lion"}, {"decay": "step"}, {"decay": "linear", "decay_steps": 5}, {"floor": 1.5}]
)
def test_optimisers_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match=f"optim.{list(options)[-1]}="):
        make_optimizer(warmup_steps=10, **options)


@pytest.mark.parametrize(("case", "shape"), [("uniform", (2, 2, 2)), *(("absorbing", shape) for shape in MESHES)])
def test_any_mesh_trains_as_one_device(one_device, case, shape):
    assert_same_training(three_steps(case, shape), one_device[case])


def test_microbatches_train_as_one_batch(one_device):
    """With dropout: its masks belong to the sequences."""
    for microbatches, shape in ((8, (1, 1, 1)), (2, (2, 2, 1))):
        assert_same_training(three_steps("absorbing", shape, microbatches=microbatches), one_device["absorbing"])


def experiment_of(objective, kind, shape):
    fields = {f"mesh__{axis}": size for axis, size in zip(sharding.MESH_AXES, shape, strict=True)}
    fields |= {"noise__kind": "loglinear" if kind == "absorbing" else "geometric", "model__num_heads": 4}
    config = make_config(objective=objective, graph__kind=kind, **fields)
    return make_experiment(config, 31 if kind == "absorbing" else 32, jax.devices()[: int(np.prod(shape))])


def random_params(experiment):
    """Random everywhere: the zero-initialised head would hide the network."""
    waves = lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape)  # noqa: E731
    return jax.tree.map(waves, experiment.init_state(jax.random.key(0)).params)


@pytest.mark.parametrize(
    ("objective", "kind", "meshes"),
    [("sedd", "absorbing", MESHES), ("sedd", "uniform", [(2, 2, 2)]), ("ar", "uniform", [(2, 2, 2)])],
)
def test_bound_and_samples_are_those_of_one_device(objective, kind, meshes):
    """Also with numbers of sequences that the mesh does not divide."""
    tokens = np.concatenate([TOKENS, TOKENS[:3] + 1]) % 31
    given = tokens % 5 == 0

    def figures(shape):
        experiment = experiment_of(objective, kind, shape)
        with jax.set_mesh(experiment.mesh):
            params = random_params(experiment)
            bound, sample = experiment.bound_fn(4), experiment.sample_fn(experiment.sampling)
            bounds = experiment.map_batches(
                lambda batch, first: bound(params, jax.random.key(2), batch, first), tokens, 4
            )
            samples = experiment.map_batches(
                lambda clamp, first: sample(params, jax.random.key(3), clamp, 4, first).tokens,
                (given, tokens),
                5,
            )
        return bounds, samples

    expected = figures((1, 1, 1))
    for shape in meshes:
        bounds, samples = figures(shape)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), bounds, expected[0])
        # A sample at the very edge of an interval may fall on the other side after reassociation.
        assert np.mean(samples != expected[1]) < 0.02
        assert (samples == tokens)[given].all()


@pytest.mark.parametrize(
    "options", [{"method": "confidence", "remask": 2}, {"method": "entropy", "entropy_budget": 20.0}]
)
def test_positions_are_filled_in_the_order_of_one_device(options):
    given = TOKENS[:6] % 5 == 0

    def samples(shape):
        experiment = experiment_of("sedd", "absorbing", shape)
        with jax.set_mesh(experiment.mesh):
            sample = experiment.sample_fn(dataclasses.replace(experiment.sampling, **options))
            return jax.device_get(sample(random_params(experiment), jax.random.key(3), (given, TOKENS[:6]), 4, 0))

    expected, found = samples((1, 1, 1)), samples((2, 2, 2))
    assert found.calls == expected.calls <= 4
    # Certainties that are equal up to rounding may come in another order.
    assert np.mean(found.tokens != expected.tokens) < 0.05
    assert (found.tokens == TOKENS[:6])[given].all()


def test_no_device_waits_for_another_within_the_loop_over_chunks():
    """Each has its own number of positions to draw or to evaluate, and so its own number of chunks."""
    experiment = experiment_of("sedd", "absorbing", (2, 4, 1))
    with jax.set_mesh(experiment.mesh):
        params = random_params(experiment)
        tokens = sharding.place(TOKENS, sharding.batch_sharding(experiment.mesh))
        calls = {
            "sample": (experiment.sample_fn(experiment.sampling, 4), (params, jax.random.key(0), (tokens > 3, tokens))),
            "bound": (experiment.bound_fn(4), (params, jax.random.key(0), tokens, 0)),
        }
        for function, arguments in calls.values():
            text = function.lower(*arguments).compile().as_text()
            counts = []
            for trips in (1, 1000):
                program = Program(text, 8, trips=dict.fromkeys(("step", "denoise", "diffusion"), trips))
                counts.append(sorted(entry.executions for entry in collectives(program)))
            assert any(program.loop_of.values()) and not program.unknown_trip_counts
            assert counts[0] == counts[1]
            assert counts[0]  # the weights are split, so they are gathered


TEXTS = ["Ein kurzer Text.", "no", "é" * 40, "A sample that is longer than the window of the model.", "The end"]


def figures_of_trained(models, shape):
    """What evaluation, sampling and a judge say on a mesh, with batch sizes that it does not divide. None: one device,
    with whole weights."""
    mesh = dict(zip(sharding.MESH_AXES, shape or (8, 1, 1), strict=True))
    trained = load_trained(epath.Path(models / "diffusion"), log=pytest.fail, mesh=mesh)
    judge = judging.load_judge(str(models / "ar"), mesh=mesh)
    if shape is None:
        config = trained.config.copy_and_resolve_references()
        config.mesh = {"data": 1}
        one = make_experiment(config, trained.tokenizer.vocab_size, jax.devices()[:1])
        places = jax.tree.map(lambda leaf: leaf.sharding, one.abstract_state().params)
        trained = trained._replace(experiment=one, params=jax.device_put(trained.params, places))
    else:
        assert dict(trained.experiment.mesh.shape) == dict(judge.mesh.shape) == mesh
        for params in (trained.params, judge.nats.args[0]):
            for path, leaf in jax.tree.leaves_with_path(params):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                # Biases of heads and MLPs, and the network of the noise level, have no axis for `fsdp`.
                split = leaf.sharding.shard_shape(leaf.shape) != leaf.shape
                assert split or shape[1] == 1 or name.startswith("sigma") or name.endswith("bias"), name
    options = EvalOptions(num_times=3, num_sequences=11, batch_size=3)
    stream = perplexity.stream_for(trained, epath.Path(models / "diffusion"), str(models / "text.txt"))
    windows = np.full((5, 32), FREE)
    windows[:, 3:7] = [97, 98, 99, 32]
    generated = Generator(trained, trained.experiment.sampling, 3).generate(windows, steps=4, seed=1)
    judged = judging.judge_samples(judge, TEXTS, 3)
    return perplexity.summary(trained, stream, options, seed=2, name="text"), judged, generated.tokens


@pytest.fixture(scope="module")
def trained_on_one_device(models):
    return figures_of_trained(models, None)


@pytest.mark.parametrize("shape", MESHES)
def test_a_trained_model_stays_split_and_says_what_it_says_on_one_device(models, trained_on_one_device, shape):
    figures, judged, tokens = figures_of_trained(models, shape)
    assert figures == close(trained_on_one_device[0], 1e-4)
    assert judged == pytest.approx(trained_on_one_device[1], rel=1e-4)
    assert np.mean(tokens != trained_on_one_device[2]) < 0.02
    assert (tokens[:, 3:7] == [97, 98, 99, 32]).all()


def test_a_trained_mesh_that_does_not_fit_here_splits_the_weights_as_far_as_it_can():
    shapes = {
        (2, 2, 2): {"data": 2, "fsdp": 2, "tensor": 2},
        (4, -1, 1): {"data": 4, "fsdp": 2, "tensor": 1},
        (1, 16, 4): {"data": 1, "fsdp": 8, "tensor": 1},
        (16, 1, 1): {"data": 8, "fsdp": 1, "tensor": 1},
        (2, 6, 1): {"data": 4, "fsdp": 2, "tensor": 1},
    }
    for sizes, expected in shapes.items():
        assert dict(sharding.fitting_mesh(**dict(zip(sharding.MESH_AXES, sizes, strict=True))).shape) == expected


def bytes_read():
    """So far by this process, from files that the system may hold in memory."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count the bytes")
def test_only_the_averages_are_read_and_split_as_in_training(tmp_path):
    config = make_config(model__dim=256, model__num_layers=2, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    experiment = make_experiment(config, Bytes().vocab_size)
    state = random_state(experiment)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state, position=0, config=config.to_dict())
    configuration.save(config, epath.Path(tmp_path), "data")
    Bytes().save(epath.Path(tmp_path))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.ema))

    before = bytes_read()
    trained = load_trained(epath.Path(tmp_path), log=pytest.fail)
    read = bytes_read() - before
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        before = bytes_read()
        checkpoints.restore(experiment.abstract_state(), log=pytest.fail)
        # The whole state is the parameters, their averages and two moments of each.
        assert 0.7 * held < read < 1.5 * held < 2.8 * held < bytes_read() - before
    assert trained.step == 3
    jax.tree.map(np.testing.assert_array_equal, trained.params, state.ema)
    assert jax.tree.map(lambda leaf: leaf.sharding, trained.params) == jax.tree.map(
        lambda leaf: leaf.sharding, state.ema
    )


def random_state(experiment):
    """Of bits that no compression makes shorter, and other ones in each leaf."""
    state, draw = experiment.init_state(jax.random.key(0)), np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put(np.asarray(1e-2 * draw.standard_normal(leaf.shape), leaf.dtype), leaf.sharding),
        state,
    )


@pytest.mark.parametrize("objective", ["sedd", "ar"])
def test_evaluation_holds_no_log_scores_of_all_positions(objective):
    config = make_config(objective=objective, model__dim=16, model__num_heads=1, data__length=256)
    experiment = make_experiment(config, 4096, jax.devices()[:1])
    tokens = jax.ShapeDtypeStruct((32, 256), jnp.int32)
    inputs = experiment.abstract_state().params, jax.eval_shape(lambda: jax.random.key(0)), tokens, 0
    with jax.set_mesh(experiment.mesh):
        memory = experiment.bound_fn(2).lower(*inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * 256 * 4096 * 4 / 4


def test_every_weight_and_moment_is_split():
    mesh = mesh_of((1, 4, 2))
    graph = Uniform(32)
    state = init_state(jax.random.key(0), model_of(graph), make_optimizer(), mesh)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # A quarter by fsdp, half of that again by tensor where an axis has heads, MLP or vocabulary; little is replicated.
    assert held < total / 3
    split = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    for moments in (state.ema, state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        assert {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(moments)} == split


def test_an_axis_that_the_mesh_does_not_divide_is_not_split():
    mesh = mesh_of((1, 4, 2))
    assert sharding.spec((32, 33), ("embed", "vocab"), mesh) == PartitionSpec(("fsdp",), None)
    assert sharding.spec((7, 34), (None, "vocab"), mesh) == PartitionSpec(None, ("tensor",))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "mesh.data=3, .* does not fit 8 devices"),
        ({"data": 2, "fsdp": 2}, "4 does not fit 8"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"tensor": 0}, "mesh.tensor=0: sizes must be positive"),
        ({"slices": 2}, "mesh.slices=2: the devices are of 1"),
        ({"slices": 0}, "mesh.slices=0: the devices are of 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(**sizes)


def test_one_size_may_be_what_the_others_leave():
    assert dict(sharding.make_mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_the_state_is_updated_in_place():
    graph, noise = CASES["absorbing"]
    mesh, optimizer = mesh_of((1, 1, 1)), make_optimizer()
    with jax.set_mesh(mesh):
        step = make_train_step(model_of(graph), ScoreEntropy(graph, noise), optimizer, mesh, decay=0.99)
        state = abstract_state(model_of(graph), optimizer, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        memory = step.lower(state, key, jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_the_clip_is_that_of_optax(clip):
    grads = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}
    ours, theirs = clip_by_global_norm(clip), optax.clip_by_global_norm(clip)
    found, expected = (clipped.update(grads, clipped.init(grads))[0] for clipped in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    zero = jax.tree.map(jnp.zeros_like, grads)
    assert not any(leaf.any() for leaf in jax.tree.leaves(ours.update(zero, ours.init(zero))[0]))


def test_the_first_moment_may_be_bfloat16():
    graph, _ = CASES["absorbing"]
    state = abstract_state(model_of(graph), make_optimizer(mu_dtype="bfloat16"), mesh_of((1, 1, 1)))
    adam = state.opt_state[1][0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adam.mu)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves((adam.nu, state.params, state.ema))} == {"float32"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a device of several slices that a mesh reads."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_only_replicas_lie_in_different_slices():
    chips = [Chip(id=i, slice_index=i % 2, coords=(i // 2 % 4, i // 8, 0)) for i in range(16)]
    for sizes in ({}, {"fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "slices": 2}):
        mesh = sharding.make_mesh(**sizes, devices=chips)
        slices = [{chip.slice_index for chip in replica.flat} for replica in mesh.devices]
        assert slices == [{0}] * (len(slices) // 2) + [{1}] * (len(slices) // 2)
        assert sorted(chip.id for chip in mesh.devices.flat) == list(range(16))
    for sizes, message in (
        ({"fsdp": -1, "data": 1}, "mesh.data=1 must be a multiple of the 2 slices"),
        ({"slices": 1}, "mesh.slices=1: the devices are of 2"),
        ({"slices": 4}, "mesh.slices=4: the devices are of 2"),
    ):
        with pytest.raises(InputError, match=message):
            sharding.make_mesh(**sizes, devices=chips)


def test_mesh_over_some_devices():
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert list(mesh.devices.flat) == jax.devices()[:4]


def test_a_weight_that_is_not_split_is_named_with_its_cost():
    mesh, tokens = mesh_of((1, 2, 4)), jnp.zeros((1, 2), jnp.int32)

    def lines(num_states):
        model = Transformer(num_states=num_states, num_layers=2, dim=32, num_heads=4, cond_dim=16)
        boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, jnp.ones(1))["params"]
        return sharding.unsharded(boxed, mesh)

    assert lines(1000) == []
    bias, kernel = lines(1001)
    assert bias.startswith("head/bias") and kernel.startswith(
        "head/kernel [32, 1001] is not split: its 1001 along 'vocab' are no multiple of mesh.tensor=4."
    )
    # 16 of 32 rows by fsdp, of 1001 floats each.
    assert "It takes 0.0641 MB per device instead of 0.016," in kernel


def test_one_process_holds_all_sequences():
    assert sharding.local_sequences(16, mesh_of((2, 2, 2))).tolist() == list(range(16))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_of_kernels_leaves_the_others_alone(kind):
    params = {
        "blocks": {"qkv": {"kernel": jnp.ones((1, 4, 4)), "bias": jnp.ones((1, 4))}},
        "embedding": jnp.ones((4, 4)),
    }
    still = jax.tree.map(jnp.zeros_like, params)
    for decayed, others in (("kernels", 1.0), ("all", 0.95)):
        optimizer = make_optimizer(lr=0.5, warmup_steps=0, weight_decay=0.1, decayed=decayed, kind=kind)
        updates, _ = optimizer.update(still, optimizer.init(params), params)
        kernel, bias, embedding = (
            float(leaf.mean())
            for leaf in (updates["blocks"]["qkv"]["kernel"], updates["blocks"]["qkv"]["bias"], updates["embedding"])
        )
        np.testing.assert_allclose((1 + kernel, 1 + bias, 1 + embedding), (0.95, others, others), rtol=1e-6)
