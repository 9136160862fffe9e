"""Miniatures of the publishers' releases: the real folders, names and columns, with a few short clips.

Each maker writes a release into a folder and returns what its set must give: samples and rejections by output. One clip
of most sets is damaged.
"""

from __future__ import annotations

from miniatures.archives import ARCHIVES
from miniatures.files import Expected
from miniatures.listed import LISTED
from miniatures.parquet_sets import PARQUET_SETS
from miniatures.spoken_qa import SPOKEN_QA
from miniatures.text import TEXT_SETS

MINIATURES = {**PARQUET_SETS, **ARCHIVES, **LISTED, **SPOKEN_QA, **TEXT_SETS}
"""A maker for each set of the published mix."""

__all__ = ["MINIATURES", "Expected"]
