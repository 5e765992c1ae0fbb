"""Random input of all kinds ends with exit code 0 or 2, one line, nothing left behind and within bounds."""

import subprocess
import sys

from running import ENVIRONMENT, ROOT


def test_random_input():
    argv = [sys.executable, "tests/fuzz.py", "--cases=40", "--seed=1"]
    ended = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
