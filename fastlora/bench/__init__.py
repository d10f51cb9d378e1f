"""Result rows of benchmarks/ as tables, pictures and one page: `fastlora bench ROWS --out PAGE`. Measures nothing."""

from .rows import read
from .table import Table

__all__ = ["Table", "read"]
