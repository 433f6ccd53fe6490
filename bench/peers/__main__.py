"""Ours against every peer: ``python -m bench.peers [--quick] [--problem P] [--task T] [--peer Q]``.

Prints a table, and writes or completes ``bench/results/peers_threads<n>_<isa>.{json,md}`` (``peers_quick_...`` with
``--quick``): a long run may be made in parts, as long as nothing but results changes between them. On one thread the
clock is the process's own, for which foreign load does not count. Every problem is measured in several processes, one
pass over all problems after the other: memory and neighbours differ more between them than between rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

QUICK_TASKS = ("neumann20", "hypergradient")


def main() -> None:
    """Measure, print and save."""
    from bench.peers import COMPILED, PEERS

    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tasks, three rounds, nothing that compiles torch")
    parser.add_argument("--problem", action="append", help="default: all")
    parser.add_argument("--task", action="append", help="default: all")
    of = "; ".join(PEERS)
    parser.add_argument("--peer", action="append", choices=list(PEERS), metavar="PEER", help=f"default: all of {of}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all processors")
    parser.add_argument("--processes", type=int, help="default: 2 (--quick: 1)")
    parser.add_argument("--rounds", type=int, help="default: 7")
    parser.add_argument("--budget", type=float, help="seconds of rounds per task (default: 10)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # JAX counts its threads when it is imported: processors come first.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    options.peer = options.peer or [p for p in PEERS if not (options.quick and p in ("torch.compile", COMPILED))]
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.budget = options.budget or (3.0 if options.quick else 10.0)
    options.processes = options.processes or (1 if options.quick else 2)

    from bench.peers.problems import PROBLEMS
    from bench.peers.tasks import TASKS

    for given, known in ((options.problem, PROBLEMS), (options.task, TASKS)):
        for name in given or ():
            if name not in known:
                parser.error(f"expected one of {', '.join(known)}, got {name}")
    options.problem = options.problem or list(PROBLEMS)
    options.task = options.task or list(QUICK_TASKS if options.quick else TASKS)
    (work if options.worker else lead)(options)


def work(options: argparse.Namespace) -> None:
    """Measure in this process; the rows are the last line of what it prints."""
    import torch

    from bench.measure import clock_for
    from bench.peers.problems import load
    from bench.peers.run import compare
    from bench.peers.tasks import TASKS

    torch.set_num_threads(options.threads)
    rows = []
    for problem in options.problem:
        for task in options.task:
            torch._dynamo.reset()
            clock = clock_for(options.threads)
            rows += compare(load(problem), TASKS[task], options.peer, options.rounds, options.budget, clock)
    print(json.dumps(rows))


def lead(options: argparse.Namespace) -> None:
    """Have processes measure, and save what they found, also of a run that is cut short."""
    from bench.measure import save, table
    from bench.peers.run import merged, versions

    name = f"peers_{'quick_' if options.quick else ''}threads{options.threads}"
    settings = ("threads", "rounds", "budget", "task", "peer")
    given = [f"--{key}={value}" for key in settings for value in _listed(getattr(options, key))]
    runs: dict[str, list[list[dict[str, object]]]] = {problem: [] for problem in options.problem}
    for _ in range(options.processes):
        for problem, found in runs.items():
            command = [sys.executable, "-m", "bench.peers", "--worker", f"--problem={problem}", *given]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(table(merged(found)), flush=True)
            path = save(name, merged(found), key=3, threads=options.threads, **versions())
    print(f"saved {path}")


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


if __name__ == "__main__":
    main()
