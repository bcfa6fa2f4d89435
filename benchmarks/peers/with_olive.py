"""Olive: its static or dynamic quantization pass, or with NAME olive-search its search over both, with an evaluator."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from olive.data.component.dataset import BaseDataset
from olive.data.registry import Registry
from olive.workflows import run
from work import Feeds, Work, opened

DRAWS = 12  # of the search; some are invalid, some come again and cost nothing


class Examples(BaseDataset):
    """Feeds with their batch axis, and their labels; calibration leaves the labels alone."""

    def __init__(self, feeds: list[Feeds], labels: list[Any]) -> None:
        self.feeds, self.labels = feeds, labels

    def __len__(self) -> int:
        return len(self.feeds)

    def __getitem__(self, index: int) -> tuple[Feeds, Any]:
        return self.feeds[index], self.labels[index]


def data(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "DataContainer",
        "load_dataset_config": {"type": f"{name}_examples"},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "dataloader_config": {"type": "no_auto_batch_dataloader"},
        "post_process_data_config": {"type": "text_classification_post_process"},  # argmax
    }


def register(work: Work) -> None:
    import torch

    labels = torch.from_numpy(work.labels())

    @Registry.register_dataset("calibration_examples")
    def calibration(**_: Any) -> Examples:
        feeds = list(work.calibration())
        return Examples(feeds, [torch.zeros(1)] * len(feeds))

    @Registry.register_dataset("selection_examples")
    def selection(**_: Any) -> Examples:
        return Examples(list(work.selection()), list(labels[:, None]))


def evaluator(work: Work) -> dict[str, Any]:
    accuracy = {
        "name": "accuracy_score",
        "priority": 2,
        "metric_config": {"task": "multiclass", "num_classes": work.job.classes},
        "goal": {"type": "max-degradation", "value": work.job.budget},
    }
    latency = {"name": "avg", "priority": 1}  # of what keeps within the goal, the fastest
    return {
        "type": "OnnxEvaluator",  # Olive 0.13.0 trips over a type that is left out
        "metrics": [
            {"name": "accuracy", "type": "accuracy", "data_config": "selection", "sub_types": [accuracy]},
            {"name": "latency", "type": "latency", "data_config": "selection", "sub_types": [latency]},
        ],
    }


def optimize(work: Work, folder: str) -> tuple[str, str]:
    """The model's path, and what was done."""
    register(work)
    one: dict[str, Any] = {"type": "OnnxDynamicQuantization"}
    described = "OnnxDynamicQuantization"
    if work.job.kind == "image":
        one = {"type": "OnnxStaticQuantization", "data_config": "calibration", "precision": "int8"}
        one |= {"activation_type": "uint8", "per_channel": True}
        described = "OnnxStaticQuantization, QDQ, U8S8, per channel, MinMax"
    chosen: dict[str, Any] = {"passes": {"quantization": one}}
    if work.name == "olive-search":
        described = f"OnnxQuantization, search, {DRAWS} draws by TPE, max-degradation {work.job.budget:g}"
        searched = {"type": "OnnxQuantization", "data_config": "calibration"}
        if work.job.kind == "text":
            searched["calibrate_method"] = "MinMax"  # the others need texts of one length, or fail
        chosen = {
            "passes": {"quantization": searched},
            "search_strategy": {
                "execution_order": "joint",
                "sampler": "tpe",
                "max_iter": DRAWS,  # max_samples does not end it
                "sampler_config": {"seed": 0},
            },
            "evaluators": {"evaluator": evaluator(work)},
            "evaluator": "evaluator",
        }
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    output = run(
        {
            "input_model": {"type": "OnnxModel", "model_path": str(work.graph)},
            "systems": {"local": {"type": "LocalSystem", "accelerators": [accelerator]}},
            "host": "local",
            "target": "local",
            "data_configs": [data("calibration"), data("selection")],
            "cache_dir": f"{folder}/cache",
            "output_dir": f"{folder}/out",
            **chosen,
        }
    )
    best = output.get_best_candidate()
    if best is None:
        raise SystemExit("no model of Olive's met its goal")
    return best.model_path, described


if __name__ == "__main__":
    work = opened()
    with tempfile.TemporaryDirectory() as folder:
        path, described = optimize(work, folder)
        shutil.copyfile(Path(path), work.model)
    work.finish(described, "olive-ai", "onnxruntime", "onnx", "torch")
