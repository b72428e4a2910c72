"""What each process of a job runs: `python -m trainer.train --config RUN/config.yaml --run-dir RUN`.

It says by its exit code what is to be done next (`trainer.errors.ExitCode`). The ranks find each other through RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them it trains alone.

Nothing heavy is imported here: data workers import their parent's main module again.
"""

import argparse
import os
import sys
import traceback

from data.forkserver import start_forkserver
from trainer.config_text import from_yaml
from trainer.errors import ExitCode, UserError
from trainer.garbage import without_collection
from trainer.preemption import StopRequest
from trainer.run_folder import RunFolder
from trainer.start_times import StartTimes, process_age_s


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run's resolved config, YAML")
    parser.add_argument("--run-dir", required=True, help="the run folder, a path or any fsspec URL")
    options = parser.parse_args(arguments)
    stop = StopRequest()  # before the slow imports: a signal during them must not kill the process
    try:
        with open(options.config, encoding="utf-8") as file:
            config = from_yaml(file.read(), source=options.config)
        if config.data.num_workers:
            start_forkserver()  # which imports for seconds, as this process does now
        with without_collection():  # a fifth of the time that the imports take
            from trainer.run import run

        return run(config, RunFolder(options.run_dir), stop, StartTimes(process_age_s()))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code: int = ExitCode.STOP
    except Exception:
        traceback.print_exc()
        code = 1
    # At once: other ranks may wait for this one in a collective, and tearing down would wait for them. The launcher ends
    # them when this process is gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
