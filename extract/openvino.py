"""How does OpenVINO compute a convolutional network on a processor, and of which networks is that true?

OpenVINO plans memory and fuses operations for one shape of input, which makes convolutions about twice as fast as in
torch. Transformers gain nothing, since theirs are large matrix products, which torch does as well.

OpenVINO sends statistics of its use to Google Analytics as soon as it is imported, unless that was declined, and leaves
an identifier in the home directory. It is imported here without its telemetry (`load`), and sends and writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from extract.backbones import Backbone
from extract.pooling import forward_poolings

NAME = "openvino"  # as it is recorded
INSTALL = "pip install 'mitofm[cpu]'"
_TELEMETRY = "openvino_telemetry"
_importing = Lock()


def version() -> str | None:
    """Give the version of OpenVINO; None where it is not installed."""
    return metadata.version(NAME) if find_spec(NAME) else None


def load() -> Any:
    """Import OpenVINO without its telemetry, unless the program has imported it before; returns the module.

    Raises:
        RuntimeError: it is not installed.
    """
    if version() is None:
        raise RuntimeError(f"OpenVINO is not installed: {INSTALL}")
    with _importing:
        missing = object()
        telemetry: Any = sys.modules.get(_TELEMETRY, missing)
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment] # its import fails, and OpenVINO goes on without
        try:
            import openvino
        finally:
            del sys.modules[_TELEMETRY]
            if telemetry is not missing:
                sys.modules[_TELEMETRY] = telemetry
    return openvino


def is_convolutional(model: nn.Module) -> bool:
    """Whether all weights of a network are those of convolutions and batch norms: EfficientNets, ResNets and others."""
    holders = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    return bool(holders) and all(isinstance(holder, nn.Conv2d | nn.BatchNorm2d) for holder in holders)


class OpenvinoNetwork(nn.Module):
    """A frozen network that OpenVINO computes in float32, image by image, each on one thread.

    So the bits of an embedding depend neither on the size of a batch nor on the number of threads. Several threads may
    call it at once. It is converted when it first sees an image of a size, which takes a second or two.
    """

    def __init__(self, model: nn.Module, backbone: Backbone) -> None:
        """Take a network over.

        Args:
            model: in eval mode, float32, on the processor; convolutions and batch norms alone (`is_convolutional`).
            backbone: its record.
        """
        super().__init__()
        self._plain = (model, backbone)  # in a tuple: its parameters are not this network's
        self._n_threads = torch.get_num_threads()  # now, for threads that compute side by side have one each
        self._requests: dict[int, tuple[tuple[str, ...], SimpleQueue[Any]]] = {}  # by size: poolings, idle requests
        self._lock = Lock()

    def __deepcopy__(self, memo: Mapping[int, Any]) -> OpenvinoNetwork:
        """Copies are one: it never changes."""
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute every pooling, as `forward_poolings` does, of images (b, 3, h, h).

        Raises:
            RuntimeError: OpenVINO cannot convert or compute this network.
        """
        with self._lock:
            if images.shape[-1] not in self._requests:
                self._requests[images.shape[-1]] = self._compile(images[:1])
        names, idle = self._requests[images.shape[-1]]
        request = idle.get()
        try:
            rows = [request.infer([image[None].numpy()], share_inputs=True).to_tuple() for image in images.contiguous()]
        finally:
            idle.put(request)
        # Results are views of the request's memory until they are stacked.
        return {name: torch.cat([torch.from_numpy(row[k]) for row in rows]) for k, name in enumerate(names)}

    def _compile(self, image: Tensor) -> tuple[tuple[str, ...], SimpleQueue[Any]]:
        """Convert the network for images of a size (1, 3, h, h), and make a request for every thread."""
        openvino = load()
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
        from torch.fx.experimental.proxy_tensor import make_fx

        names: list[str] = []

        def poolings(images: Tensor) -> tuple[Tensor, ...]:
            found = forward_poolings(*self._plain, images)
            names[:] = found
            return tuple(found.values())

        with torch.inference_mode(False), torch.no_grad():
            decoder = TorchFXPythonDecoder(make_fx(poolings)(image.clone()))  # has to live until the end of `convert`
        front_end = FrontEndManager().load_by_framework("pytorch")
        model = front_end.convert(front_end.load(decoder))
        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # or it would take bf16 or fp16 where the processor has them
            "NUM_STREAMS": self._n_threads,
            "INFERENCE_NUM_THREADS": self._n_threads,
            "ENABLE_CPU_PINNING": False,  # cores may be busy with other work
            "ENABLE_HYPER_THREADING": True,
        }
        compiled = openvino.Core().compile_model(model, "CPU", options)
        idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self._n_threads):
            idle.put(compiled.create_infer_request())
        return tuple(names), idle
