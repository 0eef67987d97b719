"""What torch.fx, and torchvision's ``create_feature_extractor`` by it, must be told to record a cut model.

It runs the model on stand-ins, and writes down what is done to them. A stand-in has no sizes, and Φ asks for sizes: so
a skipped block is recorded whole, as one call. Its inner nodes are not to be had; every other node of the host is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


def record_call(function: Callable[..., Any], x: Proxy, *args: Any) -> Proxy:
    """Record ``function(x, *args)``, which runs in the graph."""
    return x.tracer.create_proxy("call_function", function, (x, *args), {})


def record_whole(module: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """Record ``module(x, *args, **kwargs)`` as one call, under the module's name."""
    tracer: Any = x.tracer

    def record(*args: Any, **kwargs: Any) -> Proxy:
        path = tracer.path_of_module(module)
        node = tracer.create_proxy("call_module", path, args, kwargs)
        if hasattr(tracer, "node_to_qualname"):
            # torchvision takes the number off a name such as encoder_layer_3, and gives it another.
            tracer.node_to_qualname[node.node] = path
        return node

    return tracer.call_module(module, record, (x, *args), kwargs)
