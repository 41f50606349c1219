"""The detections of images before any threshold."""

from __future__ import annotations

from torch import Tensor

from headoff.scoring import Scoring


def candidates(scoring: Scoring, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detections as in the models' own evaluations.

    They are the best class of every query, whatever its score; with scores by sigmoid, the pairs of query and class
    with the highest scores, as many as the model has queries or chooses.

    Args:
        logits: (..., Q, columns). boxes: (..., Q, 4).

    Returns:
        Scores (..., n), labels (..., n), boxes (..., n, 4) and queries (..., n).
    """
    probabilities = scoring.probabilities(logits)
    queries, classes = probabilities.shape[-2:]
    if scoring.kind == "softmax":
        scores, labels = probabilities.max(-1)
        indices = labels.new_tensor(range(queries)).expand_as(labels)
        return scores, labels, boxes, indices
    scores, pairs = probabilities.flatten(-2).topk(min(scoring.most or queries, queries * classes), dim=-1)
    indices = pairs // classes
    return scores, pairs % classes, boxes.gather(-2, indices[..., None].expand(*pairs.shape, 4)), indices
