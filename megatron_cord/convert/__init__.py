"""Names and shapes between Hugging Face and Megatron, as a stream of tensors; readers and writers of both formats."""

from megatron_cord.convert.hf.reader import read_tensors
from megatron_cord.convert.loading import read_into
from megatron_cord.convert.stream import export_tensors, import_tensors

__all__ = ["export_tensors", "import_tensors", "read_into", "read_tensors"]
