"""A detector with the attention under test in it: logits, detections, relevance maps, gradients, single calls."""
