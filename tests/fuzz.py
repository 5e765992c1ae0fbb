"""Random command lines and files against the laws of `forked.judge`: python tests/fuzz.py --cases=2000 --seed=1

Case n of a seed is the same whatever else runs; --only=N repeats one and shows what it printed. One JSON line on
stdout: how many cases of which kind ended with which exit code, and those that broke a law. Exit code 1 if any did.
"""

import argparse
import bz2
import collections
import gzip
import json
import lzma
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import forked  # noqa: E402
import pyarrow  # noqa: E402
from running import SMALL, make_config, write_text  # noqa: E402

from sedd_jax import cli  # noqa: E402
from sedd_jax.config import flatten  # noqa: E402
from sedd_jax.data.tokenizers import Bytes  # noqa: E402
from sedd_jax.generation.templates import parse_windows  # noqa: E402


def among(text: str) -> list[str]:
    return text.split()


# Between 100 and 2^31 lie amounts of work that a command may well take on, for hours.
INTEGERS = among("0 -1 1 2 3 7 64 2147483648 4294967295 4294967296 -2147483649 1e3 1.5 0x10 1_0 ٣")
INTEGERS += [*map(str, (2**63 - 1, 2**63, -(2**63) - 1, 2**64)), "9" * 30, "9" * 400, "1" + "0" * 5000]
FLOATS = among("nan inf -inf 0.0 -0.0 1.0 1e-45 1e-320 0.5 2.5 1e30 1e999 -1e-9 1,5")
WORDS = among(
    "None none True {} %s%n (1,) 1+1 - -- ' \" a,b,,c [1] {'a':1} __import__('os') \udcff \x1b[31m \U0001f600"
)
WORDS += ["", " ", "a\nb", "a" * 300, "x" * 5000, "é" * 200]
PATHS = among(
    """text.txt empty folder fifo loop secret locked run ar dangling weights out.x/y text.txt/x run/ . .. ../.. / ~ ~/x
    /dev/null /dev/full /dev/zero /proc/self/mem /nonexistent/x ~nobody/x file:///nonexistent s3://b/x gs://b/x
    xyz://b embedded tfds:none tfds: hf:folder hf: shards:folder shards: text8:text.txt@train mix: * ** [
    mix:1*text.txt,0*text.txt mix:nan*text.txt mix:1e999*text.txt mix:1e-320*text.txt"""
)
VALUES = [INTEGERS, FLOATS, WORDS, [*PATHS, "a" * 300 + "/b"]]
JSON = among(
    """null true 12 1e999 NaN -0 "" "text" "\\ud800" "\\u0000" [] {} "open ["a"] {"text":1} ' { "a<|endoftext|>b" \0"""
)
JSON += ["9" * 5000, "1" * 30, "[" * 100_000, '{"a":' * 100_000]
SMALLEST = SMALL | {"train.steps": 2, "train.eval_every": 0, "train.sample_every": 0, "eval.num_times": 1}
SMALLEST |= {"data.source": "text.txt", "sampling.steps": 2, "sampling.num": 1, "eval.num_sequences": 2}
TRAIN = [f"--config={ROOT}/configs/baseline.py", *(f"--config.{name}={value}" for name, value in SMALLEST.items())]
BASE = {
    "train": [*TRAIN, "--workdir=new"],
    "evaluate": ["--workdir=run", "--data=text.txt", "--num_times=1", "--num_sequences=2"],
    "sample": ["--workdir=run", "--num=1", "--steps=2"],
    "prepare": ["--data=text.txt", "--tokenizer=bytes", "--output=out", "--workers=1"],
    "convert": ["--from=official", "--input=weights", "--tokenizer=bytes", "--output=out"],
    "judge": ["--samples=samples.jsonl", "--model=ar"],
    "frontier": ["--workdir=run", "--steps=2", "--num=2", "--num_times=2"],
    "sweep": ["--sweep=sweep.py", "--workdir=new"],
}
# What a config file may do, one a line.
CONFIGS = """raise ValueError('no')
raise KeyboardInterrupt
raise SystemExit(3)
raise MemoryError
f = lambda: f(); f()
1 / 0
import absent
config.train.steps = np.int64(2)
config.optim.lr = np.float32('nan')
config.model.dim = np.array([32])
config.optim = {'lr': {'a': float('nan')}}
config.train.steps = None
config.model = None
config.data.source = b'text.txt'
config.data.source = 'a\\0b'
config.data.source = ['text.txt']
config.train.seed = 10**400
config.mesh = {1: 2}
config.again = config
config = None
config = {'a': 1}
del config.data
config.optim.lr = lambda: 1
config.train.steps = {1, 2}
config.model.dtype = '\\ud800'"""
CONFIG = """
import numpy as np
from configs import baseline
def get_config():
    config = baseline.get_config()
    config.update_from_flattened_dict({})
    {}
    return config
"""

