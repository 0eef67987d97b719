"""A model as an exported graph, and the engines that run one."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from skipat_surgery.measure.alternatives import int8

Run = Callable[[Tensor], Tensor]
OUTPUTS = ("logits", "last_hidden_state")


class OneTensor(nn.Module):
    """A model that gives its logits or tokens alone, as a graph gives tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.name = model, ""

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        self.name = next(name for name in OUTPUTS if getattr(output, name, None) is not None)
        found: Tensor = getattr(output, self.name)
        return found


class Exported:
    """A model, exported once at one shape, for every engine.

    Args:
        model: In evaluation mode.
        images: (B, C, H, W), the shape that it is exported at.
        path: Of the ONNX file to write.
    """

    def __init__(self, model: nn.Module, images: Tensor, path: Path) -> None:
        self.tokens, self.images, self.path = OneTensor(model), images, path
        with torch.no_grad():
            self.tokens(images)
            self.program = torch.export.export(self.tokens, (images,), strict=False)
            torch.onnx.export(self.program, (), path, dynamo=True, verbose=False, external_data=False)

    @property
    def name(self) -> str:
        """Of the output."""
        return self.tokens.name

    @functools.cached_property
    def nodes(self) -> Counter[str]:
        """How many nodes of each kind the ONNX graph has."""
        import onnx

        graph = onnx.load(str(self.path)).graph
        return Counter(node.op_type for node in graph.node)

    @property
    def bytes(self) -> int:
        """Of the ONNX file."""
        return self.path.stat().st_size


def run_module(run: Run, batch: int, name: str) -> nn.Module:
    """An engine of one batch size as a model: images of any number go in, an output with that name comes out."""

    class Module(nn.Module):
        def forward(self, images: Tensor) -> Any:
            parts = []
            for part in images.split(batch):
                missing = batch - len(part)
                full = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
                parts.append(run(full.float())[: len(part)])
            return SimpleNamespace(**{name: torch.cat(parts)})

    return Module()


def eager(model: Exported, calibration: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Run:
    """PyTorch as it comes."""
    return _torch(model, dtype, lambda module: module)


def compiled(model: Exported, calibration: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Run:
    """torch.compile."""
    torch.compiler.reset()
    return _torch(model, dtype, lambda module: torch.compile(module, dynamic=False))


def torchao_int8(model: Exported, calibration: Sequence[Tensor]) -> Run:
    """torchao's dynamic int8 under torch.compile, as torchao asks for."""
    return _torch(model, torch.bfloat16, lambda module: torch.compile(int8(module), dynamic=False))


def _torch(model: Exported, dtype: torch.dtype, made: Callable[[nn.Module], Any]) -> Run:
    call = made(copy.deepcopy(model.tokens).to(dtype))

    def run(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found: Tensor = call(images.to(dtype))
        return found.float()

    run(model.images)  # a compiled one is made by its first call
    return run


def onnxruntime_fp32(model: Exported, calibration: Sequence[Tensor]) -> Run:
    """ONNX Runtime's CPU provider."""
    return _onnxruntime(model.path)


def onnxruntime_int8(model: Exported, calibration: Sequence[Tensor]) -> Run:
    """ONNX Runtime's static quantisation, calibrated."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batch, (name,) = len(model.images), [spec.arg.name for spec in model.program.graph_signature.input_specs[-1:]]

    class Reader(CalibrationDataReader):
        batches = iter(_whole(calibration, batch))

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.batches, None)
            return None if images is None else {name: images.numpy()}

    ready, quantised = model.path.with_suffix(".ready.onnx"), model.path.with_suffix(".int8.onnx")
    quant_pre_process(str(model.path), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready), str(quantised), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul", "Gemm"]
    )
    return _onnxruntime(quantised)


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@functools.cache
def openvino_core() -> Any:
    """The one Core of a process.

    Each Core's CPU plugin gives the thread that makes it a stack to handle signals on, and takes that away when it
    goes. Where several go in another order than they came, the thread is left with a stack that is not there, and the
    next signal that has a handler, such as SIGCHLD under torch's DataLoader, ends the process.
    """
    import openvino

    return openvino.Core()


def openvino_of(model: Exported, calibration: Sequence[Tensor], precision: str = "f32", int8: bool = False) -> Run:
    """OpenVINO's CPU plugin; int8 by NNCF, calibrated."""
    import openvino

    with torch.no_grad():
        graph = openvino.convert_model(model.tokens, example_input=model.images)
    graph.reshape(tuple(model.images.shape))
    if int8:
        import nncf

        data = nncf.Dataset(_whole(calibration, len(model.images)), lambda images: images.numpy())
        graph = nncf.quantize(graph, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=64)
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    loaded = openvino_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": precision, **threads})
    return lambda images: torch.from_numpy(loaded(images.numpy())[0].copy())


def _whole(calibration: Iterable[Tensor], batch: int) -> list[Tensor]:
    """The calibration images in batches of one size."""
    parts = torch.cat(list(calibration)).float().split(batch)
    return [part for part in parts if len(part) == batch]


ENGINES: dict[str, Callable[[Exported, Sequence[Tensor]], Run]] = {
    "eager fp32": eager,
    "eager bf16": functools.partial(eager, dtype=torch.bfloat16),
    "torch.compile bf16": functools.partial(compiled, dtype=torch.bfloat16),
    "torchao int8": torchao_int8,
    "onnxruntime fp32": onnxruntime_fp32,
    "onnxruntime int8": onnxruntime_int8,
    "openvino fp32": openvino_of,
    "openvino bf16": functools.partial(openvino_of, precision="bf16"),
    "openvino int8": functools.partial(openvino_of, int8=True),
}
