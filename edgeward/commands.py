"""The commands, and how a command line is read: argv -> a stage."""

from collections.abc import Sequence

import cyclopts

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


def call(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 2 usage, which is explained on stderr.

    Raises:
        EdgewardError, OSError, KeyboardInterrupt: of the command.
    """
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        _explain(error)
        return 2
    return 0


def _explain(error: cyclopts.CycloptsError) -> None:
    from rich.console import Console  # what only those need that print

    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(cyclopts.CycloptsPanel(error))
