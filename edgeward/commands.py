"""The commands, and how a command line is read: argv -> a stage."""

from collections.abc import Sequence

import cyclopts

from bundle.errors import EdgewardError

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


class UsageError(EdgewardError):
    """The command line is wrong."""

    exit_code = 2


def call(arguments: Sequence[str]) -> None:
    """Run one command line.

    Raises:
        UsageError: it cannot be read.
        EdgewardError, OSError, KeyboardInterrupt: of the command.
    """
    _check_command(arguments)
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _check_command(arguments: Sequence[str]) -> None:
    """Refuse what is no command: cyclopts would import them all to suggest one, and an edge box cannot."""
    words = [word for word in arguments if word not in (*app.help_flags, *app.version_flags)]
    names = [name for name in app if not name.startswith("-")]
    if words and words[0] not in names:
        raise UsageError(f"There is no command {words[0]!r}. The commands are {', '.join(names)}.")
