"""FLOPs, bytes and collectives of programs are counted exactly; step and sampler compile for TPU topologies."""

import importlib.util
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from running import make_config, run

from sedd_jax.aot import costs, estimates, report as aot
from sedd_jax.aot.estimates import least_traffic, roofline
from sedd_jax.aot.hlo import Program
from sedd_jax.devices import chips, sharding
from sedd_jax.errors import InputError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra aot; Linux on x86-64 only)"
)


def program(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return Program(compiled.as_text(), jax.device_count()), compiled


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_loop_counts_as_often_as_it_runs():
    def products(x, weights):
        def outer(x, weight):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ weight), x), None

        return jax.lax.scan(outer, x, weights)[0]

    counted, compiled = program(products, array(16, 32), array(5, 32, 32))
    assert counted.unknown_trip_counts == 0
    assert costs.flops(counted) == 5 * 3 * 2 * 16 * 32 * 32
    # The reason for counting ourselves; the rest of XLA's count is the tanh.
    assert compiled.cost_analysis()["flops"] < 2 * (2 * 16 * 32 * 32)


def test_a_batched_product_counts_each_batch_entry():
    counted, _ = program(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), array(4, 8, 16), array(4, 16, 32))
    assert costs.flops(counted) == 2 * 4 * 8 * 16 * 32


# A batched product [4, 12, 128, 64] x [4, 12, 256, 64] in a TPU program: all but one position of each window meet a
# hole of the dilation.
BATCHED = """HloModule batched, is_scheduled=true

ENTRY %main (a: f32[4,12,128,64], b: f32[4,12,256,64]) -> f32[4,12,128,256] {
  %a = f32[4,12,128,64]{3,2,1,0:T(8,128)} parameter(0)
  %b = f32[4,12,256,64]{3,2,1,0:T(8,128)S(1)} parameter(1)
  ROOT %c = f32[4,12,128,256]{2,3,1,0:T(8,128)} convolution(%a, %b), window={size=4x12 stride=3x11 lhs_dilate=4x12}, dim_labels=01bf_01oi->01bf
}
"""  # noqa: E501


# The forward attention kernel of 4 sequences, 2 heads, 128 positions and 64 features.
KERNEL = """HloModule kernel, is_scheduled=true

ENTRY %main (q: bf16[4,2,128,64], k: bf16[4,2,128,64], v: bf16[4,2,128,64]) -> bf16[4,2,128,64] {
  %q = bf16[4,2,128,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[4,2,128,64]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[4,2,128,64]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  ROOT %splash_mha_fwd.1 = bf16[4,2,128,64]{3,2,1,0:T(8,128)(2,1)} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", operand_layout_constraints={}
}
"""  # noqa: E501


def test_the_attention_kernel_counts_as_the_products_in_it():
    assert costs.flops(Program(KERNEL, 1)) == 2 * (2 * 4 * 2 * 128 * 128 * 64)


def test_a_loop_that_ends_with_the_data_counts_as_its_innermost_scope_says():
    def products(x, weight, end):
        @jax.named_scope("inner")
        def inner(_, x):
            return jax.lax.fori_loop(0, end, lambda _, x: jnp.tanh(x @ weight), x)

        with jax.named_scope("outer"):
            return jax.lax.fori_loop(0, end, inner, x)

    text = jax.jit(products).lower(array(16, 32), array(32, 32), array(dtype=jnp.int32)).compile().as_text()
    counted = Program(text, 1, trips={"inner": 2.5, "outer": 4})
    assert counted.unknown_trip_counts == 0
    assert costs.flops(counted) == 4 * (2.5 * 2 * 16 * 32 * 32)
    assert set(counted.loop_of.values()) == {"", "inner", "outer"}
    assert Program(text, 1).unknown_trip_counts == 2


