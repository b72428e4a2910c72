"""A rank of a real run that is struck by faults: `python -m tests.faulty_rank --config C --run-dir R --faults LIST`, with a
comma-separated list of START:STEP:RANK:WHAT; WHAT is one of `FAULTS`."""

import argparse
import os
import signal
import sys
import time

from trainer.run_folder import RunFolder


def sleep_for_ever() -> None:
    time.sleep(1000)


def be_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_slow() -> None:
    time.sleep(1.0)


FAULTS = {"sleep": sleep_for_ever, "stopped": be_stopped, "killed": be_killed, "slow": be_slow}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--faults", default="")
    parser.add_argument("--slow-saves", default="-1:0", help="START:SECONDS that each save, and the end, takes longer")
    options = parser.parse_args()
    from trainer import train
    from trainer.checkpoint.manager import CheckpointManager
    from trainer.run import Run
    from trainer.trainer import Trainer

    start = len(RunFolder(options.run_dir).names("attempts"))
    due = {}
    for fault in filter(None, options.faults.split(",")):
        at_start, step, rank, what = fault.split(":")
        if (int(at_start), int(rank)) == (start, int(os.environ["RANK"])):
            due[int(step)] = FAULTS[what]
    slow_start, slow_s = options.slow_saves.split(":")
    train_step, save, draw_curves = Trainer._train_step, CheckpointManager.save, Run._draw_curves

    def struck(trainer, batch, plan):  # type: ignore[no-untyped-def]
        due.pop(plan.step, lambda: None)()
        return train_step(trainer, batch, plan)

    def slow_save(manager, *arguments, **named):  # type: ignore[no-untyped-def]
        time.sleep(float(slow_s) if start == int(slow_start) else 0)
        return save(manager, *arguments, **named)

    def slow_end(run: Run) -> None:
        time.sleep(float(slow_s) if start == int(slow_start) else 0)
        draw_curves(run)

    Run._draw_curves = slow_end  # type: ignore[assignment, method-assign]
    Trainer._train_step = struck  # type: ignore[method-assign]
    CheckpointManager.save = slow_save  # type: ignore[assignment, method-assign]
    return train.main(["--config", options.config, "--run-dir", options.run_dir])


if __name__ == "__main__":
    sys.exit(main())
