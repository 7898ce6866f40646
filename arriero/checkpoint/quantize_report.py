"""What quantisation did to each kind of matrix and each layer, as a table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from rich.table import Table

from arriero.checkpoint.quantize import Rounded


def errors_table(matrices: Sequence[Rounded]) -> Table:
    """A row for each layer, and one for the head: the error of each kind of matrix, in percent.

    Of the outputs, where a text was used; else of the weights.
    """
    of_outputs = all(matrix.output_error is not None for matrix in matrices)
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for matrix in matrices:
        layer = re.fullmatch(r"model\.layers\.(\d+)\..*?(\w+?)(_proj)?\.weight", matrix.name)
        place, kind = (layer[1], layer[2]) if layer else ("head", "head")
        error = matrix.output_error if of_outputs else matrix.error
        wider = "" if matrix.kind == matrices[0].kind else f" {matrix.kind}"
        rows[place][kind] = f"{error or 0.0:.2%}{wider}"
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    what = "outputs on the calibration text" if of_outputs else "weights"
    table = Table("layer", title=f"error by rounding, of the {what}: ||after - before|| / ||before||")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for place, row in rows.items():
        table.add_row(place, *(row.get(kind, "") for kind in kinds))
    return table
