"""A checkpoint comes back bit for bit or not at all."""

import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sedd_jax.errors import InputError
from sedd_jax.training.checkpoint import Checkpoints, fingerprint

CONFIG = {"model": {"width": 8, "dropout": 0.1, "tie": None}, "mesh": (1, 2)}


class Moments(NamedTuple):
    count: jax.Array
    mean: dict


def make_state(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(16, 8)).astype(np.float32)
    weights[0, :4] = [np.nan, -0.0, np.inf, 1e-42]
    return {
        "step": jnp.int32(seed),
        "key": jnp.asarray(rng.integers(0, 2**32, 2, dtype=np.uint32)),
        "params": {"embed": jnp.asarray(weights), "out": jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16)},
        "optimizer": (Moments(jnp.int32(seed), {"embed": jnp.asarray(weights**2)}), ()),
        "frozen": jnp.asarray(rng.integers(0, 2, 5).astype(bool)),
        "table": jnp.asarray(rng.integers(0, 256, 7, dtype=np.uint8)),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def as_bytes(tree) -> list:
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def fail(line: str):
    raise AssertionError(f"unexpected log line: {line}")


def restore(directory, state=None, **options):
    lines = []
    with Checkpoints(directory, **options) as checkpoints:
        return checkpoints.restore(abstract(make_state(0) if state is None else state), log=lines.append), lines


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A directory with steps 1 and 2, to copy; saving it once keeps the many damage tests quick."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), position=10 * step, config=CONFIG)
    return directory


@pytest.fixture
def directory(two_checkpoints, tmp_path):
    return Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bits(path: Path, rng: random.Random):
    data = bytearray(path.read_bytes())
    for position in rng.sample(range(len(data)), min(4, len(data))):
        data[position] ^= rng.randrange(1, 256)
    path.write_bytes(data)


def test_round_trip_is_bit_exact(tmp_path):
    saved = make_state(7)
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.restore(abstract(saved), log=fail) is None
        checkpoints.save(7, saved, position=123, config=CONFIG)
        restored = checkpoints.restore(abstract(saved), log=fail)
    assert (restored.step, restored.position) == (7, 123)
    assert restored.config == {**CONFIG, "mesh": [1, 2]}
    assert jax.tree.structure(restored.state) == jax.tree.structure(saved)
    assert as_bytes(restored.state) == as_bytes(saved)


def test_restores_onto_another_sharding(directory):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    over_rows, everywhere = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=over_rows if x.ndim == 2 and x.shape[0] % mesh.size == 0 else everywhere
        ),
        make_state(0),
    )
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(target, log=fail)
    assert as_bytes(restored.state) == as_bytes(make_state(2))
    assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(lambda x: x.sharding, target)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "bfloat16", "float16", "int32", "uint32", "float32"])
