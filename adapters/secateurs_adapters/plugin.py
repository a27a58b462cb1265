"""Entry point of the adapters: registers what they bring, by name; imports nothing that is heavy.

Listed under the entry-point group `secateurs`. Everything is a `"module:attribute"` string and imported at first use, so
that a missing onnxruntime or scikit-learn breaks only what needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateurs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from secateurs.data import Dataset
    from secateurs.devices import Device
    from secateurs.interfaces import (
        Converter,
        CostModel,
        DatasetLoader,
        Exporter,
        Metric,
        ModelLoader,
        StructureCostModel,
        Target,
    )
    from secateurs.plan import Plan
    from secateurs.registry import Registrar
    from secateurs.report import Report

PROVIDERS = {
    "CPUExecutionProvider": "CPUs, everywhere",
    "CUDAExecutionProvider": "NVIDIA GPUs",
    "TensorrtExecutionProvider": "NVIDIA GPUs through TensorRT",
    "OpenVINOExecutionProvider": "Intel CPUs, GPUs and NPUs",
    "XnnpackExecutionProvider": "Arm and x86 CPUs, mobile",
    "CoreMLExecutionProvider": "Apple devices",
    "QNNExecutionProvider": "Qualcomm NPUs",
    "DmlExecutionProvider": "GPUs on Windows through DirectML",
}
"""What each execution provider runs on."""
VALUE_METRICS = {
    "perplexity": ("Perplexity", "of the next token; labels are the input tokens; lower is better"),
    "mean-squared-error": ("MeanSquaredError", "of values; lower is better"),
    "mean-absolute-error": ("MeanAbsoluteError", "of values; lower is better"),
    "spearman": ("Spearman", "rank correlation of values"),
    "mean-iou": ("MeanIoU", "overlap of predicted and true pixels, averaged over classes"),
}
"""Metrics that are no share of examples: class and summary, by name."""


@hookimpl
def secateurs_register_models(register: Registrar[ModelLoader]) -> None:
    """Register the loaders."""
    register(
        "factory",
        "secateurs_adapters.models:load_factory",
        summary="`module:function` beside the recipe or installed, called with `arguments`",
    )
    register("hf", "secateurs_adapters.hf_models:load_hf", summary="a Hugging Face network by name or folder")
    register("timm", "secateurs_adapters.vision_models:load_timm", summary="a network of timm by name")
    register(
        "torchvision", "secateurs_adapters.vision_models:load_torchvision", summary="a network of torchvision by name"
    )


@hookimpl
def secateurs_register_datasets(register: Registrar[DatasetLoader]) -> None:
    """Register the data sources with their options."""
    sources = {
        "digits": ("Digits", "scikit-learn's 8x8 handwritten digits"),
        "npz": ("Npz", "arrays written with numpy.savez: images and labels, or named inputs"),
        "image_folder": ("ImageFolder", "one sub-folder of images per class"),
        "tsv": ("Tsv", "tab-separated texts and labels, tokenised"),
    }
    for name, (model, summary) in sources.items():
        register(
            name,
            f"secateurs_adapters.datasets:load_{name}",
            summary=summary,
            settings=f"secateurs_adapters.data_settings:{model}Settings",
        )
    register(
        "hf",
        "secateurs_adapters.hf_data:load_hf",
        summary="texts, images or recordings read by `datasets`: hub or local files",
        settings="secateurs_adapters.hf_settings:HfDataSettings",
    )


@hookimpl
def secateurs_register_exporters(register: Registrar[Exporter]) -> None:
    """Register the exporters with their options."""
    exporters = {
        "dynamo": ("export:DynamoExporter", "DynamoSettings", "torch.onnx.export(dynamo=True)"),
        "torchscript": (
            "torchscript:TorchScriptExporter",
            "TorchScriptSettings",
            "by tracing, for what dynamo refuses",
        ),
        "optimum": ("optimum_export:OptimumExporter", "OptimumSettings", "Hugging Face networks, through Optimum"),
    }
    for name, (target, settings, summary) in exporters.items():
        register(
            name,
            f"secateurs_adapters.{target}",
            summary=summary,
            settings=f"secateurs_adapters.export_settings:{settings}",
        )


@hookimpl
def secateurs_register_converters(register: Registrar[Converter]) -> None:
    """Register what makes other files of an exported one."""
    register("fixed-shapes", "secateurs_adapters.fixed:FixedShapes", summary="every shape fixed, for accelerators")
    register(
        "quantise-static",
        "secateurs_adapters.quantize:StaticQuantiser",
        summary="8 bits, ranges of activations from calibration data",
    )
    register(
        "quantise-dynamic",
        "secateurs_adapters.quantize:DynamicQuantiser",
        summary="8-bit weights, ranges of activations at run time",
    )


@hookimpl
def secateurs_register_targets(register: Registrar[Target]) -> None:
    """Register onnxruntime's execution providers; whether one is available shows when a run checks it."""
    for name, summary in PROVIDERS.items():
        register(name, "secateurs_adapters.validate:OnnxRuntimeTarget", summary=summary)


