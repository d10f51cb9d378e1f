"""What rows of an H100 are expected to say, from a stated model of the machine, before anything was measured there.

layer      one adapted layer by a contestant of benchmarks/ops.py, by graph
product    a plain product by cuBLAS or Triton
step       a training step of ViT-B/16 by a contestant of benchmarks/baselines/, by an engine
change     the layer by Triton with the tile table's row changed

model.py has the machine, tables.py the page's tables, with what measured.py finds beside.
"""

from __future__ import annotations

from expected.layers import layer
from expected.model import Expected, product
from expected.ours import change
from expected.steps import step

__all__ = ["Expected", "change", "layer", "product", "step"]
