"""Why PyTorch could not export a network, in one sentence that names the operator, the layer and the line."""

import re
from collections.abc import Callable, Iterator

from torch.export import ExportedProgram

_OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)")
_LINE = re.compile(r'The following call raised this error:\n  File "([^"]+)", line (\d+), in \w+\n\s*([^\n]+)')
_STYLE = re.compile(r"\x1b\[\d+m")


def reason(error: BaseException, trace: Callable[[], ExportedProgram]) -> str:
    """What stopped an export.

    Args:
        error: of torch.onnx.export, with its causes.
        trace: the network as PyTorch sees it before it is made ONNX; called when an operator has no counterpart there.
    """
    said = [_STYLE.sub("", str(each)) for each in _causes(error)]
    for text in said:
        if found := _OPERATOR.search(text):
            operator = f"{found[1]}.{found[2]}"
            return f"ONNX has nothing for the operator {operator}{_layer(operator, trace)}."
        if "data-dependent" in text and (line := _LINE.search(text)):
            return f"what is computed depends on the values of the data, in {line[1]}, line {line[2]}: {line[3]}"
    text = next((text for text in said[::-1] if text.strip()), type(error).__name__)
    return text.strip().splitlines()[0]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _layer(operator: str, trace: Callable[[], ExportedProgram]) -> str:
    """The layer that uses an operator, as a clause; nothing where that cannot be found."""
    try:
        nodes = trace().graph.nodes
    except Exception:  # of many classes, and the reason is known already
        return ""
    for node in nodes:
        if str(node.target) == operator and (stack := node.meta.get("nn_module_stack")):
            path, kind = list(stack.values())[-1]
            name = path.removeprefix("L['self'].").removeprefix("network.") or "the network"
            return f", which {name} ({getattr(kind, '__name__', str(kind).rpartition('.')[2])}) uses"
    return ""
