"""torchrun for our commands: the same options, one-line errors, and no orphan processes.

    python vita_audio/cli/launch.py --nproc_per_node 8 tools/finetune_sts.py --model_name_or_path …

* A process that fails on bad input passes its message to the launcher, in the error file that torchrun gives every
  process. The launcher prints it once, instead of one copy per process and torchrun's report of some forty lines.
* SIGTERM and SIGUSR1 are passed on, and the launcher waits: a trainer saves first. A second one ends everything.
* A process ends with its launcher, even if the launcher is killed early. Each process starts in this file, which
  requests this from Linux before anything is imported, checks that the launcher is still alive, and then
  becomes the command.

The file is run by its path and imports only the standard library before it launches, so it starts quickly.
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
from types import FrameType
from typing import NoReturn

REFUSED = 78
"""Exit status of a command that fails on bad input: EX_CONFIG of sysexits.h."""
LAUNCHER_VARIABLE = "VITA_AUDIO_LAUNCHER"
"""Environment variable of launched processes with the launcher's process id."""
_WORKER_FLAG = "--as-worker"


def main(argv: Sequence[str] | None = None) -> None:
    """Launch a command or, in a launched process, become it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [_WORKER_FLAG]:
        end_with_launcher()
        os.execv(sys.executable, [sys.executable, "-u", *arguments[1:]])
    _launch(arguments)


def refuse(message: str) -> NoReturn:
    """End this process with one line on standard error; with the launcher, the launcher prints it."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file and LAUNCHER_VARIABLE in os.environ:
        Path(error_file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    else:
        print(message, file=sys.stderr)
    sys.exit(REFUSED)


def end_with_launcher() -> None:
    """End this process when its launcher ends, or at once if the launcher has already ended."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # The launcher may have died before the line above; then this process already has another parent.
    if not _is_launcher(os.getppid()):
        os._exit(1)


def _is_launcher(process: int) -> bool:
    if LAUNCHER_VARIABLE in os.environ:
        return process == int(os.environ[LAUNCHER_VARIABLE])
    # A plain torchrun does not give its id, but it runs in this interpreter; a process that adopts orphans does not.
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
    # They log every process that they stop, and the failure that is reported below.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    options.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    received: list[signal.Signals] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if len(received) > 1:
            raise SignalException("stopped twice", sigval=received[-1])
        for process in _children():
            os.kill(process, number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    try:
        run.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if received and failure.exitcode < 0:
            print(f"launch: stopped by {received[0].name}", file=sys.stderr)
            sys.exit(128 + received[0])
        if failure.exitcode == REFUSED:
            print(failure.message, file=sys.stderr)
        elif received:
            print(f"launch: stopped by {received[0].name} with status {failure.exitcode}", file=sys.stderr)
        else:
            how = f"status {failure.exitcode}" if failure.exitcode >= 0 else failure.signal_name()
            print(f"launch: process {rank} ended with {how}; see its output above", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except DistNetworkError as error:
        reason = str(error).splitlines()[0]
        print(f"launch: {reason}\nlaunch: give a free port with --master_port (MASTER_PORT)", file=sys.stderr)
        sys.exit(REFUSED)
    except SignalException as error:
        print(f"launch: stopped by {error.sigval.name}", file=sys.stderr)
        sys.exit(128 + error.sigval)


def _children() -> list[int]:
    """The processes that this one has started."""
    files = Path("/proc/self/task").glob("*/children")
    return [int(word) for file in files for word in file.read_text().split()]


if __name__ == "__main__":
    main()
