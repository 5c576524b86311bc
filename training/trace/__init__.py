"""Any torch.nn.Module -> its graph, or the node that cannot be traced and what to do about it."""

from training.trace.call import TraceError
from training.trace.module import trace

__all__ = ["TraceError", "trace"]
