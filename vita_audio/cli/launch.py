"""torchrun for our commands: the same options, one line when a command refuses, and no orphans.

    python vita_audio/cli/launch.py --nproc_per_node 8 tools/finetune_sts.py --model_name_or_path …

* A process that refuses hands its message to the launcher, in the error file that torchrun gives every process.
  The launcher prints it once, in place of one copy for each process and torchrun's report of some forty lines.
* A process ends with its launcher, also with one that is killed in its first moments. Each process starts in
  this file, which asks Linux for that before anything is imported, makes sure that the launcher still lives,
  and becomes the command.

The file is run by its path and imports the standard library alone until it launches, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

REFUSED = 78
"""Exit status of a command that refuses: EX_CONFIG of sysexits.h."""
LAUNCHER_VARIABLE = "VITA_AUDIO_LAUNCHER"
"""In the environment of launched processes: the launcher's process id."""
_WORKER_FLAG = "--as-worker"


def main(argv: Sequence[str] | None = None) -> None:
    """Launch a command, or, in a launched process, become it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [_WORKER_FLAG]:
        end_with_launcher()
        os.execv(sys.executable, [sys.executable, "-u", *arguments[1:]])
    _launch(arguments)


def refuse(message: str) -> NoReturn:
    """End this process with one line on standard error, or, below the launcher, with that line from the launcher."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file and LAUNCHER_VARIABLE in os.environ:
        Path(error_file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    else:
        print(message, file=sys.stderr)
    sys.exit(REFUSED)


def end_with_launcher() -> None:
    """Let this process die when its launcher does, and at once if the launcher is gone already."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # The launcher may have died before the line above. Then this process has another parent by now.
    if not _is_launcher(os.getppid()):
        os._exit(1)


def _is_launcher(process: int) -> bool:
    if LAUNCHER_VARIABLE in os.environ:
        return process == int(os.environ[LAUNCHER_VARIABLE])
    # A plain torchrun does not say who it is, but it runs in this interpreter; a process that adopts orphans does not.
    try:
        return os.readlink(f"/proc/{process}/exe") == os.readlink("/proc/self/exe")
    except OSError:
        return False


def _launch(arguments: list[str]) -> None:
    from torch.distributed import DistNetworkError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(arguments)
    script = ["-m", options.training_script] if options.module else [options.training_script]
    options.module = False
    options.training_script_args = [_WORKER_FLAG, *script, *options.training_script_args]
    options.training_script = os.path.abspath(__file__)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    # They announce every process that they stop and report the failure that is told below.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    try:
        run.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == REFUSED:
            print(failure.message, file=sys.stderr)
        else:
            how = f"status {failure.exitcode}" if failure.exitcode >= 0 else failure.signal_name()
            print(f"launch: process {rank} ended with {how}; what it said stands above", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except DistNetworkError as error:
        reason = str(error).splitlines()[0]
        print(f"launch: {reason}\nlaunch: give a free port with --master_port (MASTER_PORT)", file=sys.stderr)
        sys.exit(REFUSED)
    except SignalException as error:
        print(f"launch: stopped by {error.sigval.name}", file=sys.stderr)
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
