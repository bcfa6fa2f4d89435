"""`transformers:ID_OR_DIR`: text encoders of the transformers library."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from bundle.errors import MissingExtra, ModelError
from bundle.log import log
from bundle.manifest import TextInput
from bundle.text import TOKENIZER
from finetune.config import TrainConfig
from finetune.data import Dataset
from finetune.model import TransformersModel
from finetune.pretrained import Pretrained, buckets

CONFIG = "config.json"
_DEFAULT_LENGTH = TrainConfig.max_length


def open_model(name: str, config: TrainConfig, dataset: Dataset) -> Pretrained:
    """A pretrained encoder with its tokenizer.

    Args:
        name: a folder, or an id on the hub.
        config: has the length, special tokens included, and the pooling. Where the length is the default, it is cut to
            what the encoder can take.
        dataset: has the names of the texts: one, or two that are encoded as a pair.

    Raises:
        ModelError: there is no such model here, or it is not an encoder with a fast tokenizer, or takes fewer tokens.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ModelError(f"there is no folder {name}.")
    column, *pair = dataset.input_columns or ("text",)
    if len(pair) > 1:
        raise ModelError(f"an encoder takes one or two columns of texts, not {', '.join(dataset.input_columns)}.")
    source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    transformers = _import()
    tokenizer, pad_id = _open_tokenizer(transformers, source)
    backbone = _open_backbone(transformers, source)
    pooling: Literal["mean", "cls"] = "cls" if config.pooling == "cls" else "mean"
    spec = TransformersModel(name=name, pooling=pooling, dropout=_dropout(backbone.config))
    length = _length(backbone, config.max_length, pad_id, name)
    text = TextInput(
        column=column,
        pair=pair[0] if pair else None,
        max_length=length,
        pad_id=pad_id,
        buckets=buckets(length),
    )
    settings = backbone.config.to_json_string(use_diff=False).encode()
    return Pretrained(
        spec, text, backbone, backbone.config.hidden_size, {TOKENIZER: tokenizer.encode(), CONFIG: settings}
    )


def rebuild(read: Callable[[str], bytes]) -> tuple[nn.Module, int]:
    """The same architecture with fresh weights, and its number of features, from the stored config.json.

    Raises:
        ModelError: this transformers cannot make it.
    """
    transformers = _import()
    try:
        config = transformers.AutoConfig.for_model(**json.loads(read(CONFIG)))
        backbone = transformers.AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ModelError(f"transformers {transformers.__version__} cannot make the model: {error}") from error
    return _without_pooler(backbone), config.hidden_size


def _import() -> ModuleType:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtra("transformers is not installed: pip install 'edgeward[finetune]'.") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _open_tokenizer(transformers: ModuleType, source: str) -> tuple[str, int]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # OSError, ValueError, ImportError, and the hub's own
        raise _cannot_load("the tokenizer of", source, error) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source} has no fast tokenizer (tokenizer.json), and no other can be served.")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up where the files are missing
        raise ModelError(f"{source} has no tokenizer: there is no tokenizer.json or vocabulary in it.")
    return tokenizer.backend_tokenizer.to_str(), tokenizer.pad_token_id or 0  # the mask makes any id as good


def _open_backbone(transformers: ModuleType, source: str) -> Any:
    try:
        backbone, info = transformers.AutoModel.from_pretrained(
            source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except Exception as error:  # as above
        raise _cannot_load("the weights of", source, error) from error
    backbone = _without_pooler(backbone)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        raise ModelError(
            f"the weights of {source} lack {len(missing)} of the model's tensors and have "
            f"{len(info['mismatched_keys'])} of another shape: {', '.join(missing[:3])}."
        )
    return backbone


def _cannot_load(what: str, source: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    return ModelError(f"{what} {source} cannot be loaded: {reason} Without a network, give a folder.")


def _without_pooler(backbone: Any) -> Any:
    if getattr(backbone, "pooler", None) is not None:  # a layer on the first token that no output here comes from
        backbone.pooler = None
    return backbone


def _dropout(config: Any) -> float:
    for key in ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "hidden_dropout"):
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            return float(value)
    return 0.1


def _length(backbone: Any, wanted: int, pad_id: int, name: str) -> int:
    """The length that was wanted, or what the encoder can take if that is less and nobody asked for more."""
    backbone.eval()
    refusal = _refusal(backbone, wanted, pad_id)
    if refusal is None:
        return wanted
    good, bad = 0, wanted
    while wanted == _DEFAULT_LENGTH and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if _refusal(backbone, middle, pad_id) else (middle, bad)
    if not good:
        raise ModelError(
            f"{name} cannot encode {wanted} tokens: {refusal}. Choose an encoder, or a shorter max_length."
        )
    log.info("the encoder takes fewer tokens than the default", model=name, max_length=good)
    return good


def _refusal(backbone: Any, length: int, pad_id: int) -> str | None:
    """Why an encoder cannot take texts of so many tokens, if it cannot."""
    padding = (pad_id, getattr(backbone.config, "pad_token_id", None))  # to which some give no position
    ids = torch.full((2, length), next(token for token in range(3) if token not in padding))
    try:
        with torch.inference_mode():
            hidden = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    except Exception as error:  # an IndexError beyond the last position, an AttributeError of another kind of model
        return str(error) or type(error).__name__
    if hidden.shape != (2, length, getattr(backbone.config, "hidden_size", None)):
        return f"it gives vectors {tuple(hidden.shape)}, not (2, {length}, hidden size)"
    return None
