"""`python -m escd.draw [stem ...]`: draws the paper's figures (`escd.paper`); each is a function."""

from __future__ import annotations

from .ending import run_command

if __name__ == "__main__":
    run_command("escd.paper.draw")  # before torch is imported: an interrupt is one line

from .paper.diagrams import diagram_encoder, diagram_filter, diagram_pipeline
from .paper.draw import FIGURES
from .paper.figures import (
    autoencoder_rate,
    backbone_samples,
    composition_grid,
    forward_backward,
    leakage_table,
    pretraining_curve,
    training_scores,
    transfer_by_rank,
    transfer_examples,
)
from .paper.methods import methods_curve, methods_examples
from .paper.stems import drawable

STEMS = drawable()

__all__ = [
    "FIGURES",
    "STEMS",
    "autoencoder_rate",
    "backbone_samples",
    "composition_grid",
    "diagram_encoder",
    "diagram_filter",
    "diagram_pipeline",
    "forward_backward",
    "leakage_table",
    "methods_curve",
    "methods_examples",
    "pretraining_curve",
    "training_scores",
    "transfer_by_rank",
    "transfer_examples",
]