def test_any_single_flipped_bit_changes_the_hash(dtype):
    rng = np.random.default_rng(0)
    clean = (rng.integers(0, 2, (6, 5, 4)) * (1 if dtype == "bool" else 3)).astype(jnp.dtype(dtype))
    expected = int(fingerprint(clean))
    width = clean.dtype.itemsize
    for _ in range(20):
        flipped = bytearray(clean.tobytes())
        bit = 0 if dtype == "bool" else rng.integers(8 * width)
        flipped[rng.integers(clean.size) * width + bit // 8] ^= 1 << (bit % 8)
        assert int(fingerprint(np.frombuffer(bytes(flipped), clean.dtype).reshape(clean.shape))) != expected


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_both_halves_of_a_64_bit_value_count(dtype):
    with jax.enable_x64(True):
        clean = np.arange(12, dtype=dtype).reshape(3, 4)
        hashes = {int(fingerprint(jnp.asarray(clean)))}
        for bit in range(64):
            flipped = clean.copy()
            flipped.view(np.uint64)[1, 2] ^= np.uint64(1) << np.uint64(bit)
            hashes.add(int(fingerprint(jnp.asarray(flipped))))
    assert len(hashes) == 65


def test_hash_sees_where_a_value_stands():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrangements = [values, values[::-1], values[:, ::-1], np.roll(values, 1), np.zeros((4, 6), np.float32)]
    assert len({int(fingerprint(np.ascontiguousarray(x))) for x in arrangements}) == len(arrangements)


def test_hash_does_not_depend_on_sharding():
    devices = np.array(jax.devices())
    values = np.random.default_rng(0).normal(size=(4 * devices.size, 2 * devices.size)).astype(np.float32)
    mesh = Mesh(devices, ("d",))
    expected = int(fingerprint(values))
    for spec in (PartitionSpec(), PartitionSpec("d"), PartitionSpec(None, "d")):
        assert int(fingerprint(jax.device_put(values, NamedSharding(mesh, spec)))) == expected


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_truncated_files_are_never_wrong_values(directory, keep):
    for path in files_of(directory / "2"):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        check_sound_or_previous(directory)
        path.write_bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_are_never_wrong_values(directory, seed):
    rng = random.Random(seed)
    for path in files_of(directory / "2"):
        content = path.read_bytes()
        flip_bits(path, rng)
        check_sound_or_previous(directory)
        path.write_bytes(content)


def check_sound_or_previous(directory: Path):
    restored, lines = restore(directory, read_only=True)
    assert as_bytes(restored.state) == as_bytes(make_state(restored.step))
    assert (restored.position, restored.config) == (10 * restored.step, {**CONFIG, "mesh": [1, 2]})
    if restored.step == 1:
        assert len(lines) == 1 and "\n" not in lines[0]
        assert lines[0].startswith("checkpoint 2 is damaged (") and lines[0].endswith("using the one before, 1")
    else:
        assert restored.step == 2 and not lines


def test_values_changed_behind_a_sound_format_are_named(tmp_path):
    """Damage that no file format detects: the arrays of one checkpoint under the record of another."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, make_state(1), position=10, config=CONFIG)
        checkpoints.save(2, make_state(2), position=20, config=CONFIG)
        changed = make_state(2)
        changed["params"]["embed"] = changed["params"]["embed"].at[3, 3].add(1e-3)
        checkpoints.save(3, changed, position=20, config=CONFIG)
    shutil.rmtree(tmp_path / "checkpoints/2/state")
    (tmp_path / "checkpoints/3/state").rename(tmp_path / "checkpoints/2/state")
    shutil.rmtree(tmp_path / "checkpoints/3")
    restored, lines = restore(tmp_path / "checkpoints")
    assert restored.step == 1
    assert lines == ["checkpoint 2 is damaged (params/embed is not what was saved); using the one before, 1"]


@pytest.mark.parametrize(
    "old, new", [(b'"position": 20', b'"position": 21'), (b"0.1", b"0.2"), (b"float32", b"float64")]
)
def test_altered_record_is_noticed(directory, old, new):
    [record] = [path for path in files_of(directory / "2/record") if old in path.read_bytes()]
    record.write_bytes(record.read_bytes().replace(old, new, 1))
    restored, [line] = restore(directory)
    assert restored.step == 1 and "record has been altered" in line


def test_damage_in_an_older_step_does_not_matter(directory):
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(3, make_state(3), position=30, config=CONFIG)
    for path in [*files_of(directory / "1"), *files_of(directory / "3")]:
        path.write_bytes(b"{")
    restored, [line] = restore(directory)
    assert restored.step == 2 and line.startswith("checkpoint 3 is damaged")
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_empty_step_folder_is_passed_over_and_leftovers_are_ignored(directory):
    (directory / "3").mkdir()
    (directory / "4.orbax-checkpoint-tmp-0").mkdir()
    (directory / "4.orbax-checkpoint-tmp-0" / "half").write_bytes(b"x")
    (directory / "notes").mkdir()
    restored, [line] = restore(directory)
    assert restored.step == 2 and line.startswith("checkpoint 3 is damaged")
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(4, make_state(4), position=40, config=CONFIG)
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "4", "notes"]


def other_shape(state):
    state["params"]["embed"] = jnp.zeros((16, 9))


def other_dtype(state):
    state["params"]["out"] = state["params"]["out"].astype(jnp.float32)


def missing_leaf(state):
    del state["table"]


def extra_leaf(state):
    state["params"]["bias"] = jnp.zeros(3)


@pytest.mark.parametrize(
    "change, message",
    [
        (other_shape, r"params/embed is float32\[16,8\] in the checkpoint .*/2 but float32\[16,9\] in this run"),
        (other_dtype, r"params/out is bfloat16\[8,4\] in .* but float32\[8,4\]"),
        (missing_leaf, r"table is uint8\[7\] in .* but absent"),
        (extra_leaf, r"params/bias is absent in .* but float32\[3\]"),
    ],
)
def test_checkpoint_of_another_model_is_refused(directory, change, message):
    state = make_state(0)
    change(state)
    with pytest.raises(InputError, match=message):
        restore(directory, state)
    assert restore(directory)[0].step == 2


def test_all_damaged_is_an_error_and_moves_nothing(directory):
    for path in [*files_of(directory / "1"), *files_of(directory / "2")]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the checkpoints \[1, 2\] in .*/checkpoints can be used"):
        restore(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_damaged_step_is_moved_aside_and_can_be_saved_again(directory):
    for expected in (["2"], ["2", "2-1"]):
        with Checkpoints(directory) as checkpoints:
            for path in files_of(directory / "2/state"):
                path.write_bytes(b"")
            lines = []
            assert checkpoints.restore(abstract(make_state(0)), log=lines.append).step == 1 and len(lines) == 1
            assert checkpoints.steps() == [1]
            checkpoints.save(2, make_state(2), position=20, config=CONFIG)
        assert sorted(path.name for path in directory.with_name("checkpoints-damaged").iterdir()) == expected
        assert as_bytes(restore(directory)[0].state) == as_bytes(make_state(2))


def test_a_part_is_read_and_what_was_saved_in_bfloat16_is_widened(directory):
    newest = make_state(2)
    asked = {"params": newest["params"] | {"out": newest["params"]["out"].astype(jnp.float32)}}
    with Checkpoints(directory, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract(asked), log=fail, partial=True)
        assert as_bytes(restored.state) == as_bytes(asked)
        with pytest.raises(InputError, match=r"more is absent in the checkpoint .*2"):
            checkpoints.restore(abstract({"more": newest["table"]}), log=fail, partial=True)


def test_read_only_changes_nothing(directory):
    (directory / "2/state/manifest.ocdbt").write_bytes(b"")
    (directory / "3.orbax-checkpoint-tmp-0").mkdir()
    before = sorted(directory.parent.rglob("*"))
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)), log=lambda line: None).step == 1
        with pytest.raises(InputError, match="read-only"):
            checkpoints.save(5, make_state(5), position=50, config=CONFIG)
    assert sorted(directory.parent.rglob("*")) == before
    absent = directory / "absent"
    assert restore(absent, read_only=True) == (None, []) and not absent.exists()


def test_keeps_the_newest_and_every_period(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_period=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, {"w": jnp.full(3, step)}, position=step, config={})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [4, 6, 7]
        with pytest.raises(ValueError, match="already exists"):
            checkpoints.save(6, {"w": jnp.full(3, 6)}, position=6, config={})


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Checkpoints(tmp_path / "file")


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        checkpoints.save(1, make_state(1), position=10, config=CONFIG)
    assert restore(tmp_path / "run/checkpoints")[0].step == 1


def test_donating_the_state_after_save_is_safe(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 - 7, tree), donate_argnums=0)
    make = jax.jit(lambda seed: {"w": jax.random.normal(jax.random.key(seed), (512, 2048)), "b": jnp.full(8, seed)})
    with Checkpoints(tmp_path / "checkpoints", keep_last=9) as checkpoints:
        for step in range(3):
            state = make(step)
            checkpoints.save(step, state, position=step, config={})
            for _ in range(3):
                state = overwrite(state)
            jax.block_until_ready(state)
            restored = checkpoints.restore(abstract(state), log=fail)
            assert restored.step == step and as_bytes(restored.state) == as_bytes(make(step))


SAVE_FOREVER = textwrap.dedent(
    """
    import itertools, sys
    import jax.numpy as jnp
    from sedd_jax.training.checkpoint import Checkpoints
    with Checkpoints(sys.argv[1], keep_last=2) as checkpoints:
        for step in itertools.count(max(checkpoints.steps(), default=0) + 1):
            state = {"w": jnp.arange(12_500_000, dtype=jnp.float32) + step, "step": jnp.int32(step)}
            checkpoints.save(step, state, position=step, config={})
            print(step, flush=True)
    """
)


def test_killed_while_saving_restores_a_complete_state(tmp_path):
    directory, rng = tmp_path / "checkpoints", random.Random(0)
    like = {"w": jnp.zeros(12_500_000, jnp.float32), "step": jnp.int32(0)}
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, directory], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        with Checkpoints(directory, read_only=True) as checkpoints:
            restored = checkpoints.restore(abstract(like), log=fail)
        assert restored.position == restored.step == int(restored.state["step"])
        assert np.array_equal(restored.state["w"], np.arange(12_500_000, dtype=np.float32) + restored.step)
