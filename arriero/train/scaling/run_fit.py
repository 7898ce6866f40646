"""The command `arriero scaling fit`: reads runs, fits laws, prints them, and writes fit.json and fit.png."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import ConfigError, DataError
from arriero.io.files import json_text, replaced_file, write_json
from arriero.io.paths import as_path, hint
from arriero.io.records import endings, parse_row, read_records
from arriero.show.terminal import output, warn_once
from arriero.train.scaling.fit import NEAR_RULE, ROUNDING, Fit, Runs, budgets_of, fit
from arriero.train.scaling.laws import FLOPS_PER_PARAMETER
from arriero.train.scaling.plot import fit_png

FIT, PICTURE = "fit.json", "fit.png"


def run_fit(path: Path, resamples: int, seed: int, as_json: bool = False) -> Fit:
    """Fit what `path` holds, print it, and write fit.json and fit.png: into the directory, or beside the file.

    Raises `DataError` where the runs give no isoFLOP law; what they do give has been printed and written by then.
    """
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; it must be at least 1 (usual: 1000)")
    found = fit(read_runs(path), resamples, seed)
    path = as_path(path)
    directory = path if path.is_dir() else path.parent
    write_json(directory / FIT, found.summary())
    with replaced_file(directory / PICTURE) as temporary:
        temporary.write_bytes(fit_png(found))
    if as_json:
        print(json_text({key: value for key, value in found.summary().items() if key != "resamples"}, indent=1))
    else:
        plan = "" if found.refused else f"; plan with it: arriero scaling plan {directory} ..."
        console = output()
        console.print(found.view())
        console.print(f"{directory / FIT} and {directory / PICTURE} written{plan}", markup=False)
    if found.refused:
        raise DataError(found.refused)
    return found


def read_runs(path: Path) -> Runs:
    """Read runs.jsonl, or that of a sweep's directory: lines with params, tokens, loss, and flops (else 6 N D).

    The FLOPs of a run become those of its budget (`budgets_of`). Raises `DataError` naming the line for what is
    missing or not a positive number.
    """
    path = as_path(path)
    file = path / "runs.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; `arriero scaling sweep --out {path}` writes it, run by run{hint(path)}")
    if endings(file)[0] != ".jsonl":
        raise DataError(f"{file}: give runs as .jsonl, a line for each")
    rows = []
    for record in read_records(file):
        run = parse_row(record)
        values: dict[str, Any] = {name: run.get(name) for name in ("params", "tokens", "loss", "flops")}
        for name, value in values.items():
            if value is None and name == "flops":
                value = FLOPS_PER_PARAMETER * values["params"] * values["tokens"]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise DataError(f"{file}, line {record.row}: {name} is {value!r}; it must be a number above 0")
            values[name] = value
        rows.append([values[name] for name in ("flops", "params", "tokens", "loss")])
    flops, params, tokens, loss = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    budgets = budgets_of(flops)
    if (np.abs(flops / budgets - 1) > ROUNDING).any():
        warn_once(f"{file}: {len(flops)} runs are taken for {len(np.unique(budgets))} budgets: {NEAR_RULE}")
    return Runs(budgets, params, tokens, loss)