Made = tuple[Any, list[str]]
FLAGS: dict[str, list[str]] = {}


def field(draw: random.Random, folder: Path) -> Made:
    name, value = draw.choice(list(flatten(make_config()))), draw.choice(draw.choice(VALUES))
    if value.isdigit() and len(value) < 11 and name.endswith(("steps", "num", "num_times")) and int(value) < 1 << 31:
        value = "3"
    if draw.random() < 0.2:
        odd = ["{}[0]", "{}.x", "{}.", ".{}", "{}{}", "a." * 200 + "{}", "model", "{}x", "x.{}", "{} "]
        name = draw.choice(odd).replace("{}", name)
    separator = draw.choice(["="] * 9 + [" "])
    given = [f"--config.{name}", value] if separator == " " else [f"--config.{name}={value}"]
    return "train", [*BASE["train"], *given]


def flag(draw: random.Random, folder: Path) -> Made:
    command = draw.choices(list(BASE), [3, 3, 4, 4, 4, 3, 2, 1])[0]
    argv = list(BASE[command])
    for _ in range(draw.choice([1, 1, 2])):
        name, value = draw.choice(FLAGS[command]), draw.choice(draw.choice(VALUES))
        if value.isdigit() and 64 < int(value[:11]) < 1 << 31:
            value = "2147483648"
        argv = [part for part in argv if not part.startswith(f"--{name}=")]
        argv += draw.choice([[f"--{name}={value}"]] * 8 + [[f"-{name}={value}"], [f"--{name}", value]])
    if "--print_commands" not in argv and command == "sweep":
        argv.append("--print_commands")
    if "process" in " ".join(argv) or "coordinator" in " ".join(argv):
        argv.append("--start_timeout=2")
    return command, argv


def template(draw: random.Random, folder: Path) -> Made:
    pieces = among(
        "[[ ]] [ ] \\[[ \\]] \\ [[12]] [[~5]] [[~]] [[0]] [[eot]] [[3-12]] [[9:/a+/]] [[9:/(/]] word é ~ \0 \udcff"
    )
    pieces += [" ", "\n", "\r", "<|endoftext|>", f"[[{draw.choice(INTEGERS)}]]"]
    text = "".join(draw.choices(pieces, k=draw.randint(0, 8)))
    how = draw.choice(["template", "template", "templates", "prefix", "suffix"])
    if how == "templates":
        suffix, content = corpus_file(draw)
        if draw.random() < 0.7:
            suffix, content = ".txt", text.encode(errors="surrogateescape")
        (folder / f"t{suffix}").write_bytes(content)
        text = f"t{suffix}"
    if draw.random() < 0.2 and "\0" not in text:
        return "sample", [*BASE["sample"], f"--{how}={text}"]

    def parse():
        sys.argv[1:] = []
        cli.run(lambda: {"windows": len(parse_windows(32, Bytes(), **{how: text}))})

    return parse, [f"--{how}={text!r}"]


def corpus(draw: random.Random, folder: Path) -> Made:
    suffix, content = corpus_file(draw)
    (folder / f"c{suffix}").write_bytes(content)
    if draw.random() < 0.15:
        shutil.copy(folder / f"c{suffix}", folder / "samples.jsonl")
        return "judge", BASE["judge"]
    if draw.random() < 0.15:
        return "train", [*BASE["train"], f"--config.data.source=c{suffix}"]
    return "prepare", ["--data=c*", *BASE["prepare"][1:], f"--shard_bytes={draw.choice(['100', '1000000'])}"]


