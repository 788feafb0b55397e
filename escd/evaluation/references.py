"""References: a silhouette filled with a material, so that the shape and the appearance are known exactly.

A list has 20 silhouettes and 20 materials of distinct categories, the candidates of every retrieval score;
the first of each are paired into references. `escd/data/references` holds four lists:

- "evaluation", and "development" for hyper-parameters: glyphs of matplotlib's DejaVu Sans, scikit-image's
  horse, and crops of photographs of scikit-image.
- "real" and "real-development": photographed, stationary materials, and silhouettes of things, a third of
  them pierced. `escd.evaluation.lists` chose them; a NOTICE beside them names their authors. On these,
  texture and colour are scored apart (`escd.evaluation.texture`).

A folder of other silhouettes and materials can be used instead.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image
from torch import Tensor

from .. import records
from ..data import foreground, names
from ..paths import PACKAGE
from . import measure, texture
from .silhouettes import fit, fit_silhouette, glyph_contours, glyph_silhouette, named_outlines, resized

CANDIDATES = 20  # silhouettes and materials a retrieval score chooses from
LISTS = ("evaluation", "development")
REAL_LISTS = ("real", "real-development")  # of real things: texture and colour are scored apart
BUNDLED = PACKAGE / "data" / "references"
