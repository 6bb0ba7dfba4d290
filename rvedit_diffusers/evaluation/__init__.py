"""Scores of an editor on the procedural benchmark, and its results on public ones."""

from .editors import (
    CopySource,
    PipelineEditor,
    Task,
    VaeCeiling,
    configs_hash,
    model_name,
    reconstruct,
    weights_hash,
)
from .public import (
    PublicEdit,
    check_sources,
    read_benchmark,
    read_clip,
    score_result,
    write_manifest,
    write_result,
)
from .record import ScoreRecord, write_json
from .report import figures_of, format_table, summarize, values_of, write_strips
from .runner import Level, SingleEdits, is_scored, pending_rounds, score_rounds


__all__ = [
    "CopySource",
    "Level",
    "PipelineEditor",
    "PublicEdit",
    "ScoreRecord",
    "SingleEdits",
    "Task",
    "VaeCeiling",
    "check_sources",
    "configs_hash",
    "figures_of",
    "format_table",
    "is_scored",
    "model_name",
    "pending_rounds",
    "read_benchmark",
    "read_clip",
    "reconstruct",
    "score_result",
    "score_rounds",
    "summarize",
    "values_of",
    "weights_hash",
    "write_json",
    "write_manifest",
    "write_result",
    "write_strips",
]
