"""The edgeward command: argv -> a stage -> a result on stdout; logs and errors on stderr."""

import os
import sys
from collections.abc import Sequence

from bundle.errors import EdgewardError
from bundle.log import configure as configure_log

INTERRUPTED = 130  # as shells say it: 128 + SIGINT


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 our error, 2 usage, 3 gate failed, 130 interrupted."""
    configure_log()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors reach us as exceptions, and the user as one line
    # The thread that waits for events reads the sockets itself, and no other one has to wake it; read with its import.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
    try:
        return _call(arguments)
    except EdgewardError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt as error:
        _say(str(error) or "interrupted; nothing half-written is left behind.")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the result has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _say(str(error))
        return 1


def _call(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["serve"]:
        from edgeward import plain

        config = plain.read(arguments[1:])
        if config:
            plain.serve(config)
            return 0
    from edgeward import commands

    commands.call(arguments)
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"edgeward: {text}\n")


def _open_standard() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: else a socket would be there, and get what is printed."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)


def main() -> None:
    """The console script."""
    _open_standard()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