def corpus_file(draw: random.Random) -> tuple[str, bytes]:
    """(ending of its name, content)"""
    lines = []
    for _ in range(draw.randint(0, 6)):
        key = draw.choice(["text"] * 6 + ["Text", "", "a" * 5000])
        lines.append(f'{{"{key}": {draw.choice(JSON)}}}' if draw.random() < 0.8 else draw.choice(JSON))
    if draw.random() < 0.3:
        lines = ["Plain words, é and so on. " * 20, draw.choice(WORDS).replace("\udcff", ""), "a\0b", "\r"]
    text = draw.choice(["\n", "\n", "\r\n", ",", "\n\n"]).join(lines) + draw.choice(["", "\n"])
    content = text.encode(draw.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32"]))
    content = draw.choice(
        [content] * 9 + [content * 300, b"\xff\xfe", draw.randbytes(500), b"PAR1" + content + b"PAR1"]
    )
    packed = draw.choice([*PACK] * 2 + [None] * 8)
    kind = draw.choice([".txt", ".jsonl", ".jsonl", ".json", ".ndjson", ".parquet", "", ".JSONL", ".tsv", ".csv"])
    if packed:
        content = PACK[packed](content)
        kind += packed if draw.random() < 0.7 else draw.choice(list(PACK))
        if draw.random() < 0.2:
            content = content[: -draw.randint(1, 20)] + draw.choice([b"", b"junk"])
    if draw.random() < 0.03:
        content, kind = gzip.compress(bytes(1 << 26), 1) * 48, draw.choice([".txt.gz", ".jsonl.gz"])  # 3 GB of zeros
    return kind, content


def _zip(content: bytes) -> bytes:
    with zipfile.ZipFile(buffer := BytesIO(), "w") as archive:
        archive.writestr("text.txt", content)
    return buffer.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zip": _zip,
}


def weights(draw: random.Random, folder: Path) -> Made:
    kind = draw.choice(["header"] * 4 + ["config"] * 2 + ["torch"] * 2 + ["bytes"])
    here = folder / "weights"
    if kind == "torch":
        (here / "model.safetensors").unlink()
        shutil.copy(folder / "torch" / "pytorch_model.bin", here)
    path = here / {"config": "config.json", "torch": "pytorch_model.bin"}.get(kind, "model.safetensors")
    content = bytearray(path.read_bytes())
    if kind == "config":
        content = json.dumps(mutated(draw, json.loads(content))).replace(f'"{MARK}"', draw.choice(JSON)).encode()
    elif kind == "header":
        (size,) = struct.unpack("<Q", content[:8])
        header, data = mutated(draw, json.loads(content[8 : 8 + size])), content[8 + size :]
        for entry in header.values() if isinstance(header, dict) and draw.random() < 0.15 else ():
            if isinstance(entry, dict) and "dtype" in entry:
                entry["dtype"] = draw.choice(["F8_E4M3", "F8_E5M2", "F64", "I64", "BOOL", "BF16", "F16", "F4", ""])
        text = json.dumps(header).replace(f'"{MARK}"', draw.choice(JSON)).encode()
        size = draw.choice([len(text)] * 9 + [0, len(text) - 1, len(text) + 1, 2**63, 2**64 - 1])
        content = struct.pack("<Q", size) + text + data
    else:
        for _ in range(draw.randint(1, 20)):
            content[draw.randrange(len(content))] = draw.choice([0, 255, 127, draw.randrange(256)])
        if draw.random() < 0.3:
            del content[draw.randrange(len(content)) :]
    path.write_bytes(content)
    return "convert", BASE["convert"]


MARK = "any JSON"


def mutated(draw: random.Random, tree: Any) -> Any:
    """The JSON value with one part of it replaced by another, by MARK, renamed, doubled or taken out."""
    if not isinstance(tree, dict | list) or not tree or draw.random() < 0.05:
        numbers = [int(value) for value in INTEGERS if value.lstrip("-").isdigit() and len(value) < 400]
        return draw.choice([MARK, MARK, MARK, "float32", 0.5, -1, 0, 3, draw.choice(numbers)])
    key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    if draw.random() < 0.2:
        value = tree.pop(key)
        names = ["_orig_mod.{}", "module.{}", "", "x" * 5000, "\0", "{}.{}"]
        if isinstance(tree, dict) and draw.random() < 0.7:
            tree[draw.choice(names).replace("{}", key)] = value
    else:
        tree[key] = mutated(draw, tree[key])
    return tree


def config_file(draw: random.Random, folder: Path) -> Made:
    (folder / "mine.py").write_text(CONFIG.format(SMALLEST, draw.choice(CONFIGS.splitlines())))
    return "train", [f"--config=mine.py{draw.choice(['', '', '', ':form'])}", "--workdir=new"]


KINDS = {field: 5, flag: 6, template: 4, corpus: 4, weights: 4, config_file: 1}


