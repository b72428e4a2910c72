"""Are samples lost or repeated, when runs are stopped, killed and resumed on other numbers of ranks?

    python -m ops.bench.data_sequences [--sequences 20] [--seed 0] [--damage 5] [--own-fork-servers]

Each sequence is one run of 48 steps on two mixed datasets with aspect buckets, captions by weight, random crops and flips,
in three phases of two mixes and batch sizes; shards come from storage that is not local, through bounded caches of two
"nodes", fetched ahead. Its ranks are processes of their own with one or two data workers each. At random moments all its
ranks are stopped (SIGTERM), or it is killed: all ranks, one of them, or one data worker (SIGKILL). The next start goes on from
the newest saved state, on another number of ranks. Everything but the training itself is the trainer's own code.

In the last --damage sequences shards are also damaged or removed at random moments and mended at others, and newest saved
states are lost now and then, so that starts begin from earlier ones. What stands for the samples of a bad shard is then part
of what must be the same.

lost, repeated   samples of the uninterrupted run's global batches that the batches which count do not have, or that they
                 have besides; which count: of each step, those of the last start that delivered it
moved            batches of the same samples in another order, or with other captions or pixels
differing        what ranks were given at steps that they did again, or alone before a kill, and was not the same. Where a shard
                 went bad at a step only when that was done again, the same is meant of what was known then
"""

import argparse
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ops.bench.stream_sets import SHARD_KIB, config_of, damage_or_mend, mend, write_datasets

WORLD_SIZES = (1, 2, 4)
Delivered = tuple[str, str, str]
"""A sample: its key, caption and a digest of its pixels."""
SAVE_EVERY = 7
_CACHE_SHARDS = 16
"""Room of a node's cache; the window, what is fetched ahead and what is open must fit."""
_START_S = 240.0
_MOST_STARTS = 16
_DISTURBED = 2
"""Starts that do not come to their end undisturbed; of later ones half do."""


