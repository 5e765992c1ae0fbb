"""Eight virtual CPU devices, compiled programs kept between runs, and shapes checked wherever the package is called."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA has one thread per core, and on a small machine devices that wait for one another in a collective take them all.
os.environ["NPROC"] = str(max(16, os.cpu_count() or 1))
# Most of the time of the tests is compilation: without LLVM's optimisations it takes half as long, and half of that
# without the detour of fused loops over MLIR. running.py tells the commands the same.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK_TO_COMPILE}"
)
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

jaxtyping.install_import_hook("sedd_jax", "beartype.beartype")

LONGEST = (
    "buckets",
    "resume",
    "fuzz",
    "sampling",
    "multiprocess",
    "sharding",
    "autoregressive",
    "commands",
    "recipes",
    "sweep",
)


def pytest_collection_modifyitems(items) -> None:
    """The longest files come first: a worker takes whole files, and a long last one keeps the others idle."""
    rank = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def models(tmp_path_factory, worker_id) -> pathlib.Path:
    """A folder with a small diffusion model in diffusion/, its AR baseline in ar/ and their text.txt: trained once, by
    the worker that first needs them, for tests that only read."""
    from running import train_here, write_text  # here, behind the hook above

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "models"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            fields = {"data__source": str(write_text(folder / "text.txt"))}
            for name, objective in (("diffusion", "sedd"), ("ar", "ar")):
                train_here(folder / name, **fields, train__sample_every=0, objective=objective)
            (folder / "done").touch()
    return folder
