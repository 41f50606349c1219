"""Evaluation over a data set: detections of every image under every configuration, and what is computed from them.

How detections are made:

- `annotations`, `sources`, `batches`: the ground truth, the images, which of them are computed together.
- `work`: one batch, read, detected and written. `engines` and `ray_engine`: who does it.
- `shards`, `manifest`: the files. `orders`: of heads, by importance. `run`: all of it, `headoff.evaluate`.

What both halves share: `tables`, the ground truth and the detections of a configuration as arrays; `results`, a folder
of them as it is read.

What is computed from detections: `matching`, `precision`, `outcomes`, `scores`, `importance`, `relevance`,
`comparison`, `summary`.
"""
