"""Any torch.nn.Module -> its graph, or the node that cannot be traced and what to do about it."""

from training.trace.module import TraceError, trace

__all__ = ["TraceError", "trace"]
