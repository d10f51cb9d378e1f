"""What rows of an H100 are expected to say, from a stated model of the machine, before anything was measured there.

layer      one adapted layer by a contestant of benchmarks/ops.py, by graph
product    a plain product by cuBLAS or Triton
step       a training step of ViT-B/16 by a contestant of benchmarks/baselines/, by an engine
change     the layer by Triton with the tile table's row changed

gpu/model.py has the machine, gpu/expected_tables.py the page's tables, with what gpu/measured.py finds beside.
"""

from __future__ import annotations

from gpu.layers import layer
from gpu.model import Expected, product
from gpu.ours import change
from gpu.steps import step

__all__ = ["Expected", "change", "layer", "product", "step"]