@hookimpl
def secateurs_register_metrics(register: Registrar[Metric]) -> None:
    """Register the metrics."""
    register("accuracy", "secateurs_adapters.metrics:Accuracy", summary="share of examples classified rightly")
    register(
        "top5-accuracy",
        "secateurs_adapters.metrics:TopFiveAccuracy",
        summary="share of examples whose label is among the five largest scores",
    )
    register("f1-macro", "secateurs_adapters.metrics:F1Macro", summary="F1 averaged over classes")
    for name, (reference, summary) in VALUE_METRICS.items():
        register(name, f"secateurs_adapters.value_metrics:{reference}", summary=summary)


@hookimpl
def secateurs_register_cost_models(register: Registrar[CostModel | StructureCostModel]) -> None:
    """Register the costs that a target is asked for."""
    register(
        "latency", "secateurs_adapters.costs:latency", summary="milliseconds of a run on the first target, by kernels"
    )
    register(
        "peak_memory",
        "secateurs_adapters.costs:peak_memory",
        summary="peak bytes of a run on the first target, planned",
    )


@hookimpl
def secateurs_register_devices(register: Registrar[Device]) -> None:
    """Register the packaged device profiles."""
    from secateurs_adapters.devices import load_devices

    for name, device in load_devices().items():
        register(name, device, summary=device.title)


@hookimpl
def secateurs_register_commands(register: Registrar[Callable[..., Any]]) -> None:
    """Register the sub-commands."""
    register("devices", "secateurs_adapters.commands:devices", summary="list the devices that a budget may name")
    register("validate", "secateurs_adapters.commands:validate", summary="compare two ONNX files and judge a budget")
    register(
        "bundle", "secateurs_adapters.bundle_command:bundle", summary="write a folder that measures itself on a device"
    )
    register("report", "secateurs_adapters.report_command:report", summary="draw the report.html of a run again")
    register("zoo", "secateurs_adapters.zoo.command:zoo", summary="prune many models in one unattended batch")
    register("olive", "secateurs_adapters.olive_command:olive", summary="run an Olive workflow with our passes")
    register(
        "olive-config",
        "secateurs_adapters.olive_command:olive_config",
        summary="write Olive's list of passes with ours added",
    )


@hookimpl
def secateurs_save_model(model: nn.Module, plan: Plan, example: Dataset, folder: Path) -> str | None:
    """Write what transformers needs of a Hugging Face network."""
    from secateurs_adapters.hf_folder import write_folder

    return write_folder(model, plan, folder, example)


@hookimpl
def secateurs_after_run(report: Report, folder: Path) -> None:
    """Draw `report.html`, and write the model card for the hub where there is a network for it."""
    from secateurs_adapters.hf_folder import write_card
    from secateurs_adapters.report_html import write_report_page

    write_report_page(report, folder)
    write_card(folder)
