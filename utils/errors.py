"""Errors that a user can fix: one sentence on stderr, a non-zero exit status, no traceback."""
import contextlib
import os
import signal
import sys
import time

import torch

PATIENCE = 10  # seconds


class UsageError(ValueError):
    """A mistake in a command or its input: one sentence that names the thing and the remedy."""


class WriteError(UsageError):
    """A result that cannot be kept: nothing after it could be either."""


def require(condition, sentence):
    """Raise UsageError with this sentence unless the condition holds."""
    if not condition:
        raise UsageError(sentence)


def first_process():
    """Whether this is the first process of a run, or its only one: what all would say alike, it
    says alone."""
    return os.environ.get("RANK", "") in ("", "0")


def wait_for_the_first():
    """Give the process that says an error time to say it: torchrun ends all others, and the one
    that speaks among them, as soon as one is gone."""
    time.sleep(PATIENCE)


def first_line(error):
    """The first line of an exception's message, at most 150 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:150]


def is_out_of_memory(error):
    """Whether an exception means that memory ran out; the CPU's allocator has no own type."""
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "can't allocate memory" in str(error))


@contextlib.contextmanager
def friendly_errors():
    """Print UsageErrors, file system errors, lack of memory and Ctrl-C as one sentence and exit:
    status 2, or 130 for Ctrl-C. Everything else keeps its traceback."""
    message, status = None, 2
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows \xe9 for an accent
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UsageError as error:
        message = error
    except OSError as error:
        where = error.filename or "the file system"
        message = (f"{where}: {error.strerror or error}: check the path, its permissions and the "
                   "free space")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = (f"out of memory ({first_line(error)}): train.py takes a lower --micro-batch, "
                   "--activation-checkpointing or more devices, the others smaller clips")
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    if message:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)


# what ends a run: Ctrl-C, a scheduler's end of time or of a loan, the end of a terminal
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def catch_signals(*signals):
    """A list to which the signals (default: STOPPING) are appended, so that a loop can stop between
    two steps. A second SIGTERM or Ctrl-C falls back to the default handler; SIGUSR1 and SIGHUP come
    twice when a scheduler sends them to all processes of a job, and change nothing then. SIGHUP
    stays ignored under nohup."""
    signals = [number for number in signals or STOPPING if number != signal.SIGHUP
               or signal.getsignal(number) is not signal.SIG_IGN]
    received, handlers = [], {number: signal.getsignal(number) for number in signals}

    def note(number, _):
        received.append(number)
        if number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handlers[number])

    try:
        for number in signals:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_device(name, flag="--device"):
    """Raise UsageError if this machine has no such device, which `flag` has named."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    require(name in available, f"{flag} {name}: choose cuda, mps or cpu; the variable "
            "CUDA_VISIBLE_DEVICES chooses the GPU")
    require(available[name], f"{flag} {name} is not available: leave it out to use what there is")
