"""The emulator of CUDA runs right kernels right, and finds the faults of wrong ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "csrc" / "cuda" / "emulator"
# Each row of threads starts where the last has ended, in the cycle 0 ... 6.
SUMS = [sum(i % 7 for i in range(96 * block, 96 * (block + 1))) for block in range(8)]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ found"),
    pytest.mark.skipif(not EMULATOR.is_dir(), reason="the sources are not here"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("emulator") / "cases"
    command = ["g++", "-std=c++17", "-O1", "-g1", "-DHG_EMULATE_CUDA", f"-I{EMULATOR}", "-x", "c++"]
    command += ["-fsanitize=address,undefined", ROOT / "tests" / "emulator_cases.cu", EMULATOR / "emulator.cpp"]
    subprocess.run([*command, "-o", binary], check=True)
    return binary


def run(program: Path, case: str, seed: int | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {} if seed is None else {"HYPERGRAD_EXT_EMULATE_SEED": str(seed)}
    return subprocess.run([program, case], capture_output=True, text=True, check=False, env=environment, timeout=60)


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("case", ["block_sums", "copies", "bulk_copies"])
def test_right_sums(case, seed, program):
    result = run(program, case, seed)
    assert result.returncode == 0, result.stderr
    assert [float(x) for x in result.stdout.split()][:8] == SUMS


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_blocks_of_a_cooperative_launch_wait_for_each_other(seed, program):
    result = run(program, "grid_barrier", seed)
    assert result.returncode == 0, result.stderr
    values = [float(x) for x in result.stdout.split()]
    assert values[:8] == [0, 1, 2, 3, 4, 5, 6, 0] and values[8:] == [0, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("case", ["block_sums_without_barrier", "copies_without_wait", "bulk_copies_without_wait"])
def test_reading_too_early_gives_nan(case, seed, program):
    result = run(program, case, seed)
    assert result.returncode == 0, result.stderr
    assert "nan" in result.stdout


def test_a_race_shows_in_another_order(program):
    assert len({run(program, "race", seed).stdout for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "some_return_before_the_barrier",
            "90 at a barrier, 0 at a warp operation",
        ),
        ("different_barriers", "threads of one block wait at different barriers: thread 0 at __syncthreads"),
        ("a_lane_stays_away", "31 at a warp operation"),
        ("grid_barrier_without_cooperation", "1 for other blocks or copies"),
        ("grid_too_large", "too many blocks in cooperative launch"),
        ("more_shared_than_allowed", "invalid argument"),
        ("bulk_copy_uneven", "a bulk copy of 380 bytes is not aligned to 16"),
        (
            "bulk_copy_too_short",
            "threads wait for ever: in block 0, 0 at a barrier, 0 at a warp operation, 96 for other",
        ),
        ("bulk_copy_too_long", "expects 368 bytes, and more are sent"),
        ("bulk_barrier_armed_twice", "armed before anybody has waited for its phase: thread 0"),
        ("bulk_copy_never_waited_for", "a block ends with bulk copies under way"),
        ("bulk_barrier_not_made", "no barrier for bulk copies has been made here: thread 0 at bulk_try_wait"),
    ],
)
def test_error_of_the_launch(case, message, program):
    result = run(program, case)
    assert result.returncode == 0, result.stderr
    error, values = result.stdout.splitlines()
    assert error.startswith("error: ") and message in error
    assert [float(x) for x in values.split()][:8] == SUMS


@pytest.mark.parametrize("case", ["beyond_global", "beyond_static_shared", "beyond_dynamic_shared"])
def test_the_address_sanitizer_knows_all_memory(case, program):
    result = run(program, case)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr
