# %% [markdown]
# # Which heads does a detection need?
#
# A tour of the Python API in cells (open it as a notebook with Jupytext, VS Code or PyCharm, or run it as a
# script). It uses the bundled model and a bundled scene, so nothing is downloaded; put
# `headoff.load("detr-resnet-50")` and a photo of yours in their place and the rest stays as it is.

# %%
from matplotlib.figure import Figure

import headoff

detector = headoff.load("scenes")
image = headoff.sample_image(0)

for detection in headoff.detect(detector, image):
    print(f"{detection.class_name:10s} {detection.score:.3f}  query {detection.query}")

# %% [markdown]
# ## The cumulative sweep
#
# None off, the first head off, the first two, ... in all decoder layers. The image is encoded once.

# %%
result = headoff.sweep(detector, image)

for configuration, outcome in zip(result.configurations, result.outcomes, strict=True):
    counts = {status.value: count for status, count in outcome.counts.items() if count}
    print(f"{configuration.name:12s} {counts}, {len(outcome.unmatched)} unmatched")

# %%
figure = Figure(figsize=(11, 4), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1, 2])
picture = headoff.load_image(image)
headoff.plot_detections(
    picture, result.detections[3], ax=left, outcome=result.outcomes[3], title="first 3 heads off"
)
headoff.plot_survival(result, ax=right)
figure.savefig("survival.png")

# %% [markdown]
# ## One head at a time, and one object alone
#
# Which single head does the weakest object miss most? Its own probability, for each of the 48 heads.

# %%
layout = detector.head_layout
singles = headoff.single_heads(layout.decoder_layers, layout.heads)
weakest = len(result.baseline) - 1
alone = headoff.sweep(detector, image, singles, object_index=weakest)
probabilities = alone.survival()[weakest]
most_missed = int(probabilities.argmin())
print(
    f"object #{weakest} ({result.baseline[weakest].class_name}) misses {alone.configurations[most_missed].name} most: "
    f"{result.baseline[weakest].score:.3f} -> {probabilities[most_missed]:.3f}"
)

# %% [markdown]
# ## From a ranking to an order
#
# Switch heads off by how much they matter when they go alone: the least important first. The detector survives
# more of them than in the order they happen to have.

# %%
everywhere = headoff.sweep(detector, image, [headoff.heads_off(head) for head in range(layout.heads)])
importance = result.survival()[:, 0].sum() - everywhere.survival().sum(dim=0)
order = headoff.order_by_score(importance.tolist(), descending=False)
ranked = headoff.sweep(detector, image, headoff.cumulative(layout.heads, order))
for name, one in (("heads in their order", result), ("least important first", ranked)):
    print(f"{name:24s}", [len(outcome.outcomes) - outcome.counts["lost"] for outcome in one.outcomes])

# %% [markdown]
# ## Encode once, decode at will
#
# Below `sweep` there are tensors: pixels to memory, memory and gates to logits and boxes.

# %%
pixel_values, pixel_mask = detector.preprocess([picture])
memory = detector.encode(pixel_values, pixel_mask)
gates = headoff.stack([headoff.none_off(), headoff.parse_configuration("L4H2,L5H0-3")], layout)
output = detector.decode(memory, gates)
print(output.logits.shape, output.boxes.shape)  # (configurations, images, queries, classes + 1), (..., 4)
