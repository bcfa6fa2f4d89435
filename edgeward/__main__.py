"""The edgeward command: argv -> a stage -> a result on stdout; logs and errors on stderr."""

import os
import sys
from collections.abc import Sequence

import cyclopts

from bundle.errors import EdgewardError
from bundle.log import configure as configure_log

INTERRUPTED = 130  # as shells say it: 128 + SIGINT

app = cyclopts.App(
    name="edgeward",
    help="Fine-tune a pretrained model, compile it to quantized ONNX, prove that its accuracy survived, serve it.",
    suppress_keyboard_interrupt=False,
)
# by name, so that serving never imports what training needs
app.command("edgeward.stages:finetune", name="finetune", help="Adapt a pretrained model to labelled data.")
app.command("edgeward.stages:export", name="export", help="Compile a checkpoint into a bundle that kept its accuracy.")
app.command("edgeward.serving:serve", name="serve", help="Answer gRPC calls from bundles and ONNX models.")
app.command("edgeward.scoring:score", name="score", help="Score files of any size, every row exactly once.")
app.command("edgeward.inferring:infer", name="infer", help="Ask a running server.")
app.command("edgeward.bundles:inspect", name="inspect", help="Show what is in a bundle.")
app.command("edgeward.bundles:verify", name="verify", help="Check every hash of a bundle and run its self-test.")


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 our error, 2 usage, 3 gate failed, 130 interrupted."""
    configure_log()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors reach us as exceptions, and the user as one line
    # The thread that waits for events reads the sockets itself, and no other one has to wake it; read with its import.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        _explain(error)
        return 2
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
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"edgeward: {text}\n")


def _explain(error: cyclopts.CycloptsError) -> None:
    from rich.console import Console  # megabytes, of which a server has no need

    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(cyclopts.CycloptsPanel(error))


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
