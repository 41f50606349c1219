"""Evaluation over a data set: detections of every image under every configuration, and what is computed from them.

- `tables`: the ground truth and the detections of a configuration, as arrays.
- `results`: a results folder, as it is read.
"""