def prepare_inputs(folder: Path) -> None:
    """A folder with everything that cases start from."""
    for path in (folder, folder / "folder", folder / "locked"):
        path.mkdir()
    write_text(folder / "text.txt")
    for objective, name in (("sedd", "run"), ("ar", "ar")):
        require("train", [*TRAIN, f"--workdir={name}", f"--config.objective={objective}"], folder)
    for format, name in (("safetensors", "weights"), ("torch", "torch")):
        require("convert", ["--to=official", "--input=run", f"--output={name}", f"--format={format}"], folder)
    for command in ("evaluate", "sample", "frontier"):  # compiles
        require(command, [part.replace("=out", "=.warm") for part in BASE[command]], folder)
    shutil.rmtree(folder / "run" / "frontier")
    (folder / "samples.jsonl").write_text('{"text": "some words"}\n{"text": "and others, to judge"}\n')
    (folder / "sweep.py").write_text(f"CONFIG = '{ROOT}/configs/tiny.py'\nget_sweep = lambda: [{{'optim.lr': 1e-3}}]\n")
    (folder / "empty").touch()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("absent/x")
    (folder / "secret").write_text("unreadable")
    for command in BASE:
        text = forked.Forked(command, ["--help"], folder, privileged=True).wait().out
        FLAGS[command] = sorted(set(re.findall(r"^ +--(?:\[no\])?(\w+):", text, re.MULTILINE)) - {"config"})
        assert len(FLAGS[command]) > 2, text
    if os.getuid() == 0:
        subprocess.run(["chown", "-hR", str(forked.NOBODY), folder], check=True)
    (folder / "secret").chmod(0)
    (folder / "locked").chmod(0o500)


def require(command: str, argv: list[str], folder: Path) -> None:
    ended = forked.Forked(command, argv, folder, privileged=True).wait()
    assert ended.code == 0, (command, argv, ended.err)


class Case:
    """Case `number` of a seed, from the moment it is started."""

    def __init__(self, seed: int, number: int, inputs: Path, folder: Path):
        draw, self.number = random.Random(f"{seed} {number}"), number
        subprocess.run(["cp", "-a", inputs, folder], check=True)
        make = draw.choices(list(KINDS), list(KINDS.values()))[0]
        command, self.argv = make(draw, folder)
        self.kind = f"{make.__name__} {command}" if isinstance(command, str) else make.__name__
        if os.getuid() == 0:
            subprocess.run(["chown", "-hR", str(forked.NOBODY), folder], check=True)
        self.process = forked.Forked(command, self.argv, folder)

    def described(self) -> str:
        shown = (part if len(part) < 90 else f"{part[:60]}...[{len(part)}]" for part in self.argv if part not in TRAIN)
        return f"case {self.number}, {self.kind}: {' '.join(shown)!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"cases": 2000, "seed": 0, "only": -1, "jobs": 2, "seconds": 90, "megabytes": 3000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"}
    forked.preload()
    counts, failures = collections.Counter(), []
    numbers = list(reversed(range(options.cases) if options.only < 0 else [options.only]))
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        prepare_inputs(inputs := Path(top, "inputs"))
        running: list[Case] = []
        begun, shown = time.monotonic(), time.monotonic()
        while numbers or running:
            while numbers and len(running) < options.jobs:
                number = numbers.pop()
                running.append(Case(options.seed, number, inputs, Path(top, str(number))))
            time.sleep(0.01)
            for case in list(running):
                ended = case.process.poll(seconds=options.seconds, megabytes=options.megabytes)
                if ended is None:
                    continue
                running.remove(case)
                shutil.rmtree(case.process.folder)
                counts[f"{case.kind}: {ended.code}"] += 1
                if ended.wrong:
                    failures.append({"case": case.described(), "wrong": ended.wrong, "last": ended.last_line[:300]})
                    print(json.dumps(failures[-1]), file=sys.stderr, flush=True)
                if options.only >= 0:
                    print(case.described(), ended.err, ended, sep="\n", file=sys.stderr)
            if time.monotonic() - shown > 30:
                done, shown = sum(counts.values()), time.monotonic()
                left = (shown - begun) / max(done, 1) * (len(numbers) + len(running))
                print(f"{done} of {options.cases} cases, {left / 60:.1f} minutes left", file=sys.stderr, flush=True)
    result = {"seed": options.seed, "cases": sum(counts.values()), "seconds": round(time.monotonic() - begun)}
    print(json.dumps(result | {"ended": dict(sorted(counts.items())), "failures": failures}))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
