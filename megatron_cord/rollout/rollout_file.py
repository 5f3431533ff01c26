"""Files of the rollout dump: the rollouts of one step as Parquet, `step_000042.parquet`, whole or absent.

Any reader of Parquet opens them, also while the run goes on: a file that has its name does not change any more. A
list has one entry for each token of the response. Numbers that a replay needs are kept to the last bit (float64 where
they come as such); NaN is "not measured". Nothing here needs torch, so that the report starts fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic

_TEXTS, _NUMBERS = pa.list_(pa.string()), pa.list_(pa.float32())
_SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("version", pa.int32())])

#: The columns. Those of the teacher and the divergence are null where nothing was distilled, rewards outside L_seq.
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),  # numbered from 1
        pa.field("id", pa.string(), nullable=False),  # of the sample
        pa.field(
            "role", pa.string(), nullable=False
        ),  # distill (L_tok), policy (L_seq), shared (both) or replaced (none)
        pa.field("position", pa.int32(), nullable=False),  # of the sample in the step's batch, from 0
        pa.field("draw", pa.int32(), nullable=False),  # 0, −1, … of L_tok alone, 1 to N in a group of L_seq
        # of the objective, that the response is of; "" for one without a name, null where it was not written down
        pa.field("stream", pa.string()),
        pa.field("seed", pa.int64()),  # that the engine sampled with; null for a greedy or given response
        pa.field("question", pa.string(), nullable=False),
        pa.field("voice", pa.string()),
        pa.field("response", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),  # stop, length or abort
        pa.field("versions", pa.list_(_SPAN), nullable=False),  # of the weights that generated tokens [start, end)
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("tokens", _TEXTS, nullable=False),
        pa.field("engine_logprobs", pa.list_(pa.float64()), nullable=False),  # natural logarithms, at temperature 1
        pa.field("student_logprobs", _NUMBERS),  # the trainer's, before the update; null where not trained on
        pa.field("teacher_logprobs", _NUMBERS),
        pa.field("token_kl", _NUMBERS),  # divergence D_t, nats
        pa.field("token_weights", _NUMBERS),  # w_t of L_tok
        pa.field("reference_answer", pa.string()),  # the teacher's text, with which the reward compares
        pa.field("reward", pa.float64()),
        pa.field("reward_terms", pa.map_(pa.string(), pa.float64())),
        pa.field("advantage", pa.float64(), nullable=False),
        pa.field("zero_variance", pa.bool_(), nullable=False),  # whether all rewards of its group are equal
    ]
)
_ADDED = {"stream"}  #: columns that files of earlier revisions lack
_PREFIX, _SUFFIX = "step_", ".parquet"


def dump_file(directory: Path, step: int) -> Path:
    """Return the file of the step numbered from 1."""
    return directory / f"{_PREFIX}{step:06d}{_SUFFIX}"


def dump_files(directory: Path) -> dict[int, Path]:
    """Return the files of all steps by number, ascending; empty where there is no dump."""
    steps = {}
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        number = path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        if number.isascii() and number.isdigit():
            steps[int(number)] = path
    return dict(sorted(steps.items()))


def drop_after(directory: Path, step: int) -> None:
    """Remove the files of later steps, which a run that resumes after this step writes again, and half-written ones."""
    later = [path for number, path in dump_files(directory).items() if number > step]
    for path in later + list(directory.glob(f".{_PREFIX}*.partial")):
        path.unlink(missing_ok=True)


def write_rollouts(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one step's rows, each with a value for every column of SCHEMA. The file is whole or absent."""
    table = pa.Table.from_pylist([{name: _clean(value) for name, value in row.items()} for row in rows], schema=SCHEMA)
    whole = pa.BufferOutputStream()
    pq.write_table(table, whole, compression="zstd")
    write_atomic(path, whole.getvalue().to_pybytes())


def read_rollouts(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return one step's rows, with SCHEMA's types; a column that was added since the file was written is null.

    Args:
        path: of the step.
        columns: those to read; None reads all.

    Raises:
        CordError: the file cannot be read, is damaged, or lacks a column (named) or has it with another type.
    """
    wanted = pa.schema([SCHEMA.field(name) for name in (columns or SCHEMA.names)])
    try:
        with pq.ParquetFile(path) as file:
            have = file.schema_arrow
            for field in wanted:
                if field.name not in have.names and field.name in _ADDED:
                    continue
                if field.name not in have.names:
                    raise CordError(
                        f"{path}: the column {field.name} is missing; the file is damaged or not of this project: "
                        "restore or remove it"
                    )
                if have.field(field.name).type != field.type:
                    raise CordError(
                        f"{path}: {field.name}: expected {field.type}, got {have.field(field.name).type}; restore "
                        "the file or remove it"
                    )
            table = file.read([name for name in wanted.names if name in have.names])
    except (pa.ArrowException, OSError) as error:
        raise CordError(
            f"{path} is damaged or cannot be read ({' '.join(str(error).split())[:160]}); restore the file or remove it"
        ) from None
    for name in set(wanted.names) - set(table.column_names):
        table = table.append_column(wanted.field(name), pa.nulls(len(table), wanted.field(name).type))
    table = table.select(wanted.names)
    for field in wanted:
        if not field.nullable and table[field.name].null_count:
            raise CordError(
                f"{path}: {field.name} is missing in row {_first_null(table[field.name]) + 1}; restore the file or "
                "remove it"
            )
    return table


def _first_null(column: pa.ChunkedArray) -> int:
    return int(column.is_null().to_pylist().index(True))


def _clean(value: Any) -> Any:
    """Make text valid UTF-8, which Parquet needs: JSON, and so a question, may have lone surrogates."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value