@dataclass
class Result:
    seed: int
    worlds: list[int] = field(default_factory=list)
    """Ranks of each start."""
    stops: int = 0
    kills: int = 0
    damages: int = 0
    left_out: int = 0
    """Shards, at the end."""
    batches: int = 0
    again: int = 0
    """Steps delivered more than once."""
    lost: int = 0
    repeated: int = 0
    moved: int = 0
    differing: int = 0

    @property
    def resizes(self) -> int:
        return sum(a != b for a, b in zip(self.worlds, self.worlds[1:], strict=False))

    @property
    def exact(self) -> bool:
        return not (self.lost or self.repeated or self.moved or self.differing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first sequence; the others follow")
    parser.add_argument("--damage", type=int, default=5, help="how many of them, the last ones, have shards go bad")
    parser.add_argument(
        "--own-fork-servers",
        action="store_true",
        help="each rank starts the process that its data workers are forked from, as a trainer does; slower",
    )
    options = parser.parse_args()
    # of ranks that were killed; it goes to processes that are started from here
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        datasets = write_datasets(Path(folder) / "whole")
        for i in range(options.sequences):
            damage = i >= options.sequences - options.damage
            began = time.monotonic()
            results.append(
                sequence(Path(folder) / str(i), datasets, options.seed + i, damage=damage, own=options.own_fork_servers)
            )
            print(f"{in_words(results[-1])}   {time.monotonic() - began:.0f} s", flush=True)
    print(f"\n{table(results)}")
    sys.exit(not all(result.exact for result in results))


def in_words(r: Result) -> str:
    worlds = "-".join(map(str, r.worlds))
    return (
        f"seed {r.seed:3}  ranks {worlds:20} stops {r.stops}, kills {r.kills}, resizes {r.resizes}, damaged {r.damages}, "
        f"left out {r.left_out}; {r.batches} batches, {r.again} delivered again; lost {r.lost}, repeated {r.repeated}, "
        f"moved {r.moved}, differing {r.differing}"
    )


def table(results: Sequence[Result]) -> str:
    names = ("stops", "kills", "resizes", "damages", "batches", "again", "lost", "repeated", "moved", "differing")
    sums = [str(sum(getattr(r, name) for r in results)) for name in names]
    lines = [["sequences", *names], [str(len(results)), *sums]]
    return "\n".join("  ".join(cell.rjust(9) for cell in line) for line in lines)


# ------------------------------------------------------------------------------------------------------------- a sequence


def sequence(folder: Path, whole: Path, seed: int, *, damage: bool = False, own: bool = False) -> Result:
    """A run from its first start to its last step, and how its batches differ from the undisturbed ones.

    Args:
        folder: of its own; made here.
        whole: where `write_datasets` wrote.
        damage: also let shards go bad, and states get lost.
        own: each rank has a fork server of its own.
    """
    from ops.bench.stream_rank import FAR, STATES, Attempt

    rng, result = random.Random(seed), Result(seed)
    run, far = folder / "run", folder / "far"
    (run / "logs").mkdir(parents=True)
    shutil.copytree(whole, far)
    config = config_of(f"{FAR}://{far}", seed, num_workers=rng.choice((1, 2)))
    cache_gib = _CACHE_SHARDS * (SHARD_KIB << 10) / 2**30
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ops.bench.stream_rank", "data.loader"])
    multiprocessing.forkserver.ensure_running()
    address: str = multiprocessing.forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    while True:
        assert len(result.worlds) < _MOST_STARTS, f"{run}: no end; see its logs"
        world_size = rng.choice([size for size in WORLD_SIZES if size not in result.worlds[-1:]])
        number = len(result.worlds)
        attempt = Attempt(
            str(run), number, config, world_size, free_port(), (str(folder / "node0"), str(folder / "node1")), cache_gib,
            SAVE_EVERY, step_s=0.03, seed=seed, forkserver=None if own else address,
        )  # fmt: skip
        result.worlds.append(world_size)
        ranks = [_start(context, attempt, rank) for rank in range(world_size)]
        try:
            if _disturb(attempt, ranks, rng, result, (whole, far) if damage else None):
                break
        finally:
            _end(ranks)
            mend(whole, far)
            _keep_record(run, number)
        states = sorted((run / STATES).glob("*.json"))
        if damage and len(states) > 1 and rng.random() < 0.4:
            states[-1].unlink()
    _compare(folder, whole, seed, result)
    return result


def _start(context: Any, attempt: Any, rank: int) -> BaseProcess:
    from ops.bench.stream_rank import rank_process

    process: BaseProcess = context.Process(target=rank_process, args=(attempt, rank))
    process.start()
    return process


def _disturb(
    attempt: Any, ranks: Sequence[BaseProcess], rng: random.Random, result: Result, shards: tuple[Path, Path] | None
) -> bool:
    """Stop or kill a start at a random moment; True where it came to its end before."""
    logs = [_log(attempt, rank) for rank in range(attempt.world_size)]
    how = rng.choice(("stop", "stop one", "kill", "kill one", "kill a worker"))
    if attempt.number >= _DISTURBED and rng.random() < 0.5:
        how = "nothing"
    delivered, pause = rng.randint(1, 24), rng.random() * 0.06
    events = sorted(rng.sample(range(1, 16), 4)) if shards else []
    deadline = time.monotonic() + _START_S
    while any(rank.is_alive() for rank in ranks):
        done = min(_count(log) for log in logs)
        while shards and events and done >= events[0]:
            events.pop(0)
            result.damages += damage_or_mend(*shards, rng)
        if how != "nothing" and done >= delivered:
            time.sleep(pause)
            _act(how, attempt, ranks, rng)
            how = "nothing"
            delivered = -1
        failed = [rank.exitcode for rank in ranks if rank.exitcode not in (None, 0, 75)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    codes = [rank.exitcode for rank in ranks]
    stopped_at_once = delivered == -1
    if not stopped_at_once:
        assert codes == [0] * len(ranks), (
            f"{attempt.folder}: exit codes {codes} of a start that nobody stopped; see its logs"
        )
    if codes == [0] * len(ranks):
        return True
    if set(codes) <= {0, 75}:
        result.stops += 1
    else:
        assert time.monotonic() < deadline, f"{attempt.folder}: no end by {_START_S:g} s; see its logs"
        result.kills += 1
    return False


def _act(how: str, attempt: Any, ranks: Sequence[BaseProcess], rng: random.Random) -> None:
    victims = [rank.pid or 0 for rank in ranks]
    if how in ("stop one", "kill one"):
        victims = [rng.choice(victims)]
    if how == "kill a worker":
        pids = _log(attempt, rng.randrange(len(ranks))).with_suffix(".workers").read_text().split()
        victims = [int(rng.choice(pids))] if pids else []
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM if how.startswith("stop") else signal.SIGKILL)


def _end(ranks: Sequence[BaseProcess]) -> None:
    """As a launcher does when one has failed."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()


def _keep_record(run: Path, number: int) -> None:
    """Of shards that are left out, as it is after a start."""
    from trainer.run_folder import BAD_SHARDS

    record = run / BAD_SHARDS
    (run / "logs" / f"{number:02d}.record").write_text(record.read_text() if record.exists() else '{"shards": []}')


def _log(attempt: Any, rank: int) -> Path:
    return Path(attempt.folder) / "logs" / f"{attempt.number:02d}-{attempt.world_size}-{rank}.jsonl"


def _count(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# -------------------------------------------------------------------------------------------------------------- comparing


def _compare(folder: Path, whole: Path, seed: int, result: Result) -> None:
    from ops.bench.stream_rank import uninterrupted
    from trainer.bad_shards import from_json

    config = config_of(str(whole), seed)
    made: dict[str, list[list[Delivered]]] = {}
    known: dict[Any, Any] = {}
    counting: dict[int, list[Delivered]] = {}
    seen: set[int] = set()
    for number, parts in enumerate(_starts(folder / "run" / "logs")):
        record = (folder / "run" / "logs" / f"{number:02d}.record").read_text()
        before, known = known, from_json(json.loads(record)["shards"])
        taken_in = [s for s, how in before.items() if s not in known or known[s].since > how.since]
        assert not taken_in, f"start {number} trained on {taken_in} again, which were left out"
        if record not in made:
            made[record] = [samples(batch) for batch in uninterrupted(config, str(folder / "local"), known)]
        for step in sorted(set().union(*parts)):
            right = made[record][step]
            count = len(right) // len(parts)
            result.again += step in seen
            seen.add(step)
            # of a step at which ranks were killed some have delivered their part
            for rank, part in enumerate(parts):
                result.differing += step in part and part[step] != right[rank * count : (rank + 1) * count]
            if all(step in part for part in parts):
                counting[step] = [sample for part in parts for sample in part[step]]
    result.left_out = len(known)
    # the last start knew of all shards that were ever left out, and since when
    expected = made[record]
    result.batches = len(expected)
    for step, right in enumerate(expected):
        found = counting.pop(step, [])
        lost, more = Counter(right) - Counter(found), Counter(found) - Counter(right)
        result.lost += lost.total()
        result.repeated += more.total()
        result.moved += found != right and not (lost or more)
    result.repeated += sum(map(len, counting.values()))


def _starts(logs: Path) -> list[list[dict[int, list[Delivered]]]]:
    """Of each start, of each rank: what it was given at each step."""
    files = sorted(logs.glob("*.jsonl"))
    starts = []
    for number in sorted({file.name[:2] for file in files}):
        of_start = [file for file in files if file.name[:2] == number]
        size = int(of_start[0].stem.split("-")[1])
        parts: list[dict[int, list[Delivered]]] = [{} for _ in range(size)]
        for file in of_start:
            # what follows the last newline was cut short by a kill
            for line in file.read_text().split("\n")[:-1]:
                record = json.loads(line)
                part = parts[int(file.stem.split("-")[2])]
                assert record["step"] not in part, f"{file}: step {record['step']} twice"
                part[record["step"]] = samples(record)
        starts.append(parts)
    return starts


def samples(record: Mapping[str, Any]) -> list[Delivered]:
    return list(zip(record["keys"], record["captions"], record["pixels"], strict=True))


if __name__ == "__main__":
    main()
