"""A rank that needs no torch: what the supervisor sees of a trainer, that is its metrics, signals and exit codes.

It counts steps and keeps the count in the run folder as its checkpoint. `--script` says what happens at which step of
which attempt: `ATTEMPT:STEP:RANK:WHAT` with WHAT an exit code, `kill` or `hang`; comma-separated. `--at-step` has rank 0 run
a command of the shell, `ATTEMPT:STEP:COMMAND`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--script", default="")
    parser.add_argument("--at-step", action="append", default=[])
    options = parser.parse_args()
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: stop.append(number))
    run, rank = options.run_dir, int(os.environ["RANK"])
    saved = run / f"saved-{rank}"
    step = int(saved.read_text()) if saved.exists() else 0
    attempt = len(list((run / "attempts").glob(f"*-{rank}"))) if (run / "attempts").exists() else 0
    (run / "attempts").mkdir(exist_ok=True)
    (run / "attempts" / f"{attempt:04d}-{rank}").write_text("")
    events = [event.split(":") for event in options.script.split(",") if event]
    commands = [command.split(":", 2) for command in options.at_step if rank == 0]
    (run / "metrics").mkdir(exist_ok=True)
    with open(run / "metrics" / f"{attempt:04d}.jsonl", "a") as metrics:
        while step < options.steps:
            for at_attempt, at_step, at_rank, what in events:
                if at_attempt in (str(attempt), "*") and int(at_step) == step and int(at_rank) == rank:
                    if what == "hang":
                        signal.signal(signal.SIGTERM, signal.SIG_IGN)
                        (run / f"hangs-{rank}").touch()
                        time.sleep(1000)
                    if what == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    print(f"error: told to end with {what}", flush=True)
                    return int(what)
            for at_attempt, at_step, command in commands:
                if (at_attempt, int(at_step)) == (str(attempt), step):
                    subprocess.run(command, shell=True, check=True)
            if stop:
                saved.write_text(str(step))
                print(f"saved at step {step}", flush=True)
                return 75
            time.sleep(options.step_s)
            step += 1
            if rank == 0:
                record = {"step": step, "total_steps": options.steps, "phase": "only", "images_per_s": 1.0,
                          "loss": {"denoising": 1 / step}, "time": time.time()}  # fmt: skip
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                if step % 3 == 0:  # as the listing shows them; the count above is what it goes on from
                    checkpoint = run / "checkpoints" / f"step-{step:08d}-00000000"
                    checkpoint.mkdir(parents=True, exist_ok=True)
                    (checkpoint / "COMMIT").touch()
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