def test_a_product_that_became_a_convolution_counts_as_a_product():
    assert costs.flops(Program(BATCHED, 1)) == 2 * 4 * 12 * 128 * 256 * 64
    # The operand in on-chip memory, S(1), does not go to HBM; 64 features in the lanes take 128.
    sizes = [4 * 4 * 12 * (128 * features + 128 * 256) for features in (64, 128)]
    assert costs.memory_traffic(Program(BATCHED, 1)).tolist() == sizes


def test_collectives_and_what_they_send():
    mesh = sharding.make_mesh(data=2, fsdp=4)

    def share(x):
        def body(x, _):
            gathered = jax.lax.all_gather(x, "fsdp")  # [4, 64]
            scattered = jax.lax.psum_scatter(gathered, "fsdp")  # [64]
            moved = jax.lax.ppermute(scattered, "data", [(0, 1), (1, 0)])
            return jnp.sin(jax.lax.psum(moved, ("data", "fsdp"))), None

        return jax.lax.scan(body, x, None, length=3)[0]

    shared = jax.shard_map(share, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    counted, _ = program(shared, array(64))
    found = {entry.kind: (entry.executions, entry.bytes, entry.dtype) for entry in costs.collectives(counted)}
    assert found == {
        "all-gather": (3, 3 * 256, "f32"),
        "reduce-scatter": (3, 3 * 256, "f32"),
        "collective-permute": (3, 256, "f32"),
        "all-reduce": (3, 2 * 7 / 8 * 256, "f32"),
    }


def test_memory_traffic_is_what_is_read_and_written():
    counted, _ = program(lambda a, b: jnp.sin(a) + b, array(1000), array(1000))
    assert costs.memory_traffic(counted).tolist() == [3 * 4000] * 2
    # Each turn of the loop reads one of twelve stacked vectors, and reads and writes the sum.
    counted, _ = program(
        lambda rows: jax.lax.scan(lambda s, r: (s + jnp.sin(r), None), rows[0], rows)[0], array(12, 1000)
    )
    assert 12 * 3 * 4000 <= costs.memory_traffic(counted)[0] < 12 * 12 * 4000


# A fusion that slices a view of its operand, and a buffer that nobody writes.
VIEW = """HloModule view, is_scheduled=true

%same (p: f32[12,8,128]) -> f32[12,8,128] {
  %p = f32[12,8,128]{2,1,0:T(8,128)} parameter(0)
  ROOT %copy = f32[12,8,128]{2,1,0:T(4,128)} copy(%p)
}

%one (rows: f32[12,8,128], i: s32[]) -> f32[1,8,128] {
  %rows = f32[12,8,128]{2,1,0:T(8,128)} parameter(0)
  %view = f32[12,8,128]{2,1,0:T(4,128)} fusion(%rows), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%same
  %i = s32[]{:S(6)} parameter(1)
  ROOT %slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%view, %i), dynamic_slice_sizes={1,8,128}
}

ENTRY %main (i: s32[]) -> f32[1,8,128] {
  %i = s32[]{:S(6)} parameter(0)
  %buffer = f32[12,8,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %row = f32[1,8,128]{2,1,0:T(8,128)} fusion(%buffer, %i), kind=kLoop, calls=%one
}
"""


def test_a_slice_of_a_view_is_read_as_a_slice():
    assert costs.memory_traffic(Program(VIEW, 1)).tolist() == [2 * 4 * 8 * 128] * 2


def test_the_least_traffic_of_a_mesh():
    experiment = aot.make_experiment(make_config(mesh__data=2, mesh__fsdp=4), 256)
    params = experiment.abstract_state().params
    least = least_traffic(params, experiment, batch=8 * 32, calls=1, gradient_dtype="float32", results=0, training=True)
    split = [leaf for leaf in jax.tree.leaves(params) if "fsdp" in str(leaf.sharding.spec)]
    replicated = [leaf for leaf in jax.tree.leaves(params) if "fsdp" not in str(leaf.sharding.spec)]
    embedding, rows = 257 * 32 * 4, 32 * 32 * 4  # A chip looks up fewer rows than the table has.
    weights = sum(leaf.size for leaf in split) * 4
    assert least["fsdp"] == pytest.approx(3 / 4 * (3 * (weights - embedding) + 2 * rows))
    assert least["data"] == pytest.approx(
        2 * 1 / 2 * weights / 4 + 2 * 7 / 8 * sum(leaf.size for leaf in replicated) * 4
    )
    assert least["tensor"] == 0


def test_the_roofline_is_bounded_by_its_parts():
    chip = chips.of_kind("TPU v5 lite")
    work = {"useful": chip.flops, "full": 3 * chip.flops}
    line = roofline(chip, flops=2 * chip.flops, traffic=chip.memory_bandwidth, sent=0.0, **work)
    assert (line["step_seconds"], line["step_seconds_serial"]) == (2, 3)
    assert (line["mfu"], line["mfu_serial"], line["mfu_full"]) == (1 / 2, 1 / 3, 3 / 2)


def test_the_longest_name_that_fits_is_the_chip():
    assert chips.of_kind("TPU v5 lite").flops == 197e12
    assert chips.of_kind("TPU v5p").flops == 459e12
    assert chips.of_kind("cpu") is None


SMALL = [
    "--config=configs/tiny.py:paper",
    "--config.model.num_layers=2",
    "--config.model.dim=128",
    "--config.model.num_heads=2",
    "--config.data.length=64",
    "--config.sampling.steps=3",
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_operands_are_multiplied_in_float32(dtype):
    """In the step, forwards and backwards, and in the sampler of each objective, lowered for a TPU."""
    experiments = [aot.make_experiment(make_config(model__dtype=dtype, objective=kind), 256) for kind in ("sedd", "ar")]
    programs = [(experiments[0].train_step_fn(), aot._train(experiments[0], 32).arguments)]
    programs += [(e.sample_fn(e.sampling, 4), aot._sample(e, 32).arguments) for e in experiments]
    for function, arguments in programs:
        with jax.set_mesh(experiments[0].mesh):
            text = function.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        wide = [line for line in products if re.search(r"\(tensor<[^>]*f32>, tensor<[^>]*f32>\)", line)]
        assert len(products) > 5 and (len(wide) == len(products) or dtype == "bfloat16")
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in wide)


def test_the_trips_of_chunk_loops_are_those_of_a_step():
    """The loop of the loss, on each of 8 devices, against a batch that is noised."""
    experiment = aot.make_experiment(make_config(train__batch_size=512), 256)
    loop = estimates.training(experiment, 32)["loss"]
    noised = experiment.objective.noised(jax.random.key(1), jnp.zeros((512, 32), jnp.int32))
    counts = experiment.objective.contributes(noised.x).reshape(8, -1).sum(1)
    assert loop.trips == pytest.approx(float(jnp.ceil(counts / 320).mean()), rel=0.1)  # 1024 of 2048 are noised
    assert loop.share == pytest.approx(0.5, abs=0.01)
    uniform = aot.make_experiment(make_config(graph__kind="uniform", noise__kind="geometric", eval__num_times=16), 256)
    assert estimates.training(uniform, 32)["loss"].share == 1
    assert [loop.calls for loop in estimates.evaluation(uniform, 32, 8).values()] == [16, 2]


@needs_libtpu
def test_step_evaluation_and_sampler_compile_for_a_tpu_topology():
    options = ["--config.mesh.fsdp=2", "--config.model.dtype=bfloat16", "--vocab_size=500"]
    out, err = run("compile", *SMALL, "--topology=v5e:2x2", "--what=all", *options, real=True)
    figures = json.loads(out.splitlines()[-1])
    assert (figures["chips"], figures["device_kind"]) == (4, "TPU v5 lite")
    assert figures["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    train = figures["train"]
    # Half of the parameters on each chip, except a few that are replicated; the same for the averages and for each of
    # the two moments.
    held = train["bytes_per_chip"]
    assert 0.5 <= held["params"] / (4 * figures["parameters"]) < 0.6
    assert held["ema"] == held["params"]
    assert held["moments"] == pytest.approx(2 * held["params"], rel=0.01)
    assert held["total"] > held["arguments"] >= held["params"] + held["ema"] + held["moments"]
    assert train["fits"]
    assert train["headroom"] == 16e9 - held["total"]
    # Gradients are summed in float32, and weights gathered in bfloat16.
    moved = train["collectives"]
    assert moved["reduce-scatter"].keys() == {"count", "bytes", "bytes_f32"}
    assert moved["all-reduce"].get("bytes_bf16", 0) < 1e-3 * moved["all-reduce"]["bytes"]  # biases are gathered so
    assert moved["all-gather"]["bytes_bf16"] > 0.9 * moved["all-gather"]["bytes"]
    price = train["collective_bytes_minimum_by_gradient_dtype"]
    assert price["float32"] == train["collective_bytes_minimum"] > price["bfloat16"] > 0.6 * price["float32"]
    # Half of the head, and all of what the chips compute is counted: the formula lacks the conditioning.
    assert train["flops_per_token"] == pytest.approx(train["flops_per_token_full"] - 3 * 128 * 501, rel=0.01)
    assert 0 < train["roofline"]["mfu_serial"] < train["roofline"]["mfu"] < train["roofline"]["mfu_full"] < 1
    assert (train["network_calls"], figures["evaluate"]["network_calls"], figures["sample"]["network_calls"]) == (
        1,
        16,
        4,
    )
    for name in ("train", "evaluate", "sample"):
        found = figures[name]
        assert found["unknown_trip_counts"] == found["collectives_in_chunk_loops"] == 0
        assert found["program_flops_per_chip"] == pytest.approx(found["flops_per_step"] / 4, rel=0.15)
        assert 0 < found["collective_bytes"] < 2 * found["collective_bytes_minimum"]
    assert err.count(": fits, ") == 3 and err.count("  assumed: loop ") == 4


# What a chip hands to its host for a sum over slices, as XLA writes it for two slices.
SEND = """HloModule exchange, is_scheduled=true

ENTRY %main (a: f32[128,1024]) -> token[] {
  %a = f32[128,1024]{1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[128,1024]{1,0:T(8,128)}, u32[], token[]) send(%a, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
}
"""  # noqa: E501


def test_what_slices_send_to_one_another():
    for slices, share in ((2, 1), (4, 3 / 2)):
        assert costs.between_slices(Program(SEND, 4), slices) == share * 128 * 1024 * 4


@needs_libtpu
def test_shards_narrower_than_a_tile_are_warned_of():
    mesh = sharding.make_mesh(data=-1, fsdp=2, devices=aot.topology_devices("v5e:2x2"))
    assert "leaves 64 of 128 columns" in sharding.narrow(128, mesh)[0]
    assert not sharding.narrow(256, mesh)


@needs_libtpu
def test_a_step_that_does_not_fit_says_what_it_needs():
    large = ["--config.model.dim=8192", "--config.model.num_layers=8"]
    out, err = run("compile", *SMALL, *large, "--topology=v5e:2x2", "--vocab_size=500", expect=1, real=True)
    assert out == ""
    assert "the training step does not fit a chip: it needs " in err.splitlines()[-1]


@needs_libtpu
@pytest.mark.parametrize(
    ("fields", "options", "named"),
    [
        ({}, {"topology": "v5e:3x1"}, "--topology=v5e:3x1"),
        ({}, {"topology": "nonsense"}, "--topology=nonsense"),
        ({}, {"vocab_size": 1}, "vocabulary of 1"),
        ({"mesh__fsdp": 3}, {}, "mesh.fsdp=3"),
        ({"train__batch_size": 6}, {}, "train.batch_size=6 must be a multiple of 4"),
    ],
    ids=str,
)
def test_bad_options_are_named(fields, options, named):
    options = {"topology": "v5e:2x2", "num_slices": 1, "vocab_size": 256, "what": "train"} | options
    with pytest.raises(InputError, match=named):
        aot.report(make_config(**fields), **options)


def test_a_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(InputError, match="needs libtpu"):
        aot.topology_devices("v5e:2x2")
